"""Scores from the paper (arXiv 2502.01341), printed next to ours.

The numbers come from three tables: the main one after all training stages (models of 1B, 3B and 8B; baselines of 3B;
and the 3B model with its vocabulary pruned to 3.4K words at evaluation), text restoration on VCR, and the low-resource
setting (LLaVA data, 3B). The paper scores with VLMEvalKit, on the validation splits of DocVQA, InfoVQA and TextVQA.
"""

from collections.abc import Mapping

PRUNED = "ALIGN 3B pruned"
_MODELS = ("ALIGN 1B", "ALIGN 3B", "ALIGN 8B", "MLP 3B", "Perceiver 3B", "Ovis 3B", PRUNED)

_SCORES = {
    "docvqa": (72.42, 79.63, 81.18, 71.46, 69.08, 74.68, 79.40),
    "infovqa": (38.16, 44.53, 53.75, 37.56, 34.13, 42.11, 44.13),
    "deepform": (60.47, 63.49, 63.25, 62.07, 57.08, 58.02, 63.64),
    "klc": (33.71, 35.25, 35.50, 33.36, 31.75, 33.50, 35.02),
    "wtq": (28.66, 38.59, 45.31, 28.94, 27.95, 33.13, 38.26),
    "tabfact": (71.31, 78.51, 83.04, 73.22, 71.93, 76.67, 78.83),
    "chartqa": (65.44, 71.88, 75.00, 66.48, 65.16, 67.92, 71.72),
    "textvqa": (48.81, 57.38, 64.60, 53.56, 51.33, 52.60, 57.48),
    "tablevqa": (50.29, 60.10, 64.33, 50.96, 47.76, 53.93, 59.80),
}

AVERAGED = tuple(_SCORES)
"""Benchmarks of the main table."""
AVERAGE = dict(zip(_MODELS, (52.14, 58.81, 62.88, 53.06, 50.68, 54.72, 58.69), strict=True))
"""Model -> mean over the benchmarks of the main table, as printed in its last column (58.818 appears as 58.81)."""

GENERAL = ("mmmu", "seed", "mmvet", "pope", "gqa")
FOUR = ("docvqa", "infovqa", "chartqa", "textvqa")
_FOUR_AVERAGES, _GENERAL_AVERAGES = (
    (59.32, 40.61, 33.64, 48.56, 36.23, 47.16),
    (56.88, 53.59, 53.17, 53.55, 54.18, 54.33),
)
_LOW_RESOURCE_MODELS = ("ALIGN", "MLP", "Perceiver", "Ovis", "H-Reducer", "HoneyBee")
LOW_RESOURCE: Mapping[tuple[str, ...], Mapping[str, float]] = {
    FOUR: dict(zip(_LOW_RESOURCE_MODELS, _FOUR_AVERAGES, strict=True)),
    GENERAL: dict(zip(_LOW_RESOURCE_MODELS, _GENERAL_AVERAGES, strict=True)),
}
"""Benchmarks -> model of the low-resource setting -> average over these benchmarks."""

PAPER: Mapping[str, Mapping[str, float]] = {
    **{name: dict(zip(_MODELS, scores, strict=True)) for name, scores in _SCORES.items()},
    "vcr_en_easy": {"ALIGN 3B": 65.84, "MLP 3B": 51.43},
    "vcr_en_hard": {"ALIGN 3B": 48.07, "MLP 3B": 37.89},
    "mmmu": {"ALIGN 3B": 35.33},
    "seed": {"ALIGN 3B": 63.27},
    "mmvet": {"ALIGN 3B": 35.32},
    "pope": {"ALIGN 3B": 88.85},
    "gqa": {"ALIGN 3B": 61.67},
}
"""Benchmark -> model -> score in percent. `MARKS` lists the benchmarks with other models than the main table."""

MARKS: Mapping[str, str] = {**dict.fromkeys(GENERAL, "*"), "vcr_en_easy": "**", "vcr_en_hard": "**"}
FOOTNOTES: Mapping[str, str] = {
    "*": "score of the paper's low-resource models (3B, LLaVA data), not of the models in its main table",
    "**": "score of models with VCR data in their stage 3, not of the models in the paper's main table",
}
