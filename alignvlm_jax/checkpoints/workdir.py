"""Defines the layout of the folder of a run, and finds the checkpoints in it.

    WORKDIR/config.json              the experiment
    WORKDIR/history.json             origin of its initial weights, unless the config names it (backbones)
    WORKDIR/pages.json               scale of the pages that it is trained on (`data/page_scale.py`)
    WORKDIR/remat.json               what each stage recomputes, if the config says "auto" (`training/remat_choice.py`)
    WORKDIR/tokenizer/               its tokenizer and chat template
    WORKDIR/checkpoints/120/         everything after 120 optimizer steps, counted over all stages:
        params/  opt_state/          weights; optimizer state of the stage (`arrays.py`)
        meta/                        `Progress`, state of the data, metrics, config, versions
        digests.0-of-1.json          size and digest of each file; without it the step is not complete

A workdir contains everything that is needed to resume the run, and to use and score the model. An imported workdir
holds one step without `opt_state`. `integrity.py` defines when a step is complete, and when it is undamaged.
"""

import dataclasses
import functools
import json
import sys
from pathlib import Path
from typing import Any

import jax

from alignvlm_jax.backbones import trained_model
from alignvlm_jax.checkpoints import integrity
from alignvlm_jax.checkpoints.exported import is_alignvlm_folder, model_type
from alignvlm_jax.config.experiment import ExperimentConfig
from alignvlm_jax.config.serialization import config_from_dict, read_config_json
from alignvlm_jax.downloads.contents import describe_adapter
from alignvlm_jax.downloads.hub_ids import parse_model
from alignvlm_jax.downloads.stubs import describe_stub
from alignvlm_jax.errors import UserError
from alignvlm_jax.locations import is_bucket, open_location
from alignvlm_jax.parallel import distributed
from alignvlm_jax.storage.errors import translated_errors
from alignvlm_jax.storage.objects import list_names

CONFIG_FILE = "config.json"
TOKENIZER_FOLDER = "tokenizer"
CHECKPOINTS_FOLDER = "checkpoints"
HISTORY_FILE = "history.json"
PAGES_FILE = "pages.json"


@dataclasses.dataclass(frozen=True)
class Progress:
    """Progress of a run.

    Attributes:
      step: optimizer steps done, over all stages; also the name of the checkpoint's folder.
      stage: index of the current stage.
      step_in_stage: optimizer steps done in that stage.
      train_seconds: seconds of training so far, over all sessions.
    """

    step: int = 0
    stage: int = 0
    step_in_stage: int = 0
    train_seconds: float = 0.0

    def next_stage(self) -> "Progress":
        """Returns the progress at the start of the next stage."""
        return dataclasses.replace(self, stage=self.stage + 1, step_in_stage=0)


def read_meta(step: Path) -> dict[str, Any]:
    """Reads the metadata of a step: progress, state of the data, metrics, config and versions."""
    with translated_errors(str(step)):
        return json.loads((step / "meta" / "metadata").read_text(encoding="utf-8"))


def complete_steps(checkpoints: Path) -> list[int]:
    """Returns the complete steps in a folder of checkpoints, oldest first."""
    return [step for step in numbered_steps(checkpoints) if integrity.incompleteness(checkpoints / str(step)) is None]


def numbered_steps(checkpoints: Path) -> list[int]:
    """Returns all steps in a folder of checkpoints, complete or not, oldest first."""
    names = list_names(checkpoints) if is_bucket(checkpoints) else [path.name for path in checkpoints.glob("*")]
    return sorted(int(name) for name in names if name.isdigit())


def find_checkpoint(folder: str | Path) -> tuple[Path, int]:
    """Returns the workdir and the step that `folder` refers to.

    Args:
      folder: a workdir, which stands for its newest complete step, or the folder of one step.

    Raises:
      UserError: if it is neither, or if the step is not complete.
    """
    folder = open_location(folder)
    if is_bucket(folder) and not list_names(folder):
        raise UserError(f"{folder}: the bucket has no such folder; a checkpoint is the workdir of a training run")
    # A name that is not a folder.
    if not is_bucket(folder) and not folder.is_dir():
        if str(folder) == "nano":
            raise UserError(_exported_message(folder, trained_model(folder)))
        what = "a file, not a folder" if folder.exists() else "no such folder"
        # "meta-llama/Llama-3.2-1B"
        if not folder.parent.exists() and (hub_id := parse_model(str(folder))) is not None:
            what += f" (if it is an exported model on the Hub, import it first, with --folder {hub_id})"
        raise UserError(
            f"{folder}: {what}; a checkpoint is the workdir of a training run (an exported folder, or "
            '"nano", can only be used for inference and scoring)'
        )
    # The folder of one step, or a workdir. WORKDIR/checkpoints is accepted, too.
    if folder.parent.name == CHECKPOINTS_FOLDER and folder.name.isdigit():
        workdir, steps = folder.parent.parent, [int(folder.name)]
    else:
        workdir = folder.parent if folder.name == CHECKPOINTS_FOLDER else folder
        steps = complete_steps(workdir / CHECKPOINTS_FOLDER)
    if not (workdir / CONFIG_FILE).is_file():
        reason = (
            None if is_bucket(workdir) else describe_adapter(workdir)
        ) or f"{workdir} holds no {CONFIG_FILE} of a training run"
        raise UserError(f"{folder} is not a checkpoint: {reason}")
    # If no step is complete, tell apart an exported folder, an incomplete step and a run that ended early.
    if not steps:
        if is_alignvlm_folder(workdir):
            raise UserError(_exported_message(folder, workdir))
        if not is_bucket(workdir) and (reason := describe_stub(workdir / CONFIG_FILE)):
            raise UserError(f"{workdir / CONFIG_FILE} {reason}")
        if (kind := model_type(workdir)) is not None:
            raise UserError(
                f"{folder} is not a checkpoint: its {CONFIG_FILE} describes a model of type {kind!r}. "
                "`alignvlm import` joins a SigLIP and a Llama folder into a checkpoint, which then has to be trained"
            )
        incomplete = [
            step
            for step in numbered_steps(workdir / CHECKPOINTS_FOLDER)
            if (workdir / CHECKPOINTS_FOLDER / str(step) / "params").is_dir()
        ]
        if incomplete:
            reason = integrity.incompleteness(workdir / CHECKPOINTS_FOLDER / str(max(incomplete)))
            raise UserError(f"{folder}: none of its checkpoints is complete; step {max(incomplete)}: {reason}")
        raise UserError(f"{folder} holds no finished checkpoint: the run in {workdir} was stopped before its first")
    if reason := integrity.incompleteness(workdir / CHECKPOINTS_FOLDER / str(max(steps))):
        raise UserError(f"{folder} is not a complete checkpoint: {reason}")
    return workdir, max(steps)


def _exported_message(name: Path, folder: Path) -> str:
    return (
        f"{name} is an exported folder, for inference and scoring only. For anything else, import it first: "
        f"`alignvlm import --folder {folder} --out NEW` writes it as the checkpoint NEW"
    )


def find_undamaged(folder: str | Path) -> tuple[Path, int]:
    """Returns the workdir and the newest step whose weights match their digests.

    All processes must call it: each verifies a share of the files, and all return the same step. If a step of a workdir
    is damaged, a warning names it, and an older step is used instead.

    Args:
      folder: a workdir or the folder of one step, as for `find_checkpoint`.

    Raises:
      UserError: if no undamaged step is found.
    """
    workdir, newest = find_checkpoint(folder)
    checkpoints, reasons = workdir / CHECKPOINTS_FOLDER, []
    candidates = [newest] if open_location(folder).name.isdigit() else reversed(complete_steps(checkpoints))
    for step in candidates:
        seal = integrity.seal_identity(checkpoints / str(step))
        if not (reason := _damage_of_weights(checkpoints / str(step), seal)):
            return workdir, step
        reasons.append(f"{checkpoints / str(step)}: {reason}")
        warn_skipped(checkpoints / str(step), reason)
    raise UserError(f"{folder} holds no undamaged checkpoint: {'; '.join(reasons)}")


def warn_skipped(step: Path, reason: str) -> None:
    """Prints a warning, in process 0 only, that a damaged step is skipped."""
    distributed.log(f"warning: {step} is skipped: {reason}", file=sys.stderr)


@functools.lru_cache(maxsize=64)
def _damage_of_weights(step: Path, seal: str) -> str | None:
    """Returns what is wrong with the weights of a step, or None if nothing is.

    Args:
      step: folder of the step.
      seal: identity of its seal. It is only part of the cache's key, because another run may write a step into a folder
        of the same name.
    """
    del seal
    share = (jax.process_index(), jax.process_count())
    reasons = distributed.gather_json(integrity.damage(step, ("params", "meta"), share=share))
    return next(filter(None, reasons), None)


def read_run_config(folder: str | Path) -> ExperimentConfig:
    """Reads the experiment that a checkpoint belongs to."""
    return config_from_dict(read_config_json(find_checkpoint(folder)[0] / CONFIG_FILE))
