"""Trees and joined conversations: the page and its branches, limits, refusals, and the same batches everywhere."""

import dataclasses
import json

import numpy as np
import pytest

from alignvlm_jax.config.stages import MixturePart
from alignvlm_jax.data.chat import EncodedChat
from alignvlm_jax.data.feeding import Feed
from alignvlm_jax.data.packing import Example, PackingConfig, Refused, empty_batch, write_bin
from alignvlm_jax.data.pipeline import DataConfig, make_reader
from alignvlm_jax.data.planning import plan_stage
from alignvlm_jax.data.trees import Tree, join_branches, join_messages, joint_key, plan_trees
from tests.data.pages import PACKING, PER_TILE, TILING, TOKEN_GRID, pages, png_image, prepared, turn
from tests.data.test_feeding import ROWS, digest, read_batches
from tests.data.test_packing import _chat

PAD = 99


def _reader(chat, sources, mode="tree", mixture=None, max_text_tokens=120, max_turns=None, **packing):
    mixture = mixture or [MixturePart(name.partition("/")[0]) for name in sources]
    data = DataConfig(
        tiling=TILING,
        packing=dataclasses.replace(PACKING, **packing),
        group_questions=mode,
        max_turns=max_turns,
    )
    options = dict(seed=(3,), token_grid=TOKEN_GRID, max_text_tokens=max_text_tokens)
    return make_reader(sources, mixture, chat, data, **options)


def _questions(group, count, image=None, turns=1, **fields):
    """Returns records of one image, a question each."""
    image = image or png_image(group, (40, 40))
    return [
        prepared(0, *(turn(f"Total {j}-{k}?", f"{group}.{j}.{k}", int(k == 0)) for k in range(turns)))
        | {"images": [image], "id": f"{group}-{j}", **fields}
        for j in range(count)
    ]


def _examples(reader, position=0):
    """Returns the examples and refusals of a position, by the number of questions."""
    measured = reader.measure(position)
    refused = [found for found in measured if isinstance(found, Refused)]
    made = []
    for found in measured:
        if not isinstance(found, Refused):
            result = reader.make(found)
            made += [result] if isinstance(result, Example) else []
            refused += [] if isinstance(result, Example) else result
    return made, refused


def _learned(chat, example):
    """Returns the texts that the branches of an example learn."""
    ids = np.zeros(len(example.tokens), int) if example.branch_ids is None else example.branch_ids
    targets = np.flatnonzero(example.loss_weights) + 1
    return [chat.decode(example.tokens[[i for i in targets if ids[i] == branch]]) for branch in np.unique(ids[targets])]


def test_worked_example():
    chats = [_chat("buiiqsYE"), _chat("buiirsZZE")]
    config = PackingConfig(tokens_per_bin=16, tiles_per_bin=2, bins_per_microbatch=1, examples_per_bin=4)
    assert plan_trees(chats, ["a", "a"], config) == [Tree((0, 1), 4)]
    chat, branch_ids = join_branches(chats, 4)
    tiles, valid_hw = np.zeros((1, 4, 4, 3), np.uint8), np.ones((1, 2), np.int32)
    batch = empty_batch(1, 1, config, tile_size=4, pad_id=PAD, is_tree=True)
    write_bin(batch, (0, 0), [Example((4, 5), *chat, tiles, valid_hw, branch_ids=branch_ids)], 2)
    row = {name: field[0, 0] for name, field in batch.items()}
    letters = [chr(token + 64) if token != PAD else "p" for token in row["tokens"]]
    targets = [chr(token + 64) if token != PAD else "p" for token in row["targets"]]
    assert "".join(letters) == "buiiqsYErsZZEppp" and "".join(targets) == "uiipsYEpsZZEpppp"
    assert row["segment_ids"].tolist() == [1] * 13 + [0] * 3
    assert row["branch_ids"].tolist() == [0] * 4 + [1] * 4 + [2] * 5 + [0] * 3
    assert row["positions"].tolist() == [*range(8), 4, 5, 6, 7, 8, 0, 0, 0]
    assert row["loss_weights"].tolist() == [0, 0, 0, 0, 0, 1, 1, 0, 0, 1, 1, 1, 0, 0, 0, 0]
    assert row["example_ids"].tolist() == [4, 5, -1, -1] and row["num_examples"] == 2


def test_pages_and_branches_of_random_groups():
    """Every conversation is the page and its branch, no branch is cut, and the limits of a bin hold."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        config = PackingConfig(
            tokens_per_bin=40, branch_tokens_per_bin=int(rng.integers(4, 30)), examples_per_bin=int(rng.integers(1, 6))
        )
        chats = []
        for _ in range(rng.integers(1, 9)):
            first = "b" + "u" * int(rng.integers(0, 2)) + "ii" * int(rng.integers(0, 2))
            chats.append(_chat(first + "qr"[: rng.integers(0, 3)] + "s" + "Y" * int(rng.integers(1, 9)) + "E"))
        trees = plan_trees(chats, [0] * len(chats), config)
        assert sorted(i for tree in trees for i in tree.members) == list(range(len(chats)))
        for members, page in trees:
            if len(members) == 1:
                assert page == 0
                continue
            together, branch_ids = join_branches([chats[i] for i in members], page)
            assert len(together.tokens) <= 40 and len(members) <= config.examples_per_bin
            assert np.count_nonzero(branch_ids) <= config.branch_tokens
            assert (
                not together.loss_weights[branch_ids == 0].any() and (together.visual_index[branch_ids > 0] < 0).all()
            )
            for branch, i in enumerate(members, start=1):
                own = (branch_ids == 0) | (branch_ids == branch)
                for field, alone in zip(EncodedChat(*(field[own] for field in together)), chats[i], strict=True):
                    np.testing.assert_array_equal(field, alone)


def test_conversations_that_cannot_share_a_page_stay_alone():
    config = PackingConfig(tokens_per_bin=40, branch_tokens_per_bin=6)
    text, image_last, long = _chat("bqsYE"), _chat("bqiisYE"), _chat("buiiqsYYYYYYE")
    chats = [text, text, image_last, _chat("briisYE"), long, _chat("buiiqsYE"), _chat("buiirYE"), _chat("buiiYE")]
    images = [(), (), *["a"] * 5, "b"]
    alone = [Tree((i,)) for i in (0, 1, 2, 3, 4, 5, 6, 7)]
    # The two short ones need seven tokens together; with one more they are a tree.
    assert sorted(plan_trees(chats, images, config)) == alone
    trees = plan_trees(chats, images, dataclasses.replace(config, branch_tokens_per_bin=7))
    assert sorted(trees) == [*alone[:5], Tree((5, 6), 4), alone[7]]


def test_questions_of_a_page_and_records_of_an_image_are_branches(chat):
    documents = pages(4)
    reader = _reader(chat, {"documents/train": documents}, mixture=[MixturePart("documents", task="qa")])
    for position in range(4):
        (example,), refused = _examples(reader, position)
        record = documents[example.numbers[0]]
        assert sorted(_learned(chat, example)) == sorted(record["answers"]) and not refused
        assert example.numbers == (example.numbers[0],) * len(record["questions"])
        assert np.sum(example.visual_index >= 0) == PER_TILE * len(example.tiles)
    # The turns of a record stay together, because later ones may refer to earlier ones.
    records = [*_questions(1, 2, turns=2), *_questions(2, 1), *_questions(1, 1, turns=2)]
    reader = _reader(chat, {"a/train": records})
    assert reader.num_groups == 2
    for position in range(2):
        (example,), _ = _examples(reader, position)
        expected = {f"{n}.{int(records[n]['id'][-1])}" for n in example.numbers}
        assert sorted(example.numbers) in ([0, 1, 3], [2]) and len(expected) <= 3
        answers = [
            "".join(m["content"] for m in json.loads(records[n]["conversation"]) if m["role"] == "assistant")
            for n in example.numbers
        ]
        assert _learned(chat, example) == answers


def test_bad_record_costs_its_branch_and_bad_image_its_tree(chat):
    records = _questions(1, 4)
    records[2]["conversation"] = "[]"
    (example,), (refused,) = _examples(_reader(chat, {"a/train": records}))
    assert sorted(example.numbers) == [0, 1, 3] and refused.id == "1-2" and "0 image marks" in refused.reason
    # One question of a page is no text.
    page = pages(1)[0] | {"questions": ["a?", None, "c?"], "answers": ["1", "2", "3"]}
    reader = _reader(chat, {"a/train": [page]}, mixture=[MixturePart("a", task="qa")])
    (example,), (refused,) = _examples(reader)
    assert sorted(_learned(chat, example)) == ["1", "3"] and "NoneType" in refused.reason
    # The header of the image is good and its pixels are not, or it is no image at all.
    for image in (png_image(1, (40, 40))[:-40], b"not a picture"):
        made, refused = _examples(_reader(chat, {"a/train": _questions(1, 4, image)}))
        assert not made and sorted(found.id for found in refused) == [f"1-{j}" for j in range(4)]


def test_limits_hold_for_each_branch(chat):
    records = _questions(1, 3, turns=3)
    (whole,), _ = _examples(_reader(chat, {"a/train": records}, tokens_per_bin=400, max_text_tokens=100))
    (example,), _ = _examples(_reader(chat, {"a/train": records}, max_turns=1))
    assert len(example.numbers) == 3 and sorted(_learned(chat, example)) == ["1.0.0", "1.1.0", "1.2.0"]
    text = len(whole.tokens) - np.count_nonzero(whole.branch_ids > 1) - PER_TILE * len(whole.tiles)
    (example,), _ = _examples(_reader(chat, {"a/train": records}, max_text_tokens=int(text) - 1))
    assert example.num_cut == 3 and sorted(_learned(chat, example)) == [f"1.{j}.01.{j}.1" for j in range(3)]


@pytest.mark.parametrize("mode", ["tree", "conversation"])
def test_large_groups_are_split_and_never_cut(chat, mode):
    records = _questions(1, 30)
    reader = _reader(chat, {"a/train": records}, mode, branch_tokens_per_bin=50, max_text_tokens=60)
    found = []
    for position in range(reader.num_groups):
        examples, refused = _examples(reader, position)
        assert not refused and all(len(example.numbers) > 1 for example in examples[:-1])
        for example in examples:
            found += example.numbers
            assert "".join(_learned(chat, example)) == "".join(f"1.{n}.0" for n in example.numbers)
            assert len(example.tokens) <= PACKING.tokens_per_bin and len(example.numbers) <= PACKING.examples_per_bin
            assert not example.num_cut and np.sum(example.visual_index < 0) <= 60 or mode == "tree"
            assert example.branch_ids is None or np.count_nonzero(example.branch_ids) <= 50
    assert sorted(found) == list(range(30)) and len(found) > reader.num_groups


def test_records_that_only_seem_to_show_one_image_share_no_page(chat, monkeypatch):
    from alignvlm_jax.data import groups

    records = [*_questions(1, 2), *_questions(2, 2)]
    monkeypatch.setattr(groups, "_scan_record", lambda record: (b"collides", 1))
    reader = _reader(chat, {"a/train": records})
    assert reader.num_groups == 1
    examples, _ = _examples(reader)
    assert sorted(sorted(example.numbers) for example in examples) == [[0, 1], [2, 3]]
    assert all((example.tiles == 1 + example.numbers[0] // 2).all() for example in examples)


def test_joined_conversation_shows_its_images_once(chat):
    records = [*_questions(1, 3), *pages(0)]
    (example,), _ = _examples(_reader(chat, {"a/train": records}, "conversation"))
    assert sorted(example.numbers) == [0, 1, 2] and len(example.tiles) * PER_TILE == np.sum(example.visual_index >= 0)
    assert _learned(chat, example) == ["".join(f"1.{n}.0" for n in example.numbers)]
    orders = {_examples(_reader(chat, {"a/train": records}, "conversation"), i)[0][0].numbers for i in range(8)}
    assert len(orders) > 2, "the order is drawn anew in every epoch"
    one, two = turn("What?", "a", 1), [{"role": "system", "content": "Be brief."}, *turn("Who?", "b", 1)]
    assert joint_key(one) is not None and joint_key(one) != joint_key(two)
    assert joint_key(turn("", "caption", 1)) is None and joint_key([*one, *turn("And here?", "c", 1)]) is None
    assert [message["role"] for message in join_messages([two, two])] == ["system"] + ["user", "assistant"] * 2


def _mixture():
    """Returns data sets of pages and of conversations, with bad records, in groups of one to five."""
    rng = np.random.default_rng(5)
    records = [record for i in range(12) for record in _questions(i, int(rng.integers(1, 6)))]
    records[4]["conversation"] = "[]"
    records += [prepared(i, turn(f"What is {i} + 1?", f"{i + 1}")) for i in range(6)]
    documents = pages(11)
    documents[5]["image"] = b"not a picture"
    mixture = [MixturePart("a", weight=2.0), MixturePart("b", task="mixed", weight=1.0)]
    return {"a/train": records, "b/train": documents}, mixture


STEPS, MICROBATCHES = 4, 1


@pytest.fixture(scope="module", params=["tree", "conversation"])
def examples(request, chat):
    sources, mixture = _mixture()
    return _reader(chat, sources, request.param, mixture, branch_tokens_per_bin=80)


@pytest.fixture(scope="module")
def reference(examples):
    return read_batches(Feed(examples, ROWS, MICROBATCHES), STEPS)


@pytest.mark.parametrize("hosts", [2, 4])
def test_any_number_of_hosts_sees_the_same_batches(examples, reference, hosts):
    made = [
        read_batches(Feed(examples, share.tolist(), MICROBATCHES, threads=3), STEPS)
        for share in np.split(np.array(ROWS), hosts)
    ]
    for step in range(STEPS):
        joined = {name: np.concatenate([batches[step][name] for batches, _ in made], 1) for name in reference[0][step]}
        assert digest(joined) == digest(reference[0][step])
        assert {row: state for _, states in made for row, state in states[step].items()} == reference[1][step]


def test_resuming_at_any_step_is_exact(examples, reference):
    for stop in (1, 3):
        batches, _ = read_batches(Feed(examples, ROWS, MICROBATCHES, reference[1][stop - 1]), STEPS - stop)
        assert list(map(digest, batches)) == list(map(digest, reference[0][stop:]))


def test_worker_processes_make_the_same_batches(examples, reference):
    if examples.grouping != "tree":
        return  # the start of a process takes a second
    batches, states = read_batches(Feed(examples, ROWS, MICROBATCHES, workers=1), 2)
    assert list(map(digest, batches)) == list(map(digest, reference[0][:2])) and states == reference[1][:2]


def test_weights_limits_and_counts_refer_to_questions(examples, reference):
    for batch in reference[0]:
        assert ("branch_ids" in batch) == (examples.grouping == "tree")
        if "branch_ids" in batch:
            assert (batch["branch_ids"] > 0).sum(axis=-1).max() <= 80 and batch["branch_ids"].max() > 1
        np.testing.assert_array_equal(batch["num_examples"], (batch["example_ids"] >= 0).sum(axis=-1))
    # A long stretch of the order has two questions of the first part for one of the second.
    questions = [0.0, 0.0]
    for position in range(2048):
        part, group = examples.order[position]
        for index in examples.parts[part].groups[group]:
            if examples.grouping == "tree" and part == 1:
                questions[part] += (1 + len(examples.parts[part].records[index]["questions"])) / 2
            else:
                questions[part] += 1
    assert questions[0] / questions[1] == pytest.approx(2.0, rel=0.02)


def test_an_epoch_has_every_question_once(chat):
    documents = pages(40)
    reader = _reader(chat, {"b/train": documents}, mixture=[MixturePart("b", task="qa")])
    plan = plan_stage(reader, global_batch=16, epochs=2.0, progress=False)
    feed = Feed(reader, ROWS, plan.microbatches, num_positions=plan.num_positions, max_refused=0.0)
    batches = [next(feed) for _ in range(plan.steps)]
    assert feed.name(int(batches[0]["example_ids"][0, 0, 0])).endswith(" of b/train")
    feed.close()
    numbers = np.concatenate([batch["example_ids"].ravel() for batch in batches])
    expected = [2 * len(record["questions"]) for record in documents]
    np.testing.assert_array_equal(np.bincount(numbers[numbers >= 0], minlength=40), expected)
    used_bins = sum(np.count_nonzero(batch["num_examples"]) for batch in batches)
    assert plan.examples_per_bin == pytest.approx(sum(expected) / used_bins, rel=0.15)
    assert sum(expected) / plan.steps == pytest.approx(16, rel=0.4), "a batch counts questions"
