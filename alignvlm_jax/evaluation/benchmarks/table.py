"""The table of benchmarks: for each its files, its split, its prompt, its metric.

Prompts: a model of the paper's main recipe is fine-tuned on DocDownstream, whose questions stand alone, so these
benchmarks ask the question as it stands (X-PLUG/mPLUG-DocOwl, docowl_benchmark_evaluate.py). What the paper put around
them is unstated; VLMEvalKit, with which it scored, adds "Answer the question using a single word or phrase." to VQA.
`{question}` is the benchmark's own text, `{choices}` its options, one a line ("A. ...").

`max_new_tokens` is lmms-eval's where it states one, and else enough for the longest reference.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from alignvlm_jax.errors import UserError
from alignvlm_jax.evaluation.benchmarks import chartqa, docdownstream, documents, scoring, textvqa
from alignvlm_jax.evaluation.benchmarks.layout import Layout
from alignvlm_jax.evaluation.benchmarks.paper import PAPER
from alignvlm_jax.evaluation.benchmarks.question import Question

_AS_IT_STANDS = "{question}"
_DOCOWL = "X-PLUG/mPLUG-DocOwl, DocOwl1.5/docowl_benchmark_evaluate.py"


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """One row of the table.

    Attributes:
      name: what the command line calls it.
      title: what people call it.
      layouts: the forms it is published in; the first whose files are there is read.
      split: the one that the paper, or else everybody, scores.
      prompt: what is asked; by `Question.kind` where there are several.
      prompt_source: who asks so.
      max_new_tokens: where an answer is cut off.
      metric: from answers to scores.
      submission: from answers to what the benchmark's own server or judge takes.
    """

    name: str
    title: str
    layouts: tuple[Layout, ...]
    split: str
    prompt: str | Mapping[str, str]
    prompt_source: str
    max_new_tokens: int
    metric: scoring.Metric
    submission: Callable[[Sequence[Question], scoring.Answers], Any] | None = None

    @property
    def paper(self) -> Mapping[str, float]:
        """The paper's scores in percent, by model."""
        return PAPER.get(self.name, {})

    def ask(self, question: Question) -> str:
        """The text that the model is given, with `IMAGE` where images go."""
        template = self.prompt if isinstance(self.prompt, str) else self.prompt[question.kind]
        choices = "\n".join(f"{chr(ord('A') + i)}. {choice}" for i, choice in enumerate(question.choices))
        return template.format(question=question.text, choices=choices)


# fmt: off
BENCHMARKS: Mapping[str, Benchmark] = {row.name: row for row in (
    Benchmark(
        "docvqa", "DocVQA",
        (docdownstream.layout("DocVQA"), documents.DOCVQA, documents.DOCVQA_PARQUET),
        split="val", prompt=_AS_IT_STANDS, prompt_source=_DOCOWL, max_new_tokens=32,
        metric=scoring.mean_of("ANLS", scoring.anls), submission=documents.submission,
    ),
    Benchmark(
        "infovqa", "InfoVQA",
        (docdownstream.layout("InfographicsVQA"), documents.INFOVQA, documents.INFOVQA_PARQUET),
        split="val", prompt=_AS_IT_STANDS, prompt_source=_DOCOWL, max_new_tokens=32,
        metric=scoring.mean_of("ANLS", scoring.anls), submission=documents.submission,
    ),
    Benchmark(
        "deepform", "DeepForm", (docdownstream.layout("DeepForm"),),
        split="test", prompt=_AS_IT_STANDS, prompt_source=_DOCOWL, max_new_tokens=64, metric=scoring.forms,
    ),
    Benchmark(
        "klc", "KLC", (docdownstream.layout("KleisterCharity"),),
        split="test", prompt=_AS_IT_STANDS, prompt_source=_DOCOWL, max_new_tokens=64, metric=scoring.forms,
    ),
    Benchmark(
        "wtq", "WTQ", (docdownstream.layout("WikiTableQuestions"),),
        split="test", prompt=_AS_IT_STANDS, prompt_source=_DOCOWL, max_new_tokens=64,
        metric=scoring.mean_of("denotation accuracy", scoring.wtq_whole, split_at_bars=scoring.wtq_split),
    ),
    Benchmark(
        "tabfact", "TabFact", (docdownstream.layout("TabFact"),),
        split="test", prompt=_AS_IT_STANDS, prompt_source=_DOCOWL, max_new_tokens=8,
        metric=scoring.mean_of("accuracy", scoring.tabfact_accuracy),
    ),
    Benchmark(
        "chartqa", "ChartQA", (docdownstream.layout("ChartQA"), chartqa.ORIGINAL, chartqa.PARQUET),
        split="test", prompt=_AS_IT_STANDS, prompt_source=_DOCOWL, max_new_tokens=32,
        metric=scoring.mean_of("relaxed accuracy", scoring.relaxed_accuracy),
    ),
    Benchmark(
        "textvqa", "TextVQA", (docdownstream.layout("TextVQA"), textvqa.ORIGINAL, textvqa.PARQUET),
        split="val", prompt=_AS_IT_STANDS, prompt_source=_DOCOWL, max_new_tokens=32,
        metric=scoring.mean_of("VQA accuracy", scoring.vqa_accuracy), submission=textvqa.submission,
    ),
)}
# fmt: on


def find_benchmarks(names: Sequence[str]) -> list[Benchmark]:
    """The benchmarks of these names.

    Raises:
      UserError: one is not known, or named twice.
    """
    for name in names:
        if name not in BENCHMARKS:
            raise UserError(f"no benchmark {name!r}: there are {', '.join(BENCHMARKS)}")
        if names.count(name) > 1:
            raise UserError(f"the benchmark {name!r} is named twice")
    return [BENCHMARKS[name] for name in names]
