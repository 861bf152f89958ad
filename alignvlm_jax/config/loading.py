"""Reads a config from a plain Python file and from the command line, as nested dicts that are not checked yet.

A config file defines `get_config()`, which returns an `ml_collections.ConfigDict` (or a dict). `interop/start.py` turns
the result into frozen dataclasses, and checks everything before anything is built. A wrong key, type (`building.py`) or
value (`checks.py`) raises a `UserError` that names the key's full path, what was expected and, for a key, the closest
valid one.

`get_config` may have parameters: `get_config(dataset: str, steps: int = 300)` takes `--config.dataset=data/tags`.

Keys that a file omits have the values of what the run starts from (`completion.py`), or else the defaults of their
dataclasses, which are defined in the packages they configure.
"""

import contextlib
import dataclasses
import inspect
import os
import runpy
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import ml_collections

import alignvlm_jax
from alignvlm_jax.config.building import UnparsedText, build, describe_value, join_names, suggestion, to_plain
from alignvlm_jax.config.experiment import ExperimentConfig
from alignvlm_jax.config.overrides import apply_override
from alignvlm_jax.errors import UserError


def read_raw_config(file: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Reads a config file and applies overrides.

    Args:
      file: the config file, or the name of one shipped with the package.
      overrides: "a.b=value", with or without "--config." in front.

    Returns:
      Nested dicts and lists for `complete_config`. The values of overrides are text that is not parsed yet.

    Raises:
      UserError: if the file cannot be read.
    """
    # Overrides of parameters decide what the config is; the others change it.
    given = dict(override.removeprefix("--config.").partition("=")[::2] for override in overrides)
    raw = to_plain(_evaluate(file, lambda path, signature: _parse_parameters(path, signature, given)))
    for override in overrides:
        if override.removeprefix("--config.").partition("=")[0] in given:
            apply_override(raw, override)
    return raw


def find_config(file: str | Path) -> Path:
    """Returns the path of a config file; `configs/NAME.py` and `NAME.py` also refer to one shipped with the package.

    Raises:
      UserError: if there is no such file.
    """
    file = Path(file)
    candidates = [file]
    if file in (Path(file.name), Path("configs", file.name)):
        candidates += [folder / file.name for folder in _shipped_folders()]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise UserError(f"{file}: no such config file; the package ships {', '.join(shipped_configs()) or 'none'}")


def shipped_configs() -> list[str]:
    """Returns the names of the config files shipped with the package, such as "nano.py"."""
    names = {path.name for folder in _shipped_folders() for path in folder.glob("*.py")}
    return sorted(names - {"__init__.py"})


def _shipped_folders() -> list[Path]:
    package = Path(alignvlm_jax.__file__).parent
    return [package / "configs", package.parent / "configs"]  # installed, and in a clone


@contextlib.contextmanager
def _importable_neighbors(folder: Path) -> Iterator[None]:
    """Lets a config file import the files in its folder and in the current one, however the program was started."""
    # `python -m` adds the current folder to the path and a console script does not; neither adds the config's folder.
    before_path, before_modules = list(sys.path), set(sys.modules)
    sys.path[:0] = [str(folder), os.getcwd()]
    try:
        yield
    finally:
        sys.path[:] = before_path
        # The config of another folder may have a neighbor of the same name.
        new = set(sys.modules) - before_modules
        neighbors = {name for name in new if "." not in name and _is_in(sys.modules[name], folder)}
        for name in new:
            if name.partition(".")[0] in neighbors:
                del sys.modules[name]


def _is_in(module: ModuleType, folder: Path) -> bool:
    """Returns whether a module is a file, or a package, directly in the folder."""
    file = Path(getattr(module, "__file__", None) or "")
    return (file.parent.parent if file.name == "__init__.py" else file.parent) == folder


def read_config_file(file: str | Path, **parameters: Any) -> Any:
    """Returns the unchecked config that the file's `get_config` returns, for config files that modify another one.

    A config file may import modules from its own folder and from the current one.

    Args:
      file: the config file, or the name of one shipped with the package.
      **parameters: values of the parameters of its `get_config`.

    Raises:
      UserError: if the file fails. The message names the file and the line.
    """
    return _evaluate(file, lambda path, signature: parameters)


def _evaluate(file: str | Path, choose: Callable[[Path, inspect.Signature], Mapping[str, Any]]) -> Any:
    """Returns what the file's `get_config` returns for the arguments that `choose` returns for its signature."""
    path = find_config(file)
    try:
        with _importable_neighbors(path.resolve().parent):
            namespace = runpy.run_path(str(path))
            get_config = namespace.get("get_config")
            if not callable(get_config):
                raise UserError(f"{path}: a config file must define get_config() and return the config from it")
            config = get_config(**choose(path, inspect.signature(get_config, eval_str=True)))
    except UserError:
        raise
    except SyntaxError as error:
        raise UserError(f"{path}, line {error.lineno}: {error.msg}") from error
    except Exception as error:  # the file is the user's code and may raise anything
        # The innermost line of the config file itself, not of a library that it calls.
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        where = f"{path}, line {lines[-1]}" if lines else str(path)
        raise UserError(f"{where}: {type(error).__name__}: {error}") from error
    if not isinstance(config, Mapping | ml_collections.ConfigDict):
        raise UserError(f"{path}: get_config() must return a ConfigDict, got {describe_value(config)}")
    return config


def _parse_parameters(path: Path, signature: inspect.Signature, overrides: dict[str, str]) -> dict[str, Any]:
    """Removes the overrides of the parameters of `get_config` from `overrides`, and returns their values."""
    values, parameters = {}, signature.parameters
    for name, parameter in parameters.items():
        key = f"config.{name}"
        if name in overrides:
            kind = str if parameter.annotation is parameter.empty else parameter.annotation
            values[name] = build(kind, UnparsedText(overrides.pop(name)), key, None)
        elif parameter.default is parameter.empty:
            raise UserError(f"{key}: {path} needs a value: --{key}=VALUE")
    keys = [field.name for field in dataclasses.fields(ExperimentConfig)]
    for name in overrides:
        if parameters and name.partition(".")[0] not in keys:
            raise UserError(
                f"config.{name}: no such key{suggestion(name, [*parameters, *keys])}; {path} has "
                f"{join_names(parameters)}, and config has {join_names(keys)}"
            )
    return values
