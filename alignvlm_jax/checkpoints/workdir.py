"""The folder of a run: what lies in it beside the arrays, and which of its checkpoints can be gone on from.

    WORKDIR/config.json              the experiment
    WORKDIR/history.json             where its first weights came from, if not from the backbones the config names
    WORKDIR/tokenizer/               its tokenizer and chat template
    WORKDIR/checkpoints/120/         everything after 120 optimizer steps, counted over all stages:
        params/  opt_state/          weights; the stage's optimizer (`arrays.py`)
        meta/                        `Progress`, where the data were, metrics, config, versions
        digests.0-of-1.json          the size and digest of each file, without which the step does not count

So a workdir needs nothing but itself to be resumed, asked or scored. One that was imported rather than trained holds
one step without an `opt_state`. A step is complete, and undamaged, as `integrity.py` has it.
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
from alignvlm_jax.checkpoints.exported import is_alignvlm_folder
from alignvlm_jax.config.experiment import ExperimentConfig
from alignvlm_jax.config.serialization import config_from_dict, read_config_json
from alignvlm_jax.errors import UserError
from alignvlm_jax.parallel import distributed

CONFIG_FILE = "config.json"
TOKENIZER_FOLDER = "tokenizer"
CHECKPOINTS_FOLDER = "checkpoints"
HISTORY_FILE = "history.json"


@dataclasses.dataclass(frozen=True)
class Progress:
    """Where a run stands.

    Attributes:
      step: optimizer steps done, over all stages; names the checkpoint.
      stage: index of the stage the state belongs to.
      step_in_stage: steps done in it.
      train_seconds: time spent in training so far, over all sittings.
    """

    step: int = 0
    stage: int = 0
    step_in_stage: int = 0
    train_seconds: float = 0.0

    def next_stage(self) -> "Progress":
        """Returns the progress at the start of the next stage."""
        return dataclasses.replace(self, stage=self.stage + 1, step_in_stage=0)


def read_meta(step: Path) -> dict[str, Any]:
    """What was saved of a step besides weights: progress, where the data were, metrics, config, versions."""
    return json.loads((step / "meta" / "metadata").read_text(encoding="utf-8"))


def complete_steps(checkpoints: Path) -> list[int]:
    """The steps in a folder of checkpoints of which every file is there, oldest first."""
    return [step for step in numbered_steps(checkpoints) if integrity.incompleteness(checkpoints / str(step)) is None]


def numbered_steps(checkpoints: Path) -> list[int]:
    """The steps in a folder of checkpoints, complete or not, oldest first."""
    return sorted(int(path.name) for path in checkpoints.glob("*") if path.name.isdigit())


def find_checkpoint(folder: str | Path) -> tuple[Path, int]:
    """The workdir and the step that `folder` stands for: a workdir (its newest step) or one of its step folders."""
    folder = Path(folder)
    if not folder.is_dir():
        if trained_model(folder) != folder:
            raise UserError(_exported(folder, trained_model(folder)))
        raise UserError(
            f"{folder}: no such folder; a checkpoint is the workdir of a training run, and to be asked or scored also "
            'an exported folder, or "nano"'
        )
    if folder.parent.name == CHECKPOINTS_FOLDER and folder.name.isdigit():
        workdir, steps = folder.parent.parent, [int(folder.name)]
    else:
        workdir = folder.parent if folder.name == CHECKPOINTS_FOLDER else folder
        steps = complete_steps(workdir / CHECKPOINTS_FOLDER)
    if not (workdir / CONFIG_FILE).is_file():
        raise UserError(f"{folder} is not a checkpoint: {workdir} holds no {CONFIG_FILE} as a training run leaves it")
    if not steps:
        if is_alignvlm_folder(workdir):
            raise UserError(_exported(folder, workdir))
        found = (path.parent.name for path in (workdir / CHECKPOINTS_FOLDER).glob("*/params"))
        begun = [int(name) for name in found if name.isdigit()]
        if begun:
            reason = integrity.incompleteness(workdir / CHECKPOINTS_FOLDER / str(max(begun)))
            raise UserError(f"{folder}: no checkpoint in it is whole; of step {max(begun)}: {reason}")
        raise UserError(f"{folder} holds no finished checkpoint yet: the run in {workdir} was stopped before its first")
    if reason := integrity.incompleteness(workdir / CHECKPOINTS_FOLDER / str(max(steps))):
        raise UserError(f"{folder} is no complete checkpoint: {reason}")
    return workdir, max(steps)


def _exported(name: Path, folder: Path) -> str:
    return (
        f"{name} is an exported folder, which is asked and scored as it is, and for all else brought in first: "
        f"tools/import_pytorch.py --folder {folder} --out NEW makes the checkpoint NEW of it"
    )


def find_undamaged(folder: str | Path) -> tuple[Path, int]:
    """As `find_checkpoint`, but with all weights read and compared with their digests, each process its share.

    In a workdir, a damaged step is named and the newest that is not is taken, the same by all processes; all must call.

    Raises:
      UserError: there is none.
    """
    workdir, newest = find_checkpoint(folder)
    checkpoints, reasons = workdir / CHECKPOINTS_FOLDER, []
    candidates = [newest] if Path(folder).name.isdigit() else reversed(complete_steps(checkpoints))
    for step in candidates:
        sealed = max(path.stat().st_mtime_ns for path in (checkpoints / str(step)).glob("digests.*.json"))
        if not (reason := _damage_of_weights(checkpoints / str(step), sealed)):
            return workdir, step
        reasons.append(f"{checkpoints / str(step)}: {reason}")
        warn_passed_over(checkpoints / str(step), reason)
    raise UserError(f"{folder} holds no checkpoint that is undamaged: {'; '.join(reasons)}")


def warn_passed_over(step: Path, reason: str) -> None:
    """Names a step that is damaged, once for all processes."""
    distributed.log(f"warning: {step} is passed over: {reason}", file=sys.stderr)


@functools.lru_cache(maxsize=64)
def _damage_of_weights(step: Path, sealed: int) -> str | None:
    del sealed  # when it was; here to tell it from another of the same name
    share = (jax.process_index(), jax.process_count())
    found = distributed.gather_json(integrity.damage(step, ("params", "meta"), share=share))
    return next(filter(None, found), None)


def read_run_config(folder: str | Path) -> ExperimentConfig:
    """The experiment that a checkpoint belongs to."""
    return config_from_dict(read_config_json(find_checkpoint(folder)[0] / CONFIG_FILE))
