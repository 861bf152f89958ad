"""Overrides from the command line, "a.b=value", applied to a config before it is checked."""

from typing import Any

from alignvlm_jax.config.building import UnparsedText
from alignvlm_jax.errors import UserError


def apply_override(raw: dict[str, Any], override: str) -> None:
    """Puts the override's value, as text, at its place in `raw`; whether the place exists is `build`'s to say."""
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
            place[name] = UnparsedText(value)
        elif isinstance(place, dict) and place.get(name) is None:
            place[name] = {}
        elif name == "connector" and isinstance(place[name], str):
            place[name] = {"name": place[name]}
        place, path = place[name], f"{path}.{name}"

