"""Packing: the worked example of the docstring, and what must hold for any examples."""

import numpy as np
import pytest

from alignvlm_jax.data.chat import EncodedChat
from alignvlm_jax.data.packing import Example, PackingConfig, Refused, assign_bins, fill, make_example, pack
from alignvlm_jax.errors import UserError

SIDE, PAD = 4, 99


def _chat(layout: str) -> EncodedChat:
    """'ii' image placeholders, lower case prompt, upper case answer: 'uiiqAB' -> tokens, weights, visual_index."""
    visual = np.array([letter == "i" for letter in layout])
    weights = np.array([letter.isupper() for letter in layout[1:]] + [False], np.float32)
    visual_index = np.where(visual, np.cumsum(visual) - 1, -1).astype(np.int32)
    return EncodedChat(np.array([ord(letter) - 64 for letter in layout], np.int32), weights, visual_index)


def _tiles(count, value=1):
    valid_hw = np.tile(np.array([[3, SIDE]], np.int32), (count, 1))
    return np.full((count, SIDE, SIDE, 3), value, np.uint8), valid_hw


def _example(number, layout, per_tile=2, **limits):
    config = PackingConfig(**{"tokens_per_bin": 100, "tiles_per_bin": 10, **limits.pop("config", {})})
    max_text_tokens = limits.pop("max_text_tokens", 1000)
    tiles = _tiles(layout.count("i") // per_tile, number)
    return make_example(
        number, _chat(layout), *tiles, config, tokens_per_tile=per_tile, max_text_tokens=max_text_tokens
    )


def test_worked_example():
    config = PackingConfig(tokens_per_bin=20, tiles_per_bin=4, bins_per_microbatch=1, examples_per_bin=3)
    first, second = _example(7, "buiiqsXE"), _example(4, "buiiiisYE")  # The larger goes first.
    batch = pack([first, second], config, tokens_per_tile=2, tile_size=SIDE, pad_id=PAD)
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
    assert fill(batch) == {"tokens": 17 / 20, "tiles": 3 / 4}
    assert batch["num_examples"].tolist() == [[2]]


def test_shapes_and_dtypes():
    config = PackingConfig(tokens_per_bin=12, tiles_per_bin=2, bins_per_microbatch=2, examples_per_bin=5)
    batch = pack([_example(i, "uiiqAE") for i in range(5)], config, tokens_per_tile=2, tile_size=SIDE, pad_id=PAD)
    # Two examples fill a bin of twelve: three bins, two microbatches, one empty bin.
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


def test_empty_steps_and_more_microbatches():
    config = PackingConfig(tokens_per_bin=12, tiles_per_bin=2, bins_per_microbatch=2, min_microbatches=3)
    batch = pack([Refused(0, "unreadable")] * 4, config, tokens_per_tile=2, tile_size=SIDE, pad_id=PAD)
    assert batch["tokens"].shape == (3, 2, 12)
    assert batch["num_refused"].sum() == 4 and batch["num_examples"].sum() == 0 and not batch["loss_weights"].any()


def _random_layout(rng, per_tile):
    layout = "b"
    for _ in range(rng.integers(1, 4)):
        layout += "i" * (per_tile * rng.integers(0, 3))
        layout += "q" * rng.integers(1, 6) + "A" * rng.integers(1, 9)
    return layout


def test_properties_of_random_batches():
    """Nothing dropped or changed, both budgets held, positions restart, visual tokens matched one to one."""
    rng = np.random.default_rng(0)
    for _ in range(100):
        per_tile = int(rng.integers(1, 4))
        config = PackingConfig(
            tokens_per_bin=int(rng.integers(60, 150)),
            tiles_per_bin=int(rng.integers(6, 12)),
            bins_per_microbatch=int(rng.integers(1, 4)),
            examples_per_bin=int(rng.integers(2, 8)),
        )
        limits = dict(tokens_per_bin=config.tokens_per_bin, tiles_per_bin=config.tiles_per_bin)
        examples = [
            _example(number, _random_layout(rng, per_tile), per_tile, config=limits)
            for number in range(1, rng.integers(2, 40))
        ]
        batch = pack(examples, config, tokens_per_tile=per_tile, tile_size=SIDE, pad_id=PAD)
        bins = {name: field.reshape(-1, *field.shape[2:]) for name, field in batch.items()}
        seen = []
        for row in range(len(bins["tokens"])):
            b = {name: field[row] for name, field in bins.items()}
            members = b["example_ids"][b["example_ids"] >= 0]
            seen += members.tolist()
            assert b["segment_ids"].max() == len(members) == b["num_examples"]
            used_tiles = int((b["tile_valid_hw"][:, 0] > 0).sum())
            # Every visual token of the bin's tiles is used once, in order, and none of an empty tile.
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


def test_first_fit_by_hand():
    config = PackingConfig(tokens_per_bin=10, tiles_per_bin=4)
    # By share: 3 (tiles 4/4), 0 (0.8), 1 (0.6), 4 (0.5 by tiles), 2 (0.4). 1 and 2 share a bin; 4 goes with 0.
    assert assign_bins([8, 6, 4, 1, 2], [1, 1, 1, 4, 2], config) == [[3], [0, 4], [1, 2]]
    assert assign_bins([], [], config) == []
    # The third limit.
    assert len(assign_bins([1] * 7, [0] * 7, PackingConfig(tokens_per_bin=10, examples_per_bin=3))) == 3


def test_what_does_not_fit_is_refused():
    with pytest.raises(UserError, match=r"8 tokens \(2 visual\), a bin holds 7"):
        _example(1, "buiiqsXE", config={"tokens_per_bin": 7})
    with pytest.raises(UserError, match="2 tiles, a bin holds 1"):
        _example(1, "buiiiiqsXE", config={"tiles_per_bin": 1})
    with pytest.raises(UserError, match="6 text tokens, the limit is 5 and no answer ends before it"):
        _example(1, "buiiqsXE", max_text_tokens=5)
    with pytest.raises(ValueError, match="3 visual tokens are not 2 for each"):
        _example(1, "buiiiqsXE")


def test_text_is_cut_after_the_last_answer_that_fits():
    layout = "uiiqABqCDqEF"
    whole = _example(1, layout, max_text_tokens=10)
    assert len(whole.tokens) == 12 and not whole.was_cut
    for limit, expected in [(9, "uiiqABqCD"), (7, "uiiqABqCD"), (6, "uiiqAB"), (4, "uiiqAB")]:
        example = _example(1, layout, max_text_tokens=limit)
        np.testing.assert_array_equal(example.tokens, _chat(expected).tokens)
        np.testing.assert_array_equal(example.loss_weights, _chat(expected).loss_weights)
        assert example.was_cut and len(example.tiles) == 1
    # A later picture goes with its turn, whole.
    example = _example(3, "uiiqABuiiiiCDuiiEF", max_text_tokens=6 + 1)
    np.testing.assert_array_equal(example.tokens, _chat("uiiqABuiiiiCD").tokens)
    assert len(example.tiles) == len(example.valid_hw) == 3
    batch = pack([example], PackingConfig(tokens_per_bin=20), tokens_per_tile=2, tile_size=SIDE, pad_id=PAD)
    assert batch["num_cut"].sum() == 1


def test_fills_well():
    """Pages of one to ten tiles and long and short text: few empty slots in the tighter of the two budgets."""
    rng = np.random.default_rng(0)
    config = PackingConfig(tokens_per_bin=4096, tiles_per_bin=20)
    tiles = rng.choice([1, 3, 5, 7, 10], 400)
    lengths = tiles * 144 + rng.integers(20, 900, 400)
    bins = assign_bins(lengths, tiles, config)
    assert sorted(i for members in bins for i in members) == list(range(400))
    assert max(lengths.sum() / len(bins) / 4096, tiles.sum() / len(bins) / 20) > 0.95


def test_wrong_config():
    with pytest.raises(ValueError, match="tokens_per_bin"):
        PackingConfig(tokens_per_bin=0)


def test_example_is_immutable():
    example = _example(1, "buiiqsXE")
    assert isinstance(example, Example)
    with pytest.raises(AttributeError):
        example.number = 2
