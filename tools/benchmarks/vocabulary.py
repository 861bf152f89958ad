"""ALIGN over the vocabulary: time, memory and agreement against dense JAX and eager PyTorch.

Axes: T queries (visual tokens), D width, V vocabulary.

Runs on whatever JAX finds: a CPU in float32, a GPU in bfloat16 (then PyTorch is also compiled). What is timed takes
turns, and the best of several rounds counts: other work on the machine slows all of them alike, or is left out.
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
from alignvlm_jax.models.alignvlm import AlignVLMConfig
from alignvlm_jax.models.connectors import AlignConfig, MLPConfig, make_connector
from alignvlm_jax.models.language import LanguageConfig
from alignvlm_jax.ops import VocabularyStatistics, vocabulary_attention, vocabulary_statistics

PARTS = ("agreement", "memory", "time", "decoding", "sweep")
NAMES = ("value", "q", "keys", "scale", "bias", "values")
EPS = 1e-5

# (T, D, V): the two sizes of the bars. Small T, D and V for --quick.
SIZES = ((2048, 1024, 32000), (729, 2048, 128256))
QUICK_SIZES = ((256, 64, 4000), (48, 128, 4000))
# (T, D, V) of which the first takes its statistics from the covariance, the second from another pass.
AGREEMENT_SIZES = ((256, 128, 128256), (96, 512, 128256))
QUICK_AGREEMENT_SIZES = ((256, 64, 4000), (48, 128, 4000))
MEMORY_SIZE = (7290, 2048, 128256)
MEMORY_QUERIES = (128, 729, 2048, 7290, 16384)
# What decides where either wins: widths of a nano and of a real model, few and many words, few and many queries.
SWEEP = [(t, d, v) for d in (128, 1024) for v in (128, 1024, 8192, 32000) for t in (64, 512, 2048)]
QUICK_SWEEP = [(64, 128, 128), (64, 128, 1024)]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="small sizes, two rounds")
    parser.add_argument("--rounds", type=int, default=5, help="how often each is timed; the best counts")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to measure")
    parser.add_argument("--block-size", type=int, help="rows of the vocabulary in a block, instead of the default")
    parser.add_argument("--plot", type=Path, help="where to draw memory against T (docs/vocabulary_memory.svg)")
    parser.add_argument("--no-torch", action="store_true", help="leave PyTorch out")


def run(args: argparse.Namespace) -> dict:
    """Measures the parts that were asked for and prints them as it goes."""
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


# What is compared.


def dense(q, keys, scale, bias, values):
    """The formula as it stands; LayerNorm and softmax in float32 at least."""
    wide = jnp.promote_types(q.dtype, jnp.float32)
    logits = jnp.dot(q, keys.T, preferred_element_type=wide)
    logits -= jnp.mean(logits, axis=-1, keepdims=True)
    logits *= jax.lax.rsqrt(jnp.mean(logits**2, axis=-1, keepdims=True) + EPS)
    return jax.nn.softmax(logits * scale + bias, axis=-1).astype(values.dtype) @ values


def dense_rounded(q, keys, scale, bias, values):
    """The same with logits in the dtype of the inputs: what a bfloat16 program, such as PyTorch's, computes."""
    logits = (q @ keys.T).astype(jnp.float32)
    logits -= jnp.mean(logits, axis=-1, keepdims=True)
    logits *= jax.lax.rsqrt(jnp.mean(logits**2, axis=-1, keepdims=True) + EPS)
    return jax.nn.softmax(logits * scale + bias, axis=-1).astype(values.dtype) @ values


def with_gradients(attention):
    """From the five inputs and the result's cotangent to the result and the five gradients."""

    def run(q, keys, scale, bias, values, cotangent):
        value, pull_back = jax.vjp(attention, q, keys, scale, bias, values)
        return value, *pull_back(cotangent)

    return run


def make_inputs(size, dtype) -> list[jax.Array]:
    """Rows of the size of a language model's embeddings, with a mean of their own; and the result's cotangent."""
    num_queries, width, words = size
    rng = np.random.default_rng(0)

    def normal(*shape):
        return rng.standard_normal(shape, np.float32)

    keys = 0.02 * normal(words, width) + 0.01 * normal(width)
    values = 0.02 * normal(words, width) + 0.01 * normal(width)
    scale, bias = 2 + 0.2 * normal(words), 0.2 * normal(words)
    arrays = [normal(num_queries, width), keys, scale, bias, values, normal(num_queries, width)]
    return [jnp.asarray(array, dtype) for array in arrays]


def shapes(size, dtype) -> list[jax.ShapeDtypeStruct]:
    num_queries, width, words = size
    of_each = [(num_queries, width), (words, width), (words,), (words,), (words, width), (num_queries, width)]
    return [jax.ShapeDtypeStruct(shape, dtype) for shape in of_each]


def working_dtype():
    return jnp.bfloat16 if jax.default_backend() == "gpu" else jnp.float32


# Agreement.


def agreement(args) -> dict:
    """Errors relative to dense float64, norm-wise, of the value and of every gradient."""
    figures = {}
    streamed = functools.partial(vocabulary_attention, eps=EPS, block_size=args.block_size)
    for size in QUICK_AGREEMENT_SIZES if args.quick else AGREEMENT_SIZES:
        for dtype in (jnp.float32, jnp.bfloat16):
            inputs = make_inputs(size, dtype)
            with jax.enable_x64(True):
                wide = [np.asarray(array).astype(np.float64) for array in inputs]
                exact = [np.asarray(leaf) for leaf in jax.jit(with_gradients(dense))(*wide)]
            found = {"streaming": streamed, "dense": dense if dtype == jnp.float32 else dense_rounded}
            for name, attention in found.items():
                got = jax.jit(with_gradients(attention))(*inputs)
                errors = {
                    of: float(np.linalg.norm(np.asarray(a).astype(np.float64) - b) / np.linalg.norm(b))
                    for of, a, b in zip(NAMES, got, exact, strict=True)
                }
                figures[_key(size, jnp.dtype(dtype).name, name)] = errors
                text = " ".join(f"{of} {error:.1e}" for of, error in errors.items())
                print(f"agreement {_label(size)} {jnp.dtype(dtype).name:<8} {name:<9} {text}")
    return figures


# Memory.


def memory(args) -> dict:
    """Temporary bytes of forward + backward, by the compiler; nothing is run."""
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
        of_dense, of_streaming = figures["dense"][-1], figures["streaming"][-1]
        print(
            f"memory {_label((num_queries, width, words))} temporary, forward + backward:"
            f" dense {of_dense / 1e9:.3f} GB, streaming {of_streaming / 1e9:.3f} GB, 1/{of_dense / of_streaming:.1f}"
        )
    if args.plot:
        plot_memory(figures, args.plot)
    return figures


def plot_memory(figures: dict, path: Path) -> None:
    """Memory against T, both axes logarithmic."""
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
    print(f"plot in {path}")


# Time.


def times(args) -> dict:
    """Forward, forward with cached statistics, and forward + backward; seconds, best and median."""
    figures = {}
    for size in QUICK_SIZES if args.quick else SIZES:
        figures[_key(size)] = time_size(size, args)
    return figures


def time_size(size, args) -> dict:
    inputs = make_inputs(size, working_dtype())
    streamed = functools.partial(vocabulary_attention, eps=EPS, block_size=args.block_size)
    statistics = jax.jit(vocabulary_statistics)(inputs[1])

    def cached(statistics: VocabularyStatistics, *inputs):
        return streamed(*inputs, statistics=statistics)

    programs = {
        "forward": {
            "dense": compiled(dense, *inputs[:5]),
            "streaming": compiled(streamed, *inputs[:5]),
            "cached": compiled(cached, statistics, *inputs[:5]),
        },
        "both": {
            "dense": compiled(with_gradients(dense), *inputs),
            "streaming": compiled(with_gradients(streamed), *inputs),
        },
    }
    peaks = {}
    if not args.no_torch:
        for what, torch_programs in torch_programs_of(inputs).items():
            programs[what] |= torch_programs
    figures = {}
    for what, of_what in programs.items():
        figures[what] = take_turns(of_what, 2 if args.quick else args.rounds)
        for name, program in of_what.items():
            peaks[f"{what}/{name}"] = program.temporary_bytes()
            figures[what][name]["temporary_bytes"] = program.temporary_bytes()
        base = figures[what]["dense"]["best"]
        for name, found in figures[what].items():
            found["of_dense"] = found["best"] / base
            print(
                f"time {_label(size)} {what:<8}{name:<15} {found['best']:8.3f} s  {found['of_dense']:.2f} of dense"
                f"   temporary {(found['temporary_bytes'] or 0) / 1e9:.3f} GB"
            )
    matmul = compiled(lambda q, keys: q @ keys.T, *inputs[:2])
    best = take_turns({"matmul": matmul}, 3)["matmul"]["best"]
    rate = 2 * np.prod(size) / best
    figures["matmul_flops_per_second"] = rate
    for what, products in (("forward", 2), ("both", 6)):
        fraction = products * 2 * np.prod(size) / figures[what]["streaming"]["best"] / rate
        figures[what]["streaming"]["fraction_of_matmul_rate"] = fraction
        print(f"time {_label(size)} {what:<8}streaming does the dense products at {fraction:.2f} of the matmul rate")
    return figures


class compiled:
    """A JAX program with its inputs, ready to be timed."""

    def __init__(self, function, *inputs):
        self._program = jax.jit(function).lower(*inputs).compile()
        self._inputs = inputs

    def __call__(self):
        jax.block_until_ready(self._program(*self._inputs))

    def temporary_bytes(self) -> int:
        return self._program.memory_analysis().temp_size_in_bytes


def torch_programs_of(inputs) -> dict:
    """The dense form in PyTorch, eager and (on a GPU) compiled."""
    import torch

    device = "cuda" if jax.default_backend() == "gpu" and torch.cuda.is_available() else "cpu"
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[inputs[0].dtype.name]
    arrays = [torch.tensor(np.asarray(array.astype(jnp.float32)), device=device).to(dtype) for array in inputs]
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
    """A PyTorch program ready to be timed; its peak memory is what it allocates beyond its inputs."""

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
            # Once: the kernel's high-water mark of this process, reset before. Results are counted, unlike JAX's.
            Path("/proc/self/clear_refs").write_text("5")
            before = _status_bytes("VmRSS")
            self._function()
            self._peak = _status_bytes("VmHWM") - before
        else:
            self._function()

    def temporary_bytes(self) -> int | None:
        return self._peak


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def take_turns(programs: dict, rounds: int) -> dict:
    """Runs each once to warm up, then all in turn, `rounds` times."""
    seconds = {name: [] for name in programs}
    for program in programs.values():
        program()
    for _ in range(rounds):
        for name, program in programs.items():
            start = time.perf_counter()
            program()
            seconds[name].append(time.perf_counter() - start)
    return {name: {"best": min(taken), "median": float(np.median(taken))} for name, taken in seconds.items()}


# Decoding.


def decoding(args) -> dict:
    """What a page costs in the connector once the weights are frozen: ALIGN (cached, pruned) beside the MLP.

    A page is ten tiles; one is run and its time taken ten times.
    """
    encoder, width, words, kept, features = (32, 64, 4000, 100, 49) if args.quick else (1152, 2048, 128256, 3400, 729)
    tiles_per_page = 10
    rng = np.random.default_rng(0)
    inputs = jnp.asarray(rng.standard_normal((1, features, encoder), np.float32), working_dtype())
    embedding = jnp.asarray(0.02 * rng.standard_normal((words, width), np.float32))
    dtype = jnp.dtype(working_dtype()).name

    def program(config, variables):
        module = make_connector(config, output_size=width, dtype=dtype)
        return compiled(lambda *arrays: module.apply(*arrays).tokens, variables, inputs, embedding)

    def initial(config):
        module = make_connector(config, output_size=width, dtype=dtype)
        return nn.unbox(module.init(jax.random.key(0), inputs, embedding))["params"]

    align, usage = initial(AlignConfig()), rng.random(words)
    statistics = jax.jit(functools.partial(vocabulary_statistics, dtype=dtype))(align["w2"])
    cached = {"params": align, "vocabulary": {"statistics": statistics}}
    programs = {
        "align": program(AlignConfig(), {"params": align}),
        "align cached": program(AlignConfig(), cached),
        "align pruned": program(*_pruned_connector(align, usage, kept, dtype)),
        "mlp": program(MLPConfig(), {"params": initial(MLPConfig())}),
    }
    figures = take_turns(programs, 2 if args.quick else args.rounds)
    full, mlp = figures["align cached"]["best"], figures["mlp"]["best"]
    for name, found in figures.items():
        found["seconds_per_page"] = tiles_per_page * found["best"]
        found["times_cheaper_than_cached"] = full / found["best"]
        print(
            f"decoding {name:<13} {found['seconds_per_page']:8.3f} s a page, {found['best'] / mlp:7.1f} x the MLP's,"
            f" {full / found['best']:6.1f} x cheaper than ALIGN cached"
        )
    return figures | {"kept_words": kept, "words": words, "tiles_per_page": tiles_per_page}


def _pruned_connector(connector, usage, kept: int, dtype: str):
    """The config of the connector, and its own variables out of those of the whole model."""
    config = AlignVLMConfig(language=LanguageConfig(dtype=dtype))
    config, params = prune_vocabulary(config, {"connector": connector}, usage, kept)
    return config.connector, {"params": params["connector"]}


# Where each wins.


def sweep(args) -> list[dict]:
    """Forward + backward of both forms over a range of sizes."""
    figures = []
    streamed = functools.partial(vocabulary_attention, eps=EPS, block_size=args.block_size)
    for size in QUICK_SWEEP if args.quick else SWEEP:
        inputs = make_inputs(size, working_dtype())
        programs = {
            "dense": compiled(with_gradients(dense), *inputs),
            "streaming": compiled(with_gradients(streamed), *inputs),
        }
        found = take_turns(programs, 2 if args.quick else args.rounds)
        seconds = {name: found[name]["best"] for name in programs}
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
