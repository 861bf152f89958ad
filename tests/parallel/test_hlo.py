"""FLOPs, bytes and collectives counted in the text of compiled programs, against counts done by hand.

Most programs are compiled here, by XLA's CPU compiler for 8 devices. Where the TPU compiler writes programs
differently, the text is copied from its output.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from alignvlm_jax.parallel import hlo_collectives, hlo_work
from alignvlm_jax.parallel.hlo import Program
from alignvlm_jax.parallel.hlo_collectives import _groups
from alignvlm_jax.parallel.hlo_work import _count_valid_pairs
from alignvlm_jax.parallel.mesh import MeshConfig, make_mesh


def _compile(function, *arguments, **options):
    return jax.jit(function, **options).lower(*arguments).compile().as_text()


def test_products_in_nested_loops_are_counted_once_per_iteration():
    def step(x, w):
        def inner(x, _):
            return jnp.tanh(x @ w), None

        def outer(x, _):
            return jax.lax.scan(inner, x, None, length=5)[0] + jnp.tanh(x @ w), None

        return jax.lax.scan(outer, x, None, length=7)[0]

    text = _compile(step, jnp.ones((12, 16)), jnp.ones((16, 16)))
    program = Program(text)
    assert sum(hlo_work.flops(program).values()) == 7 * (5 + 1) * 2 * 12 * 16 * 16
    # Every run of a product reads its operands and writes its result.
    assert hlo_work.bytes_moved(program) >= 42 * 4 * (12 * 16 + 16 * 16 + 12 * 16)


def test_the_caller_provides_trip_counts_of_data_dependent_loops():
    def step(x, count):
        return jax.lax.fori_loop(0, count, lambda i, x: x @ x, x)

    text = _compile(step, jnp.ones((8, 8)), 3)
    op_names = []
    program = Program(text, trips=lambda op_name: op_names.append(op_name) or 10)
    assert sum(hlo_work.flops(program).values()) == 10 * 2 * 8**3
    assert op_names and all("while" in name for name in op_names)


def test_batched_products_are_counted():
    left, right = jnp.ones((3, 4, 5, 6)), jnp.ones((3, 6, 7))
    text = _compile(lambda a, b: jnp.einsum("bijk,bkl->bijl", a, b), left, right)
    assert sum(hlo_work.flops(Program(text)).values()) == 2 * 3 * 4 * 5 * 6 * 7


@pytest.mark.parametrize(
    "line, flops",
    [
        # A plain product, rows x inner by inner x columns.
        (
            "%c = bf16[9728,14336]{1,0} convolution(%a, %b), dim_labels=bf_io->bf",
            2 * 9728 * 4096 * 14336,
        ),
        # A product written as a convolution in which each output reads a single position of the window.
        (
            "%c = bf16[9728,32,128]{2,0,1} convolution(%d, %e), "
            "window={size=32 pad=31_31 rhs_reversal=1}, dim_labels=bf0_0oi->b0f",
            2 * 9728 * 4096 * 32 * 128,
        ),
    ],
)
def test_products_written_as_convolutions_are_counted(line, flops):
    text = f"""HloModule test

ENTRY %main (a: bf16[9728,4096], b: bf16[4096,14336]) -> bf16[9728,14336] {{
  %a = bf16[9728,4096]{{1,0:T(8,128)(2,1)}} parameter(0)
  %b = bf16[4096,14336]{{1,0}} parameter(1)
  %d = bf16[9728,4096,1]{{1,0,2}} bitcast(%a)
  %e = bf16[32,128,4096]{{2,1,0}} parameter(2)
  ROOT {line}, metadata={{op_name="jit(step)/layers/mlp/up/dot_general"}}
}}
"""
    assert hlo_work.flops(Program(text)) == {"jit(step)/layers/mlp/up/dot_general": flops}


def test_only_window_positions_inside_the_input_are_counted():
    rng = np.random.default_rng(0)
    for _ in range(50):
        source, size, stride, low, spread, dilate = (int(rng.integers(1, n)) for n in (9, 5, 4, 4, 3, 3))
        low -= 1
        high = int(rng.integers(0, 3))
        out = ((source - 1) * spread + 1 + low + high - (size - 1) * dilate - 1) // stride + 1
        if out < 1:
            continue
        # The same convolution of ones with ones sums to the number of valid pairs.
        dims = ("NCH", "OIH", "NCH")
        result = jax.lax.conv_general_dilated(
            jnp.ones((1, 1, source)),
            jnp.ones((1, 1, size)),
            (stride,),
            [(low, high)],
            lhs_dilation=(spread,),
            rhs_dilation=(dilate,),
            dimension_numbers=dims,
        )
        assert _count_valid_pairs(source, out, size, stride, low, spread, dilate) == int(result.sum())


# Shortened output of XLA's TPU compiler: a loop over 32 layers with kernels of the decoder (forward, and the gradient
# of keys and values) and of the encoder (forward). Their FLOPs are only known from the shapes of operands and results.
SPLASH = """HloModule test

%body (p: (s32[], bf16[1])) -> (s32[], bf16[1]) {
  %p = (s32[], bf16[1]{0}) parameter(0)
  %splash_mha_fwd_segmented_residuals.2 = (f32[512,128]{1,0}, bf16[32,9728,128]{2,1,0}, f32[32,9728,128]{2,1,0}) custom-call(%p), custom_call_target="tpu_custom_call", operand_layout_constraints={s8[1,19,19]{2,1,0}, bf16[32,9728,128]{2,1,0}, bf16[8,9728,128]{2,1,0}, bf16[8,9728,128]{2,1,0}, s32[9728,128]{1,0}, s32[8,9728]{1,0}, s32[9728,128]{1,0}}, frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 512}"
}}, metadata={op_name="jit(s)/language/layers/attention/pallas_call"}
  %splash_mha_dkv_segmented.1 = (bf16[8,9728,128]{2,1,0}, bf16[8,9728,128]{2,1,0}) custom-call(%p), custom_call_target="tpu_custom_call", operand_layout_constraints={s8[1,19,19]{2,1,0}, bf16[32,9728,128]{2,1,0}, bf16[8,9728,128]{2,1,0}, bf16[8,9728,128]{2,1,0}, s32[8,9728]{1,0}, s32[9728,128]{1,0}, s32[8,9728]{1,0}}, metadata={op_name="jit(s)/language/layers/attention/dkv"}
  %splash_mha_fwd_segmented.3 = (f32[10,768,128]{2,1,0}, bf16[10,16,768,72]{3,2,1,0}) custom-call(%p), custom_call_target="tpu_custom_call", operand_layout_constraints={s8[1,1,1]{2,1,0}, bf16[10,16,768,72]{3,2,1,0}, bf16[10,16,768,72]{3,2,1,0}, bf16[10,16,768,72]{3,2,1,0}, s32[10,768,128]{2,1,0}, s32[10,8,768]{2,1,0}}, metadata={op_name="jit(s)/vision/layers/attention/pallas_call"}
  ROOT %t = (s32[], bf16[1]{0}) tuple(%p)
}

%cond (p: (s32[], bf16[1])) -> pred[] {
  %p = (s32[], bf16[1]{0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %n = s32[] constant(32)
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (a: bf16[1]) -> (s32[], bf16[1]) {
  %a = bf16[1]{0} parameter(0)
  %zero = s32[] constant(0)
  %start = (s32[], bf16[1]{0}) tuple(%zero, %a)
  ROOT %loop = (s32[], bf16[1]{0}) while(%start), condition=%cond, body=%body
}
"""  # noqa: E501


def test_products_inside_pallas_kernels_are_counted():
    program = Program(SPLASH)
    square = 19 * 20 / 2 * 512**2  # Causal: of 19 x 19 blocks, those above the diagonal are skipped.
    # Layers x 2 FLOPs per multiply-add x products of the kernel x heads x pairs of positions x head width.
    assert hlo_work.flops(program) == {
        "jit(s)/language/layers/attention/pallas_call": 32 * 2 * 2 * 32 * square * 128,
        "jit(s)/language/layers/attention/dkv": 32
        * 2
        * 4
        * 32
        * square
        * 128,  # The 32 query heads, and not the 8 heads of its results.
        "jit(s)/vision/layers/attention/pallas_call": 32 * 2 * 2 * 10 * 16 * 768 * 768 * 72,
    }
    assert hlo_work.kernels(program) == {
        "language: splash_mha_fwd_segmented_residuals": 32,
        "language: splash_mha_dkv_segmented": 32,
        "vision: splash_mha_fwd_segmented": 32,
    }


def test_a_kernel_that_lost_its_path_belongs_to_the_part_that_its_operands_come_from():
    """JAX 0.11 names the operations of a function that it has traced before by the path inside the function alone."""
    text = SPLASH.replace("jit(s)/language/layers/attention/pallas_call", "vmap(x)/jit(_splash_attention)/pallas_call")
    query = """  %q = bf16[1]{0} fusion(%p), calls=%f, metadata={op_name="jit(s)/eval_jaxpr/language/layers/query"}
  %half = bf16[1]{0} bitcast(%q), metadata={op_name="jit(s)/while/body/eval_jaxpr/layers/attention"}
  %padded = bf16[1]{0} pad(%half, %half), metadata={op_name="vmap(x)/jit(_splash_attention)/pad"}
  %splash_mha_fwd_segmented_residuals.2"""
    text = text.replace("  %splash_mha_fwd_segmented_residuals.2", query).replace(
        "custom-call(%p), custom", "custom-call(%padded), custom", 1
    )
    program = Program(text)
    assert hlo_work.kernels(program) == hlo_work.kernels(Program(SPLASH))
    assert sum(hlo_work.flops(program).values()) == sum(hlo_work.flops(Program(SPLASH)).values())


@functools.cache
def _traffic():
    """Compiles a loop of 6 with an all-gather over fsdp and an all-reduce over tensor, then an all-reduce over data."""
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))

    def local(x, w):
        def step(total, _):
            gathered = jax.lax.all_gather(w * total[0], "fsdp", axis=0, tiled=True)  # [64, 64] float32
            return total + jax.lax.psum(jnp.tanh(total @ gathered), "tensor"), None  # [16, 64]

        total = jax.lax.scan(step, x @ jnp.ones((64, 64)), None, length=6)[0]
        return jax.lax.psum(total, "data")

    specs = jax.P("data", None), jax.P("fsdp", None)
    function = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=jax.P(), check_vma=False)
    shardings = [NamedSharding(mesh, spec) for spec in specs]
    return _compile(function, jnp.ones((32, 64)), jnp.ones((64, 64)), in_shardings=shardings)


def test_collectives_in_loops_are_counted_once_per_iteration():
    collectives = hlo_collectives.collectives(Program(_traffic()), [0] * 8)
    by_kind = {}
    for collective in collectives:
        by_kind.setdefault(collective.kind, []).append((collective.count, collective.bytes_sent))
    half = 1 / 2  # Each device of a ring of n sends (n - 1) / n of the bytes.
    assert by_kind["all-gather"] == [(6, 64 * 64 * 4 * half)]
    # An all-reduce is a reduce-scatter and an all-gather: hence the factor 2.
    assert sorted(by_kind["all-reduce"]) == [(1, 2 * 16 * 64 * 4 * half), (6, 2 * 16 * 64 * 4 * half)]


def test_collectives_across_slices_are_distinguished():
    # Devices 0 to 3 are one slice: data crosses slices, fsdp and tensor do not.
    collectives = hlo_collectives.collectives(Program(_traffic()), [0, 0, 0, 0, 1, 1, 1, 1])
    assert [each.crosses_slices for each in sorted(collectives, key=lambda each: each.count)] == [True, False, False]


@pytest.mark.parametrize(
    "attributes, groups",
    [
        ("replica_groups={{0,1},{2,3}}, dimensions={0}", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[4]", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[2,2]T(1,0)", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=2] {'axis_1'}, use_global", [[0, 1], [2, 3]]),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=2] {'axis_0'}, use_global", [[0, 2], [1, 3]]),
        ("source_target_pairs={{0,1},{1,0}}", [[0, 1], [1, 0]]),
        ("replica_groups=mesh['a'=1,'b'=2,'c'=2], device_ids=([2,2]T(1,0)) {'b'}, use_global", [[0, 1], [2, 3]]),
        ("replica_groups={}", []),
    ],
)
def test_groups_are_parsed_in_every_notation_of_xla(attributes, groups):
    assert _groups(attributes, 4) == groups


def test_a_chain_of_parts_is_counted_as_one_collective():
    """XLA's TPU compiler splits a gather into parts that overlap with products; its bytes must be counted once."""
    text = """HloModule test

%start (p: bf16[4,2]) -> bf16[4,4] {
  %p = bf16[4,2]{1,0} parameter(0)
  %all-gather.1 = bf16[4,4]{1,0} all-gather(%p), channel_id=1, replica_groups={{0,1}}, dimensions={1}, frontend_attributes={chain_id="0"}
  ROOT %s = bf16[4,4]{1,0} custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%later (p: bf16[4,2]) -> bf16[4,4] {
  %p = bf16[4,2]{1,0} parameter(0)
  ROOT %all-gather.2 = bf16[4,4]{1,0} all-gather(%p), channel_id=1, replica_groups={{0,1}}, dimensions={1}, frontend_attributes={chain_id="0"}
}

ENTRY %main (p: bf16[4,2]) -> bf16[4,4] {
  %p = bf16[4,2]{1,0} parameter(0)
  %a = bf16[4,4]{1,0} fusion(%p), kind=kCustom, calls=%start
  %b = bf16[4,4]{1,0} fusion(%p), kind=kCustom, calls=%later
  ROOT %c = bf16[4,4]{1,0} fusion(%p), kind=kCustom, calls=%later
}
"""  # noqa: E501
    (gather,) = hlo_collectives.collectives(Program(text), [0, 0])
    assert (gather.kind, gather.count, gather.bytes_sent) == ("all-gather", 1, 4 * 4 * 2 / 2)


def test_transfers_between_slices_are_reported_as_collectives():
    """The text is copied from a program for two slices, with shorter names."""
    text = """HloModule test

ENTRY %main (p: f32[16,8]) -> f32[16,8] {
  %p = f32[16,8]{1,0} parameter(0)
  %t = token[] after-all()
  %send.1 = (f32[16,8]{1,0}, u32[], token[]) send(%p, %t), channel_id=10, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_host_transfer_rendezvous="all-reduce.678_0",_xla_megascale_reduce_operation="SUM",_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}
  %send.2 = (f32[16,8]{1,0}, u32[], token[]) send(%p, %t), channel_id=11, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_megascale_target="{1,2,3}x{0:3}",_xla_megascale_transfer_type="ALL_GATHER"}
  %send.3 = (f32[16,8]{1,0}, u32[], token[]) send(%p, %t), channel_id=12, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_megascale_transfer_type="ONE_TO_ONE"}
  ROOT %r = f32[16,8]{1,0} copy(%p)
}
"""  # noqa: E501
    bytes_sent = {
        collective.kind: collective.bytes_sent
        for collective in hlo_collectives.collectives(Program(text), [0, 0, 1, 1])
        if collective.crosses_slices
    }
    assert bytes_sent == {"all-reduce": 512, "all-gather": 1024, "collective-permute": 512}


def test_the_largest_buffers_are_listed_with_their_origin():
    text = _compile(lambda x: jnp.sort(x @ x.T, axis=-1)[:, :2], jnp.ones((96, 4)))
    (size, shape, origin), *_ = hlo_work.largest_buffers(Program(text), 3)
    assert size == 96 * 96 * 4 and shape == "f32[96,96]" and origin
