"""Prepares the folder of a run: creates it, or checks that a resumed run has the same config."""

from collections.abc import Sequence
from pathlib import Path

from alignvlm_jax.checkpoints.weights import history_of_run, read_page_scale, write_history, write_page_scale
from alignvlm_jax.checkpoints.workdir import (
    CHECKPOINTS_FOLDER,
    CONFIG_FILE,
    TOKENIZER_FOLDER,
    complete_steps,
    read_meta,
)
from alignvlm_jax.config.experiment import ExperimentConfig
from alignvlm_jax.config.serialization import config_to_json, read_config_json
from alignvlm_jax.errors import UserError
from alignvlm_jax.parallel import distributed
from alignvlm_jax.storage.text_files import replace_text
from alignvlm_jax.training import config_changes
from alignvlm_jax.training.experiment_data import TrainingData


def prepare_workdir(workdir: Path, config: ExperimentConfig, data: TrainingData, allowed: Sequence[str]) -> None:
    """Writes the config, tokenizer, history and page scale of a new run, or checks the config of a resumed run.

    If a resumed run has a changed config, the new config replaces the old one.

    All processes must call it.

    Args:
      workdir: folder of the run.
      config: the experiment.
      data: the data of the experiment, which include the tokenizer.
      allowed: keys of the config that may differ from those of the run in `workdir`.

    Raises:
      UserError: if another key differs, if the folder cannot be written, or if the hosts do not share it.
    """
    path, steps = workdir / CONFIG_FILE, complete_steps(workdir / CHECKPOINTS_FOLDER)
    is_resumed = bool(steps)
    is_up_to_date = False
    text = config_to_json(config)

    # Compare the config with that of the run. Checkpoints also store it, in case config.json is missing.
    if is_resumed:
        has_config = path.is_file()
        if has_config:
            old = read_config_json(path)
        else:
            old = read_meta(workdir / CHECKPOINTS_FOLDER / str(steps[-1]))["config"]
        changes = config_changes.compare(old, config)
        distributed.log(config_changes.describe(changes))
        config_changes.check(changes, allowed, workdir)
        is_up_to_date = has_config and path.read_text(encoding="utf-8") == text
    # All processes verify a share of the checkpoint's files, so all of them read its history.
    is_started = config.init_from is not None and not is_resumed
    history = history_of_run(config.init_from) if is_started else None
    # Barrier: every process must have read the folder before process 0 writes to it.
    distributed.gather_json("read")
    try:
        # A run that resumes with the same config writes nothing here, so a kill at this point cannot damage it.
        if distributed.is_primary() and not is_up_to_date:
            workdir.mkdir(parents=True, exist_ok=True)
            data.save_tokenizer(workdir / TOKENIZER_FOLDER)
            if history is not None:
                write_history(workdir, history)
            if not is_resumed:
                write_page_scale(workdir, _page_scale(config, data))
            replace_text(path, text)
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be written ({error.strerror})") from error
    # Barrier: process 0 has written. A host that does not see the file now does not share its storage.
    distributed.gather_json("written")
    distributed.require_equal({f"{workdir} is on storage that the host shares with process 0": path.is_file()})


def _page_scale(config: ExperimentConfig, data: TrainingData) -> float | None:
    """Returns the scale of the pages of this run or of the run that it starts from, whichever is smaller."""
    scales = [data.page_scale(), read_page_scale(config.init_from) if config.init_from is not None else None]
    return min((scale for scale in scales if scale is not None), default=None)
