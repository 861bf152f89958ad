"""Measures how fast text is read and answers are decoded, compared with transformers on the same weights.

Axes: B rows, L positions of the prompt, K cache slots, A decoded tokens, V vocabulary.

The weights are random, in the shapes of SmolLM2-135M and of the nano decoder; both sides hold the same ones. Everything
is float32. Three figures per model, in tokens per second:

    prefill   B = 1, 533 tokens: the scores of the next token, with a filled cache
    decode    B = 1 and 8, after a prompt of 64 tokens: greedy tokens, one at a time (`inference/generate.py`'s loop)

transformers decodes with its default cache and with a static one, without compilation; the faster one counts. The
contenders take turns, and the median of several rounds counts. The nano decoder is measured without a peer, at 1 and 32
rows of 256 tokens, the length of a question about a page.
"""

import argparse
import functools
import json
import pathlib
import platform
import tempfile
import time
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from alignvlm_jax.backbones import backbone_folder
from alignvlm_jax.interop.huggingface import load_language_folder
from alignvlm_jax.interop.huggingface_config import read_language_config
from alignvlm_jax.locations import as_path
from alignvlm_jax.models.language import LanguageConfig, LanguageModel, empty_cache
from alignvlm_jax.models.unstacking import unstack_layers

PEERS = ("transformers", "none")
THREADS = 2
SMOLLM2 = dict(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    max_position_embeddings=8192,
    rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
    rms_norm_eps=1e-5,
    tie_word_embeddings=True,
)
HEAD_DIM = 64
QUICK = dict(SMOLLM2, vocab_size=128, hidden_size=36, intermediate_size=64, num_hidden_layers=2)
PREFILL_TOKENS, QUICK_PREFILL_TOKENS = 533, 70
DECODE_PROMPT, DECODE_ROWS, DECODE_TOKENS = 64, (1, 8), 32
QUICK_ROWS, QUICK_DECODE_TOKENS = (2,), 6
NANO_PROMPT, NANO_ROWS, NANO_TOKENS = 256, (1, 32), 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of this benchmark."""
    parser.add_argument("--peer", choices=PEERS, default="transformers", help="peer (default: transformers)")
    parser.add_argument("--rounds", type=int, default=7, help="number of timed rounds; the median counts (default: 7)")
    parser.add_argument("--quick", action="store_true", help="smoke test: a tiny decoder, one round")
    parser.add_argument("--model", type=as_path, help="a Llama folder to use instead of random weights")
    parser.add_argument("--prompt", type=int, default=DECODE_PROMPT, help="tokens before decoding (default: 64)")


def run(args: argparse.Namespace) -> dict | None:
    """Measures, and prints a line for each figure; returns None if the peer is not installed."""
    figures = {"machine": platform.machine(), "jax": jax.__version__, "threads": THREADS, "prompt": args.prompt}
    with tempfile.TemporaryDirectory() as folder:
        peer = None
        if args.peer == "transformers":
            try:
                import torch
                import transformers
            except ImportError as error:
                print(f"{error}: pip install torch transformers, or --peer none")
                return None
            torch.set_num_threads(THREADS)
            figures |= {"torch": torch.__version__, "transformers": transformers.__version__}
            peer = make_peer(QUICK if args.quick else SMOLLM2, args.model, folder)
        if args.model or peer:
            config, params = load_language(args.model or folder)
        else:
            config, params = random_language(QUICK if args.quick else SMOLLM2, folder)
    rng = np.random.default_rng(0)
    rounds = 1 if args.quick else args.rounds
    length = QUICK_PREFILL_TOKENS if args.quick else PREFILL_TOKENS
    all_rows, num_tokens = (QUICK_ROWS, QUICK_DECODE_TOKENS) if args.quick else (DECODE_ROWS, DECODE_TOKENS)
    tokens = rng.integers(3, config.vocab_size, (1, length), np.int32)
    contenders = {"ours": Prefill(config, params, tokens)}
    if peer is not None:
        contenders["transformers"] = TorchPrefill(peer, tokens)
    figures["prefill"] = compare(f"prefill {length} tokens", contenders, length, rounds)
    for rows in all_rows:
        tokens = rng.integers(3, config.vocab_size, (rows, args.prompt), np.int32)
        contenders = {"ours": Decode(config, params, tokens, num_tokens)}
        if peer is not None:
            for cache in ("dynamic", "static"):
                contenders[f"transformers, {cache} cache"] = TorchDecode(peer, tokens, num_tokens, cache)
        what = f"decode batch {rows}"
        figures[what] = compare(what, contenders, rows * num_tokens, rounds)
    if not args.quick:
        config, params = load_language(backbone_folder("language", "nano"))
        for rows in NANO_ROWS:
            tokens = rng.integers(3, config.vocab_size, (rows, NANO_PROMPT), np.int32)
            what = f"nano, decode batch {rows}"
            ours = {"ours": Decode(config, params, tokens, NANO_TOKENS)}
            figures[what] = compare(what, ours, rows * NANO_TOKENS, rounds)
            print(f"{what}: {1e3 * rows / figures[what]['ours']['tokens_per_second']:.2f} ms per step")
    return figures


def compare(what: str, contenders: dict[str, Callable[[], np.ndarray]], num_tokens: int, rounds: int) -> dict:
    """Times the contenders in turns, and prints tokens per second and the ratio to the fastest peer."""
    answers = {name: contender() for name, contender in contenders.items()}  # also compiles
    seconds = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, contender in contenders.items():
            start = time.perf_counter()
            contender()
            seconds[name].append(time.perf_counter() - start)
    figures = {}
    for name, times in seconds.items():
        figures[name] = {"tokens_per_second": num_tokens / float(np.median(times)), "seconds": times}
        figures[name]["same_tokens"] = float(np.mean(answers[name] == answers["ours"]))
    peers = {name: result["tokens_per_second"] for name, result in figures.items() if name != "ours"}
    line = f"{what}: ours {figures['ours']['tokens_per_second']:.1f} tokens/s"
    if peers:
        best = max(peers, key=peers.get)
        figures["peer"] = best
        figures["times_peer"] = figures["ours"]["tokens_per_second"] / peers[best]
        for name, rate in peers.items():
            line += f"; {name} {rate:.1f} (same tokens: {figures[name]['same_tokens']:.0%})"
        line += f"; {figures['times_peer']:.2f} times {best}"
    print(line, flush=True)
    return figures


# Ours.


def random_language(shapes: dict, scratch: str):
    """Returns the config and random parameters of a decoder with the shapes of a Llama config."""
    raw = {"model_type": "llama", **shapes, "head_dim": HEAD_DIM}
    pathlib.Path(scratch, "config.json").write_text(json.dumps(raw))
    config = read_language_config(scratch)
    model, ids = LanguageModel(config), jnp.zeros((1, 1), jnp.int32)
    inputs = jnp.zeros((1, 1, config.hidden_size))
    variables = jax.jit(lambda key: model.init(key, inputs, positions=ids, segment_ids=ids))(jax.random.key(0))
    return config, nn.unbox(variables["params"])


def load_language(folder):
    """Returns the config and the parameters of a decoder, on the first device."""
    config, params = load_language_folder(folder)
    return config, jax.device_put(params, jax.devices()[0])


class Prefill:
    """Prefill of a prompt; a call returns the next token of each row."""

    def __init__(self, config: LanguageConfig, params, tokens: np.ndarray):
        self._program = functools.partial(jax.jit(prefill, static_argnums=(0, 3)), config, params, tokens, 64)

    def __call__(self) -> np.ndarray:
        logits, cache = self._program()
        jax.block_until_ready(cache)
        return np.asarray(jnp.argmax(logits, axis=-1))


class Decode:
    """Greedy decoding after a prompt; a call returns the answers."""

    def __init__(self, config: LanguageConfig, params, tokens: np.ndarray, num_tokens: int):
        logits, cache = jax.jit(prefill, static_argnums=(0, 3))(config, params, tokens, num_tokens)
        # As `Generator` does.
        layers = unstack_layers({"params": {"language": params}})
        if layers is not None:
            params, cache = {**params, "layers": layers}, cache.unstack()
        self._cache = cache
        first = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        self._program = functools.partial(jax.jit(decode, static_argnums=(0, 3)), config, params, first, num_tokens)

    def __call__(self) -> np.ndarray:
        return np.asarray(self._program(self._cache))


def prefill(config, params, tokens, free_slots):
    """Returns the scores [B, V] after a prompt, and the cache."""

    def read(model, tokens):
        batch, length = tokens.shape
        positions = jnp.broadcast_to(jnp.arange(length), tokens.shape)
        cache = empty_cache(config, batch, length + free_slots)
        hidden, cache = model(
            model.embed(tokens),
            positions=positions,
            segment_ids=jnp.ones_like(tokens),
            cache=cache,
            cache_is_empty=True,
        )
        return model.logits(hidden[:, -1]), cache

    return LanguageModel(config).apply({"params": params}, tokens, method=read)


def decode(config, params, first, num_tokens, cache):
    """Returns `num_tokens` greedy tokens, with the loop of `inference/generate.py`."""
    rows = first.shape[0]
    model = LanguageModel(config)

    def step(model, token, cache):
        positions = jnp.full((rows, 1), cache.index)
        hidden, cache = model(
            model.embed(token[:, None]), positions=positions, segment_ids=jnp.ones_like(positions), cache=cache
        )
        return jnp.argmax(model.logits(hidden[:, 0]), axis=-1).astype(jnp.int32), cache

    def body(state):
        index, token, answers, cache = state
        answers = answers.at[:, index].set(token)
        token, cache = model.apply({"params": params}, token, cache, method=step)
        return index + 1, token, answers, cache

    start = (0, first, jnp.zeros((rows, num_tokens), jnp.int32), cache)
    return jax.lax.while_loop(lambda state: state[0] < num_tokens, body, start)[2]


# transformers.


def make_peer(shapes: dict, folder, scratch):
    """Returns transformers' model from `folder`, or a random one, which is also saved to `scratch`."""
    import torch
    import transformers

    if folder:
        return transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shapes, head_dim=HEAD_DIM)).eval()
    model.save_pretrained(scratch)
    return model


class TorchPrefill:
    """Prefill with transformers; a call returns the next token of each row."""

    def __init__(self, model, tokens: np.ndarray):
        import torch

        self._model, self._tokens = model, torch.tensor(tokens, dtype=torch.long)

    def __call__(self) -> np.ndarray:
        import torch

        with torch.inference_mode():
            output = self._model(self._tokens, use_cache=True, logits_to_keep=1)
        return output.logits[:, -1].argmax(-1).numpy()


class TorchDecode:
    """Greedy decoding with transformers after a prompt; a call returns the answers."""

    def __init__(self, model, tokens: np.ndarray, num_tokens: int, cache: str):
        import torch
        import transformers

        self._model, self._num_tokens = model, num_tokens
        slots = tokens.shape[1] + num_tokens
        if cache == "static":
            self._cache = transformers.StaticCache(config=model.config, max_cache_len=slots)
        else:
            self._cache = transformers.DynamicCache(config=model.config)
        with torch.inference_mode():
            output = model(torch.tensor(tokens, dtype=torch.long), past_key_values=self._cache, logits_to_keep=1)
        self._first = output.logits[:, -1].argmax(-1, keepdim=True)

    def __call__(self) -> np.ndarray:
        import torch

        token, answers = self._first, []
        with torch.inference_mode():
            for _ in range(self._num_tokens):
                answers.append(token)
                output = self._model(token, past_key_values=self._cache, use_cache=True)
                token = output.logits[:, -1].argmax(-1, keepdim=True)
        # Forget the answers, so that the next call starts from the prompt again.
        self._cache.crop(-self._num_tokens)
        return torch.cat(answers, dim=1).numpy()
