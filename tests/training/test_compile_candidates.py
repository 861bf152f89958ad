"""Candidates of a search: which of them divide evenly, their memory and FLOPs by arithmetic, and their order."""

import dataclasses

import pytest

from alignvlm_jax.config import load_config
from alignvlm_jax.config.experiment import ExperimentConfig
from alignvlm_jax.config.stages import MixturePart, StageConfig
from alignvlm_jax.data.packing import PackingConfig
from alignvlm_jax.data.pipeline import DataConfig
from alignvlm_jax.data.tiling import TilingConfig
from alignvlm_jax.models.alignvlm import AlignVLMConfig
from alignvlm_jax.parallel.chips import TPU_V5E
from alignvlm_jax.training.compile_candidates import (
    Candidate,
    Space,
    all_meshes,
    bin_of_pages,
    candidates,
    keeps_at_least,
    lower_bound,
    misfit,
    rank,
    recomputed_flops,
    seconds_per_example,
)
from tests.tiny_models import tiny_language, tiny_vision

STAGE = StageConfig(name="tiny", mixture=(MixturePart("pages"),), global_batch=8, max_text_tokens=16)
EXPERIMENT = ExperimentConfig(
    # A page has four tiles and a thumbnail, and each tile four patches: 20 visual tokens.
    model=AlignVLMConfig(vision=tiny_vision(), language=tiny_language(100)),
    data=DataConfig(tiling=TilingConfig(tile_size=16, max_tiles=4), packing=PackingConfig(1024, 10, 4)),
    stages=(STAGE,),
)


def space(**changes):
    def state_bytes(data, fsdp, tensor):
        return 1000 // (fsdp * tensor), 1000 // (fsdp * tensor), 2000 // (fsdp * tensor)

    fields = dict(experiment=EXPERIMENT, stage=STAGE, chip=TPU_V5E, num_devices=4, slices=1, capacity_bytes=10**9)
    return Space(**{**fields, "state_bytes": state_bytes, **changes})


def candidate(data=1, fsdp=4, tensor=1, rows=1, remat="full", **changes):
    return dataclasses.replace(Candidate(data, fsdp, tensor, rows, remat, "full", 1024, 10), **changes)


def test_meshes_are_all_factorizations():
    assert all_meshes(4) == [(4, 1, 1), (2, 2, 1), (1, 4, 1), (2, 1, 2), (1, 2, 2), (1, 1, 4)]


@pytest.mark.parametrize(
    "shape, reason",
    [
        (dict(), None),
        (dict(fsdp=2, tensor=2), None),
        (dict(fsdp=1, tensor=4), "num_kv_heads=2"),
        (dict(rows=2), "a step of whole microbatches has 16 pages, global_batch is 8"),
        (dict(data=4, fsdp=1), None),
    ],
)
def test_a_candidate_must_divide_heads_and_the_global_batch(shape, reason):
    found = misfit(space(), candidate(**shape))
    assert found == reason or reason in found


def test_slices_are_placed_along_data():
    assert "slices" in misfit(space(slices=2), candidate(data=1, fsdp=4))
    assert misfit(space(slices=2), candidate(data=2, fsdp=2)) is None


def test_only_candidates_that_divide_and_may_fit_are_found():
    found = candidates(space(), policies=("full", "none"), rows=(1, 2))
    assert {(c.data, c.fsdp, c.tensor, c.rows) for c in found} == {
        (4, 1, 1, 1),
        (2, 2, 1, 1),
        (1, 4, 1, 1),
        (2, 1, 2, 1),
        (1, 2, 2, 1),
        (2, 1, 2, 2),
        (1, 2, 2, 2),
    }
    largest = max(lower_bound(space(), c) for c in found)
    assert len(candidates(space(capacity_bytes=largest - 1), policies=("full", "none"), rows=(1, 2))) < len(found)
    assert not candidates(space(capacity_bytes=1), policies=("full",))


def test_a_frozen_encoder_has_one_policy():
    policies = dict(policies=("full",), vision_policies=("full", "none"), rows=(1,))
    frozen = space(stage=dataclasses.replace(STAGE, trainable=("connector", "language")))
    assert len(candidates(space(), **policies)) == 2 * len(candidates(frozen, **policies))


def test_bins_scale_with_their_pages_and_hold_the_largest_example():
    assert bin_of_pages(space(), 2) == (1024, 10)
    assert bin_of_pages(space(), 4) == (2048, 20)
    # Half of the positions would do for a page without much text, but an example may have 600 tokens of it.
    assert bin_of_pages(space(), 1) == (512, 5)
    assert bin_of_pages(space(stage=dataclasses.replace(STAGE, max_text_tokens=600)), 1) == (1024, 5)


def test_the_lower_bound_counts_state_gradients_kept_activations_and_an_mlp():
    # Weights, moments and gradients over four devices: 250 + 500 + 250 bytes.
    layers = 2 * 1024 * 32  # the input of two layers
    encoder = 1 * 40 * 16  # and of one encoder layer, for ten tiles of four patches
    mlp = 1024 * (2 * 64 + 32)
    assert lower_bound(space(), candidate()) == 1000 + 2 * (layers + encoder + mlp)
    # Queries are 32 wide, keys and values 16 each; tensor=2 halves them.
    kept = lower_bound(space(), candidate(remat="attention_out,qkv")) - lower_bound(space(), candidate())
    assert kept == 2 * 2 * 1024 * (32 + 32 + 2 * 16)
    split = candidate(fsdp=2, tensor=2)
    half = lower_bound(space(), dataclasses.replace(split, language_remat="attention_out,qkv")) - lower_bound(
        space(), split
    )
    assert half == kept / 2


def test_less_is_recomputed_the_more_is_kept():
    policies = ("full", "attention_out", "attention_out,qkv", "attention_out,qkv,mlp_in", "none")
    flops = [recomputed_flops(space(), candidate(remat=remat, vision_remat="none")) for remat in policies]
    assert flops == sorted(flops, reverse=True) and flops[-1] == 0
    # Of 1024 positions in two layers: queries, keys and values again, and then not.
    assert flops[1] - flops[2] == 1024 * 2 * (2 * 32 * (32 + 2 * 16))
    memory = [lower_bound(space(), candidate(remat=remat, vision_remat="none")) for remat in policies]
    assert memory == sorted(memory)


def test_the_fastest_candidates_come_first_and_those_without_room_last():
    found = candidates(space(), policies=("full", "none"), rows=(1,), meshes=[(1, 4, 1), (1, 2, 2)])
    ordered = rank(space(), found)
    times = [seconds_per_example(space(), c) for c in ordered]
    assert times == sorted(times) and ordered[0].language_remat == "none"
    tight = int(1.05 * max(lower_bound(space(), c) for c in found))
    assert rank(space(capacity_bytes=tight), found)[-1].language_remat == "none"
    assert rank(space(capacity_bytes=tight), found)[0].language_remat == "full"


def test_candidates_are_compared_by_what_they_keep():
    full, some, other = candidate(), candidate(remat="attention_out"), candidate(remat="qkv")
    assert keeps_at_least(some, full) and not keeps_at_least(full, some)
    assert not keeps_at_least(some, other) and not keeps_at_least(other, some)
    assert keeps_at_least(candidate(remat="none"), candidate(remat="attention_out,dots"))
    assert not keeps_at_least(candidate(remat="attention_out,dots"), candidate(remat="none"))
    assert not keeps_at_least(dataclasses.replace(some, rows=2), full)
    assert not keeps_at_least(some, dataclasses.replace(full, vision_remat="none"))


def test_the_overrides_of_a_candidate_are_a_config():
    words = candidate(data=2, fsdp=2, rows=2).overrides()
    config = load_config("configs/nano.py", words)
    assert (config.mesh.data, config.mesh.fsdp, config.mesh.tensor) == (2, 2, 1)
    assert (config.data.packing.tokens_per_bin, config.data.packing.tiles_per_bin) == (1024, 10)
    assert config.data.packing.bins_per_microbatch == 8
