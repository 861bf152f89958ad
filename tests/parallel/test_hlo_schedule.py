"""The time of an asynchronous collective, of which the compiler's schedule hides a part behind computation."""

import pytest

from alignvlm_jax.parallel import hlo_collectives, hlo_schedule
from alignvlm_jax.parallel.chips import TPU_V5E
from alignvlm_jax.parallel.hlo import Program

# An excerpt as the TPU compiler prints it, with two neighbors and round numbers. 1.5 million cycles are 1 ms.
PROGRAM = """HloModule test

%start (p: bf16[ROWS,1000]) -> bf16[ROWS,2000] {
  %p = bf16[ROWS,1000]{1,0} parameter(0)
  %all-gather.1 = bf16[ROWS,2000]{1,0} all-gather(%p), channel_id=1, replica_groups={{0,1}}, dimensions={1}, frontend_attributes={chain_id="0"}
  ROOT %s = bf16[ROWS,2000]{1,0} custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%done (p: bf16[ROWS,2000]) -> bf16[ROWS,2000] {
  %p = bf16[ROWS,2000]{1,0} parameter(0)
  ROOT %d = bf16[ROWS,2000]{1,0} custom-call(%p), custom_call_target="AsyncCollectiveDone"
}

ENTRY %main (p: bf16[ROWS,1000], q: f32[8,8]) -> f32[8,8] {
  %p = bf16[ROWS,1000]{1,0} parameter(0)
  %q = f32[8,8]{1,0} parameter(1)
  %before = f32[8,8]{1,0} negate(%q), backend_config={"estimated_cycles":"3000000"}
  %a = bf16[ROWS,2000]{1,0} fusion(%p), kind=kCustom, calls=%start, backend_config={"estimated_cycles":"10"}
  %between = f32[8,8]{1,0} negate(%before), backend_config={"estimated_cycles":"1500000"}
  %b = bf16[ROWS,2000]{1,0} fusion(%a), kind=kCustom, calls=%done, backend_config={"estimated_cycles":"10"}
  ROOT %after = f32[8,8]{1,0} negate(%between), backend_config={"estimated_cycles":"3000000"}
}
"""  # noqa: E501


@pytest.mark.parametrize(("rows", "gather", "exposed"), [(400_000, 4e-3, 3e-3), (50_000, 0.5e-3, 0.0)])
def test_only_the_computation_between_start_and_end_hides_a_collective(rows, gather, exposed):
    program = Program(PROGRAM.replace("ROWS", str(rows)))
    (collective,) = hlo_collectives.collectives(program, [0, 0])
    assert collective.is_overlapped
    assert hlo_schedule.collective_seconds(TPU_V5E, collective) == pytest.approx(gather)
    seconds = hlo_schedule.schedule_seconds(program, TPU_V5E, [collective])
    assert seconds["instructions"] == pytest.approx(5e-3)
    assert seconds["collectives"] == pytest.approx(exposed)
