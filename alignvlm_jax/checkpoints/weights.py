"""Writes weights as a new workdir, and reads the weights of a run without its optimizer state.

Weights are read from the step that `workdir.find_undamaged` returns: onto a mesh (`restore_params`), or one slice at a
time into host memory (`ParameterReader`). Their history is stored with them: a list of the trainings, imports and other
changes that they result from.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import Mesh, SingleDeviceSharding

from alignvlm_jax.checkpoints.arrays import StoredTree, restore_tree
from alignvlm_jax.checkpoints.checkpointer import Checkpointer
from alignvlm_jax.checkpoints.new_folder import new_folder
from alignvlm_jax.checkpoints.workdir import (
    CHECKPOINTS_FOLDER,
    CONFIG_FILE,
    HISTORY_FILE,
    PAGES_FILE,
    TOKENIZER_FOLDER,
    Progress,
    find_checkpoint,
    find_undamaged,
    read_meta,
    read_run_config,
)
from alignvlm_jax.config.experiment import ExperimentConfig
from alignvlm_jax.config.serialization import config_to_json, read_config_json
from alignvlm_jax.data.chat import ChatTokenizer
from alignvlm_jax.errors import UserError
from alignvlm_jax.jax_modes import ordinary_modes
from alignvlm_jax.models.alignvlm import Params, parameter_shapes, stored_dtypes
from alignvlm_jax.parallel import sharding


@ordinary_modes()
def write_checkpoint(
    workdir: str | Path,
    config: ExperimentConfig,
    params: Params,
    tokenizer: ChatTokenizer,
    *,
    history: Sequence[dict[str, Any]],
    progress: Progress | None = None,
    page_scale: float | None = None,
) -> None:
    """Writes weights from another source as a workdir, for inference, further training and export.

    No half-written checkpoint can remain; see `new_folder`.

    Args:
      workdir: folder to write. It must not exist, or must be empty.
      config: the experiment to store with the weights.
      params: weights on any devices. They keep their dtypes.
      tokenizer: tokenizer of the language model.
      history: history of the weights, oldest entry first; shown in the model card.
      progress: steps that the weights were already trained for.
      page_scale: scale of the pages that the weights were trained on; see `data/page_scale.py`. None if unknown.
    """
    with new_folder(workdir) as folder:
        fill_workdir(folder, config, params, tokenizer, history=history, progress=progress, page_scale=page_scale)


@ordinary_modes()
def fill_workdir(
    workdir: Path,
    config: ExperimentConfig,
    params: Params,
    tokenizer: ChatTokenizer,
    *,
    history: Sequence[dict[str, Any]],
    progress: Progress | None = None,
    page_scale: float | None = None,
) -> None:
    """Writes the files of `write_checkpoint` into a folder that `new_folder` yields."""
    (workdir / CONFIG_FILE).write_text(config_to_json(config), encoding="utf-8")
    write_history(workdir, history)
    write_page_scale(workdir, page_scale)
    tokenizer.save(workdir / TOKENIZER_FOLDER)
    with Checkpointer(workdir, config) as checkpointer:
        checkpointer.save_params(progress or Progress(), params)


def write_history(workdir: Path, history: Sequence[dict[str, Any]]) -> None:
    """Writes the history of the weights that a run starts with."""
    (workdir / HISTORY_FILE).write_text(json.dumps(list(history), indent=2) + "\n", encoding="utf-8")


def read_history(folder: str | Path) -> list[dict[str, Any]]:
    """Reads the history of the weights that a run started with; empty if it started from its backbones."""
    path = find_checkpoint(folder)[0] / HISTORY_FILE
    return read_config_json(path) if path.is_file() else []


def write_page_scale(workdir: Path, scale: float | None) -> None:
    """Writes the scale of the pages that the weights were trained on, if it is known."""
    if scale is not None:
        (workdir / PAGES_FILE).write_text(json.dumps({"scale": round(scale, 4)}) + "\n", encoding="utf-8")


def read_page_scale(folder: str | Path) -> float | None:
    """Reads the scale of the pages that a checkpoint was trained on; None if it is not recorded."""
    path = find_checkpoint(folder)[0] / PAGES_FILE
    return read_config_json(path).get("scale") if path.is_file() else None


def history_of_run(folder: str | Path) -> list[dict[str, Any]]:
    """Returns the history of a checkpoint's weights, its own training included, for a run that starts from it."""
    reader = ParameterReader(folder)
    trained = {"what": "trained", "progress": reader.meta["progress"], "config": reader.meta["config"]}
    return [*reader.history, *([trained] if reader.step else [])]


@ordinary_modes()
def restore_params(folder: str | Path, mesh: Mesh | None = None, *, dtype: str = "float32") -> Params:
    """Returns a checkpoint's weights in `dtype`, placed on a mesh or, without one, all on the first device."""
    boxed = parameter_shapes(read_run_config(folder).model)
    shapes = nn.unbox(boxed)
    if mesh is None:
        shardings = jax.tree.map(lambda _: SingleDeviceSharding(jax.devices()[0]), shapes)
    else:
        shardings = sharding.parameter_shardings(boxed, mesh)
    return restore_params_into(
        folder,
        jax.tree.map(
            lambda leaf, dtype, sharding: jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=sharding),
            shapes,
            stored_dtypes(shapes, dtype),
            shardings,
        ),
    )


@ordinary_modes()
def restore_params_into(folder: str | Path, abstract: Params) -> Params:
    """Returns a checkpoint's weights with the shapes, dtypes and shardings of `abstract`."""
    workdir, step = find_undamaged(folder)
    return restore_tree(workdir / CHECKPOINTS_FOLDER / str(step) / "params", abstract)


class ParameterReader(StoredTree):
    """Reads a checkpoint's weights one slice at a time into host memory, regardless of the mesh they were saved on.

    Attributes:
      config: the experiment.
      step: the step of the checkpoint.
      meta: metadata of the step, such as its progress and versions.
      history: history of the weights that the run started with.
      tokenizer_folder: folder of the run's tokenizer.
      shapes: shape of every weight, by its path ("language/layers/mlp/gate/kernel").
      dtypes: dtype of every weight, by its path.
    """

    def __init__(self, folder: str | Path):
        workdir, self.step = find_undamaged(folder)
        self.config = read_run_config(folder)
        self.history = read_history(folder)
        self.tokenizer_folder = workdir / TOKENIZER_FOLDER
        step = workdir / CHECKPOINTS_FOLDER / str(self.step)
        try:
            self.meta = read_meta(step)
        except (ValueError, OSError) as error:
            raise UserError(f"{step} cannot be read: {str(error).splitlines()[0]}") from error
        super().__init__(step / "params")
