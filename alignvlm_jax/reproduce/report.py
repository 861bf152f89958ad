"""report.md and its plots, from nothing but the results of the jobs: whatever came out, that is what it says."""

from pathlib import Path

from alignvlm_jax.config.loading import load_config
from alignvlm_jax.reproduce import parts, recipe
from alignvlm_jax.reproduce.jobs import read_result
from alignvlm_jax.reproduce.options import ENCODER_TITLES, TITLES, Options
from alignvlm_jax.reproduce.part import Results

REPORT_FILE = "report.md"


def write_report(options: Options, out: Path) -> Path:
    """Writes the report on what is there so far, and returns its file."""
    results = Results(options, out)
    sections = [f"# {_TITLE}", _head(options, out), "## What the paper claims and what shows here", claims(results)]
    for part in parts.PARTS:
        if part.section is not None:
            sections += [f"## {part.title}", part.section(results, out).strip()]
    sections += ["## What is equal, and what favours whom", _fairness(options)]
    file = out / REPORT_FILE
    new = file.with_name(f".{file.name}")
    new.write_text("\n\n".join(sections) + "\n", encoding="utf-8")
    new.replace(file)
    return file


_TITLE = "Connectors under one recipe"


def _head(options: Options, out: Path) -> str:
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
        f"training, code {', '.join(revisions) or 'not run yet'}). A run: {stages}. Every figure below is "
        "made from the runs' `result.json`; nothing is left out but what is said to be."
    )


def claims(results: Results) -> str:
    """What shows of the paper's claims, a line each."""
    lines = [line for part in parts.PARTS if part.claims is not None for line in part.claims(results)]
    if not lines:
        return "Nothing can be said yet: no two connectors have been compared."
    return (
        '"Shows" and "The opposite shows": the 95 % interval of the difference leaves 0 out (each comparison by '
        'itself, not corrected for their number). "Undecided": it does not. The interval of one seed alone counts what '
        "other pages would change, not what another seed would.\n\n" + "\n".join(f"- {line}" for line in lines)
    )


def _fairness(options: Options) -> str:
    config = load_config(options.config, options.overrides)
    page = config.data.packing.tiles_per_bin
    rows = []
    for connector in options.connectors:
        run = recipe.experiment(options, Path("data"), connector=connector, encoder=options.encoders[-1], seed=0)
        text = max(stage.max_text_tokens for stage in run.stages)
        tokens = run.data.packing.tokens_per_bin - text
        sizes = ", ".join(f"{name} {value}" for name, value in recipe.NANO_SIZES[connector].items()) or "none"
        rows.append(f"| {TITLES[connector]} | {tokens} | {sizes} |")
    learning = ", ".join(f"{stage.name} {stage.learning_rates.language:g}" for stage in config.stages)
    table = "\n".join(["| connector | visual tokens a page | sizes set here |", "|---|---:|---|", *rows])
    return _FAIRNESS.format(
        page=page,
        trials=len(recipe.RATE_FACTORS),
        learning=learning,
        table=table,
        encoders=" and ".join(ENCODER_TITLES[encoder] for encoder in options.encoders),
    )


_FAIRNESS = """\
Equal for all connectors: the backbones ({encoders}), the pages of every step and their order (a bin holds one page, so
that the number of visual tokens cannot change which pages share a step), the number of steps, schedule, warm-up,
optimizer, the rates of encoder and decoder ({learning}), and {trials} trials for the connector's rate. Equal in steps
is not equal in seconds or parameters: see the costs.

Not equal, and in whose favour:

- **The decoder favours ALIGN, and next MLP and Ovis.** It was pre-trained on pages written as text, one character for
  each patch, in the place where the visual tokens go: that is what ALIGN can say from its first step, in the decoder's
  own embeddings. The paper's decoders never saw such text, and its comparison has no such advantage. Connectors with
  one token for each patch find the positions of that pre-training; those that reduce do not.
- **ALIGN alone starts from the decoder's weights**: W2 is a copy of the LM head, as the paper says. It is ALIGN's idea,
  and not a favour done here; the others have nothing to copy.
- **The shipped encoder favours ALIGN more**: it was trained to name the character under each patch, which supervises
  what ALIGN says. The other encoder learned from whole transcriptions; that comparison is the fair one.
- **Fewer tokens are cheaper**: Perceiver, H-Reducer and C-Abstractor give the decoder fewer tokens a page, and their
  steps are quicker. On pages with a character in nearly every patch, reducing also loses more than on photographs.
- The rates of encoder and decoder come from the demo's recipe, which was developed with ALIGN.
- Nano scale: characters of a synthetic print, a decoder of a million parameters. What shows here need not show at 3B,
  nor the reverse.

{table}
"""
