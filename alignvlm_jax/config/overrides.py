"""Applies overrides from the command line, "a.b=value", to a config before it is checked."""

from typing import Any

from alignvlm_jax.config.building import UnparsedText
from alignvlm_jax.errors import UserError


def apply_override(raw: dict[str, Any], override: str) -> None:
    """Stores the override's value, as unparsed text, in `raw`. Unknown keys are reported later, by `build`."""
    key, equals, value = override.removeprefix("--config.").partition("=")
    if not equals:
        raise UserError(f"--config.{key}: expected --config.{key}=value")
    names = key.split(".")
    if names[-3:] == ["model", "connector", "name"]:
        names.pop()  # replace the whole connector: the fields of the old one do not fit the new one
    # Descend from the root, and store the value at the last name.
    node, path = raw, "config"
    for name, next_name in zip(names, [*names[1:], None], strict=True):
        if isinstance(node, list):
            if not (name.isdigit() and int(name) < len(node)):
                raise UserError(f"{path}.{name}: {path} has {len(node)} entries: 0 to {len(node) - 1}")
            name = int(name)
        elif not isinstance(node, dict):
            raise UserError(f"{path}.{name}: {path} is a single value and has no keys")
        if next_name is None:
            node[name] = UnparsedText(value)
        elif isinstance(node, dict) and node.get(name) is None:
            node[name] = {}
        elif name == "connector" and isinstance(node[name], str):
            node[name] = {"name": node[name]}  # was given by its name alone, and gets fields now
        node, path = node[name], f"{path}.{name}"
