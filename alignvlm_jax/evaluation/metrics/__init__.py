"""The benchmarks' metrics.

Each function reproduces an official scorer, including its flaws, because scores are comparable only then.

    benchmark                   function              official scorer
    DocVQA, InfoVQA             anls                  the RRC server's script
    ChartQA                     relaxed_accuracy      google-research/pix2struct
    TextVQA                     vqa_accuracy          facebookresearch/mmf
    DeepForm, KLC               due_f1                due-benchmark/evaluator
    WikiTableQuestions          wtq_denotation        ppasupat/WikiTableQuestions, evaluator.py
    TabFact                     tabfact_accuracy      X-PLUG/mPLUG-DocOwl
    TableVQA-Bench              tablevqa_correct      naver-ai/tablevqabench
                                fintabnetqa_strictly_correct
    VCR                         vcr_scores            tianyu-z/VCR
    MMMU                        mmmu_choice           MMMU-Benchmark/MMMU
                                mmmu_open
    SEED-Bench                  seed_accuracy         lmms-eval
    POPE                        pope_says_yes         AoiDragon/POPE
    GQA                         gqa_accuracy          lmms-eval

Every function scores one question from 0 to 1; only `due_f1` scores a data set. The score of a data set is the mean
over its questions, unless a docstring says otherwise.

Answers are not cleaned up first. If a popular harness strips or rewrites answers, the docstring says so, and a
comparison with that harness has to do the same. A single string in place of a list of accepted answers is taken as the
only accepted answer. `ScorerAborted` is raised where the official scorer would stop with an error.
"""

from alignvlm_jax.evaluation.metrics.answers import anls, evalai_normalize, relaxed_accuracy, vqa_accuracy
from alignvlm_jax.evaluation.metrics.arguments import ScorerAborted
from alignvlm_jax.evaluation.metrics.choices import gqa_accuracy, mmmu_choice, mmmu_open, pope_says_yes, seed_accuracy
from alignvlm_jax.evaluation.metrics.forms import due_f1
from alignvlm_jax.evaluation.metrics.restoration import vcr_scores
from alignvlm_jax.evaluation.metrics.tables import (
    fintabnetqa_strictly_correct,
    tabfact_accuracy,
    tablevqa_correct,
    wtq_denotation,
)

__all__ = [
    "ScorerAborted",
    "anls",
    "due_f1",
    "evalai_normalize",
    "fintabnetqa_strictly_correct",
    "gqa_accuracy",
    "mmmu_choice",
    "mmmu_open",
    "pope_says_yes",
    "relaxed_accuracy",
    "seed_accuracy",
    "tabfact_accuracy",
    "tablevqa_correct",
    "vcr_scores",
    "vqa_accuracy",
    "wtq_denotation",
]
