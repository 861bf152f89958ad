"""An experiment, as frozen dataclasses read from a plain Python file and from the command line.

A config file defines `get_config()`, which returns an `ml_collections.ConfigDict` (or a dict). `load` reads it, applies
`a.b=value` overrides, and checks everything before anything is built: a wrong key, type (`config_building.py`) or value
(`config_checks.py`) is a `UserError` that names the key's full path, what was expected and, for a key, the nearest
right one.

    config = load("configs/nano.py", ["seed=1", "stages.0.learning_rates.vision=1e-4", "model.connector=mlp"])

What a file leaves out has the default of its dataclass; the dataclasses live beside what they configure.
"""

import dataclasses
import hashlib
import json
import runpy
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_collections

import alignvlm_jax
from alignvlm_jax.config_building import apply_override, article, build, connector_name, plain
from alignvlm_jax.config_checks import check
from alignvlm_jax.data.pipeline import DataConfig
from alignvlm_jax.errors import UserError
from alignvlm_jax.evaluation.schedule import EvaluationConfig
from alignvlm_jax.models.alignvlm import AlignVLMConfig
from alignvlm_jax.parallel.mesh import MeshConfig
from alignvlm_jax.training.anomalies import AnomalyConfig
from alignvlm_jax.training.debug import DebugConfig
from alignvlm_jax.training.profile import ProfileConfig
from alignvlm_jax.training.retention import CheckpointConfig
from alignvlm_jax.training.stages import StageConfig


@dataclasses.dataclass(frozen=True)
class BackbonesConfig:
    """Where the weights come from that stage 1 starts with.

    Attributes:
      vision: a SigLIP folder in Hugging Face layout; "nano" is the one shipped with the package, "nano-transcription"
        the one made without labels per patch, "random" draws weights of the configured shape.
      language: a Llama folder, likewise.
    """

    vision: str = "nano"
    language: str = "nano"


@dataclasses.dataclass(frozen=True)
class ExperimentConfig:
    """Everything a run depends on.

    `init_from` is a checkpoint whose weights and tokenizer the run starts with, in place of the backbones.
    `tokenizer` is a folder with tokenizer.json and its companions; None stands for the one that the weights come with.
    """

    seed: int = 0
    model: AlignVLMConfig = AlignVLMConfig()
    backbones: BackbonesConfig = BackbonesConfig()
    init_from: str | None = None
    tokenizer: str | None = None
    data: DataConfig = DataConfig()
    mesh: MeshConfig = MeshConfig()
    stages: tuple[StageConfig, ...] = ()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    profile: ProfileConfig = ProfileConfig()
    anomalies: AnomalyConfig = AnomalyConfig()
    debug: DebugConfig = DebugConfig()
    log_every_steps: int = 10


def load(file: str | Path, overrides: Sequence[str] = ()) -> ExperimentConfig:
    """Reads a config file, applies overrides ("a.b=value", with or without "--config." in front), checks the result."""
    raw = plain(read_config_file(file))
    for override in overrides:
        apply_override(raw, override)
    config = from_dict(raw)
    if getattr(config.model.connector, "kept_words", None) is not None:
        raise UserError(
            "config.model.connector.kept_words: expected None: a pruned model is not trained; train the full one, "
            "then `alignvlm analyze vocabulary --prune` it"
        )
    return config


def find_config(file: str | Path) -> Path:
    """The file as given; `configs/NAME.py` and `NAME.py` also mean the one shipped with the package."""
    file = Path(file)
    candidates = [file]
    if file in (Path(file.name), Path("configs", file.name)):
        candidates += [folder / file.name for folder in _shipped_folders()]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise UserError(f"{file}: no such config file; the package ships {', '.join(shipped_configs()) or 'none'}")


def shipped_configs() -> list[str]:
    """The names of the config files that come with the package, such as "nano.py"."""
    names = {path.name for folder in _shipped_folders() for path in folder.glob("*.py")}
    return sorted(names - {"__init__.py"})


def _shipped_folders() -> list[Path]:
    package = Path(alignvlm_jax.__file__).parent
    return [package / "configs", package.parent / "configs"]  # installed, and in a clone


def from_dict(raw: Mapping[str, Any]) -> ExperimentConfig:
    """Nested dicts and lists, as a config file or `to_dict` gives them, into a checked config."""
    config = build(ExperimentConfig, raw, "config", None)
    check(config)
    return config


def to_dict(config: ExperimentConfig) -> dict[str, Any]:
    """The config as nested dicts and lists that JSON can hold; `from_dict` undoes it."""
    raw = json.loads(json.dumps(dataclasses.asdict(config)))
    raw["model"]["connector"]["name"] = connector_name(config.model.connector)
    return raw


def to_json(config: ExperimentConfig) -> str:
    """The config as it is saved with every checkpoint."""
    return json.dumps(to_dict(config), indent=2) + "\n"


def read_json(path: Path) -> dict[str, Any]:
    """What `to_json` wrote, as plain dicts and lists: `from_dict` makes a config of it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not the config of a run ({error})") from error


def config_hash(config: ExperimentConfig) -> str:
    """A short name of this very config; two runs with the same one are the same experiment."""
    return hashlib.sha256(json.dumps(to_dict(config), sort_keys=True).encode()).hexdigest()[:12]


def read_config_file(file: str | Path) -> Any:
    """What the file's `get_config` returns, unchecked: for configs that are another one with a few changes.

    Whatever goes wrong in it is a `UserError` that names the file and the line.
    """
    path = find_config(file)
    try:
        namespace = runpy.run_path(str(path))
        if not callable(namespace.get("get_config")):
            raise UserError(f"{path}: a config file must define get_config(), which returns the config")
        config = namespace["get_config"]()
    except UserError:
        raise
    except SyntaxError as error:
        raise UserError(f"{path}, line {error.lineno}: {error.msg}") from error
    except Exception as error:  # the user's own code: anything may be wrong with it
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        where = f"{path}, line {lines[-1]}" if lines else str(path)
        raise UserError(f"{where}: {type(error).__name__}: {error}") from error
    if not isinstance(config, Mapping | ml_collections.ConfigDict):
        raise UserError(f"{path}: get_config() must return a ConfigDict, it returned {article(config)}")
    return config
