"""Tests of the metrics against results of the official scorers.

The rows of the tables were run through the official scorers' own code, outside this repository. The comments name the
scorer and explain single rows.
"""

import sys
import time

import pytest
import spacy

from alignvlm_jax.errors import UserError
from alignvlm_jax.evaluation import metrics
from alignvlm_jax.evaluation.metrics import restoration

# ANLS: the RRC script.


@pytest.mark.parametrize(
    ("prediction", "references", "score"),
    [
        ("kitten", ["sitting"], 1 - 3 / 7),
        ("sitting", ["kitten"], 1 - 3 / 7),
        ("flaw", ["lawn"], 0.5),
        ("ab", ["abc"], 1 - 1 / 3),
        ("Mill  ROAD\n", ["mill road"], 1.0),
        ("mill road", ["hill road", "mill road", "x"], 1.0),
        ("15", ["16"], 0.5),  # exactly 0.5 is kept,
        ("150", ["169"], 0.0),  # 1/3 is not
        ("1,000", ["1000"], 0.8),  # no normalization of commas, articles or accents
        ("the cat", ["cat"], 0.0),
        ("cafe", ["café"], 0.75),
        ("", ["x"], 0.0),
        ("", [""], 1.0),
        ("  ", [""], 1.0),
        ("      ", ["ab"], 1 - 2 / 6),  # the flaw: spaces increase only the denominator
        ("ax" + " " * 8, ["bc"], 1 - 2 / 10),
        ("ß", ["s"], 0.5),  # one replaced letter, divided by the two letters of "SS"
        ("b, a", ["a, b"], 0.5),  # a list is one string
    ],
)
def test_anls(prediction, references, score):
    assert metrics.anls(prediction, references) == pytest.approx(score)


# ChartQA: pix2struct's relaxed_correctness. The first five rows come from its own test.


@pytest.mark.parametrize(
    ("prediction", "reference", "right"),
    [
        ("Abc", "abc", True),
        ("100%", "96%", True),
        ("100%", "94%", False),
        ("100%", "0.96", True),
        ("Don't", "Won't", False),
        ("50%", "0.5", True),
        ("50%", "50", False),
        ("50%%%", "0.5", True),
        ("50 %", "50%", True),
        ("%", "%", True),
        ("0.0", "0", False),  # a reference of zero is compared as text,
        ("0", "0", True),
        ("0%", "0", False),
        ("0", "0.1", False),  # a prediction of zero as a number
        ("1,000", "1000", False),
        ("$5", "5", False),
        ("five", "5", False),
        ("5 m", "5", False),
        ("1_000", "1000", True),  # Python's float accepts it
        ("１０", "10", True),
        ("1e3", "1000", True),
        (" 10\n", "10", True),
        (" yes", "yes", False),  # texts are not stripped
        ("Yes.", "Yes", False),
        ("nan", "nan", False),
        ("inf", "inf", False),
        ("0.95", "1", False),  # slightly more than 0.05 in floating point
        ("0.21", "0.2", True),  # slightly less than 0.05
        ("105", "100", True),
        ("105.2", "100", False),  # the tolerance is relative to the reference
        ("95", "100", True),
        ("-105", "-100", True),
        ("100", "-100", False),
        ("1999", "2019", True),
    ],
)
def test_relaxed_accuracy(prediction, reference, right):
    assert metrics.relaxed_accuracy(prediction, [reference]) == float(right)


def test_relaxed_accuracy_takes_the_best_reference():
    assert metrics.relaxed_accuracy("7", ["cat", "7.1"]) == 1
    assert metrics.relaxed_accuracy("8", ["cat", "7.1"]) == 0


# TextVQA: mmf's EvalAIAnswerProcessor and TextVQAAccuracyEvaluator.


@pytest.mark.parametrize(
    ("text", "normalized"),
    [
        ("The RED Car!", "red car"),
        ("red,white", "redwhite"),
        ("what?ever", "whatever"),
        ("1,000", "1000"),
        ("5.", "5"),
        ("5.5.", "5.5"),
        (".5", ".5"),
        ("a.m.", "am"),
        ("red-blue", "red blue"),
        ("red - blue-green", "red bluegreen"),
        ("blue-green-", "blue green"),
        ("-5", "5"),
        ("and/or", "and or"),
        ("x@y_z", "x y z"),
        ('"hi"', "hi"),
        ("a\nb\tc", "b c"),
        ("$5 50% #1 & * b:c it’s", "$5 50% #1 & * b:c it’s"),
        ("none", "0"),
        ("zero Ten eleven", "0 10 eleven"),
        ("vitamin a", "vitamin"),
        ("an apple", "apple"),
        ("dont", "don't"),
        ("couldntve couldn'tve couldnt've", "couldntve couldn't've couldn't've"),
        ("whats", "what's"),
        ("what's", "what 's"),
        ("Im Ive Id've", "im ive id've"),
        ("somebody'd somebodyd've", "somebodyd somebody'd've"),
        ("yall'd've twas oclock ow's'at", "y'all'd've 'twas o'clock ow 's'at"),
        ("the", ""),
        ("!", ""),
        ("x" + "." * 40, "x" + "." * 8),  # 32 periods are deleted
    ],
)
def test_evalai_normalize(text, normalized):
    assert metrics.evalai_normalize(text) == normalized


def test_vqa_accuracy_is_three_tenths_per_person():
    for people, score in enumerate([0, 0.3, 0.6, 0.9, 1, 1]):
        references = ["Red."] * people + [f"other {i}" for i in range(10 - people)]
        assert metrics.vqa_accuracy("the red", references) == pytest.approx(score)


def test_vqa_accuracy_of_an_empty_answer_matches_references_that_normalize_to_nothing():
    assert metrics.vqa_accuracy("", ["the"] + ["x"] * 9) == pytest.approx(0.3)
    assert metrics.vqa_accuracy("", ["x"] * 10) == 0


def test_vqa_accuracy_needs_ten_references():
    with pytest.raises(metrics.ScorerAborted, match="needs 10 references, got 9"):
        metrics.vqa_accuracy("x", ["x"] * 9)


# DUE: its evaluator's F1.


def test_due_f1_as_in_the_evaluators_own_tests():
    # test_fscorer.py: three of four values are right. (There, the fourth differs in case, and case counts.)
    expected = [[("date", ["2017"]), ("place", ["Ohio"]), ("party", ["Wells"]), ("party", ["Lsi Inc."])]]
    predicted = [[("date", "2017"), ("place", "Ohio"), ("party", "Lsi Inc."), ("party", "Bells")]]
    assert metrics.due_f1(predicted, expected) == pytest.approx(3 / 4)
    # test_due_evaluator.py: three right values, five predicted, six expected.
    expected = [[("a", ["yes"]), ("b", ["2012"]), ("c", ["JDA"]), ("d", ["Delaware"]), ("e", ["Red"]), ("f", ["2 y"])]]
    predicted = [[("a", "yes"), ("b", "2011"), ("d", "New York"), ("c", "JDA"), ("e", "Red")]]
    assert metrics.due_f1(predicted, expected) == pytest.approx(6 / 11)


@pytest.mark.parametrize(
    ("predicted", "expected", "score"),
    [
        ([("k", "main st")], [("k", ["MAIN St"])], 1.0),
        ([("k", "strasse")], [("k", ["Straße"])], 1.0),  # both are STRASSE in upper case
        ([("K", "v")], [("k", ["v"])], 0.0),  # the case of keys counts
        ([("k", "v ")], [("k", ["v"])], 0.0),
        ([("k", "1000")], [("k", ["1,000"])], 0.0),
        ([("k", "b")], [("k", ["a", "b"])], 1.0),
        ([("k", "a | b")], [("k", ["a"]), ("k", ["b"])], 0.0),
        ([("k", "v"), ("k", "v")], [("k", ["v"])], 2 / 3),  # precision 1/2, recall 1
        ([("k", "v"), ("j", "")], [("k", ["v"])], 2 / 3),  # an empty string is a prediction
        ([("k", "")], [("k", [""])], 1.0),
        ([("k", "v")], [("k", ["v"]), ("j", [])], 1.0),  # j has no value to find
        ([("k", "ab")], [("k", "AB")], 1.0),  # a string is the only accepted value,
        ([("k", "a")], [("k", "ab")], 0.0),  # not a list of letters
        # x takes the value that y needs: 1 of 2, although both could be paired.
        ([("k", "x"), ("k", "y")], [("k", ["x", "y"]), ("k", ["x"])], 0.5),
        ([("k", "x"), ("k", "y")], [("k", ["x"]), ("k", ["x", "y"])], 1.0),
    ],
)
def test_due_f1_within_a_document(predicted, expected, score):
    assert metrics.due_f1([predicted], [expected]) == pytest.approx(score)


def test_due_f1_is_micro_and_pairs_by_position():
    right, wrong = [("k", "v")], [("k", "w"), ("j", "w"), ("i", "w")]
    expected = [("k", ["v"])]
    # 1 of 4 predictions is right, and 1 of 2 values is found. The mean over documents would be 1/2.
    assert metrics.due_f1([right, wrong], [expected, expected]) == pytest.approx(2 * 0.25 * 0.5 / 0.75)
    assert metrics.due_f1([right, []], [expected, []]) == 1
    assert metrics.due_f1([[], right], [expected, []]) == 0
    assert metrics.due_f1([right], [expected, expected, expected]) == 1
    assert metrics.due_f1([right, wrong], [expected]) == 1
    assert metrics.due_f1([], []) == 0


# WikiTableQuestions: evaluator.py 1.0.2 on Python 2.7.18.


@pytest.mark.parametrize(
    ("items", "targets", "canon", "right"),
    [
        (["University of Virginia†‡*"], ["university of virginia"], None, True),
        (["café"], ["CAFE"], None, True),
        (["“Rome’s”"], ["Rome's"], None, True),
        (["1–2"], ["1-2"], None, True),
        (["Paris[1][n 2]"], ["Paris"], None, True),
        (["[12]"], [""], None, True),
        (["[n]"], [""], None, False),  # a bracket at the start, without digits
        (["[٣]"], [""], None, False),  # not a digit in Python 2
        (["Rome (city) (Italy)"], ["Rome"], None, True),
        (["(Italy)"], ["Italy"], None, False),
        (["Italy (ITA)."], ["Italy"], None, False),
        (["Italy (ITA)."], ["Italy (ITA)"], None, False),  # only the target loses its bracket
        (["a  b. "], ["A b"], None, True),
        (["a.."], ["a"], None, False),
        (["C++"], ["C"], None, True),
        (["ΟΔΟΣ"], ["οδοσ"], None, True),
        (["ΟΔΟΣ"], ["οδος"], None, False),
        (["4"], ["4 events"], ["4"], True),
        (["4"], ["4 events"], None, False),
        (["4"], ["4 events"], [""], False),
        (["4 events"], ["4 events"], ["4"], True),
        (["4.0000001"], ["four"], ["4"], True),
        (["3.9999999"], ["3"], None, True),
        (["3.9999999"], ["4"], None, False),
        (["2.5000009"], ["2.5"], None, True),
        (["2.500002"], ["2.5"], None, False),
        (["1e3"], ["1000"], None, True),
        (["1,000"], ["1000"], None, False),
        (["5%"], ["5"], None, False),
        (["$5"], ["5"], None, False),
        (["１２"], ["12"], None, True),
        (["1_000"], ["1000"], None, False),
        (["- 5"], ["-5"], None, True),
        (["- 5.5"], ["-5.5"], None, False),
        (["\x1c2.5"], ["2.5"], None, True),
        (["nan"], ["NaN"], None, True),  # texts
        (["inf"], ["infinity"], None, False),
        (["1990-01-02"], ["January 2, 1990"], ["1990-01-02"], True),
        (["1990-1-2"], ["January 2, 1990"], ["1990-01-02"], True),
        (["xx-01-02"], ["January 2, 1990"], ["1990-01-02"], False),
        (["1990-01-xx"], ["January 1990"], ["1990-01-XX"], True),
        (["xxxx-01-02"], ["January 2"], ["xx-1-2"], True),
        (["1990-xx-xx"], ["1990"], None, True),
        (["1990-xxxx-02"], ["1990-xx-02"], None, False),
        (["1990-13-01"], ["1990-13-1"], None, False),
        (["1990-01-32"], ["1990-1-32"], None, False),
        (["xx-xx-xx"], ["XX-xx-xx"], None, True),  # a text
        (["3-2-1"], ["03-02-01"], None, True),
        (["a", "b"], ["b", "A"], None, True),
        (["a", "b"], ["a"], None, False),
        (["a", "A"], ["a"], None, True),
        (["1", "1.0"], ["1"], None, True),
        (["1", "one"], ["1", "1.0"], None, False),
        (["x.", "y"], ["x", "x (z)"], None, False),  # one target, two items
        (["a|b"], ["a", "b"], None, False),
        ([], ["a"], None, False),
        ([""], ["a"], None, False),
        ([""], ["*"], None, True),
        ([""], [""], ["4"], False),
        ([""], [""], ["1990-01-02"], False),
        # Of equal numbers, the first one and its spelling are kept.
        (["7", "7.0 "], ["seven"], ["7"], True),
        (["7 (x)", "b"], ["7", "7.0"], ["7", "9"], False),
    ],
)
def test_wtq_denotation(items, targets, canon, right):
    assert metrics.wtq_denotation(items, targets, canon) is right


def test_wtq_aborts_where_the_official_evaluator_fails():
    with pytest.raises(metrics.ScorerAborted):  # Python 2: OverflowError, long int too large to convert to float
        metrics.wtq_denotation(["9" * 400], ["1"])


def test_wtq_needs_one_canonical_value_per_target():
    with pytest.raises(metrics.ScorerAborted, match="expected 2 values, one per target, got 1"):
        metrics.wtq_denotation(["a"], ["a", "b"], ["a"])


def test_many_citations_do_not_take_exponential_time():
    start_time = time.process_time()
    assert metrics.wtq_denotation(["x" + "[1]" * 26 + "y"], ["x" + "[1]" * 26 + "Y[2]"])
    assert time.process_time() - start_time < 1


# TabFact: mPLUG-DocOwl's parser_line, llm_benchmark_eval and exact_match. Unlike the others, these results come from
# reading the code, not from running it.


@pytest.mark.parametrize(
    ("prediction", "reference", "right"),
    [
        ("True", "True", True),
        (" True\n", "True", True),
        ("Tr\nue", "True", True),
        ("true", "True", False),
        ("True", "True.", True),
        ("True.", "True", False),
        ("True.", "True.", False),
        ("True.", "True..", True),
        ("True", "True .", False),
        ("False", "True", False),
        ("", "True", False),
    ],
)
def test_tabfact_accuracy(prediction, reference, right):
    assert metrics.tabfact_accuracy(prediction, reference) == float(right)


# TableVQA-Bench: its evaluator on Python 3.11.


@pytest.mark.parametrize("subset", ["vwtq", "vwtq_syn"])
@pytest.mark.parametrize(
    ("prediction", "reference", "right"),
    [
        ("b||a", "a|b", True),
        ("a|b", "a|b", True),
        ("a | b", "a|b", True),
        ("a, b", "a|b", False),
        ("a|||b", "a|b", False),  # an empty item between them
        (r"a\pb", r"a\pb", True),
        ("a|b", r"a\pb", False),  # two items, against one that contains a bar
        ("a\nb", r"a\nb", True),
        ("Answer: a", "a", False),
        ("4", "4 events", False),
        ("1_000", "1000", True),  # Python 3
        ("- 5", "-5", False),
        ("[٣]", "", True),
        ("ΟΔΟΣ", "οδος", True),
    ],
)
def test_tablevqa_items(subset, prediction, reference, right):
    assert metrics.tablevqa_correct(subset, prediction, reference) is right


@pytest.mark.parametrize("item", ["nan", " NaN", "-inf", "infinity", "1e999"])
def test_tablevqa_aborts_where_the_official_scorer_fails(item):
    for prediction, reference in (("a|" + item, "a|b"), ("a", item)):
        with pytest.raises(metrics.ScorerAborted, match="neither as a number nor as a text"):
            metrics.tablevqa_correct("vwtq", prediction, reference)
    assert issubclass(metrics.ScorerAborted, UserError)


@pytest.mark.parametrize(
    ("prediction", "reference", "right"),
    [
        ("True", 1, True),
        ("True", "1", True),
        ("true, since ...", 1, True),
        ("FALSE", 0, True),
        ("False", False, True),  # possible in JSON; equal to 0
        ("untrue", 1, True),
        ("not true", 0, False),
        ("True or False", 1, False),
        ("True or False", 0, False),
        ("yes", 1, False),
        ("", 0, False),
    ],
)
def test_tablevqa_statements(prediction, reference, right):
    assert metrics.tablevqa_correct("vtabfact", prediction, reference) is right


@pytest.mark.parametrize(
    ("prediction", "reference", "right"),
    [
        ("$3,852 million", "3852000000", True),
        ("$3,852 billion", "$3,852 million", True),  # relieved: both are 3852 without their units
        ("3852", "$3,852 million", True),
        ("3853 million", "$3,852 million", False),
        ("34.2%", "0.342", True),
        ("34.2 %", "34.2", True),
        ("(1,234)", "1234", True),
        ("(1,234)", "-1234", False),
        ("3million", "3 million", False),
        ("3million", "3000000", False),
        ("10 Years", "10", True),
        ("12 square feet", "12 shares", True),
        ("5 gwh", "5 mbtus", True),
        ("5 kwh", "5", False),
        ("5 miles (8 km)", "5", True),
        ("2 million %", "2 billion %", True),  # not numbers; equal as texts without their units
        ("per unit", "per year", True),
        ("October  31.", "october 31", True),
        ("October 31", "October 30", False),
        ("nan", "nan", False),
        ("inf", "inf", True),
    ],
)
def test_tablevqa_amounts(prediction, reference, right):
    assert metrics.tablevqa_correct("fintabnetqa", prediction, reference) is right


def test_tablevqa_refuses_unknown_subsets_and_references():
    with pytest.raises(UserError, match="'vqa'.*vwtq_syn"):
        metrics.tablevqa_correct("vqa", "a", "a")
    with pytest.raises(UserError, match="'True' of vtabfact"):
        metrics.tablevqa_correct("vtabfact", "True", "True")


# VCR: find_best_match and rough_filter, with spaCy 3.8.18's rules for English.


@pytest.mark.parametrize(
    ("prediction", "reference", "exact", "jaccard"),
    [
        ("It says the quick brown fox here", "quick brown fox", 1, 1),
        ("fox brown quick", "quick brown fox", 0, 1),
        ("quick brown", "quick brown fox", 0, 0),  # one token too short
        ("quick brown cat", "quick brown fox", 0, 2 / 4),
        ("Quick brown fox", "quick brown fox", 0, 2 / 4),
        ("QUICK BROWN FOX", "quick brown fox", 0, 0),
        ("quick brown  fox", "quick brown fox", 0, 2 / 4),  # the double space is a token: "quick brown  "
        ("quick\nbrown fox", "quick brown fox", 0, 2 / 4),
        ("quick brown fox.", "quick brown fox.", 1, 1),
        ("a b a", "a a a", 0, 1 / 2),  # the Jaccard index is over sets
        ("he didn't go", "didn't", 1, 1),  # two tokens: did, n't
        ("u v x w", "v w", 0, 1 / 3),  # "v x" and "x w" tie; the first one counts: {v, x} and {v, w}
        ("", "fox", 0, 0),
        ("fox", "", 0, 0),
        ("I can't read quick brown fox", "quick brown fox", 0, 0),
        ("I cannot read fox", "fox", 0, 0),
        ("SORRY: fox", "fox", 0, 0),
        ("so sorry", "so sorry", 0, 0),  # although it is the covered text
        ("i can't read fox", "fox", 1, 1),  # only "sorry" is searched for in any case
        ("无法 fox", "fox", 0, 0),
        ("抱歉 fox", "fox", 0, 0),
        ("I cannot. Assistant: fox Assistant: cat", "cat", 1, 1),
        ("Assistant: fox Assistant: cat", "fox", 0, 0),
    ],
)
def test_vcr_scores(prediction, reference, exact, jaccard):
    assert metrics.vcr_scores(prediction, [reference], "en") == ([exact], [pytest.approx(jaccard)])


def test_vcr_scores_every_covered_text():
    scores = metrics.vcr_scores("the red house, a blue dog", ["red house", "blue cat", "green"], "en")
    assert scores == ([1, 0, 0], [1, pytest.approx(1 / 3), 0])
    assert metrics.vcr_scores("sorry", ["red", "blue"], "en") == ([0, 0], [0, 0])
    assert metrics.vcr_scores("a blue dog", "blue dog", "en") == ([1], [1])
    assert metrics.vcr_scores("a blue dog", [], "en") == ([], []), "no covered text"


def test_vcr_in_chinese_joins_tokens_without_spaces(monkeypatch):
    # The tokens are given, because zh_core_web_sm is not available here. Without spaces, the similarity to 天蓝 is 4/5
    # for 蓝天 蓝 and 1/2 for 蓝 蓝. With spaces it would be 1/3 and 2/5, and the Jaccard index 1/2.
    tokens = {"蓝天蓝蓝": ["蓝天", "蓝", "蓝"], "天蓝": ["天", "蓝"]}
    monkeypatch.setattr(restoration, "_tokenizer", lambda language: tokens.get)
    assert metrics.vcr_scores("蓝天蓝蓝", ["天蓝"], "zh") == ([0], [pytest.approx(1 / 3)])


@pytest.fixture
def no_cached_tokenizer():
    """Clears the cache of tokenizers before and after a test."""
    restoration._tokenizer.cache_clear()
    yield
    restoration._tokenizer.cache_clear()


def test_vcr_names_the_package_to_install(no_cached_tokenizer, monkeypatch):
    def load(name):
        raise OSError(f"[E050] Can't find model '{name}'")

    monkeypatch.setattr(spacy, "load", load)
    with pytest.raises(UserError, match="python -m spacy download zh_core_web_sm"):
        metrics.vcr_scores("蓝", ["蓝"], "zh")
    monkeypatch.setitem(sys.modules, "spacy", None)
    with pytest.raises(UserError, match=r"alignvlm-jax\[eval\]"):
        metrics.vcr_scores("a", ["a"], "en")


def test_vcr_refuses_unknown_languages():
    with pytest.raises(UserError, match="'fr'.*en and zh"):
        metrics.vcr_scores("a", ["a"], "fr")


# Invalid arguments.


@pytest.mark.parametrize("score", [metrics.anls, metrics.relaxed_accuracy, metrics.mmmu_open])
def test_one_string_is_the_only_accepted_answer(score):
    assert score("abcdefghij", "abcdefghij") == 1
    assert score("j", "abcdefghij") == 0, "its letters are not answers"
    assert score("j", ("abc", "j")) == 1, "a tuple works like a list"


def test_ten_letters_are_not_ten_answers():
    with pytest.raises(metrics.ScorerAborted, match="needs 10 references, got 1$"):
        metrics.vqa_accuracy("a", "aaaaaaaaaa")


@pytest.mark.parametrize("score", [metrics.anls, metrics.relaxed_accuracy, metrics.vqa_accuracy, metrics.mmmu_open])
def test_an_accepted_answer_is_required(score):
    with pytest.raises(metrics.ScorerAborted, match="at least one accepted answer"):
        score("a", [])


def test_items_must_be_lists_too():
    with pytest.raises(UserError, match="predicted_items: expected a list of strings, got the string 'ab'"):
        metrics.wtq_denotation("ab", ["a", "b"])
    with pytest.raises(UserError, match="targets: expected a list of strings, got the string 'ab'"):
        metrics.wtq_denotation(["a", "b"], "ab")
    with pytest.raises(UserError, match="target_canon: expected a list of strings, got the string 'ab'"):
        metrics.wtq_denotation(["a"], ["a", "b"], "ab")
