"""The cache of compiled programs: when it is on, where it is, what happens to broken entries, and equal results."""

import contextlib
import functools
import os
import shutil
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache as jax_cache

from alignvlm_jax import cli
from alignvlm_jax.commands import ask, compilation_cache
from alignvlm_jax.locations import LocationError
from alignvlm_jax.models.alignvlm import random_parameters
from alignvlm_jax.parallel.mesh import MeshConfig, make_mesh
from alignvlm_jax.training.train_step import jit_train_step, place_state
from tests.training.batches import MODEL, random_batch, stage


@contextlib.contextmanager
def own_cache(tmp_path):
    """Makes JAX use a cache of the test, in place of the one that all tests share."""
    shared = jax.config.jax_compilation_cache_dir
    # pytest undoes the hook for warnings that `turn_on` installs.
    folder = compilation_cache.turn_on({"ALIGNVLM_CACHE": str(tmp_path / "cache")})
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_compilation_cache_max_size", compilation_cache.MAX_BYTES)
    jax_cache.reset_cache()
    jax.clear_caches()
    try:
        yield folder
    finally:
        jax.config.update("jax_enable_compilation_cache", True)
        jax.config.update("jax_compilation_cache_max_size", -1)
        jax.config.update("jax_compilation_cache_dir", shared)
        jax_cache.reset_cache()


def test_the_folder_is_in_the_users_cache_and_names_the_cpu(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", "/home/anna")
    kind = compilation_cache.kind_of_cpu({})
    assert compilation_cache.cache_folder({}) == Path(f"/home/anna/.cache/alignvlm/jax-{kind}")
    assert compilation_cache.cache_folder({"XDG_CACHE_HOME": "/c"}) == Path(f"/c/alignvlm/jax-{kind}")
    # The specification says to ignore relative paths.
    assert compilation_cache.cache_folder({"XDG_CACHE_HOME": "c"}) == Path(f"/home/anna/.cache/alignvlm/jax-{kind}")
    assert compilation_cache.cache_folder({"ALIGNVLM_CACHE": "~/c"}) == Path(f"/home/anna/c/jax-{kind}")
    with pytest.raises(LocationError, match="bucket"):
        compilation_cache.cache_folder({"ALIGNVLM_CACHE": "gs://bucket/c"})


def test_another_instruction_or_another_number_of_threads_is_another_folder(monkeypatch, tmp_path):
    text = Path("/proc/cpuinfo").read_text()
    (tmp_path / "cpuinfo").write_text(text)
    known = compilation_cache.kind_of_cpu({})
    monkeypatch.setattr(compilation_cache, "_CPU_INFO", tmp_path / "cpuinfo")
    assert compilation_cache.kind_of_cpu({}) == known != compilation_cache.kind_of_cpu({"NPROC": "64"})
    # The speed of a core changes all the time.
    (tmp_path / "cpuinfo").write_text(text.replace("cpu MHz", "cpu MHz\t: 1\nbogus"))
    assert compilation_cache.kind_of_cpu({}) == known
    (tmp_path / "cpuinfo").write_text(text.replace("flags", "flags : amx_tile\nold", 1))
    assert compilation_cache.kind_of_cpu({}) != known
    monkeypatch.setattr(compilation_cache, "_CPU_INFO", tmp_path / "none")
    assert compilation_cache.cache_folder({}) is None


@pytest.mark.parametrize(
    "environ",
    [
        {"ALIGNVLM_CACHE": "off"},
        # The user's own choice.
        {"JAX_COMPILATION_CACHE_DIR": "/mine"},
        {"JAX_ENABLE_COMPILATION_CACHE": "false"},
        # One process of several.
        {"JAX_COORDINATOR_ADDRESS": "host:1"},
        {"WORLD_SIZE": "2", "RANK": "0"},
    ],
)
def test_the_cache_stays_off(environ):
    before = dict(environ)
    assert compilation_cache.turn_on(environ) is None
    assert environ == before


def test_a_call_from_another_program_leaves_its_process_alone(monkeypatch, capsys):
    """The library and the tests call `main` with arguments."""
    monkeypatch.setattr(compilation_cache, "turn_on", lambda environ: pytest.fail("turned on"))
    monkeypatch.setattr(ask, "run", lambda args: None)
    assert cli.main(["ask", "--checkpoint", "x", "none.png", "--question", "What?"]) == 0


@pytest.mark.parametrize("fault", ["a file", "others", "read-only"])
def test_an_unusable_folder_is_one_line(fault, tmp_path, monkeypatch, capsys):
    place = tmp_path / "cache"
    environ = {"ALIGNVLM_CACHE": str(place)}
    if fault == "a file":
        place.write_text("")
    else:
        compilation_cache.turn_on(dict(environ)).chmod(0o777 if fault == "others" else 0o700)
    if fault == "read-only":
        monkeypatch.setattr(os, "access", lambda *arguments: False)  # tests may run as root
    assert compilation_cache.turn_on(environ) is None
    assert "JAX_COMPILATION_CACHE_DIR" not in environ
    error = capsys.readouterr().err
    assert error.startswith("note: ") and error.count("\n") == 1 and str(place) in error


def test_an_error_during_the_work_turns_the_cache_off_with_one_line(tmp_path, capsys):
    with own_cache(tmp_path) as folder:
        shutil.rmtree(folder)
        folder.write_text("")
        assert [float(jax.jit(lambda x, y=y: x + y)(1.0)) for y in range(3)] == [1.0, 2.0, 3.0]
    error = capsys.readouterr().err
    assert error.startswith("note: ") and error.count("\n") == 1 and str(folder) in error


@functools.partial(jax.jit, donate_argnums=0)
def small_step(state, batch):
    """A loop of products, with a sum over a batch, whose state is donated."""

    def loss(weights):
        hidden, _ = jax.lax.scan(lambda hidden, layer: (jnp.tanh(hidden @ layer), None), batch, weights)
        return jnp.mean(hidden**2)

    value, gradient = jax.value_and_grad(loss)(state["weights"])
    momentum = 0.9 * state["momentum"] + gradient
    return {"weights": state["weights"] - momentum, "momentum": momentum}, value


def small_run():
    weights = jax.random.normal(jax.random.key(0), (3, 32, 32))
    state, losses = {"weights": weights, "momentum": jnp.zeros_like(weights)}, []
    for seed in range(4):
        state, loss = small_step(state, jax.random.normal(jax.random.key(seed), (8, 32)))
        losses.append(loss)
    return losses, state


def training_run():
    mesh, short = make_mesh(MeshConfig(), jax.devices()[:1]), stage(steps=4)
    params = jax.device_get(nn.unbox(jax.jit(lambda: random_parameters(MODEL, jax.random.key(0)))()))
    with jax.set_mesh(mesh):
        state, history = place_state(MODEL, short, mesh, params), []
        step = jit_train_step(MODEL, stage=short, mesh=mesh)
        for seed in range(4):
            state, metrics = step(state, random_batch(seed))
            history.append(metrics)
    return history, state.params, state.opt_state


@pytest.mark.parametrize("run", [small_run, pytest.param(training_run, marks=pytest.mark.large)])
def test_a_program_from_the_cache_computes_the_same_bits(run, tmp_path):
    """Four steps whose state is donated, compiled and then read from the cache."""
    hits, results = [], []
    jax.monitoring.register_event_listener(lambda event, **_: hits.append(event) if "cache_hits" in event else None)
    with own_cache(tmp_path):
        for is_cached in (False, True):
            jax.clear_caches()
            hits.clear()
            results.append(jax.device_get(run()))
            assert bool(hits) == is_cached
    jax.tree.map(np.testing.assert_array_equal, *results)


def test_a_broken_entry_is_replaced(tmp_path, capsys):
    def double(x):
        return 2 * x

    def triple(x):
        return 3 * x

    with own_cache(tmp_path) as folder:
        assert float(jax.jit(double)(3.0)) + float(jax.jit(triple)(3.0)) == 15.0
        entries = [*folder.glob("jit_double-*-cache"), *folder.glob("jit_triple-*-cache")]
        content = entries[0].read_bytes()
        for entry in entries:
            entry.write_bytes(content[: len(content) // 2])
        jax.clear_caches()
        # Compiled again, and written. An entry holds the time that it took, so its size varies by a few bytes.
        assert float(jax.jit(double)(3.0)) == 6.0
        assert len(entries[0].read_bytes()) > len(content) * 0.9
        assert capsys.readouterr().err == ""
        # If more entries cannot be read, the fault is not that of a single file.
        assert float(jax.jit(triple)(3.0)) == 9.0
        assert not jax.config.jax_enable_compilation_cache
    assert capsys.readouterr().err.count("\n") == 1


def test_what_a_killed_process_left_is_removed(tmp_path):
    """JAX's cache raises an error at every later write if an entry has no time."""
    environ = {"ALIGNVLM_CACHE": str(tmp_path)}
    folder = compilation_cache.turn_on(dict(environ))
    for name in ("jit_a-1-cache", "jit_a-1-atime", "jit_b-2-cache"):
        (folder / name).write_bytes(b"x" * 8)
    compilation_cache.turn_on(environ)
    assert {path.name for path in folder.glob("jit_*")} == {"jit_a-1-cache", "jit_a-1-atime"}
    assert environ["JAX_COMPILATION_CACHE_DIR"] == str(folder)
