"""From answers to scores: which metric takes what of a question, for each benchmark.

A metric takes the questions and their answers, and the answer of a question that could not be asked is None: it is
wrong, whatever the metric. Answers come as `Reader.answer` gives them, without blanks at their ends.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

from alignvlm_jax.evaluation import metrics
from alignvlm_jax.evaluation.benchmarks.question import Question
from alignvlm_jax.evaluation.benchmarks.scores import Score, Scores, mean, ratio

Answers = Mapping[str, str | None]
Metric = Callable[[Sequence[Question], Answers], Scores]
OneScore = Callable[[str, Question], float]


def mean_of(name: str, one: OneScore, **others: OneScore) -> Metric:
    """The mean of what `one` says of each answer, for all and for each group; `others` for all, by name."""

    def metric(questions: Sequence[Question], answers: Answers) -> Scores:
        values, aborted = _each(one, questions, answers)
        more = [
            mean(other.replace("_", " "), _each(function, questions, answers)[0]) for other, function in others.items()
        ]
        return Scores(mean(name, values), (*more, *_by_group(questions, values)), tuple(aborted.items()))

    return metric


def anls(answer: str, question: Question) -> float:
    return metrics.anls(answer, question.references)


def relaxed_accuracy(answer: str, question: Question) -> float:
    return metrics.relaxed_accuracy(answer, question.references)


def vqa_accuracy(answer: str, question: Question) -> float:
    return metrics.vqa_accuracy(answer, question.references)


def tabfact_accuracy(answer: str, question: Question) -> float:
    return metrics.tabfact_accuracy(answer, question.references[0])


def wtq_whole(answer: str, question: Question) -> float:
    """The answer as one item, its newlines deleted: mPLUG-DocOwl."""
    return float(metrics.wtq_denotation([answer.replace("\n", "")], question.references))


def wtq_split(answer: str, question: Question) -> float:
    """The answer split at " | ": the DUE baselines."""
    return float(metrics.wtq_denotation(answer.replace("\n", "").split(" | "), question.references))


def forms(questions: Sequence[Question], answers: Answers) -> Scores:
    """F1 over the values of documents: DeepForm and KLC.

    Primary is mPLUG-DocOwl's, where the answer "None" means that there is no such value: one question is asked for
    every key, so a model that may not say so makes a false value of each. Plain DUE F1 counts it as a value.
    """
    documents = defaultdict(list)
    for question in questions:
        documents[question.document or question.id].append(question)
    scores = []
    for name, dropped in (("F1, answers None dropped", ("None",)), ("F1, plain DUE", ())):
        tops, bottoms = [], []
        for asked in documents.values():
            predicted = [
                (question.group, answer.replace("\n", ""))
                for question in asked
                if (answer := answers[question.id]) is not None and answer.replace("\n", "") not in dropped
            ]
            # Once, though a key may be asked for on several of the document's pages.
            sought = dict.fromkeys((question.group, question.values) for question in asked)
            expected = [(key, value) for key, values in sought for value in values]
            # F1 = 2 right / (predicted + expected), so that micro F1 is a ratio of sums over documents.
            bottoms.append(len(predicted) + len(expected))
            tops.append(metrics.due_f1([predicted], [expected]) * bottoms[-1])
        scores.append(ratio(name, tops, bottoms))
    return Scores(scores[0], (scores[1],))


def tablevqa(questions: Sequence[Question], answers: Answers) -> Scores:
    """TableVQA-Bench: accuracy over all its questions, by part, and the strict one of fintabnetqa."""

    def correct(answer: str, question: Question) -> float:
        return float(metrics.tablevqa_correct(question.group, answer, question.references[0]))

    def strict(answer: str, question: Question) -> float:
        return float(metrics.fintabnetqa_strictly_correct(answer, question.references[0]))

    found = mean_of("accuracy", correct)(questions, answers)
    financial = [question for question in questions if question.group == "fintabnetqa"]
    strictly = mean("fintabnetqa, strict", _each(strict, financial, answers)[0])
    return dataclasses.replace(found, others=(*found.others, strictly) if financial else found.others)


def vcr(language: str) -> Metric:
    """VCR: exact match over covered texts, and their Jaccard index; an interval's units are the images."""

    def metric(questions: Sequence[Question], answers: Answers) -> Scores:
        metrics.vcr_scores("", ["."], language)  # An error now, before anything is asked, if spaCy's model lacks.
        exact, jaccard, covered = [], [], []
        for question in questions:
            # What could not be read covers one text at least; a picture that covers none counts for nothing.
            answer, references = answers[question.id], ("",) if question.references is None else question.references
            scores = ([0.0], [0.0]) if answer is None else metrics.vcr_scores(answer, references, language)
            exact.append(sum(scores[0]))
            jaccard.append(sum(scores[1]))
            covered.append(len(references))
        return Scores(ratio("exact match", exact, covered), (ratio("Jaccard index", jaccard, covered),))

    return metric


def mmmu(questions: Sequence[Question], answers: Answers) -> Scores:
    """MMMU: accuracy, by subject, and how often an answer named no option (where the official code would guess)."""
    unnamed = []

    def one(answer: str, question: Question) -> float:
        if question.kind == "open":
            return float(metrics.mmmu_open(answer, question.references))
        letter = metrics.mmmu_choice(answer, question.choices)
        unnamed.append(float(letter is None))
        return float(letter in question.references)

    found = mean_of("accuracy", one)(questions, answers)
    return dataclasses.replace(found, others=(mean("answers that name no option", unnamed), *found.others))


def seed_accuracy(answer: str, question: Question) -> float:
    return metrics.seed_accuracy(answer, question.references[0])


def gqa_accuracy(answer: str, question: Question) -> float:
    return metrics.gqa_accuracy(answer, question.references[0])


def pope(questions: Sequence[Question], answers: Answers) -> Scores:
    """POPE: F1 of the answer yes (VLMEvalKit's overall score); accuracy, share of yes; F1 and accuracy by part."""
    expected = [question.references == ("yes",) for question in questions]
    # What could not be asked is answered wrongly.
    said = [
        not right if (answer := answers[question.id]) is None else metrics.pope_says_yes(answer)
        for question, right in zip(questions, expected, strict=True)
    ]
    groups = [question.group for question in questions]

    def scores(of: Sequence[int], name: str) -> list[Score]:
        right = [2.0 * (said[i] and expected[i]) for i in of]
        either = [float(said[i]) + float(expected[i]) for i in of]
        return [
            ratio(f"{name}F1", right, either),
            mean(f"{name}accuracy", [float(said[i] == expected[i]) for i in of]),
        ]

    f1, accuracy = scores(range(len(questions)), "")
    parts = [
        score
        for group in sorted(set(groups) - {""})
        for score in scores([i for i, other in enumerate(groups) if other == group], f"{group}, ")
    ]
    return Scores(f1, (accuracy, mean("share of yes", [float(yes) for yes in said]), *parts))


def not_scored(questions: Sequence[Question], answers: Answers) -> Scores:
    """Answers that are judged elsewhere."""
    return Scores(None)


def _each(one: OneScore, questions: Sequence[Question], answers: Answers) -> tuple[list[float], dict[str, str]]:
    """What `one` says of each answer, and of which the official scorer would have died."""
    values, aborted = [], {}
    for question in questions:
        answer = answers[question.id]
        try:
            values.append(0.0 if answer is None else float(one(answer, question)))
        except metrics.ScorerAborted as error:
            values.append(0.0)
            aborted[question.id] = str(error)
    return values, aborted


def _by_group(questions: Sequence[Question], values: Sequence[float]) -> list[Score]:
    groups = defaultdict(list)
    for question, value in zip(questions, values, strict=True):
        if question.group:
            groups[question.group].append(value)
    return [mean(group, groups[group]) for group in sorted(groups)] if len(groups) > 1 else []
