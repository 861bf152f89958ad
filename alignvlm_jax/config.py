"""An experiment, as frozen dataclasses read from a plain Python file and from the command line.

A config file defines `get_config()`, which returns an `ml_collections.ConfigDict` (or a dict). `load` reads it, applies
`a.b=value` overrides, and checks everything before anything is built: a wrong key, type or value is a `UserError` that
names the key's full path, what was expected and, for a key, the nearest right one.

    config = load("configs/nano.py", ["seed=1", "stages.0.learning_rates.vision=1e-4", "model.connector=mlp"])

What a file leaves out has the default of its dataclass; the dataclasses live beside what they configure.
"""

import ast
import dataclasses
import difflib
import hashlib
import json
import math
import runpy
import traceback
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import ml_collections

import alignvlm_jax
from alignvlm_jax.data.pipeline import DataConfig
from alignvlm_jax.errors import UserError
from alignvlm_jax.evaluation.schedule import EvaluationConfig
from alignvlm_jax.models import hardware
from alignvlm_jax.models.alignvlm import PARTS, AlignVLMConfig
from alignvlm_jax.models.connectors import CONNECTOR_CONFIGS, AlignConfig, CAbstractorConfig, PerceiverConfig
from alignvlm_jax.ops.attention import KERNELS
from alignvlm_jax.parallel.mesh import MeshConfig
from alignvlm_jax.training.anomalies import AnomalyConfig
from alignvlm_jax.training.debug import DebugConfig
from alignvlm_jax.training.optimizer import OPTIMIZERS
from alignvlm_jax.training.profile import ProfileConfig, traced_steps
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
    raw = _plain(read_config_file(file))
    for override in overrides:
        _apply(raw, override)
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
    config = _build(ExperimentConfig, raw, "config", None)
    _check(config)
    return config


def to_dict(config: ExperimentConfig) -> dict[str, Any]:
    """The config as nested dicts and lists that JSON can hold; `from_dict` undoes it."""
    raw = json.loads(json.dumps(dataclasses.asdict(config)))
    raw["model"]["connector"]["name"] = _connector_name(config.model.connector)
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


# Reading


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
        raise UserError(f"{path}: get_config() must return a ConfigDict, it returned {_article(config)}")
    return config


def _plain(value: Any) -> Any:
    """ConfigDicts, dicts and sequences, at any depth, as fresh dicts and lists."""
    if isinstance(value, ml_collections.ConfigDict | Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


class _Text(str):
    """A value from the command line, to be read as the type of the field that it is for."""


def _apply(raw: dict[str, Any], override: str) -> None:
    """Puts the override's value, as text, at its place in `raw`; whether the place exists is `_build`'s to say."""
    key, equals, value = override.removeprefix("--config.").partition("=")
    if not equals:
        raise UserError(f"--config.{key}: expected --config.{key}=value")
    names = key.split(".")
    if names[-3:] == ["model", "connector", "name"]:
        names.pop()  # another connector has other fields: what the file says of the old one does not carry over
    place, path = raw, "config"
    for name, after in zip(names, [*names[1:], None], strict=True):
        if isinstance(place, list):
            if not (name.isdigit() and int(name) < len(place)):
                raise UserError(f"{path}.{name}: {path} has {len(place)} entries: 0 to {len(place) - 1}")
            name = int(name)
        elif not isinstance(place, dict):
            raise UserError(f"{path}.{name}: {path} is a single value and has no parts")
        if after is None:
            place[name] = _Text(value)
        elif isinstance(place, dict) and place.get(name) is None:
            place[name] = {}
        elif name == "connector" and isinstance(place[name], str):
            place[name] = {"name": place[name]}
        place, path = place[name], f"{path}.{name}"


# Building


def _build(kind: Any, value: Any, path: str, default: Any) -> Any:
    """`value` as an instance of the annotated type `kind`; `default` fills in what a mapping leaves out."""
    if dataclasses.is_dataclass(kind):
        return _build_dataclass(kind, value, path, default)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if set(arguments) == set(CONNECTOR_CONFIGS.values()):
            return _build_connector(value, path, default)
        if value is None or (isinstance(value, _Text) and value.lower() == "none"):
            if type(None) in arguments:
                return None
        (kind,) = (argument for argument in arguments if argument is not type(None))
        return _build(kind, value, path, default)
    if isinstance(value, _Text):
        value = _parse(kind, value)
    if origin is Literal:
        if value not in arguments:
            raise UserError(f"{path}: expected one of {_listed(arguments)}, got {value!r}{_nearest(value, arguments)}")
        return value
    if origin is tuple:
        if not isinstance(value, list):
            raise UserError(f"{path}: expected a list, got {_article(value)}")
        return tuple(_build(arguments[0], item, f"{path}.{index}", None) for index, item in enumerate(value))
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise UserError(f"{path}: expected {_TYPE_NAMES[kind]}, got {_article(value)}")
    return value


_TYPE_NAMES = {int: "a whole number", float: "a number", str: "a string", bool: "True or False"}


def _build_dataclass(kind: type, value: Any, path: str, default: Any) -> Any:
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected the fields of {kind.__name__}, got {_article(value)}")
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for key in value:
        if key not in fields:
            raise UserError(
                f"{path}.{key}: no such key{_nearest(key, fields)}; {path} has {_listed(fields) or 'no keys at all'}"
            )
    kinds, arguments = typing.get_type_hints(kind), {}
    for name, field in fields.items():
        if isinstance(default, kind):
            inherited = getattr(default, name)
        elif field.default_factory is not dataclasses.MISSING:
            inherited = field.default_factory()
        else:
            inherited = field.default
        if name in value:
            arguments[name] = _build(kinds[name], value[name], f"{path}.{name}", inherited)
        elif inherited is dataclasses.MISSING:
            raise UserError(f"{path}.{name}: missing, and it has no default")
        else:
            arguments[name] = inherited
    try:
        return kind(**arguments)
    except ValueError as error:  # the dataclass's own check
        raise UserError(f"{path}: {error}") from error


def _build_connector(value: Any, path: str, default: Any) -> Any:
    """A connector: its name alone, or its name and fields. Without a name it is the default connector."""
    if isinstance(value, str):
        value = {"name": value}
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected the name of a connector or its fields, got {_article(value)}")
    name = str(value.get("name", _connector_name(default) if default else "align"))
    _one_of(f"{path}.name", name, list(CONNECTOR_CONFIGS))
    rest = {key: item for key, item in value.items() if key != "name"}
    return _build_dataclass(CONNECTOR_CONFIGS[name], rest, path, default)


def _connector_name(connector: Any) -> str:
    return next(name for name, kind in CONNECTOR_CONFIGS.items() if type(connector) is kind)


def _parse(kind: Any, text: _Text) -> Any:
    """Text from the command line as Python would read it; strings need no quotes."""
    if kind is str:
        return str(text)
    literals = {"true": "True", "false": "False"}
    try:
        return _plain(ast.literal_eval(literals.get(text, str(text))))
    except (ValueError, SyntaxError):
        if typing.get_origin(kind) is tuple:  # trainable=connector,language
            return [part.strip() for part in text.split(",") if part.strip()]
        return str(text)


# Checking


def _check(config: ExperimentConfig) -> None:
    """What types cannot say: values that exist, and sizes that fit each other."""
    vision, language = config.model.vision, config.model.language
    for name, part in (("vision", vision), ("language", language)):
        path = f"config.model.{name}"
        _one_of(f"{path}.dtype", part.dtype, hardware.DTYPES)
        _one_of(f"{path}.attention", part.attention, (hardware.AUTO, *KERNELS))
        _one_of(f"{path}.remat", part.remat, ("none", "dots", "full"))
        _positive(path, part, "hidden_size", "intermediate_size", "num_layers", "num_heads")
    _positive("config.model.vision", vision, "image_size", "patch_size")
    _positive("config.model.language", language, "vocab_size", "num_kv_heads", "max_position_embeddings")
    if vision.patch_size > vision.image_size:
        raise UserError(
            f"config.model.vision.patch_size: expected at most image_size, {vision.image_size}, got {vision.patch_size}"
        )
    if vision.hidden_size % vision.num_heads:
        raise UserError(
            f"config.model.vision.num_heads: {vision.num_heads} heads do not divide hidden_size {vision.hidden_size}"
        )
    if language.head_dim is None and language.hidden_size % language.num_heads:
        raise UserError(
            f"config.model.language.num_heads: {language.num_heads} heads do not divide hidden_size "
            f"{language.hidden_size} (set head_dim to give heads another width)"
        )
    if language.num_heads % language.num_kv_heads:
        raise UserError(
            f"config.model.language.num_kv_heads: {language.num_kv_heads} do not divide num_heads {language.num_heads}"
        )
    if language.head_width % 2:
        raise UserError(
            f"config.model.language.head_dim: expected an even number (rotary pairs), got {language.head_width}"
        )
    if config.data.tiling.tile_size != vision.image_size:
        raise UserError(
            f"config.data.tiling.tile_size: expected the encoder's image_size, {vision.image_size}, "
            f"got {config.data.tiling.tile_size}"
        )
    connector = config.model.connector
    if isinstance(connector, CAbstractorConfig):
        tokens = connector.num_tokens
        if not 0 < tokens <= vision.num_patches or math.isqrt(tokens) ** 2 != tokens:
            raise UserError(
                "config.model.connector.num_tokens: expected a square number, at most the encoder's "
                f"{vision.num_patches} patches, got {tokens}"
            )
    if isinstance(connector, AlignConfig) and connector.num_extra_words < 0:
        raise UserError(
            f"config.model.connector.num_extra_words: expected 0 (none) or more, got {connector.num_extra_words}"
        )
    if isinstance(connector, AlignConfig) and connector.kept_words is not None:
        _positive("config.model.connector", connector, "kept_words")
    anyres = config.data.tiling.rule == "anyres_max_9"
    if config.model.newline != anyres:
        raise UserError(
            f"config.model.newline: expected {anyres} with config.data.tiling.rule {config.data.tiling.rule!r}, got "
            f"{config.model.newline}: rows of visual tokens end with a newline exactly under anyres_max_9"
        )
    if anyres and isinstance(config.model.connector, PerceiverConfig):
        raise UserError(
            "config.data.tiling.rule: anyres_max_9 joins the visual tokens of neighbouring tiles, and a Perceiver's "
            "have no places in their tile: expected ovis or internvl, or another connector"
        )
    _positive("config", config, "log_every_steps")
    _positive("config.checkpoint", config.checkpoint, "every_steps", "keep")
    _positive("config.evaluation", config.evaluation, "batch_size", "max_new_tokens")
    for name in ("every_steps", "limit"):
        if getattr(config.evaluation, name) is not None:
            _positive("config.evaluation", config.evaluation, name)
    _at_least_0("config.checkpoint", config.checkpoint, "keep_best")
    _positive("config.anomalies", config.anomalies, "max_skipped")
    _at_least_0("config.anomalies", config.anomalies, "max_rollbacks", "spike")
    keep_every, every = config.checkpoint.keep_every, config.checkpoint.every_steps
    if keep_every is not None and (keep_every < 1 or keep_every % every):
        raise UserError(f"config.checkpoint.keep_every: expected a multiple of every_steps, {every}, got {keep_every}")
    _positive("config.data", config.data, "max_image_pixels", "read_threads", "prefetch_batches")
    try:
        traced_steps(config.profile)
    except ValueError as error:
        raise UserError(f"config.profile.steps: {error}") from error
    if config.data.max_turns is not None:
        _positive("config.data", config.data, "max_turns")
    _at_least_0("config.data", config.data, "workers", "max_refused")
    if config.data.max_refused > 1:
        raise UserError(f"config.data.max_refused: expected a share, 0 to 1, got {config.data.max_refused}")
    if not config.stages:
        raise UserError("config.stages: expected at least one stage, got none")
    for index, stage in enumerate(config.stages):
        _check_stage(stage, f"config.stages.{index}")
        bins, rows = stage.bins_per_step, config.data.packing.bins_per_microbatch
        if bins is not None and (bins < 1 or bins % rows):
            raise UserError(
                f"config.stages.{index}.bins_per_step: expected a multiple of data.packing.bins_per_microbatch, "
                f"{rows}, got {bins}"
            )
    names = [stage.name for stage in config.stages]
    if len(set(names)) < len(names):
        raise UserError(f"config.stages: expected stages of different names, got {_listed(names)}")


def _check_stage(stage: StageConfig, path: str) -> None:
    if not stage.trainable:
        raise UserError(f"{path}.trainable: expected at least one of {_listed(PARTS)}, got none")
    for index, part in enumerate(stage.trainable):
        _one_of(f"{path}.trainable.{index}", part, PARTS)
        if part in stage.trainable[:index]:
            raise UserError(f"{path}.trainable.{index}: {part!r} is named twice")
    if (stage.steps is None) == (stage.epochs is None):
        raise UserError(f"{path}: expected either steps or epochs, got {'neither' if stage.steps is None else 'both'}")
    _positive(path, stage, *(name for name in ("steps", "epochs") if getattr(stage, name) is not None))
    _positive(path, stage, "global_batch", "max_text_tokens")
    for name in ("vision", "connector", "language"):
        _at_least_0(f"{path}.learning_rates", stage.learning_rates, name)
    _at_least_0(path, stage, "warmup_steps", "final_lr_fraction")
    if stage.steps is not None and stage.warmup_steps >= stage.steps:
        raise UserError(f"{path}.warmup_steps: expected fewer than the stage's {stage.steps}, got {stage.warmup_steps}")
    if stage.final_lr_fraction > 1:
        raise UserError(f"{path}.final_lr_fraction: expected at most 1, got {stage.final_lr_fraction}")
    optimizer = stage.optimizer
    _one_of(f"{path}.optimizer.name", optimizer.name, OPTIMIZERS)
    _positive(f"{path}.optimizer", optimizer, "eps", "muon_rms")
    _at_least_0(f"{path}.optimizer", optimizer, "weight_decay", "b1", "b2", "muon_beta")
    for name in ("b1", "b2", "muon_beta"):
        if getattr(optimizer, name) >= 1:
            raise UserError(f"{path}.optimizer.{name}: expected less than 1, got {getattr(optimizer, name)}")
    if optimizer.clip_norm is not None:
        _positive(f"{path}.optimizer", optimizer, "clip_norm")
    if not stage.mixture:
        raise UserError(f"{path}.mixture: expected at least one data set, got none")
    for index, part in enumerate(stage.mixture):
        _positive(f"{path}.mixture.{index}", part, "weight")


def _one_of(path: str, value: Any, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise UserError(f"{path}: expected one of {_listed(allowed)}, got {value!r}{_nearest(value, allowed)}")


def _positive(path: str, owner: Any, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        if not (math.isfinite(value) and value > 0):
            raise UserError(f"{path}.{name}: expected more than 0, got {value}")


def _at_least_0(path: str, owner: Any, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        if not (math.isfinite(value) and value >= 0):
            raise UserError(f"{path}.{name}: expected 0 or more, got {value}")


def _nearest(value: Any, candidates: Any) -> str:
    matches = difflib.get_close_matches(str(value), [str(candidate) for candidate in candidates], n=1, cutoff=0.5)
    return f": did you mean {matches[0]!r}?" if matches else ""


def _listed(names: Any) -> str:
    return ", ".join(str(name) for name in names)


def _article(value: Any) -> str:
    """A value with its kind, for messages: "the string 'abc'"."""
    names = {
        str: "the string",
        _Text: "the string",
        int: "the whole number",
        float: "the number",
        bool: "the truth value",
    }
    kind = names.get(type(value), f"a {type(value).__name__},")
    shown = repr(str(value)) if isinstance(value, str) else repr(value)
    return f"{kind} {shown if len(shown) <= 60 else shown[:57] + '...'}"
