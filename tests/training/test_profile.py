"""Profiler traces contain the configured steps, and are written where TensorBoard's profile plugin reads them."""

import jax
import jax.numpy as jnp
import pytest

from alignvlm_jax.config.run import ProfileConfig, traced_steps
from alignvlm_jax.config.serialization import config_from_dict
from alignvlm_jax.errors import UserError
from alignvlm_jax.training.profile import Profiler


def run_steps(profiler, first, last):
    """Runs steps `first` to `last` under the profiler, as the training loop does."""
    step = jax.jit(lambda x: x @ x)
    with profiler:
        for number in range(first, last + 1):
            with profiler.step(number):
                outputs = step(jnp.ones((8, 8)))
            profiler.after(number, outputs)


def steps_in_trace(folder):
    (trace,) = folder.glob("plugins/profile/*/*.xplane.pb")
    planes = jax.profiler.ProfileData.from_file(str(trace)).planes
    events = [event for plane in planes for line in plane.lines for event in line.events if event.name == "train"]
    return sorted(dict(event.stats)["step_num"] for event in events)


@pytest.mark.parametrize(
    ("first", "last", "traced"),
    [
        (1, 6, [3, 4]),
        (4, 6, [4]),  # The run resumed within the configured steps.
        (1, 3, [3]),  # The run ended within the configured steps.
    ],
)
def test_the_configured_steps_are_traced(tmp_path, first, last, traced):
    run_steps(Profiler(ProfileConfig(steps="3:5"), tmp_path), first, last)
    assert steps_in_trace(tmp_path) == traced


@pytest.mark.parametrize("steps", [None, "9:12"])
def test_no_trace_is_written_without_steps_to_trace(tmp_path, steps):
    run_steps(Profiler(ProfileConfig(steps=steps), tmp_path), 1, 3)
    assert not list(tmp_path.iterdir())


def test_the_last_step_is_exclusive_as_in_a_slice():
    assert list(traced_steps(ProfileConfig("10:13"))) == [10, 11, 12]


@pytest.mark.parametrize("steps", ["10", "13:10", "10:10", "0:3", "a:b", "10:", "10-13", "-1:3", "10:13:2"])
def test_malformed_steps_are_refused(steps):
    with pytest.raises(UserError, match=r"config\.profile\.steps: expected first:stop, such as 10:13 for .*, got"):
        config_from_dict({"profile": {"steps": steps}, "data": {"tiling": {"tile_size": 384}}})
