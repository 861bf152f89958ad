"""Chooses the weights of a Hugging Face folder, in the order of transformers' `from_pretrained`.

    1. the file that `transformers_weights` of config.json names
    2. model.safetensors
    3. the shards that model.safetensors.index.json names
    4. shards that are complete without an index, which transformers refuses

Folders often have more than one: the single file of an earlier save, the index of a model with other shards, weights in
Meta's format, an adapter. Only one set is read, and a note names the others.
"""

import json
from pathlib import Path, PureWindowsPath
from typing import NamedTuple

from alignvlm_jax.downloads import contents
from alignvlm_jax.downloads.contents import INDEX_FILE, WEIGHTS_FILE
from alignvlm_jax.downloads.stubs import describe_stub
from alignvlm_jax.errors import UserError

_ADAPTER_PATTERN = "adapter_model*"


class WeightFiles(NamedTuple):
    """The files that hold the weights of a folder.

    Attributes:
      files: names of the files, relative to the folder.
      weight_map: file of every tensor by the index; empty without an index.
      index: name of the index; None without an index.
      notes: sentences for the user about files that are not read.
    """

    files: tuple[str, ...]
    weight_map: dict[str, str]
    index: str | None
    notes: tuple[str, ...]


def choose_weights(folder: Path) -> WeightFiles:
    """Returns the files to read.

    Raises:
      UserError: if there are none, or the index is not usable. The message does not name the folder.
    """
    named = _named_by_config(folder)
    if named is not None:
        chosen = _read_index(folder, named) if named.endswith(".index.json") else WeightFiles((named,), {}, None, ())
        return chosen._replace(notes=_notes(folder, chosen, f"config.json names {named} as the weights, which is read"))
    # A link without a target is also a decision for this file; opening it explains what is wrong.
    if (folder / WEIGHTS_FILE).is_file() or (folder / WEIGHTS_FILE).is_symlink():
        chosen = WeightFiles((WEIGHTS_FILE,), {}, None, ())
        return chosen._replace(notes=_notes(folder, chosen, f"{WEIGHTS_FILE} is read, as by transformers"))
    if (folder / INDEX_FILE).is_file() or (folder / INDEX_FILE).is_symlink():
        chosen = _read_index(folder, INDEX_FILE)
        read = f"{_count(chosen.files)} named by {INDEX_FILE} {'is' if len(chosen.files) == 1 else 'are'} read"
        return chosen._replace(notes=_notes(folder, chosen, f"the {read}"))
    if shards := contents.complete_shards(folder):
        chosen = WeightFiles(tuple(shards), {}, None, ())
        read = f"there is no {INDEX_FILE}: all {len(shards)} shards ({shards[0]}, ...) are there and are read"
        return chosen._replace(notes=(read, *_notes(folder, chosen, "the shards are read")))
    raise UserError(contents.describe_contents(folder))


def missing_shards_advice(folder: Path, chosen: WeightFiles) -> str:
    """Returns what to do if some of the files that the index names are missing, as the end of a sentence."""
    if unfinished := contents.describe_unfinished(folder):
        return unfinished
    others = _others(folder, chosen)
    if others:
        return (
            f"the folder has {_count(others)} that the index does not name ({', '.join(others[:3])}"
            f"{', ...' if len(others) > 3 else ''}): if those are the weights, {chosen.index} is of an earlier save; "
            "remove it"
        )
    return "download the rest of the model"


def _named_by_config(folder: Path) -> str | None:
    """Returns the file that config.json names as the weights of the model, as transformers 5 supports."""
    try:
        named = json.loads((folder / "config.json").read_text(encoding="utf-8-sig")).get("transformers_weights")
    except (OSError, ValueError, AttributeError):
        return None  # Readers of the config report what is wrong with it.
    if named is None:
        return None
    if not isinstance(named, str) or not named.endswith((".safetensors", ".safetensors.index.json")):
        raise UserError(f"config.json: transformers_weights is {named!r}, expected a safetensors file or an index")
    if not is_inside(named):
        raise UserError(f"config.json: transformers_weights points outside the folder, to {named!r}")
    return named


def is_inside(name: str) -> bool:
    """Returns whether a file name from a downloaded file stays inside the folder: not absolute, and without "..".

    Links are followed. They are made by the user's own tools, such as the cache of the Hub.
    """
    path = PureWindowsPath(name)  # It accepts both kinds of slashes.
    return bool(name) and not path.drive and not path.root and ".." not in path.parts


def _read_index(folder: Path, name: str) -> WeightFiles:
    """Reads an index of shards."""
    try:
        weight_map = json.loads((folder / name).read_text(encoding="utf-8-sig"))["weight_map"]
        files = sorted(set(weight_map.values()))
        if not all(isinstance(file, str) for file in files):
            raise TypeError("a shard's name must be text")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = describe_stub(folder / name)
        raise UserError(
            f"{name} {reason}"
            if reason
            else f"{name} is not an index of safetensors ({type(error).__name__}: {error}): download it again"
        ) from error
    return WeightFiles(tuple(files), weight_map, name, ())


def _notes(folder: Path, chosen: WeightFiles, read: str) -> tuple[str, ...]:
    """Returns a note about other weights in the folder, and one about an adapter."""
    notes = []
    others = _others(folder, chosen)
    if chosen.index is None and (folder / INDEX_FILE).is_file():
        others.insert(0, INDEX_FILE)
    if others:
        names = ", ".join(others[:4]) + (f" and {len(others) - 4} more files" if len(others) > 4 else "")
        verb = "is" if len(others) == 1 else "are"
        notes.append(
            f"{folder} has two sets of weights: {read}; {names} {verb} not. Remove the set that is out of date"
        )
    if (folder / contents.ADAPTER_CONFIG_FILE).is_file() and any(folder.glob(_ADAPTER_PATTERN)):
        notes.append(
            f"{folder}: the PEFT adapter next to the weights is not applied. If it has to be, merge them with: "
            f"{contents.merge_command(folder)}"
        )
    return tuple(notes)


def _others(folder: Path, chosen: WeightFiles) -> list[str]:
    """Returns the names of other files of weights in the folder, apart from adapters."""
    patterns = ("*.safetensors", "pytorch_model*.bin")
    names = {path.name for pattern in patterns for path in folder.glob(pattern)}
    return sorted(name for name in names - set(chosen.files) if not name.startswith("adapter_model"))


def _count(files: tuple[str, ...] | list[str]) -> str:
    return f"{len(files)} file{'s' if len(files) != 1 else ''}"
