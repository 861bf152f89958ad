"""Packing: the worked example of the docstring, and properties of random batches."""

import dataclasses

import numpy as np
import pytest

from alignvlm_jax.data.chat import EncodedChat
from alignvlm_jax.data.packing import (
    Example,
    PackingConfig,
    check_fits,
    cut_text,
    empty_batch,
    fill_fractions,
    write_bin,
)
from alignvlm_jax.data.resampling import Resampling
from alignvlm_jax.data.window import MeasuredExample, choose_bin
from alignvlm_jax.errors import UserError

SIDE, PAD = 4, 99


def _chat(layout: str) -> EncodedChat:
    """Encodes a layout such as 'uiiqAB': 'i' is an image placeholder, lower case is prompt, upper case is answer."""
    visual = np.array([letter == "i" for letter in layout])
    weights = np.array([letter.isupper() for letter in layout[1:]] + [False], np.float32)
    visual_index = np.where(visual, np.cumsum(visual) - 1, -1).astype(np.int32)
    return EncodedChat(np.array([ord(letter) - 64 for letter in layout], np.int32), weights, visual_index)


def _tiles(count, value=1):
    valid_hw = np.tile(np.array([[3, SIDE]], np.int32), (count, 1))
    return np.full((count, SIDE, SIDE, 3), value, np.uint8), valid_hw


def _example(number, layout, per_tile=2):
    return Example((number,), *_chat(layout), *_tiles(layout.count("i") // per_tile, number))


def _pack(bins, config, per_tile=2):
    """Returns a batch of complete microbatches that begins with these bins."""
    microbatches = -(-len(bins) // config.bins_per_microbatch)
    batch = empty_batch(microbatches, config.bins_per_microbatch, config, tile_size=SIDE, pad_id=PAD)
    for row, examples in enumerate(bins):
        write_bin(batch, divmod(row, config.bins_per_microbatch), examples, per_tile)
    return batch


def test_worked_example():
    config = PackingConfig(tokens_per_bin=20, tiles_per_bin=4, bins_per_microbatch=1, examples_per_bin=3)
    batch = _pack([[_example(4, "buiiiisYE"), _example(7, "buiiqsXE")]], config)
    assert batch["example_ids"][0, 0].tolist() == [4, 7, -1]
    row = {name: field[0, 0] for name, field in batch.items()}
    a, b = "buiiiisYE", "buiiqsXE"
    text = np.array([ord(letter) - 64 for letter in a + b] + [PAD] * 3)
    np.testing.assert_array_equal(row["tokens"], text)
    np.testing.assert_array_equal(row["targets"][:8], text[1:9])
    np.testing.assert_array_equal(row["targets"][9:16], text[10:17])
    assert row["targets"][[8, 16, 17]].tolist() == [PAD] * 3
    np.testing.assert_array_equal(row["loss_weights"], [0] * 6 + [1, 1, 0] + [0] * 5 + [1, 1, 0] + [0] * 3)
    np.testing.assert_array_equal(row["segment_ids"], [1] * 9 + [2] * 8 + [0] * 3)
    np.testing.assert_array_equal(row["positions"], [*range(9), *range(8), 0, 0, 0])
    expected = [-1, -1, 0, 1, 2, 3, -1, -1, -1, -1, -1, 4, 5, -1, -1, -1, -1, -1, -1, -1]
    np.testing.assert_array_equal(row["visual_index"], expected)
    np.testing.assert_array_equal(row["tiles"][:, 0, 0, 0], [4, 4, 7, 0])
    np.testing.assert_array_equal(row["tile_valid_hw"], [[3, SIDE]] * 3 + [[0, 0]])
    assert fill_fractions(batch) == {"tokens": 17 / 20, "tiles": 3 / 4}
    assert batch["num_examples"].tolist() == [[2]]


def test_shapes_and_dtypes():
    config = PackingConfig(tokens_per_bin=12, tiles_per_bin=2, bins_per_microbatch=2, examples_per_bin=5)
    examples = [_example(i, "uiiqAE") for i in range(5)]
    batch = _pack([examples[:2], examples[2:4], examples[4:]], config)  # and one empty bin
    assert {name: (field.shape[2:], field.dtype.name) for name, field in batch.items()} == {
        "tokens": ((12,), "int32"),
        "targets": ((12,), "int32"),
        "loss_weights": ((12,), "float32"),
        "segment_ids": ((12,), "int32"),
        "positions": ((12,), "int32"),
        "visual_index": ((12,), "int32"),
        "tiles": ((2, SIDE, SIDE, 3), "uint8"),
        "tile_valid_hw": ((2, 2), "int32"),
        "example_ids": ((5,), "int32"),
        "num_examples": ((), "int32"),
        "num_cut": ((), "int32"),
        "num_refused": ((), "int32"),
    }
    assert all(field.shape[:2] == (2, 2) for field in batch.values())
    assert batch["num_examples"].tolist() == [[2, 2], [1, 0]]
    assert (batch["tokens"][1, 1] == PAD).all() and not batch["segment_ids"][1, 1].any()


def _random_layout(rng, per_tile):
    layout = "b"
    for _ in range(rng.integers(1, 4)):
        layout += "i" * (per_tile * rng.integers(0, 3))
        layout += "q" * rng.integers(1, 6) + "A" * rng.integers(1, 9)
    return layout


def test_properties_of_random_batches():
    """Nothing is dropped or changed, both budgets hold, positions restart, and visual tokens are matched one to one."""
    rng = np.random.default_rng(0)
    for _ in range(100):
        per_tile = int(rng.integers(1, 4))
        config = PackingConfig(
            tokens_per_bin=int(rng.integers(60, 150)),
            tiles_per_bin=int(rng.integers(6, 12)),
            bins_per_microbatch=int(rng.integers(1, 4)),
            examples_per_bin=int(rng.integers(2, 8)),
        )
        examples = [_example(i, _random_layout(rng, per_tile), per_tile) for i in range(1, rng.integers(2, 40))]
        waiting = [MeasuredExample(e.numbers[0], len(e.tokens), len(e.tiles)) for e in examples]
        packed = []
        while waiting:
            chosen = choose_bin(waiting, config)
            packed.append([examples[waiting[i].position - 1] for i in chosen])
            waiting = [example for i, example in enumerate(waiting) if i not in chosen]
        batch = _pack(packed, config, per_tile)
        bins = {name: field.reshape(-1, *field.shape[2:]) for name, field in batch.items()}
        seen = []
        for row in range(len(bins["tokens"])):
            b = {name: field[row] for name, field in bins.items()}
            members = b["example_ids"][b["example_ids"] >= 0]
            seen += members.tolist()
            assert b["segment_ids"].max() == len(members) == b["num_examples"]
            used_tiles = int((b["tile_valid_hw"][:, 0] > 0).sum())
            # Every visual token of the bin's tiles is used once, in order; those of empty tiles are not used.
            visual = b["visual_index"][b["visual_index"] >= 0]
            np.testing.assert_array_equal(visual, np.arange(used_tiles * per_tile))
            tile = 0
            for segment, number in enumerate(members, start=1):
                example = examples[number - 1]
                here = b["segment_ids"] == segment
                assert np.ptp(np.flatnonzero(here)) + 1 == here.sum() == len(example.tokens)
                np.testing.assert_array_equal(b["tokens"][here], example.tokens)
                np.testing.assert_array_equal(b["positions"][here], np.arange(here.sum()))
                np.testing.assert_array_equal(b["loss_weights"][here], example.loss_weights)
                np.testing.assert_array_equal(b["targets"][here][:-1], example.tokens[1:])
                own = b["visual_index"][here]
                np.testing.assert_array_equal(own >= 0, example.visual_index >= 0)
                assert (own[own >= 0] // per_tile).tolist() == np.repeat(
                    np.arange(tile, tile + len(example.tiles)), per_tile
                ).tolist()
                assert (b["tiles"][tile : tile + len(example.tiles)] == number).all()
                tile += len(example.tiles)
            rest = b["segment_ids"] == 0
            assert (b["tokens"][rest] == PAD).all() and not b["loss_weights"][rest].any()
            assert (b["visual_index"][rest] == -1).all() and not b["tiles"][tile:].any()
        assert sorted(seen) == list(range(1, len(examples) + 1))


def test_example_that_does_not_fit_is_refused():
    with pytest.raises(UserError, match=r"8 tokens \(2 visual\), a bin holds 7"):
        check_fits(_chat("buiiqsXE"), 1, PackingConfig(tokens_per_bin=7))
    with pytest.raises(UserError, match="2 tiles, a bin holds 1"):
        check_fits(_chat("buiiiiqsXE"), 2, PackingConfig(tokens_per_bin=10, tiles_per_bin=1))
    check_fits(_chat("buiiiiqsXE"), 2, PackingConfig(tokens_per_bin=10, tiles_per_bin=2))


def test_text_is_cut_after_the_last_answer_that_fits():
    layout = "uiiqABqCDqEF"
    for limit, expected in [(10, layout), (9, "uiiqABqCD"), (7, "uiiqABqCD"), (6, "uiiqAB"), (4, "uiiqAB")]:
        cut = cut_text(_chat(layout), limit)
        np.testing.assert_array_equal(cut.tokens, _chat(expected).tokens)
        np.testing.assert_array_equal(cut.loss_weights, _chat(expected).loss_weights)
    # A later image is dropped with its turn, as a whole.
    np.testing.assert_array_equal(cut_text(_chat("uiiqABuiiiiCDuiiEF"), 7).tokens, _chat("uiiqABuiiiiCD").tokens)
    with pytest.raises(UserError, match="6 text tokens and no answer ends within the limit of 5"):
        cut_text(_chat("buiiqsXE"), 5)


def test_truncated_examples_are_counted():
    examples = [dataclasses.replace(_example(i, "uiiqAB"), num_cut=i < 2) for i in range(3)]
    batch = _pack([examples], PackingConfig(tokens_per_bin=20, bins_per_microbatch=1))
    assert batch["num_cut"].tolist() == [[2]] and batch["num_examples"].tolist() == [[3]]


def test_wrong_config():
    with pytest.raises(ValueError, match="tokens_per_bin"):
        PackingConfig(tokens_per_bin=0)


def test_example_is_immutable():
    example = _example(1, "buiiqsXE")
    assert isinstance(example, Example)
    with pytest.raises(AttributeError):
        example.numbers = (2,)


def test_anyres_sources_are_features_of_the_bin():
    """Two examples with one image each, of three and two visual tokens: sources are numbered through the bin."""
    examples = []
    for number, layout, tokens in ((1, "uiiisA", 3), (2, "uiisA", 2)):
        sources = np.tile(np.arange(tokens, dtype=np.int32)[:, None], (1, 4))
        sources[-1, 0] = -1  # a newline
        resampling = Resampling(sources, np.full((tokens, 4), 0.25, np.float32))
        examples.append(Example((number,), *_chat(layout), *_tiles(2, number), resampling=resampling))
    config = PackingConfig(tokens_per_bin=12, tiles_per_bin=4, bins_per_microbatch=1)
    batch = empty_batch(1, 1, config, tile_size=SIDE, pad_id=PAD, resampled=True)
    write_bin(batch, (0, 0), examples, 2)
    assert batch["visual_index"][0, 0].tolist() == [-1, 0, 1, 2, -1, -1, -1, 3, 4, -1, -1, -1]
    # The second example's features follow the first example's two tiles of two features each.
    assert batch["visual_sources"][0, 0, :, 1].tolist() == [0, 0, 1, 2, 0, 0, 0, 4, 5, 0, 0, 0]
    assert batch["visual_sources"][0, 0, :, 0].tolist() == [0, 0, 1, -1, 0, 0, 0, 4, -1, 0, 0, 0]
    assert batch["visual_weights"][0, 0].sum(axis=-1).tolist() == [0, 1, 1, 1, 0, 0, 0, 1, 1, 0, 0, 0]
