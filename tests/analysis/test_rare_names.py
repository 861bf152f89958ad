"""Tests of the rare names analysis on answers with a known effect of rarity, and of the shipped model."""

import json

import numpy as np
import pytest

import alignvlm_jax
from alignvlm_jax.analysis.rare_names import report
from alignvlm_jax.analysis.rare_names.answers import ask_decoder
from alignvlm_jax.analysis.rare_names.kinds import NameAnswer, classify, count_endings, distinguishing_letters
from alignvlm_jax.analysis.rare_names.measure import compare, letter_agreement, summarize
from alignvlm_jax.analysis.rare_names.run import run
from alignvlm_jax.data.synthetic.names import COUNTS, build_names_corpus, draw_lexicon
from alignvlm_jax.errors import UserError
from alignvlm_jax.evaluation.report import Answer

LEXICON = draw_lexicon(0, 12)
NAMES = {(name.group, name.seen): name for name in LEXICON}


def answer(name, predicted, page="p"):
    return Answer(page, "names", "cmtt10", "What is the name?", name.text, predicted)


def simulate(error_of, per_name=20, toward=None, seed=0):
    """Returns answers that are wrong at the rate `error_of(seen)`; `toward(name, rng)` gives the wrong answer."""
    rng = np.random.default_rng(seed)
    answers = []
    for number, name in enumerate(LEXICON * per_name):
        wrong = rng.random() < error_of(name.seen)
        predicted = (toward(name, rng) if toward and name.has_look_alikes else "XX") if wrong else name.text
        answers.append(answer(name, predicted, page=str(number)))
    return classify(answers, LEXICON)


def test_every_kind_of_answer_is_recognized():
    rare, common, middle = NAMES[0, 1], NAMES[0, 256], NAMES[0, 16]
    other, loner = NAMES[1, 64], NAMES[11, 4]
    answers = [
        answer(middle, middle.text + " "),
        answer(middle, common.text),
        answer(middle, rare.text),
        answer(middle, other.text),
        answer(middle, loner.text),
        answer(middle, "Q" + middle.text),
        answer(loner, "Total"),
        Answer("p", "names", "cmtt10", "What is the fee?", "3.20", "3.20"),
    ]
    kinds = [answer.kind for answer in classify(answers, LEXICON)]
    kept = ["right", "commoner look-alike", "rarer look-alike", "another name", "elsewhere on the page"]
    assert kinds == [*kept, "garble", "garble"]  # the loner is printed on that page, the fee is not a name


def test_answers_with_another_names_ending():
    rare, common = NAMES[7, 1], NAMES[8, 256]  # without look-alikes
    stump = "QQ"
    found = classify(
        [
            answer(rare, stump + common.text[-3:]),
            answer(common, stump + rare.text[-3:]),
            answer(rare, stump + rare.text[-3:]),  # the ending of the name itself
            answer(rare, stump + common.text[-2:]),  # two letters do not count as an ending
            answer(rare, stump + NAMES[9, 1].text[-3:]),  # neither more common nor rarer
        ],
        LEXICON,
    )
    assert [answer.kind for answer in found] == ["commoner ending", "rarer ending", "garble", "garble", "garble"]
    pull = summarize(found)["all"]["pull_of_endings"]
    assert (pull["commoner"], pull["rarer"], pull["value"]) == (1, 1, 0.5)

    # Look-alikes that share their last letters also share the count of that ending.
    endings, letters = count_endings(LEXICON), distinguishing_letters(LEXICON)
    texts = {group: NAMES[group, 4].text for group in letters}
    alike = [texts[group] for group, (position, _) in letters.items() if position < len(texts[group]) - 3]
    assert alike and {endings[text[-3:]] for text in alike} == {sum(COUNTS)}


def test_random_endings_are_not_taken_for_a_pull():
    def ending(name, rng):
        return "QQ" + LEXICON[rng.integers(len(LEXICON))].text[-3:]

    answers = simulate(lambda seen: 0.5, toward=ending)
    pull = summarize(answers)["all"]["pull_of_endings"]
    assert pull["commoner"] + pull["rarer"] > 100 and pull["low"] < 0.5 < pull["high"]


def test_error_by_count_is_the_share_of_wrong_answers():
    results = summarize(simulate(lambda seen: 0.0 if seen >= 64 else 1.0))
    rows = results["all"]["by_count"]
    assert [row["seen"] for row in rows] == list(COUNTS) and {row["questions"] for row in rows} == {240}
    assert [row["error"]["value"] for row in rows] == [1, 1, 1, 1, 0, 0]
    assert results["all"]["error"]["value"] == pytest.approx(4 / 6, abs=1e-4)
    assert results["all"]["rarity_gap"] == {"value": 1, "low": 1, "high": 1}
    assert results["loners"]["by_count"][0]["wrong"]["garble"] == 120
    json.dumps(results, allow_nan=False)


def test_chance_is_not_taken_for_an_effect_of_rarity():
    """The interval of the gap contains 0 in about 95 of 100 simulations without an effect."""
    inside = 0
    for seed in range(40):
        gap = summarize(simulate(lambda seen: 0.3, per_name=2, seed=seed))["all"]["rarity_gap"]
        inside += gap["low"] <= 0 <= gap["high"]
    assert inside >= 34


def test_pull_is_a_half_by_chance_and_one_where_common_names_attract():
    def anyone(name, rng):
        return NAMES[name.group, rng.choice([seen for seen in COUNTS if seen != name.seen])].text

    def the_commonest(name, rng):
        return NAMES[name.group, 256 if name.seen != 256 else 64].text

    fair = summarize(simulate(lambda seen: 0.5, toward=anyone))["look-alikes"]["pull"]
    assert fair["low"] < 0.5 < fair["high"] and fair["high"] - fair["low"] < 0.2
    pulled = simulate(lambda seen: 0.5 if seen < 256 else 0.0, toward=the_commonest)
    summary = summarize(pulled)
    assert summary["look-alikes"]["pull"]["value"] == 1 and summary["look-alikes"]["pull"]["rarer"] == 0
    assert summary["loners"]["pull"]["value"] is None
    assert "rarity hurts" in report.describe({"model": summary})


def test_two_models_are_compared_group_by_group():
    worse, better = simulate(lambda seen: 0.5 if seen <= 1 else 0.1), simulate(lambda seen: 0.1, seed=1)
    difference = compare(worse, better)
    assert difference["error_on_rare"]["high"] < -0.3 and difference["rarity_gap"]["high"] < -0.2
    assert difference["error_on_common"]["low"] < 0 < difference["error_on_common"]["high"]
    assert "wider by -36.5" in report.describe_comparison("A", {"B": difference})
    with pytest.raises(UserError, match="different names"):
        compare(worse, [answer for answer in better if answer.name.group < 3])


def test_letters_that_distinguish_look_alikes():
    letters = distinguishing_letters(LEXICON)
    assert sorted(letters) == list(range(6))
    for group, (position, choices) in letters.items():
        members = [name.text for name in LEXICON if name.group == group]
        assert [text[position] for text in members] == list(choices) and len(set(choices)) == 6
        assert len({text[:position] + text[position + 1 :] for text in members}) == 1


def test_letter_agreement_counts_the_letters_of_the_tokens():
    rare, common = NAMES[0, 1], NAMES[0, 256]
    position, _ = distinguishing_letters(LEXICON)[0]
    answers = [NameAnswer("p", rare, rare.text, "right", rare.text[position])]
    answers += [
        NameAnswer("p", rare, common.text, "commoner look-alike", text[position])
        for text in (rare.text, common.text, common.text)
    ]
    agreement = letter_agreement(answers, LEXICON)
    assert agreement["right"]["share"] == 1
    assert agreement["pulled"]["share"] == pytest.approx(1 / 3, abs=1e-4)
    assert agreement["pulled, to the letter answered"]["share"] == pytest.approx(2 / 3, abs=1e-4)
    assert agreement["by_count"]["1"]["answers"] == 4 and agreement["by_count"]["4"]["share"] is None


def test_kinds_of_answers_that_do_not_occur_are_not_described():
    rare, common = NAMES[0, 1], NAMES[0, 256]
    position, _ = distinguishing_letters(LEXICON)[0]
    right = NameAnswer("p", rare, rare.text, "right", rare.text[position])
    pulled = NameAnswer("p", rare, common.text, "commoner look-alike", rare.text[position])
    summary = summarize(simulate(lambda seen: 0.1))

    def described(*answers):
        agreement = letter_agreement(answers, LEXICON)
        text = report.describe({"model": summary, "decoder alone": summary, "tokens say the true letter": agreement})
        return text.partition(" for a rarer one).")[2].partition("the visual tokens are ")[2]

    in_right, in_pulled = "in 100 % (of 1) of right answers", "in 100 % (of 1) of answers pulled to a more common name"
    overruled = ": in the latter, the decoder overruled the visual tokens."
    assert described(right, pulled) == f"nearest to the true letter {in_right} and {in_pulled}{overruled}"
    assert described(right) == f"nearest to the true letter {in_right}."
    assert described() == ""


def test_the_shipped_model_is_analyzed(tmp_path):
    folder = build_names_corpus(tmp_path / "data", groups=6, splits=("heldout",), progress=False, processes=1)
    run(["nano"], folder, tmp_path / "out", limit=40, views=2)
    written = json.loads((tmp_path / "out" / "names.json").read_text())
    results = written["models"]["ALIGN"]
    assert report.describe(results) in (tmp_path / "out" / "names.md").read_text()
    assert (tmp_path / "out" / "names.png").stat().st_size > 5_000
    # The model reads; otherwise the measures would mean nothing.
    assert results["model"]["all"]["error"]["value"] < 0.7
    assert results["decoder alone"]["all"]["error"]["value"] < results["model"]["all"]["error"]["value"] + 0.1
    assert results["tokens say the true letter"]["right"]["share"] > 0.9
    again = [NameAnswer.from_json(fields) for fields in results["answers"]]
    assert summarize(again) == results["model"]
    two_views = written["models"]["ALIGN, 2 views"]
    assert len(two_views["answers"]) == len(results["answers"]) and two_views["answers"] != results["answers"]
    assert "decoder alone" not in two_views
    compared = written["compared with ALIGN"]["ALIGN, 2 views"]
    difference = two_views["model"]["all"]["error"]["value"] - results["model"]["all"]["error"]["value"]
    assert compared["error"]["value"] == pytest.approx(difference, abs=1e-3)


def test_a_model_without_a_token_for_each_patch_is_refused():
    reader = alignvlm_jax.load("nano")
    reader.config = type("Config", (), {**vars(reader.config)})()
    reader.config.newline = True
    with pytest.raises(UserError, match="one visual token for each patch"):
        ask_decoder(reader, "anywhere")
