"""Entry point of `alignvlm analyze geometry`."""

from collections.abc import Sequence

from alignvlm_jax.analysis import inputs, output
from alignvlm_jax.analysis.geometry import report
from alignvlm_jax.analysis.geometry.measure import HULL_TOKENS, PAGES, TOKENS, measure_geometry
from alignvlm_jax.jax_modes import ordinary_modes
from alignvlm_jax.output_files import check_writable_folder


@ordinary_modes()
def run(
    checkpoints: Sequence[str],
    data: str,
    out: str,
    *,
    split: str = "heldout",
    pages: int = PAGES,
    tokens: int = TOKENS,
    hull_tokens: int = HULL_TOKENS,
    seed: int = 0,
) -> None:
    """Measures each checkpoint and writes OUT/geometry.json, OUT/geometry.md and OUT/geometry.png.

    Args:
      checkpoints: workdirs, exported folders or "nano".
      data: folder of the data set.
      out: output folder.
      split: split of the pages.
      pages: number of pages, from the first.
      tokens: number of their visual tokens, drawn at random.
      hull_tokens: number of those tokens whose distance to the hull is computed.
      seed: seed of the draws.
    """
    check_writable_folder(out)
    records = inputs.open_records(data, split)
    geometries = {
        name: measure_geometry(reader, records, pages=pages, tokens=tokens, hull_tokens=hull_tokens, seed=seed)
        for name, reader in inputs.load_readers(checkpoints)
    }
    results = {
        "checkpoints": dict(zip(geometries, map(str, checkpoints), strict=True)),
        "data": str(data),
        "split": split,
        "pages": pages,
        "seed": seed,
        "unit": "distances are in units of text_spread",
        "geometry": {name: report.to_json(geometry) for name, geometry in geometries.items()},
    }
    plots = {"geometry": report.plot(geometries)}
    output.write(out, "geometry", results=results, plots=plots, text=report.describe(geometries, split))
