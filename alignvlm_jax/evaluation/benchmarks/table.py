"""The table of benchmarks: files, split, prompt and metric of each.

A model trained with the paper's main recipe is fine-tuned on DocDownstream, whose questions have no added instruction.
These benchmarks therefore use the plain question as the prompt (X-PLUG/mPLUG-DocOwl, docowl_benchmark_evaluate.py). The
paper does not state its prompts; VLMEvalKit, which it uses for scoring, adds "Answer the question using a single word
or phrase." to VQA questions. In a prompt, `{question}` is the benchmark's question and `{choices}` its options, one per
line ("A. ...").

TableVQA-Bench and VCR use their authors' prompts in VLMEvalKit's wording. The general benchmarks use the prompts of
lmms-eval and LLaVA, which end in the same words as the questions in LLaVA's training data.

`max_new_tokens` is close to lmms-eval's value where it has one, and otherwise enough for the longest reference.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from alignvlm_jax.errors import UserError
from alignvlm_jax.evaluation.benchmarks import (
    chartqa,
    docdownstream,
    documents,
    gqa,
    mmmu,
    mmvet,
    pope,
    scoring,
    seed,
    tablevqa,
    textvqa,
    vcr,
)
from alignvlm_jax.evaluation.benchmarks.layout import Layout
from alignvlm_jax.evaluation.benchmarks.paper import PAPER
from alignvlm_jax.evaluation.benchmarks.question import Question

_PLAIN = "{question}"
_SHORT_ANSWER = "{question}\nAnswer the question using a single word or phrase."
_BY_LETTER = "{question}\n{choices}\nAnswer with the option's letter from the given choices directly."
_DOCOWL = "X-PLUG/mPLUG-DocOwl, DocOwl1.5/docowl_benchmark_evaluate.py"

# VLMEvalKit, vlmeval/dataset/utils/tablevqabench.py; the authors' src/example_prompts.py differs in "true or false".
_VWTQ = """\
You are asked to answer questions asked on an image.
You should answer the question with a single word.
Example:\x20
Question: what was the only year mr. wu competed in the olympic games?
Answer: 2004
Question: which township in pope county, arkansas has the least amount of water area?
Answer: Freeman
If you have multiple answers, please separate them with || marks. Example: Apple||Banana||Tomato

Question: {question}
Answer:"""
_VTABFACT = """\
You are asked to answer whether the statement is True or False based on given image
You should only answer True or False.
Example:\x20
Statement: the milwaukee buck win 6 game in the 2010 - 11 season
Answer: True
Statement: only the top team score above the average of 8.8
Answer: False

Statement: {question}
Answer:"""
_FINTABNETQA = """\
You are asked to answer questions asked on a image.
You should answer the question within a single word or few words.
If units can be known, the answer should include units such as $, %, million and etc.
Example:\x20
Question: What were the total financing originations for the fiscal year ended October 31, 2004?
Answer: $3,852 million
Question: What is the time period represented in the table?
Answer: October 31
Question: What was the percentage of net sales for selling, general and administrative expenses in 2006?
Answer: 34.2%
Question: {question}
Answer:"""
_VCR = {
    "en": "What is the covered texts in the image? "
    "Please restore the covered texts without outputting the explanations.",
    "zh": "图像中被覆盖的文本是什么？请在不输出解释的情况下还原被覆盖的文本。",
}


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """One row of the table of benchmarks.

    Attributes:
      name: name on the command line.
      title: name in tables and messages.
      layouts: published forms; the first one whose files exist is read.
      split: default split: the split that the paper scores, or else the usual one.
      prompt: prompt template, or templates by `Question.kind`.
      prompt_source: source of the prompt.
      max_new_tokens: maximum length of an answer.
      metric: function from questions and answers to scores.
      published: numbers of questions in the published splits. Some splits were published in several sizes.
      folders: names of the folders and repositories that it is published in, besides `name` and `title`.
      submission: function from questions and answers to the content of the file for the benchmark's server or judge.
    """

    name: str
    title: str
    layouts: tuple[Layout, ...]
    split: str
    prompt: str | Mapping[str, str]
    prompt_source: str
    max_new_tokens: int
    metric: scoring.Metric
    published: Mapping[str, tuple[int, ...]]
    folders: tuple[str, ...] = ()
    submission: Callable[[Sequence[Question], scoring.Answers], Any] | None = None

    @property
    def paper(self) -> Mapping[str, float]:
        """Scores in the paper, in percent, by model."""
        return PAPER.get(self.name, {})

    def ask(self, question: Question) -> str:
        """Returns the prompt for a question, with `IMAGE` marks at the places of images."""
        template = self.prompt if isinstance(self.prompt, str) else self.prompt[question.kind]
        choices = "\n".join(f"{chr(ord('A') + i)}. {choice}" for i, choice in enumerate(question.choices))
        return template.format(question=question.text, choices=choices)


# fmt: off
BENCHMARKS: Mapping[str, Benchmark] = {row.name: row for row in (
    Benchmark(
        "docvqa", "DocVQA",
        (docdownstream.layout("DocVQA"), documents.DOCVQA, documents.DOCVQA_PARQUET),
        split="val", prompt=_PLAIN, prompt_source=_DOCOWL, max_new_tokens=32,
        metric=scoring.mean_of("ANLS", scoring.anls), submission=documents.submission,
        published={"val": (5349,), "test": (5188,)}, folders=("spdocvqa", "SP-DocVQA"),
    ),
    Benchmark(
        "infovqa", "InfoVQA",
        (docdownstream.layout("InfographicsVQA"), documents.INFOVQA, documents.INFOVQA_PARQUET),
        split="val", prompt=_PLAIN, prompt_source=_DOCOWL, max_new_tokens=32,
        metric=scoring.mean_of("ANLS", scoring.anls), submission=documents.submission,
        published={"val": (2801,), "test": (3288,)}, folders=("InfographicVQA", "InfographicsVQA"),
    ),
    Benchmark(
        "deepform", "DeepForm", (docdownstream.layout("DeepForm"),),
        split="test", prompt=_PLAIN, prompt_source=_DOCOWL, max_new_tokens=64, metric=scoring.forms,
        published={"test": (1500,)},
    ),
    Benchmark(
        "klc", "KLC", (docdownstream.layout("KleisterCharity"),),
        split="test", prompt=_PLAIN, prompt_source=_DOCOWL, max_new_tokens=64, metric=scoring.forms,
        published={"test": (4872,)}, folders=("KleisterCharity",),
    ),
    Benchmark(
        "wtq", "WTQ", (docdownstream.layout("WikiTableQuestions"),),
        split="test", prompt=_PLAIN, prompt_source=_DOCOWL, max_new_tokens=64,
        metric=scoring.mean_of("denotation accuracy", scoring.wtq_whole, split_at_bars=scoring.wtq_split),
        published={"val": (2831,), "test": (4344,)}, folders=("WikiTableQuestions",),
    ),
    Benchmark(
        "tabfact", "TabFact", (docdownstream.layout("TabFact"),),
        split="test", prompt=_PLAIN, prompt_source=_DOCOWL, max_new_tokens=8,
        metric=scoring.mean_of("accuracy", scoring.tabfact_accuracy),
        published={"val": (12792,), "test": (12779, 12722)},
    ),
    Benchmark(
        "chartqa", "ChartQA", (docdownstream.layout("ChartQA"), chartqa.ORIGINAL, chartqa.PARQUET),
        split="test", prompt=_PLAIN, prompt_source=_DOCOWL, max_new_tokens=32,
        metric=scoring.mean_of("relaxed accuracy", scoring.relaxed_accuracy),
        published={"val": (1920,), "test": (2500,)}, folders=("ChartQA Dataset",),
    ),
    Benchmark(
        "textvqa", "TextVQA", (docdownstream.layout("TextVQA"), textvqa.ORIGINAL, textvqa.PARQUET),
        split="val", prompt=_PLAIN, prompt_source=_DOCOWL, max_new_tokens=32,
        metric=scoring.mean_of("VQA accuracy", scoring.vqa_accuracy), submission=textvqa.submission,
        published={"val": (5000,), "test": (5734,)},
    ),
    Benchmark(
        "tablevqa", "TableVQA-Bench", (tablevqa.PARQUET,),
        split="test", prompt={"vwtq": _VWTQ, "vwtq_syn": _VWTQ, "vtabfact": _VTABFACT, "fintabnetqa": _FINTABNETQA},
        prompt_source="VLMEvalKit, vlmeval/dataset/utils/tablevqabench.py", max_new_tokens=64, metric=scoring.tablevqa,
        published={"test": (1500,)}, folders=("TableVQA-Bench", "tablevqabench"),
    ),
    *(
        Benchmark(
            f"vcr_{language}_{difficulty}", f"VCR {language} {difficulty}", (vcr.layout(language, difficulty),),
            split="test", prompt=_VCR[language], prompt_source="tianyu-z/VCR; lmms-eval, tasks/vcr_wiki",
            max_new_tokens=120, metric=scoring.vcr(language),
            published={"val": (5000,), "test": (5000,)}, folders=vcr.folders(language, difficulty),
        )
        for language in ("en", "zh") for difficulty in ("easy", "hard")
    ),
    Benchmark(
        "mmmu", "MMMU", (mmmu.PARQUET,),
        split="val",
        prompt={
            "choice": "{question}\n{choices}\n\nAnswer with the option's letter from the given choices directly.",
            "open": "{question}\n\nAnswer the question using a single word or phrase.",
        },
        prompt_source="lmms-eval, tasks/mmmu; images where the text names them, as in VLMEvalKit",
        max_new_tokens=128, metric=scoring.mmmu, submission=mmmu.submission,
        published={"dev": (150,), "val": (900,), "test": (10500,)},
    ),
    Benchmark(
        "seed", "SEED-Bench (images)", (seed.ORIGINAL, seed.PARQUET),
        split="test", prompt=_BY_LETTER, prompt_source="lmms-eval, tasks/seedbench", max_new_tokens=16,
        metric=scoring.mean_of("accuracy", scoring.seed_accuracy),
        published={"test": (14233,)}, folders=("SEED-Bench",),
    ),
    Benchmark(
        "mmvet", "MM-Vet", (mmvet.ORIGINAL, mmvet.PARQUET),
        split="test", prompt=_PLAIN, prompt_source="LLaVA, docs/Evaluation.md", max_new_tokens=1024,
        metric=scoring.not_scored, submission=mmvet.submission,
        published={"test": (218,)},
    ),
    Benchmark(
        "pope", "POPE", (pope.ORIGINAL, pope.PARQUET, pope.PARQUET_PARTS),
        split="test", prompt=_SHORT_ANSWER, prompt_source="lmms-eval, tasks/pope", max_new_tokens=16,
        metric=scoring.pope,
        published={"test": (9000, 8910)},
    ),
    Benchmark(
        "gqa", "GQA", (gqa.ORIGINAL, gqa.PARQUET),
        split="test", prompt=_SHORT_ANSWER, prompt_source="lmms-eval, tasks/gqa", max_new_tokens=16,
        metric=scoring.mean_of("accuracy", scoring.gqa_accuracy),
        published={"val": (132062,), "test": (12578,)},
    ),
)}
# fmt: on


def find_benchmarks(names: Sequence[str]) -> list[Benchmark]:
    """Returns the benchmarks of these names.

    Raises:
      UserError: if there is no name, a name is unknown, or a name occurs twice.
    """
    if not names:
        raise UserError(f"--benchmark names no benchmark. Available: {', '.join(BENCHMARKS)}")
    for name in names:
        if name not in BENCHMARKS:
            raise UserError(f"unknown benchmark {name!r}. Available: {', '.join(BENCHMARKS)}")
        if names.count(name) > 1:
            raise UserError(f"--benchmark names {name!r} twice")
    return [BENCHMARKS[name] for name in names]
