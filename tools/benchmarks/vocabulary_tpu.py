"""Measures the memory, FLOPs and bytes of ALIGN compiled for TPUs, on a machine without TPUs.

Axes: T visual tokens on a chip, D width, V vocabulary, K rows of the vocabulary in a block.

    pip install "alignvlm-jax[tpu]"          installs libtpu; elsewhere: pip install --target DIR libtpu
    PYTHONPATH=DIR tools/benchmark.py vocab-tpu

The compiler counts the body of a loop once. FLOPs and bytes are therefore taken from two programs without a loop, over
one block of rows and over nearly two. Their difference gives the cost per row, with which the cost of the first program
is extrapolated to V rows. The memory is taken from the complete program.

A program is compute-bound if its FLOPs per byte of memory traffic exceed the chip's ratio of peak FLOP/s to memory
bandwidth.
"""

import argparse
import functools

import jax
import jax.numpy as jnp

from alignvlm_jax.errors import UserError
from alignvlm_jax.ops import vocabulary_attention
from alignvlm_jax.parallel import chips
from alignvlm_jax.parallel.topology import topology_devices

CHIPS = {"v5e": chips.TPU_V5E, "v6e": chips.TPU_V6E}
SIZE = (16384, 4096, 128256)
QUICK_SIZE = (2048, 512, 16384)
BLOCK_SIZES = (256, 512, 1024, 2048, 4096)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of this benchmark."""
    parser.add_argument("--quick", action="store_true", help="smoke test: a small size and two block sizes")
    parser.add_argument("--chips", nargs="+", choices=CHIPS, default=list(CHIPS), help="chips to compile for")
    parser.add_argument("--block-sizes", nargs="+", type=int, help="values of K to compile for")


def run(args: argparse.Namespace) -> dict | None:
    """Compiles forward and forward + backward for each chip and block size; returns None if libtpu is missing."""
    size = QUICK_SIZE if args.quick else SIZE
    block_sizes = args.block_sizes or (BLOCK_SIZES[1:3] if args.quick else BLOCK_SIZES)
    figures = {"jax": jax.__version__, "size": dict(zip("TDV", size, strict=True)), "chips": {}}
    for chip in args.chips:
        try:
            device = topology_devices(f"{chip}:2x2")[0]
        except UserError as error:
            print(f"vocab-tpu: skipped, {error}")
            return None
        figures["chips"][chip] = {
            f"{kind} K={block_size}": measure(chip, device, kind, size, block_size)
            for kind in ("forward", "both")
            for block_size in block_sizes
        }
    return figures


def measure(chip: str, device, kind: str, size, block_size: int) -> dict:
    """Compiles one program; prints and returns the compiler's numbers."""
    num_queries, width, words = size
    program = functools.partial(compile_for, device, kind, num_queries, width, block_size=block_size)
    # The second block has 128 rows fewer than the first, because two equal blocks would become a loop.
    one, two = (program(rows).cost_analysis() for rows in (block_size, 2 * block_size - 128))

    def total(key: str) -> float:
        per_row = (two[key] - one[key]) / (block_size - 128)
        return one[key] + per_row * (words - block_size)

    flops, traffic = total("flops"), total("bytes accessed")
    ratio = CHIPS[chip].peak_flops / CHIPS[chip].hbm_bandwidth
    try:
        analysis = program(words).memory_analysis()
        temporary = analysis.temp_size_in_bytes
        resident = analysis.argument_size_in_bytes + analysis.output_size_in_bytes
    except jax.errors.JaxRuntimeError as error:
        print(f"{chip} {kind:<8} K={block_size:<5} does not fit: {str(error).splitlines()[0][:160]}")
        temporary = resident = None
    figures = {
        "temporary_bytes": temporary,
        "argument_and_result_bytes": resident,
        "flops": flops,
        "bytes": traffic,
        "intensity": flops / traffic,
        "chip_ratio": ratio,
        "compute_bound": flops / traffic > ratio,
    }
    if temporary is not None:
        print(
            f"{chip} {kind:<8} K={block_size:<5} temporary {temporary / 1e9:6.3f} GB besides {resident / 1e9:.2f} GB,"
            f" {flops / 1e12:7.1f} TFLOP, {traffic / 1e9:7.1f} GB moved,"
            f" {flops / traffic:5.0f} FLOP/byte (chip: {ratio:.0f})"
        )
    return figures


def compile_for(device, kind: str, num_queries: int, width: int, words: int, *, block_size: int):
    """Compiles the "forward" pass, or "both" passes, with the dtypes of training.

    Queries and results are bfloat16; tables and their gradients are float32.
    """
    sharding = jax.sharding.SingleDeviceSharding(device)

    def abstract(shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    tables = [abstract((words, width)), abstract((words,)), abstract((words,)), abstract((words, width))]
    queries = abstract((num_queries, width), jnp.bfloat16)
    attention = functools.partial(vocabulary_attention, block_size=block_size)

    def both(q, keys, scale, bias, values, cotangent):
        value, pull_back = jax.vjp(attention, q, keys, scale, bias, values)
        return value, *pull_back(cotangent)

    if kind == "forward":
        return jax.jit(attention).lower(queries, *tables).compile()
    return jax.jit(both).lower(queries, *tables, queries).compile()
