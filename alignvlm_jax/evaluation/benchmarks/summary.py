"""What a run over benchmarks came to: the table that is printed, what is to be said beside it, and the JSON."""

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from alignvlm_jax.evaluation.benchmarks.paper import AVERAGE, AVERAGED
from alignvlm_jax.evaluation.benchmarks.scores import Score

if TYPE_CHECKING:
    from alignvlm_jax.evaluation.benchmarks.runner import Outcome

_SHOWN_PROBLEMS = 5


def format_table(outcomes: Sequence["Outcome"]) -> str:
    """Scores in percent: a row for each benchmark and one for each of its further scores, the paper's models beside.

                                questions   ours               ALIGN 1B   ALIGN 3B   MLP 3B
    DocVQA val, ANLS                 5349   71.3 [70.2-72.4]   72.42      79.63      71.46
    ChartQA test, relaxed accuracy   2500   64.0 [62.1-65.8]   65.44      71.88      66.48
      augmented                      1250   80.1 [77.8-82.2]

    Under the nine benchmarks of the paper's main table, if all are there, stands their plain mean.
    """
    models = list(dict.fromkeys(model for outcome in outcomes for model in outcome.benchmark.paper))
    rows = [["", "count", "ours", *models]]
    for outcome in outcomes:
        name = f"{outcome.benchmark.title} {outcome.split}"
        paper = [
            f"{outcome.benchmark.paper[model]:.2f}" if model in outcome.benchmark.paper else "" for model in models
        ]
        if outcome.scores is None or outcome.scores.primary is None:
            rows.append([name, str(len(outcome.questions)), "not scored here", *paper])
            continue
        primary = outcome.scores.primary
        rows.append([f"{name}, {primary.name}", str(primary.count), _cell(primary), *paper])
        rows += [[f"  {other.name}", str(other.count), _cell(other)] for other in outcome.scores.others]
    if (average := average_of_nine(outcomes)) is not None:
        theirs = [f"{AVERAGE[model]:.2f}" if model in AVERAGE else "" for model in models]
        rows.append(["average of the nine", "", f"{average:.2f}", *theirs])
    widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [cell.rjust(widths[i]) if i == 1 else cell.ljust(widths[i]) for i, cell in enumerate(row)]
        lines.append("   ".join(cells).rstrip())
    return "\n".join(lines)


def average_of_nine(outcomes: Sequence["Outcome"]) -> float | None:
    """The mean, in percent, of the nine scores that the paper averages; None unless all are there."""
    values = {
        outcome.benchmark.name: 100 * outcome.scores.primary.value
        for outcome in outcomes
        if outcome.benchmark.name in AVERAGED and outcome.scores is not None and outcome.scores.primary is not None
    }
    return sum(values.values()) / len(AVERAGED) if len(values) == len(AVERAGED) else None


def format_notes(outcomes: Sequence["Outcome"]) -> str:
    """What a reader of the table must know: questions that were not asked, references that lack, limits."""
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
    return "\n".join(["", *lines]) if lines else ""


def to_json(outcome: "Outcome") -> dict[str, Any]:
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


def _remarks(outcome: "Outcome") -> list[str]:
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
