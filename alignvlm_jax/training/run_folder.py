"""Prepares the folder of a run: creates it, or checks that a resumed run has the same config."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
from alignvlm_jax.parallel.writing import call_in_primary
from alignvlm_jax.storage.text_files import replace_text
from alignvlm_jax.training import config_changes
from alignvlm_jax.training.experiment_data import TrainingData


def with_recorded_grouping(config: ExperimentConfig, workdir: Path) -> ExperimentConfig:
    """Returns the experiment with the grouping of questions that the run in `workdir` began with.

    The position of a run in its data counts groups, so another grouping would repeat some examples and leave out
    others. All processes must call it with the same config.
    """
    recorded = distributed.gather_json(call_in_primary(lambda: _recorded_grouping(workdir)))[0]
    data = config.data
    if recorded is None or recorded["group_questions"] == data.group_questions:
        return config
    distributed.log(
        f"warning: the run keeps config.data.group_questions={recorded['group_questions']}, which it began with, and "
        f"ignores {data.group_questions!r}: start another run with --init-from to change it"
    )
    packing = dataclasses.replace(data.packing, branch_tokens_per_bin=recorded["branch_tokens_per_bin"])
    data = dataclasses.replace(data, group_questions=recorded["group_questions"], packing=packing)
    return dataclasses.replace(config, data=data)


def _recorded_grouping(workdir: Path) -> dict[str, Any] | None:
    """Returns the grouping of the run in a folder, or None if there is no run to resume."""
    steps = complete_steps(workdir / CHECKPOINTS_FOLDER)
    if not steps:
        return None
    data = _recorded_config(workdir, steps[-1]).get("data", {})
    # Runs of earlier versions recorded neither, and grouped nothing.
    return {
        "group_questions": data.get("group_questions", "off"),
        "branch_tokens_per_bin": data.get("packing", {}).get("branch_tokens_per_bin"),
    }


def _recorded_config(workdir: Path, step: int) -> dict[str, Any]:
    """Returns the config of a run. Checkpoints also store it, in case config.json is missing."""
    path = workdir / CONFIG_FILE
    return read_config_json(path) if path.is_file() else read_meta(workdir / CHECKPOINTS_FOLDER / str(step))["config"]


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

    # Compare the config with that of the run.
    if is_resumed:
        changes = config_changes.compare(_recorded_config(workdir, steps[-1]), config)
        distributed.log(config_changes.describe(changes))
        config_changes.check(changes, allowed, workdir)
        is_up_to_date = path.is_file() and path.read_text(encoding="utf-8") == text
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
