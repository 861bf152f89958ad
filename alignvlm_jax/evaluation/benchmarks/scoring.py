"""Scores of all answers to a benchmark, built on the metrics in `evaluation/metrics`.

A `Metric` takes questions and their answers. The answer to a question that could not be asked is None, which every
metric counts as wrong. The other answers come from `Reader.answer`, which strips them.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

from alignvlm_jax.evaluation import metrics
from alignvlm_jax.evaluation.benchmarks.question import Question
from alignvlm_jax.evaluation.scores import Score, Scores, f1, mean, ratio

Answers = Mapping[str, str | None]
Metric = Callable[[Sequence[Question], Answers], Scores]
AnswerMetric = Callable[[str, Question], float]


def mean_of(name: str, answer_metric: AnswerMetric, **others: AnswerMetric) -> Metric:
    """Returns a metric that averages `answer_metric` over all answers and over the answers of each group.

    Args:
      name: name of the score.
      answer_metric: score of one answer.
      **others: further scores of one answer, averaged over all answers only. Underscores in their names become spaces.
    """

    def metric(questions: Sequence[Question], answers: Answers) -> Scores:
        values, aborted = _score_each(answer_metric, questions, answers)
        more = [
            mean(other.replace("_", " "), _score_each(function, questions, answers)[0])
            for other, function in others.items()
        ]
        return Scores(mean(name, values), (*more, *_by_group(questions, values)), tuple(aborted.items()))

    return metric


def anls(answer: str, question: Question) -> float:
    """Returns the ANLS of an answer."""
    return metrics.anls(answer, question.references)


def relaxed_accuracy(answer: str, question: Question) -> float:
    """Returns ChartQA's relaxed accuracy of an answer."""
    return metrics.relaxed_accuracy(answer, question.references)


def vqa_accuracy(answer: str, question: Question) -> float:
    """Returns the VQA accuracy of an answer."""
    return metrics.vqa_accuracy(answer, question.references)


def tabfact_accuracy(answer: str, question: Question) -> float:
    """Returns 1 if a verdict equals the reference."""
    return metrics.tabfact_accuracy(answer, question.references[0])


def wtq_whole(answer: str, question: Question) -> float:
    """Returns the denotation accuracy of an answer taken as one item without newlines, as mPLUG-DocOwl does."""
    return float(metrics.wtq_denotation([answer.replace("\n", "")], question.references))


def wtq_split(answer: str, question: Question) -> float:
    """Returns the denotation accuracy of an answer split at " | ", as the DUE baselines do."""
    return float(metrics.wtq_denotation(answer.replace("\n", "").split(" | "), question.references))


def forms(questions: Sequence[Question], answers: Answers) -> Scores:
    """Returns F1 over the values of documents, for DeepForm and KLC.

    The primary score is mPLUG-DocOwl's, for which the answer "None" means that the document has no such value. This
    matters because a question is asked for every key: plain DUE F1, the other score, counts "None" as a value, and
    therefore as a wrong one for every absent key.
    """
    # A document has a question for each key, possibly on each of its pages.
    documents = defaultdict(list)
    for question in questions:
        documents[question.document or question.id].append(question)
    # F1 and a bootstrap interval over documents, once without the answers "None" and once with them.
    scores = []
    for name, dropped in (("F1, answers None dropped", ("None",)), ("F1, plain DUE", ())):
        values = []
        for document_questions in documents.values():
            predicted = [
                (question.group, answer.replace("\n", ""))
                for question in document_questions
                if (answer := answers[question.id]) is not None and answer.replace("\n", "") not in dropped
            ]
            # Each value counts once, even if its key is asked for on several pages of the document.
            keys = dict.fromkeys((question.group, question.values) for question in document_questions)
            expected = [(key, value) for key, values in keys for value in values]
            values.append((predicted, expected))
        scores.append(f1(name, values))
    return Scores(scores[0], (scores[1],))


def tablevqa(questions: Sequence[Question], answers: Answers) -> Scores:
    """Returns the accuracy on TableVQA-Bench: overall, for each part, and the strict one for fintabnetqa."""

    def correct(answer: str, question: Question) -> float:
        return float(metrics.tablevqa_correct(question.group, answer, question.references[0]))

    def strict(answer: str, question: Question) -> float:
        return float(metrics.fintabnetqa_strictly_correct(answer, question.references[0]))

    scores = mean_of("accuracy", correct)(questions, answers)
    financial = [question for question in questions if question.group == "fintabnetqa"]
    strict_score = mean("fintabnetqa, strict", _score_each(strict, financial, answers)[0])
    return dataclasses.replace(scores, others=(*scores.others, strict_score) if financial else scores.others)


def vcr(language: str) -> Metric:
    """Returns VCR's metric: exact match and Jaccard index over covered texts. Intervals are over images."""

    def metric(questions: Sequence[Question], answers: Answers) -> Scores:
        metrics.vcr_scores("", ["."], language)  # Fails if spaCy's model is missing, before any question is asked.
        exact, jaccard, covered = [], [], []
        for question in questions:
            # An unreadable row counts as one missed text. An image without covered texts does not count at all.
            answer, references = answers[question.id], ("",) if question.references is None else question.references
            scores = ([0.0], [0.0]) if answer is None else metrics.vcr_scores(answer, references, language)
            exact.append(sum(scores[0]))
            jaccard.append(sum(scores[1]))
            covered.append(len(references))
        return Scores(ratio("exact match", exact, covered), (ratio("Jaccard index", jaccard, covered),))

    return metric


def mmmu(questions: Sequence[Question], answers: Answers) -> Scores:
    """Returns the accuracy on MMMU, by subject, and the share of answers that name no option.

    The official code guesses an option at random for such answers.
    """
    unnamed = []  # For each multiple-choice answer, 1 if it names no option.

    def is_correct(answer: str, question: Question) -> float:
        if question.kind == "open":
            return float(metrics.mmmu_open(answer, question.references))
        letter = metrics.mmmu_choice(answer, question.choices)
        unnamed.append(float(letter is None))
        return float(letter in question.references)

    scores = mean_of("accuracy", is_correct)(questions, answers)
    return dataclasses.replace(scores, others=(mean("answers that name no option", unnamed), *scores.others))


def seed_accuracy(answer: str, question: Question) -> float:
    """Returns 1 if an answer starts with the right letter."""
    return metrics.seed_accuracy(answer, question.references[0])


def gqa_accuracy(answer: str, question: Question) -> float:
    """Returns 1 if an answer equals the reference, apart from case and punctuation."""
    return metrics.gqa_accuracy(answer, question.references[0])


def pope(questions: Sequence[Question], answers: Answers) -> Scores:
    """Returns POPE's scores.

    The primary one is F1 of the answer yes, which is VLMEvalKit's overall score. The others are the accuracy, the share
    of answers that are yes, and the F1 and accuracy of each part.
    """
    expected = [question.references == ("yes",) for question in questions]
    # A question that could not be asked counts as wrong: its prediction is the opposite of what is expected.
    predicted = [
        not is_yes if (answer := answers[question.id]) is None else metrics.pope_says_yes(answer)
        for question, is_yes in zip(questions, expected, strict=True)
    ]
    groups = [question.group for question in questions]

    def f1_and_accuracy(indices: Sequence[int], prefix: str) -> list[Score]:
        # F1 = 2 right yes / (predicted yes + expected yes).
        tops = [2.0 * (predicted[i] and expected[i]) for i in indices]
        bottoms = [float(predicted[i]) + float(expected[i]) for i in indices]
        return [
            ratio(f"{prefix}F1", tops, bottoms),
            mean(f"{prefix}accuracy", [float(predicted[i] == expected[i]) for i in indices]),
        ]

    f1, accuracy = f1_and_accuracy(range(len(questions)), "")
    parts = [
        score
        for group in sorted(set(groups) - {""})
        for score in f1_and_accuracy([i for i, other in enumerate(groups) if other == group], f"{group}, ")
    ]
    return Scores(f1, (accuracy, mean("share of yes", [float(yes) for yes in predicted]), *parts))


def not_scored(questions: Sequence[Question], answers: Answers) -> Scores:
    """Returns no score, for benchmarks with an external judge."""
    return Scores(None)


def _score_each(
    answer_metric: AnswerMetric, questions: Sequence[Question], answers: Answers
) -> tuple[list[float], dict[str, str]]:
    """Returns the score of each answer, and the error by question id where the official scorer would fail."""
    values, aborted = [], {}
    for question in questions:
        answer = answers[question.id]
        try:
            values.append(0.0 if answer is None else float(answer_metric(answer, question)))
        except metrics.ScorerAborted as error:
            values.append(0.0)
            aborted[question.id] = str(error)
    return values, aborted


def _by_group(questions: Sequence[Question], values: Sequence[float]) -> list[Score]:
    """Returns the mean of each group, or nothing if there are fewer than two groups."""
    groups = defaultdict(list)
    for question, value in zip(questions, values, strict=True):
        if question.group:
            groups[question.group].append(value)
    return [mean(group, groups[group]) for group in sorted(groups)] if len(groups) > 1 else []
