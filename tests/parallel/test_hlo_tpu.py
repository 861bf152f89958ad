"""Counts of programs compiled for TPUs, against counts done by hand. libtpu compiles them; no TPU is needed."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from alignvlm_jax.parallel import hlo_collectives, hlo_schedule, hlo_work
from alignvlm_jax.parallel.chips import TPU_V5E
from alignvlm_jax.parallel.hlo import Program
from alignvlm_jax.parallel.mesh import MeshConfig, make_mesh
from alignvlm_jax.parallel.topology import has_compiler, topology_devices

pytestmark = pytest.mark.skipif(not has_compiler(), reason="libtpu is only available for Linux on x86")

LAYERS, WIDTH, ROWS = 32, 1024, 64  # rows per device
BLOCK, NUM_BLOCKS, HEADS = 128, 3, 2  # of attention


def compile_for_tpu(function, *arguments, **options) -> Program:
    lowered = jax.jit(function, **options).lower(*arguments)
    return Program(lowered.compile({"optimization_level": 9}).as_text())  # O0: a fifth of the time


@functools.cache
def layers_program() -> Program:
    """Compiles a training step of stacked layers for two groups (data) of four chips (fsdp) in a ring."""
    mesh = make_mesh(MeshConfig(data=2, fsdp=4), topology_devices("v5e:2x4"))

    def array(shape, dtype, *spec):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*spec)))

    def loss(weights, x):
        def layer(x, weight):
            return jax.nn.silu(x @ weight.astype(x.dtype)), None

        return jnp.sum(jax.lax.scan(layer, x, weights)[0].astype(jnp.float32))

    def step(weights, x):
        return weights - 0.1 * jax.grad(loss)(weights, x)

    weights = array((LAYERS, WIDTH, WIDTH), jnp.float32, None, "fsdp", None)
    x = array((8 * ROWS, WIDTH), jnp.bfloat16, ("data", "fsdp"), None)
    with jax.set_mesh(mesh):
        return compile_for_tpu(step, weights, x, donate_argnums=0)


@functools.cache
def attention_program() -> Program:
    """Compiles attention and its gradients: causal, not causal, and causal with the fused backward kernel."""
    placement = jax.sharding.SingleDeviceSharding(topology_devices("v5e:2x2")[0])
    length = NUM_BLOCKS * BLOCK

    def attend(name, mask, heads, segment_ids, *, is_fused=False):
        names = ["block_q", "block_kv", "block_q_dkv", "block_kv_dkv"] + ["block_q_dq", "block_kv_dq"] * (not is_fused)
        sizes = splash.BlockSizes(**dict.fromkeys(names, BLOCK), use_fused_bwd_kernel=is_fused)
        masks = splash.MultiHeadMask([mask((length, length))] * HEADS)
        kernel = splash.make_splash_mha(masks, block_sizes=sizes, head_shards=1, q_seq_shards=1)
        with jax.named_scope(name):
            return jnp.sum(kernel(*heads, segment_ids).astype(jnp.float32))

    def sums(heads, segment_ids):
        segment_ids = splash.SegmentIds(segment_ids, segment_ids)
        causal = attend("causal", splash.CausalMask, heads, segment_ids)
        full = attend("full", splash.FullMask, heads, segment_ids)
        return causal + full + attend("fused", splash.CausalMask, heads, None, is_fused=True)

    def array(dtype, *shape):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=placement)

    heads = array(jnp.bfloat16, HEADS, length, 128), *[array(jnp.bfloat16, 1, length, 128)] * 2
    return compile_for_tpu(jax.grad(sums), heads, array(jnp.int32, length))


def test_fused_reduce_scatters_are_counted_once():
    sent = {}
    for collective in hlo_collectives.collectives(layers_program(), [0] * 8):
        sent[collective.kind] = sent.get(collective.kind, 0) + collective.count * collective.bytes_sent
    weights = LAYERS * WIDTH**2 * 2  # bfloat16
    # In a ring of four, each chip sends three quarters of the weights: for the products forward and backward, and once
    # for the gradients. Its quarter of the gradients is then summed with one other chip, which is twice a half.
    assert sent == {
        "all-gather": 2 * 3 / 4 * weights,
        "reduce-scatter": 3 / 4 * weights,
        "all-reduce": 2 * 1 / 2 * weights / 4,
    }


def test_a_ring_uses_two_links_and_two_neighbors_have_one():
    collectives = hlo_collectives.collectives(layers_program(), [0] * 8)
    assert {each.kind: each.links for each in collectives} == {"all-gather": 2, "reduce-scatter": 2, "all-reduce": 1}
    (summed,) = (each for each in collectives if each.kind == "all-reduce")
    # One of the four links, with 50 of 200 GB/s.
    assert hlo_schedule.collective_seconds(TPU_V5E, summed) == summed.count * summed.bytes_sent / 50e9


def test_layers_of_a_stack_move_the_bytes_of_a_slice():
    weights = LAYERS * WIDTH**2 * 2  # bfloat16, gathered
    moved = hlo_work.bytes_moved(layers_program())
    # Each layer is gathered, read and scattered a few times. A whole stack for each of its 32 layers would be 8 times
    # these weights on each of the four chips, for every slice and update.
    assert 6 * weights < moved < 16 * weights


def test_attention_kernels_are_counted_by_their_blocks():
    counts = {}
    for name, flops in hlo_work.flops(attention_program()).items():
        scope, kernel = re.search(r"(causal|full|fused).*_(fwd|dq|dkv)_", name).groups()
        counts[scope, kernel] = flops / (2 * HEADS * BLOCK**2 * 128)
    triangle, square = NUM_BLOCKS * (NUM_BLOCKS + 1) / 2, NUM_BLOCKS**2
    # Two products forward, three for dq, four for dk and dv, and five for all three gradients at once.
    assert counts == {
        **{("causal", kernel): products * triangle for kernel, products in (("fwd", 2), ("dq", 3), ("dkv", 4))},
        **{("full", kernel): products * square for kernel, products in (("fwd", 2), ("dq", 3), ("dkv", 4))},
        **{("fused", kernel): products * triangle for kernel, products in (("fwd", 2), ("dkv", 5))},
    }
    # A caller that knows the segments says how many blocks run.
    one_block = hlo_work.flops(attention_program(), lambda kernel, num_blocks, is_causal: 1)
    assert sum(one_block.values()) == (9 + 9 + 7) * 2 * HEADS * BLOCK**2 * 128


def test_the_schedule_takes_at_least_the_time_of_its_products_and_collectives():
    program = layers_program()
    collectives = hlo_collectives.collectives(program, [0] * 8)
    seconds = hlo_schedule.schedule_seconds(program, TPU_V5E, collectives)
    assert seconds["instructions"] >= sum(hlo_work.flops(program).values()) / TPU_V5E.peak_flops
    # Low effort overlaps nothing.
    assert not any(each.is_overlapped for each in collectives)
    assert seconds["collectives"] == pytest.approx(
        sum(hlo_schedule.collective_seconds(TPU_V5E, each) for each in collectives)
    )
    attention = hlo_schedule.schedule_seconds(attention_program(), TPU_V5E, [])["attention"]
    assert attention == pytest.approx(sum(hlo_work.flops(attention_program()).values()) / TPU_V5E.peak_flops)
