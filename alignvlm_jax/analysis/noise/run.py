"""Entry point of `alignvlm analyze noise`."""

from collections.abc import Sequence

from alignvlm_jax.analysis import inputs, output
from alignvlm_jax.analysis.noise import report
from alignvlm_jax.analysis.noise.corruptions import DEFAULT_CORRUPTIONS, Corruption
from alignvlm_jax.analysis.noise.measure import SIGMAS, feature_noise, image_noise
from alignvlm_jax.jax_modes import ordinary_modes
from alignvlm_jax.output_files import check_writable_folder


@ordinary_modes()
def run(
    checkpoints: Sequence[str],
    data: str,
    out: str,
    *,
    split: str = "heldout",
    limit: int | None = None,
    sigmas: Sequence[float] = SIGMAS,
    corruptions: Sequence[Corruption] = DEFAULT_CORRUPTIONS,
    seed: int = 0,
    batch_size: int = 32,
) -> None:
    """Measures each checkpoint and writes OUT/noise.json, OUT/noise.md and the plots.

    Args:
      checkpoints: workdirs, exported folders or "nano".
      data: folder of the data set.
      out: output folder.
      split: split whose questions are asked.
      limit: if set, only the first `limit` questions are asked.
      sigmas: standard deviations of the feature noise; 0 is always measured too.
      corruptions: corruptions of the page.
      seed: seed of the noise and of the corruptions.
      batch_size: questions decoded at once.
    """
    check_writable_folder(out)
    records = inputs.open_records(data, split)
    sigmas = sorted({0.0, *sigmas})
    reports = {}
    for name, reader in inputs.load_readers(checkpoints, batch_size=batch_size):
        reports[name] = report.NoiseReport(
            feature_noise(reader, records, sigmas, limit=limit, seed=seed),
            image_noise(reader, records, corruptions, limit=limit, seed=seed),
        )
    results = {
        "checkpoints": dict(zip(reports, map(str, checkpoints), strict=True)),
        "data": str(data),
        "split": split,
        "seed": seed,
        **report.to_json(reports),
    }
    plots = {"noise": report.plot_features(reports)}
    if corruptions:
        plots["noise_images"] = report.plot_images(reports)
    output.write(out, "noise", results=results, plots=plots, text=report.describe(reports, split))
