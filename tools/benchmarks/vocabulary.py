"""Measures time, memory and agreement of ALIGN, compared with dense JAX and eager PyTorch.

Axes: T queries (visual tokens), D width, V vocabulary.

It runs on the device that JAX finds: a CPU in float32, or a GPU in bfloat16, where compiled PyTorch is measured, too.
The timed programs take turns, and the best of several rounds counts, so other load on the machine affects all of them
equally.
"""

import argparse
import functools
import platform
import sys
import time
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import alignvlm_jax
from alignvlm_jax.inference.vocabulary import prune_vocabulary
from alignvlm_jax.locations import as_path
from alignvlm_jax.models.alignvlm import AlignVLMConfig
from alignvlm_jax.models.connectors import AlignConfig, MLPConfig, make_connector
from alignvlm_jax.models.language import LanguageConfig
from alignvlm_jax.ops import VocabularyStatistics, vocabulary_attention, vocabulary_statistics

PARTS = ("agreement", "memory", "time", "decoding", "sweep")
NAMES = ("value", "q", "keys", "scale", "bias", "values")
EPS = 1e-5

# (T, D, V) of the two sizes that have a target, and small ones for --quick.
SIZES = ((2048, 1024, 32000), (729, 2048, 128256))
QUICK_SIZES = ((256, 64, 4000), (48, 128, 4000))
# (T, D, V). The first size uses the covariance for the statistics, the second one a second pass.
AGREEMENT_SIZES = ((256, 128, 128256), (96, 512, 128256))
QUICK_AGREEMENT_SIZES = ((256, 64, 4000), (48, 128, 4000))
MEMORY_SIZE = (7290, 2048, 128256)
MEMORY_QUERIES = (128, 729, 2048, 7290, 16384)
# Sizes that decide which form is better: widths of a nano and of a real model, few and many words and queries.
SWEEP = [(t, d, v) for d in (128, 1024) for v in (128, 1024, 8192, 32000) for t in (64, 512, 2048)]
QUICK_SWEEP = [(64, 128, 128), (64, 128, 1024)]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of this benchmark."""
    parser.add_argument("--quick", action="store_true", help="smoke test: small sizes, two rounds")
    parser.add_argument("--rounds", type=int, default=5, help="number of timed rounds; the best counts (default: 5)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="parts to run (default: all)")
    parser.add_argument("--block-size", type=int, help="rows of the vocabulary in a block (default: by T)")
    parser.add_argument("--plot", type=as_path, help="draw memory against T to this file (docs/vocabulary_memory.svg)")
    parser.add_argument("--no-torch", action="store_true", help="skip PyTorch")


def run(args: argparse.Namespace) -> dict:
    """Runs the requested parts; prints and returns their results."""
    device = jax.devices()[0]
    figures = {
        "device": device.device_kind,
        "platform": device.platform,
        "machine": platform.machine(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "package": str(Path(alignvlm_jax.__file__).parent),
        "quick": args.quick,
        "rounds": 2 if args.quick else args.rounds,
    }
    print(f"{device.device_kind}, jax {jax.__version__}, {figures['package']}")
    measure = {"agreement": agreement, "memory": memory, "time": times, "decoding": decoding, "sweep": sweep}
    for part in args.parts:
        figures[part] = measure[part](args)
    return figures


# The forms that are compared, and their inputs.


def dense(q, keys, scale, bias, values):
    """Computes the formula directly, with LayerNorm and softmax in at least float32."""
    wide = jnp.promote_types(q.dtype, jnp.float32)
    logits = jnp.dot(q, keys.T, preferred_element_type=wide)
    logits -= jnp.mean(logits, axis=-1, keepdims=True)
    logits *= jax.lax.rsqrt(jnp.mean(logits**2, axis=-1, keepdims=True) + EPS)
    return jax.nn.softmax(logits * scale + bias, axis=-1).astype(values.dtype) @ values


def dense_rounded(q, keys, scale, bias, values):
    """Computes the formula with logits in the dtype of the inputs, like a bfloat16 program in PyTorch."""
    logits = (q @ keys.T).astype(jnp.float32)
    logits -= jnp.mean(logits, axis=-1, keepdims=True)
    logits *= jax.lax.rsqrt(jnp.mean(logits**2, axis=-1, keepdims=True) + EPS)
    return jax.nn.softmax(logits * scale + bias, axis=-1).astype(values.dtype) @ values


def with_gradients(attention):
    """Returns a function of the five inputs and the cotangent, with the result (value, *five gradients)."""

    def run(q, keys, scale, bias, values, cotangent):
        value, pull_back = jax.vjp(attention, q, keys, scale, bias, values)
        return value, *pull_back(cotangent)

    return run


def make_inputs(size, dtype) -> list[jax.Array]:
    """Returns the five inputs, with tables that resemble a language model's embeddings, and the cotangent."""
    num_queries, width, words = size
    rng = np.random.default_rng(0)

    def normal(*shape):
        return rng.standard_normal(shape, np.float32)

    # The rows of an embedding table have a non-zero mean.
    keys = 0.02 * normal(words, width) + 0.01 * normal(width)
    values = 0.02 * normal(words, width) + 0.01 * normal(width)
    scale, bias = 2 + 0.2 * normal(words), 0.2 * normal(words)
    arrays = [normal(num_queries, width), keys, scale, bias, values, normal(num_queries, width)]
    return [jnp.asarray(array, dtype) for array in arrays]


def shapes(size, dtype) -> list[jax.ShapeDtypeStruct]:
    """Returns the shapes of the inputs and the cotangent."""
    num_queries, width, words = size
    dimensions = [(num_queries, width), (words, width), (words,), (words,), (words, width), (num_queries, width)]
    return [jax.ShapeDtypeStruct(shape, dtype) for shape in dimensions]


def working_dtype():
    """Returns the dtype in which the device computes."""
    return jnp.bfloat16 if jax.default_backend() == "gpu" else jnp.float32


# Agreement.


def agreement(args) -> dict:
    """Measures the errors of the value and of every gradient, in norm and relative to dense float64."""
    figures = {}
    streamed = functools.partial(vocabulary_attention, eps=EPS, block_size=args.block_size)
    for size in QUICK_AGREEMENT_SIZES if args.quick else AGREEMENT_SIZES:
        for dtype in (jnp.float32, jnp.bfloat16):
            inputs = make_inputs(size, dtype)
            with jax.enable_x64(True):
                wide = [np.asarray(array).astype(np.float64) for array in inputs]
                exact = [np.asarray(leaf) for leaf in jax.jit(with_gradients(dense))(*wide)]
            forms = {"streaming": streamed, "dense": dense if dtype == jnp.float32 else dense_rounded}
            for name, attention in forms.items():
                got = jax.jit(with_gradients(attention))(*inputs)
                errors = {
                    leaf: float(np.linalg.norm(np.asarray(a).astype(np.float64) - b) / np.linalg.norm(b))
                    for leaf, a, b in zip(NAMES, got, exact, strict=True)
                }
                figures[_key(size, jnp.dtype(dtype).name, name)] = errors
                text = " ".join(f"{leaf} {error:.1e}" for leaf, error in errors.items())
                print(f"agreement {_label(size)} {jnp.dtype(dtype).name:<8} {name:<9} {text}")
    return figures


# Memory.


def memory(args) -> dict:
    """Returns the temporary bytes of forward + backward according to the compiler. Nothing is run."""
    queries = (64, 256) if args.quick else MEMORY_QUERIES
    width, words = (64, 4000) if args.quick else MEMORY_SIZE[1:]
    figures = {"width": width, "words": words, "queries": list(queries), "gradients": [], "dense": [], "streaming": []}
    streamed = functools.partial(vocabulary_attention, eps=EPS, block_size=args.block_size)
    for num_queries in queries:
        inputs = shapes((num_queries, width, words), working_dtype())
        for name, attention in {"dense": dense, "streaming": streamed}.items():
            analysis = jax.jit(with_gradients(attention)).lower(*inputs).compile().memory_analysis()
            figures[name].append(analysis.temp_size_in_bytes)
        figures["gradients"].append(analysis.output_size_in_bytes)
        dense_bytes, streaming_bytes = figures["dense"][-1], figures["streaming"][-1]
        print(
            f"memory {_label((num_queries, width, words))} temporary, forward + backward:"
            f" dense {dense_bytes / 1e9:.3f} GB, streaming {streaming_bytes / 1e9:.3f} GB,"
            f" 1/{dense_bytes / streaming_bytes:.1f}"
        )
    if args.plot:
        plot_memory(figures, args.plot)
    return figures


def plot_memory(figures: dict, path: Path) -> None:
    """Plots memory against T, with logarithmic axes."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams |= {"svg.hashsalt": "alignvlm", "svg.fonttype": "none", "font.size": 10}
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.6), layout="constrained")
    for name, style in {"dense": "o-", "streaming": "s-"}.items():
        axes.plot(figures["queries"], [size / 1e9 for size in figures[name]], style, label=name)
    gradients = [size / 1e9 for size in figures["gradients"]]
    axes.plot(figures["queries"], gradients, ":", color="gray", label="result and gradients themselves")
    axes.set(xscale="log", yscale="log", xlabel="visual tokens T", ylabel="GB")
    axes.set_xticks(figures["queries"], [str(num_queries) for num_queries in figures["queries"]], minor=False)
    axes.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
    title = f"Temporary memory, forward + backward (D = {figures['width']}, V = {figures['words']})"
    axes.set_title(title, fontsize=10)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Date": None})
    print(f"wrote the plot to {path}")


# Time.


def times(args) -> dict:
    """Measures best and median seconds of forward, forward with cached statistics, and forward + backward."""
    figures = {}
    for size in QUICK_SIZES if args.quick else SIZES:
        figures[_key(size)] = time_size(size, args)
    return figures


def time_size(size, args) -> dict:
    """Times all programs of one size; prints and returns the results."""
    # The programs.
    inputs = make_inputs(size, working_dtype())
    streamed = functools.partial(vocabulary_attention, eps=EPS, block_size=args.block_size)
    statistics = jax.jit(vocabulary_statistics)(inputs[1])

    def cached(statistics: VocabularyStatistics, *inputs):
        return streamed(*inputs, statistics=statistics)

    programs = {
        "forward": {
            "dense": CompiledProgram(dense, *inputs[:5]),
            "streaming": CompiledProgram(streamed, *inputs[:5]),
            "cached": CompiledProgram(cached, statistics, *inputs[:5]),
        },
        "both": {
            "dense": CompiledProgram(with_gradients(dense), *inputs),
            "streaming": CompiledProgram(with_gradients(streamed), *inputs),
        },
    }
    peaks = {}
    if not args.no_torch:
        for what, torch_programs in make_torch_programs(inputs).items():
            programs[what] |= torch_programs

    # Their times and temporary memory, relative to the dense form.
    figures = {}
    for what, contenders in programs.items():
        figures[what] = take_turns(contenders, 2 if args.quick else args.rounds)
        for name, program in contenders.items():
            peaks[f"{what}/{name}"] = program.temporary_bytes()
            figures[what][name]["temporary_bytes"] = program.temporary_bytes()
        base = figures[what]["dense"]["best"]
        for name, result in figures[what].items():
            result["of_dense"] = result["best"] / base
            print(
                f"time {_label(size)} {what:<8}{name:<15} {result['best']:8.3f} s  {result['of_dense']:.2f} of dense"
                f"   temporary {(result['temporary_bytes'] or 0) / 1e9:.3f} GB"
            )

    # The rate of the streaming form, relative to the rate of a plain matrix product of the same size. The forward pass
    # has two products, and the backward pass has four more.
    matmul = CompiledProgram(lambda q, keys: q @ keys.T, *inputs[:2])
    best = take_turns({"matmul": matmul}, 3)["matmul"]["best"]
    rate = 2 * np.prod(size) / best
    figures["matmul_flops_per_second"] = rate
    for what, products in (("forward", 2), ("both", 6)):
        fraction = products * 2 * np.prod(size) / figures[what]["streaming"]["best"] / rate
        figures[what]["streaming"]["fraction_of_matmul_rate"] = fraction
        print(f"time {_label(size)} {what:<8}streaming does the dense products at {fraction:.2f} of the matmul rate")
    return figures


class CompiledProgram:
    """Compiled JAX program with its inputs, ready to be timed."""

    def __init__(self, function, *inputs):
        self._program = jax.jit(function).lower(*inputs).compile()
        self._inputs = inputs

    def __call__(self):
        jax.block_until_ready(self._program(*self._inputs))

    def temporary_bytes(self) -> int:
        """Bytes of temporary memory, according to the compiler."""
        return self._program.memory_analysis().temp_size_in_bytes


def make_torch_programs(inputs) -> dict:
    """Returns the dense form in PyTorch, eager and (on a GPU) compiled."""
    import torch

    device = "cuda" if jax.default_backend() == "gpu" and torch.cuda.is_available() else "cpu"
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[inputs[0].dtype.name]
    arrays = [torch.tensor(np.asarray(array.astype(jnp.float32)), device=device).to(dtype) for array in inputs]
    # The inputs q, keys, scale, bias and values; the last array is the cotangent.
    leaves = [array.requires_grad_(True) for array in arrays[:5]]

    def forward(q, keys, scale, bias, values):
        logits = q @ keys.T
        normed = torch.nn.functional.layer_norm(logits, logits.shape[-1:], scale, bias, EPS)
        return torch.softmax(normed, dim=-1) @ values

    def inference(attention):
        with torch.no_grad():
            return attention(*leaves)

    def both(attention):
        value = attention(*leaves)
        return value, torch.autograd.grad(value, leaves, arrays[5])

    forms = {"torch": forward}
    if device == "cuda":
        forms["torch compiled"] = torch.compile(forward)
    return {
        what: {name: TorchProgram(functools.partial(run, form), device) for name, form in forms.items()}
        for what, run in (("forward", inference), ("both", both))
    }


class TorchProgram:
    """PyTorch program, ready to be timed. Its peak memory excludes its inputs."""

    def __init__(self, function, device: str):
        self._function, self._device, self._peak = function, device, None

    def __call__(self):
        import torch

        if self._device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            self._function()
            torch.cuda.synchronize()
            self._peak = torch.cuda.max_memory_allocated() - before
        elif sys.platform == "linux" and self._peak is None:
            # Measured once: the peak memory of this process, which is reset first ("5" in clear_refs does that). Unlike
            # JAX's number, it includes the results.
            Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
            before = _status_bytes("VmRSS")
            self._function()
            self._peak = _status_bytes("VmHWM") - before
        else:
            self._function()

    def temporary_bytes(self) -> int | None:
        """Peak memory of a call in bytes, or None if it was not measured."""
        return self._peak


def _status_bytes(field: str) -> int:
    """Returns a field of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def take_turns(programs: dict, rounds: int) -> dict:
    """Runs each program once to warm up, then all in turn, `rounds` times; returns best and median seconds."""
    seconds = {name: [] for name in programs}
    for program in programs.values():
        program()
    for _ in range(rounds):
        for name, program in programs.items():
            start = time.perf_counter()
            program()
            seconds[name].append(time.perf_counter() - start)
    return {name: {"best": min(times), "median": float(np.median(times))} for name, times in seconds.items()}


# Decoding.


def decoding(args) -> dict:
    """Times the connector of a frozen model on a page: ALIGN (plain, cached and pruned) and the MLP.

    A page has ten tiles. One tile is measured, and its time is multiplied by ten.
    """
    encoder, width, words, kept, features = (32, 64, 4000, 100, 49) if args.quick else (1152, 2048, 128256, 3400, 729)
    tiles_per_page = 10
    rng = np.random.default_rng(0)
    inputs = jnp.asarray(rng.standard_normal((1, features, encoder), np.float32), working_dtype())
    embedding = jnp.asarray(0.02 * rng.standard_normal((words, width), np.float32))
    dtype = jnp.dtype(working_dtype()).name

    def program(config, variables):
        module = make_connector(config, output_size=width, dtype=dtype)
        return CompiledProgram(lambda *arrays: module.apply(*arrays).tokens, variables, inputs, embedding)

    def initial(config):
        module = make_connector(config, output_size=width, dtype=dtype)
        return nn.unbox(module.init(jax.random.key(0), inputs, embedding))["params"]

    # The programs. Pruning keeps the words with the largest usage, here random.
    align, usage = initial(AlignConfig()), rng.random(words)
    statistics = jax.jit(functools.partial(vocabulary_statistics, dtype=dtype))(align["w2"])
    cached = {"params": align, "vocabulary": {"statistics": statistics}}
    programs = {
        "align": program(AlignConfig(), {"params": align}),
        "align cached": program(AlignConfig(), cached),
        "align pruned": program(*_pruned_connector(align, usage, kept, dtype)),
        "mlp": program(MLPConfig(), {"params": initial(MLPConfig())}),
    }

    # Their times.
    figures = take_turns(programs, 2 if args.quick else args.rounds)
    full, mlp = figures["align cached"]["best"], figures["mlp"]["best"]
    for name, result in figures.items():
        result["seconds_per_page"] = tiles_per_page * result["best"]
        result["times_cheaper_than_cached"] = full / result["best"]
        print(
            f"decoding {name:<13} {result['seconds_per_page']:8.3f} s/page, {result['best'] / mlp:7.1f} x the MLP's,"
            f" {full / result['best']:6.1f} x cheaper than ALIGN cached"
        )
    return figures | {"kept_words": kept, "words": words, "tiles_per_page": tiles_per_page}


def _pruned_connector(connector, usage, kept: int, dtype: str):
    """Returns the config and the variables of the connector after pruning its vocabulary."""
    config = AlignVLMConfig(language=LanguageConfig(dtype=dtype))
    config, params = prune_vocabulary(config, {"connector": connector}, usage, kept)
    return config.connector, {"params": params["connector"]}


# Comparison of both forms at many sizes.


def sweep(args) -> list[dict]:
    """Measures forward + backward of both forms at many sizes."""
    figures = []
    streamed = functools.partial(vocabulary_attention, eps=EPS, block_size=args.block_size)
    for size in QUICK_SWEEP if args.quick else SWEEP:
        inputs = make_inputs(size, working_dtype())
        programs = {
            "dense": CompiledProgram(with_gradients(dense), *inputs),
            "streaming": CompiledProgram(with_gradients(streamed), *inputs),
        }
        results = take_turns(programs, 2 if args.quick else args.rounds)
        seconds = {name: results[name]["best"] for name in programs}
        temporary = {name: program.temporary_bytes() for name, program in programs.items()}
        figures.append({"size": list(size), "seconds": seconds, "temporary_bytes": temporary})
        print(
            f"sweep {_label(size)} time {seconds['streaming'] / seconds['dense']:5.2f} of dense"
            f" ({1e3 * seconds['dense']:.1f} ms), temporary memory"
            f" {temporary['streaming'] / max(1, temporary['dense']):5.2f} of dense ({temporary['dense'] / 1e6:.1f} MB)"
        )
    return figures


def _label(size) -> str:
    return "T={:<5} D={:<4} V={:<6}".format(*size)


def _key(size, *more: str) -> str:
    return " ".join(["T={} D={} V={}".format(*size), *more])
