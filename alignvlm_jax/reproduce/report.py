"""Writes report.md and its plots, from the results of the jobs alone."""

from pathlib import Path

from alignvlm_jax.interop.start import load_config
from alignvlm_jax.reproduce import parts, recipe
from alignvlm_jax.reproduce.jobs import read_result
from alignvlm_jax.reproduce.options import ENCODER_TITLES, TITLES, Options
from alignvlm_jax.reproduce.part import Results

REPORT_FILE = "report.md"
_TITLE = "Connectors under one recipe"


def write_report(options: Options, out: Path) -> Path:
    """Writes the report on the results so far, and returns its file."""
    results = Results(options, out)
    sections = [f"# {_TITLE}", _head(options, out), "## The paper's claims and the results here", claims(results)]
    for part in parts.PARTS:
        if part.section is not None:
            sections += [f"## {part.title}", part.section(results, out).strip()]
    sections += ["## Fairness of the comparison", _fairness(options)]
    file = out / REPORT_FILE
    temporary = file.with_name(f".{file.name}")
    temporary.write_text("\n\n".join(sections) + "\n", encoding="utf-8")
    temporary.replace(file)
    return file


def _head(options: Options, out: Path) -> str:
    # Runs of closed experiments count only if they have results.
    jobs = parts.all_jobs(options)
    done = [result for result in (read_result(out, job) for job in jobs) if result is not None]
    closed = [result for result in (read_result(out, job) for job in parts.closed_jobs(options)) if result is not None]
    num_runs, done = len(jobs) + len(closed), done + closed
    seconds = sum(result.get("train_seconds", 0.0) for result in done)
    revisions = sorted({result["versions"].get("git", "unknown") for result in done})
    config = load_config(options.config, options.overrides)
    stages = ", ".join(
        f"{stage.steps} steps of {stage.bins_per_step} pages ({stage.mixture[0].task})" for stage in config.stages
    )
    return (
        f"Written by `alignvlm reproduce` from {len(done)} of {num_runs} runs ({seconds / 3600:.1f} hours of "
        f"training, code {', '.join(revisions) or 'not run yet'}). Each run trains {stages}. Every number below is "
        "computed from the `result.json` files of the runs. Excluded runs are named."
    )


def claims(results: Results) -> str:
    """Returns a list of the paper's claims with a verdict on each, as Markdown."""
    lines = [line for part in parts.PARTS if part.claims is not None for line in part.claims(results)]
    if not lines:
        return "No verdict is possible yet: no two connectors have been compared."
    return (
        'Each number is a difference of shares with its 95 % interval. "Confirmed" and "Contradicted" mean that the '
        'interval excludes 0; "Undecided" means that it contains 0. The intervals are not corrected for the number of '
        "comparisons. With a single seed, they cover the variation between pages but not between seeds.\n\n"
        + "\n".join(f"- {line}" for line in lines)
    )


def _fairness(options: Options) -> str:
    config = load_config(options.config, options.overrides)
    rows = []
    for connector in options.connectors:
        run = recipe.experiment(options, Path("data"), connector=connector, encoder=options.encoders[-1], seed=0)
        text = max(stage.max_text_tokens for stage in run.stages)
        tokens = run.data.packing.tokens_per_bin - text
        sizes = ", ".join(f"{name} {value}" for name, value in recipe.NANO_SIZES[connector].items()) or "none"
        rows.append(f"| {TITLES[connector]} | {tokens} | {sizes} |")
    learning = ", ".join(f"{stage.name} {stage.learning_rates.language:g}" for stage in config.stages)
    table = "\n".join(["| connector | visual tokens per page | sizes set here |", "|---|---:|---|", *rows])
    return _FAIRNESS.format(
        trials=len(recipe.RATE_FACTORS),
        learning=learning,
        table=table,
        encoders=" and ".join(ENCODER_TITLES[encoder] for encoder in options.encoders),
    )


_FAIRNESS = """\
Equal for all connectors:

- the backbones ({encoders});
- the pages of every step and their order (a bin holds one page, so the number of visual tokens cannot change which
  pages share a step);
- the number of steps, the schedule, the warm-up and the optimizer;
- the learning rates of encoder and decoder ({learning});
- {trials} trials for the connector's learning rate.

Equal steps are not equal seconds or parameters: see "Seconds and memory".

Not equal, and in whose favor:

- **The decoder favors ALIGN, then MLP and Ovis.** It was pre-trained on pages written as text, with one character
  for each patch in the position of the visual token. ALIGN can express exactly that from its first step, in the
  decoder's own embeddings. The paper's decoders never saw such text, so its comparison has no such advantage.
  Connectors with one token per patch find the positions of that pre-training; those that reduce the number of tokens
  do not.
- **Only ALIGN starts from the decoder's weights.** W2 is a copy of the LM head, as in the paper. This is part of ALIGN,
  not an advantage added here; the other connectors have nothing to copy.
- **The shipped encoder favors ALIGN more.** It was trained to name the character under each patch, which supervises
  what ALIGN expresses. The other encoder learned from whole transcriptions; the comparison on it is the fair one.
- **Fewer tokens are cheaper.** Perceiver, H-Reducer and C-Abstractor give the decoder fewer tokens per page, and
  their steps are faster. On pages with a character in nearly every patch, reducing also loses more than on
  photographs.
- The learning rates of encoder and decoder come from the demo's recipe, which was developed with ALIGN.
- Nano scale: synthetic print, a decoder of a million parameters. What holds here need not hold at 3B, and vice versa.

{table}
"""
