"""What a run over benchmarks came to: the table that is printed, what is to be said beside it, and the JSON."""

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
from alignvlm_jax.evaluation.benchmarks.scores import Score

_SHOWN_PROBLEMS = 5


def format_table(outcomes: Sequence[Outcome], *, pruned: bool = False) -> str:
    """Scores in percent: a row for each benchmark and one for each of its further scores, the paper's models beside.

                                questions   ours               ALIGN 1B   ALIGN 3B   MLP 3B
    DocVQA val, ANLS                 5349   71.3 [70.2-72.4]   72.42      79.63      71.46
    ChartQA test, relaxed accuracy   2500   64.0 [62.1-65.8]   65.44      71.88      66.48
      augmented                      1250   80.1 [77.8-82.2]

    Under the nine benchmarks of the paper's main table, if all are there, stands their plain mean. Figures of other
    models than that table's have a mark, which `format_notes` explains.

    Args:
      outcomes: of one checkpoint.
      pruned: whether its vocabulary is pruned; the paper's model that was is then beside.
    """
    models = list(dict.fromkeys(model for outcome in outcomes for model in outcome.benchmark.paper))
    models = [model for model in models if pruned or model != PRUNED]
    rows = [["", "count", "ours", *models]]
    for outcome in outcomes:
        name = f"{outcome.benchmark.title} {outcome.split}"
        theirs, mark = outcome.benchmark.paper, MARKS.get(outcome.benchmark.name, "")
        paper = [f"{theirs[model]:.2f}{mark}" if model in theirs else "" for model in models]
        if outcome.scores is None or outcome.scores.primary is None:
            rows.append([name, str(len(outcome.questions)), "not scored here", *paper])
            continue
        primary = outcome.scores.primary
        rows.append([f"{name}, {primary.name}", str(primary.count), _cell(primary), *paper])
        rows += [[f"  {other.name}", str(other.count), _cell(other)] for other in outcome.scores.others]
    if (average := average_of(AVERAGED, outcomes)) is not None:
        theirs = [f"{AVERAGE[model]:.2f}" if model in AVERAGE else "" for model in models]
        rows.append(["average of the nine", "", f"{average:.2f}", *theirs])
    widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [cell.rjust(widths[i]) if i == 1 else cell.ljust(widths[i]) for i, cell in enumerate(row)]
        lines.append("   ".join(cells).rstrip())
    return "\n".join(lines)


def average_of(names: Sequence[str], outcomes: Sequence[Outcome]) -> float | None:
    """The mean, in percent, of the scores of these benchmarks, as the paper averages; None unless all are there."""
    values = {
        outcome.benchmark.name: 100 * outcome.scores.primary.value
        for outcome in outcomes
        if outcome.benchmark.name in names and outcome.scores is not None and outcome.scores.primary is not None
    }
    return sum(values.values()) / len(names) if len(values) == len(names) else None


def format_notes(outcomes: Sequence[Outcome]) -> str:
    """What the table's reader must know: what was not asked, references that lack, limits, whose figures are beside."""
    lines = []
    for outcome in outcomes:
        title = outcome.benchmark.title
        if outcome.limit is not None:
            lines.append(f"{title}: the first {len(outcome.questions)} questions only; the paper's are of all")
        if outcome.problems:
            lines.append(f"{title}: {len(outcome.problems)} questions could not be asked and count as wrong:")
            lines += [f"  {id}: {why}" for id, why in list(outcome.problems.items())[:_SHOWN_PROBLEMS]]
            if len(outcome.problems) > _SHOWN_PROBLEMS:
                lines.append(f"  and {len(outcome.problems) - _SHOWN_PROBLEMS} more, which --json lists")
        if outcome.scores is not None and outcome.scores.aborted:
            lines.append(
                f"{title}: the official scorer would end with an error at {len(outcome.scores.aborted)} answers, "
                f"which count as wrong here: {outcome.scores.aborted[0][0]}: {outcome.scores.aborted[0][1]}"
            )
        lines += [f"{title}: {note}" for note in _remarks(outcome)]
    lines += _about_the_papers(outcomes)
    return "\n".join(["", *lines]) if lines else ""


def _about_the_papers(outcomes: Sequence[Outcome]) -> list[str]:
    """Whose the marked figures are, and what the models of the low-resource setting average."""
    names = [outcome.benchmark.name for outcome in outcomes]
    lines = [f"{mark} {text}" for mark, text in FOOTNOTES.items() if mark in map(MARKS.get, names)]
    if set(GENERAL) & set(names):
        lines.insert(1, f"  their averages over MMMU, SEED, MM-Vet, POPE, GQA: {_listed(LOW_RESOURCE[GENERAL])}")
    if (average := average_of(FOUR, outcomes)) is not None:
        lines.append(
            f"average of DocVQA, InfoVQA, ChartQA and TextVQA: {average:.2f}; of the paper's low-resource models "
            f"(3B, LLaVA's data): {_listed(LOW_RESOURCE[FOUR])}"
        )
    return lines


def _listed(averages: Mapping[str, float]) -> str:
    return ", ".join(f"{model} {average:.2f}" for model, average in averages.items())


def to_json(outcome: Outcome) -> dict[str, Any]:
    """Everything but the answers, scores in percent."""
    benchmark, scores = outcome.benchmark, outcome.scores
    found: dict[str, Any] = {
        "benchmark": benchmark.name,
        "split": outcome.split,
        "num_questions": len(outcome.questions),
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
        "remarks": _remarks(outcome),
        "seconds": round(outcome.seconds, 1),
    }
    return found


def _remarks(outcome: Outcome) -> list[str]:
    """What readers of files remarked on many questions, each once with its count."""
    counts = Counter(question.extra for question in outcome.questions if isinstance(question.extra, str))
    return [f"{remark} ({count} questions)" for remark, count in counts.items()]


def _cell(score: Score) -> str:
    if not score.count:
        return "-"
    if score.interval is None:
        return f"{100 * score.value:.2f}"
    low, high = score.interval
    return f"{100 * score.value:.2f} [{100 * low:.1f}-{100 * high:.1f}]"
