"""Builds frozen dataclasses from nested dicts and from text on the command line.

The fields may have these types: dataclasses, tuples of one type, `Literal`, `X | None`, `str | tuple[str, ...]`, int,
float, str, bool, and `ConnectorConfig`, whose value names a registered connector. A value that does not fit raises a
`UserError` that names the key's full path, what was expected and, for a key or a choice, the closest valid one.
"""

import ast
import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import ml_collections

from alignvlm_jax.errors import UserError
from alignvlm_jax.models.connectors import ConnectorConfig, connector_named, connector_names, connector_spec


def to_plain(value: Any) -> Any:
    """Returns a copy of a nested structure, with ConfigDicts as dicts and sequences as lists."""
    if isinstance(value, ml_collections.ConfigDict | Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    return value


class UnparsedText(str):
    """Text from the command line that is not yet parsed as the type of its field."""


def build(kind: Any, value: Any, path: str, default: Any) -> Any:
    """Converts a value to the annotated type of its field.

    Args:
      kind: the annotated type.
      value: nested dicts, lists and values, or unparsed text.
      path: path of the field, for messages.
      default: default of the field, from which fields that a mapping omits are taken.

    Raises:
      UserError: if the value does not fit the type.
    """
    if kind is ConnectorConfig:
        return _build_connector(value, path, default)
    if dataclasses.is_dataclass(kind):
        return _build_dataclass(kind, value, path, default)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    # X | None
    if origin in (typing.Union, types.UnionType):
        if value is None or (isinstance(value, UnparsedText) and value.lower() == "none"):
            if type(None) in arguments:
                return None
        kinds = [argument for argument in arguments if argument is not type(None)]
        # str | tuple[str, ...]: a list is built as the tuple, everything else as the first type.
        tuples = [kind for kind in kinds if typing.get_origin(kind) is tuple and isinstance(value, list)]
        return build((tuples or kinds)[0], value, path, default)
    # All other types need parsed text.
    if isinstance(value, UnparsedText):
        value = _parse(kind, value)
    if origin is Literal:
        check_one_of(path, value, arguments)
        return value
    if origin is tuple:
        if not isinstance(value, list):
            raise UserError(f"{path}: expected a list, got {describe_value(value)}")
        return tuple(build(arguments[0], item, f"{path}.{index}", None) for index, item in enumerate(value))
    if kind is float and type(value) is int:
        return float(value)
    # Not `isinstance`: a bool is an int in Python, but not a whole number in a config.
    if type(value) is not kind:
        raise UserError(f"{path}: expected {_TYPE_NAMES[kind]}, got {describe_value(value)}")
    return value


_TYPE_NAMES = {int: "a whole number", float: "a number", str: "a string", bool: "True or False"}


def _build_dataclass(kind: type, value: Any, path: str, default: Any) -> Any:
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected the fields of {kind.__name__}, got {describe_value(value)}")
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for key in value:
        if key not in fields:
            keys = join_names(fields) or "no keys at all"
            raise UserError(f"{path}.{key}: no such key{suggestion(key, fields)}; {path} has {keys}")
    kinds, arguments = typing.get_type_hints(kind), {}
    for name, field in fields.items():
        # Default of the field: its value in the outer default if there is one, and otherwise its own default.
        if isinstance(default, kind):
            inherited = getattr(default, name)
        elif field.default_factory is not dataclasses.MISSING:
            inherited = field.default_factory()
        else:
            inherited = field.default
        if name in value:
            arguments[name] = build(kinds[name], value[name], f"{path}.{name}", inherited)
        elif inherited is dataclasses.MISSING:
            raise UserError(f"{path}.{name}: missing, and it has no default")
        else:
            arguments[name] = inherited
    try:
        return kind(**arguments)
    except ValueError as error:  # from the checks of the dataclass itself
        raise UserError(f"{path}: {error}") from error


def _build_connector(value: Any, path: str, default: Any) -> Any:
    """Builds a connector's config from its name alone, or from its name and fields.

    The name defaults to the name of `default`, if there is one, and otherwise to ALIGN.
    """
    if isinstance(value, str):
        value = {"name": value}
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected the name of a connector or its fields, got {describe_value(value)}")
    name = str(value.get("name", connector_name(default) if default else "align"))
    check_one_of(f"{path}.name", name, connector_names())
    spec = connector_named(name)
    fields = {key: item for key, item in value.items() if key != "name"}
    for key, expected in spec.removed_settings.items():
        _drop_removed_setting(fields, key, expected, path)
    return _build_dataclass(spec.config, fields, path, default)


def _drop_removed_setting(fields: dict[str, Any], key: str, expected: Any, path: str) -> None:
    """Drops a setting of earlier versions from `fields` if it has the value that changes nothing.

    Raises:
      UserError: if it has another value, because the model would not be the same without it.
    """
    value = fields.pop(key, expected)
    if isinstance(value, UnparsedText):
        value = _parse(type(expected), value)
    if value != expected:
        raise UserError(
            f"{path}.{key}: expected {expected} or no such key, got {describe_value(value)}: this setting was removed"
        )


def connector_name(connector: ConnectorConfig) -> str:
    """Returns the name of a connector in a config file."""
    return connector_spec(connector).name


def _parse(kind: Any, text: UnparsedText) -> Any:
    """Parses text from the command line as a Python literal; strings need no quotes."""
    if kind is str:
        return str(text)
    literals = {"true": "True", "false": "False"}
    try:
        return to_plain(ast.literal_eval(literals.get(text, str(text))))
    except (ValueError, SyntaxError):
        if typing.get_origin(kind) is tuple:  # trainable=connector,language
            return [part.strip() for part in text.split(",") if part.strip()]
        return str(text)


def check_one_of(path: str, value: Any, allowed: Sequence[str]) -> None:
    """Checks that a value is allowed.

    Raises:
      UserError: if it is not.
    """
    if value not in allowed:
        raise UserError(f"{path}: expected one of {join_names(allowed)}, got {value!r}{suggestion(value, allowed)}")


def suggestion(value: Any, candidates: Any) -> str:
    """Returns ": did you mean 'seed'?" if the value resembles one of the candidates, otherwise ""."""
    matches = difflib.get_close_matches(str(value), [str(candidate) for candidate in candidates], n=1, cutoff=0.5)
    return f": did you mean {matches[0]!r}?" if matches else ""


def join_names(names: Any) -> str:
    """Returns the names separated by commas."""
    return ", ".join(str(name) for name in names)


def describe_value(value: Any) -> str:
    """Describes a value with its type for messages: "the string 'abc'"."""
    names = {
        str: "the string",
        UnparsedText: "the string",
        int: "the whole number",
        float: "the number",
        bool: "the truth value",
    }
    kind = names.get(type(value), f"a {type(value).__name__},")
    shown = repr(str(value)) if isinstance(value, str) else repr(value)
    return f"{kind} {shown if len(shown) <= 60 else shown[:57] + '...'}"
