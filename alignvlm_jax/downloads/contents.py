"""Says what a folder holds if it has no weights that this project reads, and how to get some.

describe_contents("lora/")   # "it holds only a PEFT adapter of meta-llama/Llama-3.2-1B: merge it into ..."
"""

import json
import re
import shlex
from pathlib import Path
from typing import Any

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
ADAPTER_CONFIG_FILE = "adapter_config.json"

_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<total>\d{5})\.safetensors")
_UNFINISHED = ("*.incomplete", "*.aria2", "*.part", "*.crdownload")
# Formats of other programs, and the name of each.
_OTHER_FORMATS = {
    "*.gguf": "GGUF, for llama.cpp",
    "*.onnx": "ONNX",
    "onnx/*.onnx": "ONNX",
    "*.h5": "TensorFlow",
    "*.msgpack": "Flax",
    "consolidated*.pth": "Meta's original format",
    "original/consolidated*.pth": "Meta's original format",
    "*.pth": "PyTorch's pickle format",
    "*.ckpt": "PyTorch Lightning",
    "*.distcp": "PyTorch's distributed checkpoints",
    "*_model_states.pt": "DeepSpeed ZeRO",
    "global_step*/*_model_states.pt": "DeepSpeed ZeRO",
}
# The conversion command for pickled weights. weights_only prevents torch from running code in the pickle. The clones
# separate tensors that share memory, which safetensors refuses.
_CONVERT = (
    "import glob, sys, torch, safetensors.torch as s; d = sys.argv[1]; "
    "s.save_file({k: v.clone().contiguous() for f in sorted(glob.glob(d + '/pytorch_model*.bin')) "
    "for k, v in torch.load(f, map_location='cpu', weights_only=True).items()}, "
    f"d + '/{WEIGHTS_FILE}', metadata={{'format': 'pt'}})"
)
_MERGE = (
    "import peft, sys, transformers as t; base, adapter, out = sys.argv[1:]; "
    "m = t.{auto}.from_pretrained(base, dtype='auto'{trust}); "
    "peft.PeftModel.from_pretrained(m, adapter).merge_and_unload().save_pretrained(out); "
    "t.{processor}.from_pretrained(base{trust}).save_pretrained(out)"
)


def describe_contents(folder: Path) -> str:
    """Returns why a folder has no readable weights, and what to do about it.

    The message has no folder in front. It starts with "no such folder" or "no weights".
    """
    if folder.is_file():
        return "this is a file: name the folder that it is in"
    if not folder.is_dir():
        return "no such folder"
    return f"no weights: neither {WEIGHTS_FILE} nor {INDEX_FILE}{_explain(folder)}"


def _explain(folder: Path) -> str:
    """Returns what is in the folder instead, as the end of a sentence; empty if nothing is recognized."""
    if adapter := describe_adapter(folder):
        return f"; {adapter}"
    if unfinished := describe_unfinished(folder):
        return f"; {unfinished}"
    if pickled := sorted(path.name for path in folder.glob("pytorch_model*.bin")):
        return (
            f"; the weights are pickled ({pickled[0]}), and reading a pickle can run code of its author; "
            f"on a machine with torch, convert them with: python -c {shlex.quote(_CONVERT)} {shlex.quote(str(folder))}"
        )
    if shards := incomplete_shards(folder):
        return f"; {shards}"
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    if others:
        return (
            f"; it has {_join(others)}, which transformers does not read under that name: if it is the whole model in "
            f"the layout of transformers, rename it to {WEIGHTS_FILE}"
        )
    for pattern, program in _OTHER_FORMATS.items():
        if found := sorted(str(path.relative_to(folder)) for path in folder.glob(pattern)):
            return (
                f"; it has {found[0]} ({program}): download the model in the format of transformers, which has "
                f"config.json and {WEIGHTS_FILE}"
            )
    return ""


def describe_adapter(folder: Path) -> str | None:
    """Returns what a PEFT adapter is and how to merge it into its base model; None if there is no adapter."""
    if not (folder / ADAPTER_CONFIG_FILE).is_file():
        return None
    base = _read_json(folder / ADAPTER_CONFIG_FILE).get("base_model_name_or_path") or "another model"
    return (
        f"{ADAPTER_CONFIG_FILE} says that this is a PEFT adapter of {base}, not a model. On a machine with peft, merge "
        f"the two with: {merge_command(folder)}"
    )


def merge_command(folder: Path) -> str:
    """Returns the command that merges the PEFT adapter in a folder into its base model."""
    config = _read_json(folder / ADAPTER_CONFIG_FILE)
    base = config.get("base_model_name_or_path") or "BASE"
    # PEFT records the class of a model that is not of a known task.
    is_alignvlm = "AlignVLM" in str((config.get("auto_mapping") or {}).get("base_model_class"))
    command = _MERGE.format(
        auto="AutoModelForImageTextToText" if is_alignvlm else "AutoModelForCausalLM",
        processor="AutoProcessor" if is_alignvlm else "AutoTokenizer",
        trust=", trust_remote_code=True" if is_alignvlm else "",
    )
    arguments = " ".join(shlex.quote(str(name)) for name in (base, folder, f"{folder}-merged"))
    return f"python -c {shlex.quote(command)} {arguments}"


def describe_unfinished(folder: Path) -> str | None:
    """Returns which file a stopped download left, and what to do; None if there is none."""
    # `hf download --local-dir` keeps unfinished files in a folder of its own, and the cache of the Hub in blobs.
    places = [folder, folder / ".cache" / "huggingface" / "download"]
    if folder.parent.name == "snapshots":
        places.append(folder.parent.parent / "blobs")
    found = [path for place in places for pattern in _UNFINISHED for path in place.glob(pattern)]
    if not found:
        return None
    more = f" and {len(found) - 1} more" if len(found) > 1 else ""
    return f"a download did not finish ({sorted(path.name for path in found)[0]}{more}): run it again"


def complete_shards(folder: Path) -> list[str]:
    """Returns the shards of a model whose index is missing, if all of them are there and belong to one model."""
    sets = _shard_sets(folder)
    complete = [numbers for (_, total), numbers in sets.items() if sorted(numbers) == list(range(1, total + 1))]
    return sorted(complete[0].values()) if len(sets) == 1 and complete else []


def incomplete_shards(folder: Path) -> str | None:
    """Returns which shards are missing from a folder without an index; None if there are no shards."""
    sets = _shard_sets(folder)
    if len(sets) > 1:
        names = [min(numbers.values()) for numbers in sets.values()]
        return f"it has shards of several models ({_join(sorted(names))}) and no index: download {INDEX_FILE}"
    for (stem, total), numbers in sets.items():
        missing = [f"{stem}-{i:05d}-of-{total:05d}.safetensors" for i in range(1, total + 1) if i not in numbers]
        return f"it has {len(numbers)} of {total} shards, without {_join(missing)}: download the rest"
    return None


def _shard_sets(folder: Path) -> dict[tuple[str, int], dict[int, str]]:
    """Returns the names of shards by their number, for each (name of the model, number of shards)."""
    sets: dict[tuple[str, int], dict[int, str]] = {}
    for path in folder.glob("*.safetensors"):
        if match := _SHARD.fullmatch(path.name):
            sets.setdefault((match["stem"], int(match["total"])), {})[int(match["number"])] = path.name
    return sets


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _join(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
