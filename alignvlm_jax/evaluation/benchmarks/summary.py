"""The report of a run over benchmarks: the printed table, its notes, and the JSON file."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from alignvlm_jax.evaluation.benchmarks.outcome import Outcome
from alignvlm_jax.evaluation.benchmarks.paper import (
    AVERAGE,
    AVERAGED,
    FOOTNOTES,
    FOUR,
    GENERAL,
    LOW_RESOURCE,
    MARKS,
    PRUNED,
)
from alignvlm_jax.evaluation.scores import Score
from alignvlm_jax.inference.answers import format_counts

PARTIAL = " (partial)"
"""Mark of a score over a part of a benchmark."""
_SHOWN_PROBLEMS = 5


def format_table(outcomes: Sequence[Outcome], *, pruned: bool = False) -> str:
    """Returns the table of scores in percent: rows for benchmarks and their further scores, columns for the models.

                                     count   ours                ALIGN 1B   ALIGN 3B   MLP 3B
    DocVQA val, ANLS                  5349   71.30 [70.2-72.4]   72.42      79.63      71.46
    ChartQA test, relaxed accuracy    2500   64.00 [62.1-65.8]   65.44      71.88      66.48
      augmented                       1250   80.10 [77.8-82.2]

    The last row is the mean over the nine benchmarks of the paper's main table, if all of them were run. Scores of
    models that are not in that table have a mark; `format_notes` explains it.

    Args:
      outcomes: outcomes of one checkpoint.
      pruned: whether the checkpoint's vocabulary is pruned. If so, the table has a column for the paper's pruned model.
    """
    models = list(dict.fromkeys(model for outcome in outcomes for model in outcome.benchmark.paper))
    models = [model for model in models if pruned or model != PRUNED]
    # A row per benchmark and score, then the average.
    rows = [["", "count", "ours", *models]]
    for outcome in outcomes:
        name = f"{outcome.benchmark.title} {outcome.split}"
        paper_scores, mark = outcome.benchmark.paper, MARKS.get(outcome.benchmark.name, "")
        paper_cells = [f"{paper_scores[model]:.2f}{mark}" if model in paper_scores else "" for model in models]
        if outcome.scores is None or outcome.scores.primary is None:
            rows.append([name, str(len(outcome.questions)), "not scored here" + _mark(outcome), *paper_cells])
            continue
        primary = outcome.scores.primary
        rows.append([f"{name}, {primary.name}", str(primary.count), _format(primary) + _mark(outcome), *paper_cells])
        rows += [[f"  {other.name}", str(other.count), _format(other)] for other in outcome.scores.others]
    if (average := average_of(AVERAGED, outcomes)) is not None:
        paper_cells = [f"{AVERAGE[model]:.2f}" if model in AVERAGE else "" for model in models]
        rows.append(["average of the nine", "", f"{average:.2f}{_mark_of(AVERAGED, outcomes)}", *paper_cells])
    # Align the columns. Rows of further scores are shorter: they have no cells for the paper's models.
    widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [cell.rjust(widths[i]) if i == 1 else cell.ljust(widths[i]) for i, cell in enumerate(row)]
        lines.append("   ".join(cells).rstrip())
    return "\n".join(lines)


def average_of(names: Sequence[str], outcomes: Sequence[Outcome]) -> float | None:
    """Returns the unweighted mean score of these benchmarks in percent, like the paper, or None unless all have one."""
    values = {
        outcome.benchmark.name: 100 * outcome.scores.primary.value
        for outcome in outcomes
        if outcome.benchmark.name in names and outcome.scores is not None and outcome.scores.primary is not None
    }
    return sum(values.values()) / len(names) if len(values) == len(names) else None


def format_notes(outcomes: Sequence[Outcome]) -> str:
    """Returns the notes below the table: limits, problems, missing references, and the origin of the paper's scores."""
    lines = []
    for outcome in outcomes:
        title = outcome.benchmark.title
        if outcome.missing:
            lines.append(f"{title}: the score is over a part of the benchmark; the paper's scores are over all")
            lines += [f"  {sentence}" for sentence in outcome.missing]
        if outcome.limit is not None:
            lines.append(f"{title}: only the first {len(outcome.questions)} questions; the paper's scores are over all")
        if outcome.problems:
            lines.append(f"{title}: {len(outcome.problems)} questions could not be asked and count as wrong:")
            lines += [f"  {id}: {reason}" for id, reason in list(outcome.problems.items())[:_SHOWN_PROBLEMS]]
            if len(outcome.problems) > _SHOWN_PROBLEMS:
                lines.append(f"  and {len(outcome.problems) - _SHOWN_PROBLEMS} more (--json lists all)")
        if outcome.scores is not None and outcome.scores.aborted:
            first_id, first_error = outcome.scores.aborted[0]
            lines.append(
                f"{title}: the official scorer would fail with an error on {len(outcome.scores.aborted)} answers, "
                f"which count as wrong here. The first is {first_id}: {first_error}"
            )
        if warnings := format_counts(outcome.warnings, len(outcome.questions)):
            lines.append(f"{title}: warnings: {warnings}")
        lines += [f"{title}: {note}" for note in _remarks(outcome)]
    lines += _paper_notes(outcomes)
    return "\n".join(["", *lines]) if lines else ""


def _paper_notes(outcomes: Sequence[Outcome]) -> list[str]:
    """Returns notes on the marked scores, and the averages of the paper's low-resource models."""
    names = [outcome.benchmark.name for outcome in outcomes]
    lines = [f"{mark} {text}" for mark, text in FOOTNOTES.items() if mark in map(MARKS.get, names)]
    if set(GENERAL) & set(names):
        # Directly below the footnote with one star, which is the first line.
        averages = _format_averages(LOW_RESOURCE[GENERAL])
        lines.insert(1, f"  averages of these models on MMMU, SEED, MM-Vet, POPE and GQA: {averages}")
    if (average := average_of(FOUR, outcomes)) is not None:
        lines.append(
            f"average on DocVQA, InfoVQA, ChartQA and TextVQA: {average:.2f}{_mark_of(FOUR, outcomes)}; the paper's "
            f"low-resource models (3B, LLaVA data): {_format_averages(LOW_RESOURCE[FOUR])}"
        )
    return lines


def _format_averages(averages: Mapping[str, float]) -> str:
    return ", ".join(f"{model} {average:.2f}" for model, average in averages.items())


def to_json(outcome: Outcome) -> dict[str, Any]:
    """Returns an outcome without its answers as JSON, with scores in percent."""
    benchmark, scores = outcome.benchmark, outcome.scores
    return {
        "benchmark": benchmark.name,
        "split": outcome.split,
        "num_questions": len(outcome.questions),
        "num_published": list(benchmark.published.get(outcome.split, ())),
        "is_partial": bool(outcome.missing),
        "limit": outcome.limit,
        "metric": scores.primary.name if scores and scores.primary else None,
        **(scores.primary.to_json() if scores and scores.primary else {"score": None}),
        "others": {other.name: other.to_json() for other in scores.others} if scores else {},
        "paper": dict(benchmark.paper),
        "paper_note": FOOTNOTES.get(MARKS.get(benchmark.name, "")),
        "prompt": benchmark.prompt,
        "prompt_source": benchmark.prompt_source,
        "max_new_tokens": benchmark.max_new_tokens,
        "num_not_asked": len(outcome.problems),
        "not_asked": outcome.problems,
        "scorer_aborted": dict(scores.aborted) if scores else {},
        "remarks": [*outcome.missing, *_remarks(outcome)],
        "warnings": outcome.warnings,
        "seconds": round(outcome.seconds, 1),
    }


def _remarks(outcome: Outcome) -> list[str]:
    """Returns the remarks about the files, and each distinct remark of their readers with its number of questions."""
    counts = Counter(question.extra for question in outcome.questions if isinstance(question.extra, str))
    return [*outcome.remarks, *(f"{remark} ({count} questions)" for remark, count in counts.items())]


def _mark(outcome: Outcome) -> str:
    return PARTIAL if outcome.missing else ""


def _mark_of(names: Sequence[str], outcomes: Sequence[Outcome]) -> str:
    """Returns the mark of an average over these benchmarks."""
    return "".join(sorted({_mark(outcome) for outcome in outcomes if outcome.benchmark.name in names}))


def _format(score: Score) -> str:
    if not score.count:
        return "-"
    if score.interval is None:
        return f"{100 * score.value:.2f}"
    low, high = score.interval
    return f"{100 * score.value:.2f} [{100 * low:.1f}-{100 * high:.1f}]"
