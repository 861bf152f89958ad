"""Entry point of `alignvlm analyze vocabulary`."""

from collections.abc import Sequence

from alignvlm_jax.analysis import inputs, output
from alignvlm_jax.analysis.vocabulary import report
from alignvlm_jax.analysis.vocabulary.measure import (
    PAGES,
    Statistics,
    align_config,
    default_sizes,
    vocabulary_curve,
    vocabulary_use,
)
from alignvlm_jax.analysis.vocabulary.saving import save_pruned
from alignvlm_jax.checkpoints.new_folder import check_is_free
from alignvlm_jax.errors import UserError
from alignvlm_jax.jax_modes import ordinary_modes
from alignvlm_jax.output_files import check_writable_folder

_TOP = 20


@ordinary_modes()
def run(
    checkpoints: Sequence[str],
    data: str,
    out: str,
    *,
    split: str = "heldout",
    usage_split: str = "train",
    pages: int = PAGES,
    sizes: Sequence[int] | None = None,
    limit: int | None = None,
    batch_size: int = 32,
    prune: int | None = None,
    save: str | None = None,
    statistics: Statistics = "full",
) -> None:
    """Measures each checkpoint, writes OUT/vocabulary.*, and optionally saves a pruned checkpoint.

    Args:
      checkpoints: workdirs, exported folders or "nano".
      data: folder of the data set.
      out: output folder.
      split: split whose questions are asked.
      usage_split: split on which words are counted.
      pages: number of pages on which words are counted.
      sizes: numbers of words to keep; None uses `default_sizes`.
      limit: if set, only the first `limit` questions are asked.
      batch_size: questions decoded at once.
      prune: number of words of the pruned checkpoint; requires `save`.
      save: folder of the pruned checkpoint; requires `prune`.
      statistics: rows from which LN_V takes mean and variance in the pruned checkpoint.

    Raises:
      UserError: if the arguments do not fit together or a checkpoint cannot be pruned as requested.
    """
    # Refuse everything that can be refused before the first model is loaded.
    if (prune is None) != (save is None) or prune is not None and len(checkpoints) > 1:
        raise UserError("--prune K and --save DIR must be used together, and with a single --checkpoint")
    for checkpoint in checkpoints:
        _check_sizes(checkpoint, sizes, prune)
    if save is not None:
        check_is_free(save)
    check_writable_folder(out)

    counted, records = inputs.open_records(data, usage_split), inputs.open_records(data, split)
    reports = {}
    for name, reader in inputs.load_readers(checkpoints, batch_size=batch_size):
        # Count the words first: pruned models keep the most used ones.
        use = vocabulary_use(reader, counted, pages=pages)
        if save is not None:
            save_pruned(checkpoints[0], use.mean, prune, save, statistics=statistics)
            print(f"written: {save}, {prune:,} of {len(use.mean):,} words")
        num_words = align_config(reader.config).kept_words or len(use.mean)
        # A pruned model is only scored as it is.
        all_sizes = default_sizes(use) if num_words == len(use.mean) else [num_words]
        chosen = all_sizes if sizes is None else sorted(sizes)
        full = vocabulary_curve(reader, records, chosen, usage=use.mean, limit=limit)
        fewer = [size for size in chosen if size < num_words]
        kept = vocabulary_curve(reader, records, fewer, usage=use.mean, limit=limit, statistics="kept")
        top = [(reader.tokenizer.token_text(word), p) for word, p in use.top(_TOP)]
        reports[name] = report.VocabularyReport(use, top, full, kept)
    results = {
        "checkpoints": dict(zip(reports, map(str, checkpoints), strict=True)),
        "data": str(data),
        "usage_split": usage_split,
        "split": split,
        "vocabulary": {name: measured.to_json() for name, measured in reports.items()},
    }
    plots = {"vocabulary": report.plot(reports)}
    output.write(out, "vocabulary", results=results, plots=plots, text=report.describe(reports, usage_split, split))


def _check_sizes(checkpoint: str, sizes: Sequence[int] | None, prune: int | None) -> None:
    """Refuses sizes that the checkpoint cannot be pruned to, before any long work."""
    config = inputs.model_config(checkpoint)
    connector = align_config(config, checkpoint)
    words = connector.kept_words or connector.vocab_size or config.language.vocab_size
    for option, size in (*(("--sizes", size) for size in sizes or ()), *([("--prune", prune)] if prune else [])):
        if size > words:
            raise UserError(f"{option} {size}: {checkpoint} has {words:,} words; choose from 1 to {words}")
        if connector.kept_words is not None and (size, option) != (words, "--sizes"):
            raise UserError(
                f"{option} {size}: {checkpoint} is already pruned to {words:,} words; use the full model, or omit "
                f"{option}"
            )
