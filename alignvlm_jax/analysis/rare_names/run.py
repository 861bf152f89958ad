"""Entry point of `alignvlm analyze names`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from alignvlm_jax.analysis import output
from alignvlm_jax.analysis.inputs import load_readers
from alignvlm_jax.analysis.rare_names import report
from alignvlm_jax.analysis.rare_names.answers import ask_decoder, ask_names, has_one_token_per_patch, read_letters
from alignvlm_jax.analysis.rare_names.kinds import NameAnswer
from alignvlm_jax.analysis.rare_names.measure import compare, letter_agreement, summarize
from alignvlm_jax.data.synthetic.names import read_lexicon
from alignvlm_jax.inference.reader import Reader
from alignvlm_jax.jax_modes import ordinary_modes
from alignvlm_jax.output_files import check_writable_folder


@ordinary_modes()
def analyze(
    reader: Reader, folder: str | Path, *, split: str = "heldout", limit: int | None = None, seed: int = 0
) -> dict[str, Any]:
    """Returns all measures of one model and its answers, as JSON.

    A reader with several views per image only answers questions; the other measurements need a single view.

    Args:
      reader: the model.
      folder: folder of a names corpus.
      split: split of the pages.
      limit: if set, only the first `limit` questions are asked.
      seed: seed of the bootstrap.
    """
    answers = ask_names(reader, folder, split=split, limit=limit)
    results = {"split": split, "model": summarize(answers, seed=seed)}
    if has_one_token_per_patch(reader) and reader.num_views == 1:
        answers = read_letters(reader, folder, answers)
        results["tokens say the true letter"] = letter_agreement(answers, read_lexicon(folder))
        spelled = ask_decoder(reader, folder, split=split, limit=limit)
        results["decoder alone"] = summarize(spelled, seed=seed)
        results["spelled_answers"] = [answer.to_json() for answer in spelled]
    return {**results, "answers": [answer.to_json() for answer in answers]}


@ordinary_modes()
def run(
    checkpoints: Sequence[str],
    data: str | Path,
    out: str | Path,
    *,
    split: str = "heldout",
    limit: int | None = None,
    batch_size: int = 32,
    views: int = 1,
    seed: int = 0,
) -> None:
    """Measures each checkpoint and writes OUT/names.json, OUT/names.png and OUT/names.md.

    Args:
      checkpoints: workdirs, exported folders or "nano"; the others are compared with the first.
      data: folder of a names corpus.
      out: output folder.
      split: split of the pages.
      limit: if set, only the first `limit` questions are asked.
      batch_size: questions decoded at once.
      views: if above 1, each checkpoint is asked again with `views` views of every page (`inference/views.py`).
      seed: seed of the bootstrap.
    """
    # Check the arguments, then measure every checkpoint with one view and with `views` views.
    check_writable_folder(out)
    read_lexicon(data)  # refuses other corpora before any model is loaded
    models = {}
    for name, reader in load_readers(checkpoints, batch_size=batch_size):
        for number in sorted({1, views}):
            title = name if number == 1 else f"{name}, {number} views"
            models[title] = analyze(reader.with_views(number), data, split=split, limit=limit, seed=seed)
    # Write the report, with a comparison of all other models with the first.
    text = [f"# Rare names\n\n{split} pages of {data}; intervals are 95 %, over groups of names.\n"]
    text += [f"## {name}\n\n{report.describe(results)}\n" for name, results in models.items()]
    first, *others = models
    answers = {
        name: [NameAnswer.from_json(answer) for answer in results["answers"]] for name, results in models.items()
    }
    results: dict[str, Any] = {"data": str(data), "split": split, "models": models}
    if others:
        comparisons = {name: compare(answers[first], answers[name], seed=seed) for name in others}
        results[f"compared with {first}"] = comparisons
        text.append(f"## Compared with {first}\n\n{report.describe_comparison(first, comparisons)}\n")
    lines = {name: model["model"] for name, model in models.items()}
    if not others and "decoder alone" in models[first]:
        lines["its decoder alone"] = models[first]["decoder alone"]
    output.write(out, "names", results=results, plots={"names": report.plot(lines)}, text="\n".join(text))
