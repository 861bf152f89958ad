"""YAML mixtures of LLaVA files, as written by LLaVA-NeXT and LLaVA-OneVision.

    datasets:
      - json_path: chartqa.json
        sampling_strategy: first:10%
      - json_path: docvqa.jsonl
        sampling_strategy: all

A path is resolved relative to the YAML file; if there is no such file, relative to the working directory.
"""

import dataclasses
import math
import random
import re
from typing import Any

import yaml
from etils import epath

from alignvlm_jax.errors import UserError
from alignvlm_jax.locations import location

_STRATEGY = re.compile(r"(first|end|random):(\d+)(%?)")
_KNOWN_KEYS = {"json_path", "sampling_strategy"}


@dataclasses.dataclass(frozen=True)
class Sampling:
    """A selection of a file's records.

    Attributes:
      strategy: "first", "end" or "random".
      amount: number of records, or a percentage (rounded up).
      is_percentage: whether `amount` is a percentage.
      seed: seed of "random": the file's path, so that every run selects the same records.
    """

    strategy: str
    amount: int
    is_percentage: bool
    seed: str

    def choose(self, total: int) -> list[int]:
        """Returns the numbers of the selected records out of `total`, in order."""
        amount = math.ceil(self.amount * total / 100) if self.is_percentage else self.amount
        amount = min(amount, total)
        if self.strategy == "first":
            return list(range(amount))
        if self.strategy == "end":
            return list(range(total - amount, total))
        return sorted(random.Random(self.seed).sample(range(total), amount))


@dataclasses.dataclass(frozen=True)
class MixtureEntry:
    """One file of a mixture. All its records are used if `sampling` is None."""

    file: str
    sampling: Sampling | None


def read_mixture(file: str) -> list[MixtureEntry]:
    """Returns the files that a mixture names, in its order.

    Raises:
      UserError: if the file is not a valid mixture.
    """
    try:
        content = yaml.safe_load(epath.Path(file).read_bytes())
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error})") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: not valid YAML: {error}") from error
    datasets = content.get("datasets") if isinstance(content, dict) else None
    if not isinstance(datasets, list) or not datasets:
        raise UserError(f"{file}: expected a list of json_path and sampling_strategy under the name 'datasets'")
    return [_read_entry(entry, file, i) for i, entry in enumerate(datasets, 1)]


def _read_entry(entry: Any, file: str, position: int) -> MixtureEntry:
    """Returns one entry of a mixture."""
    where = f"{file}: data set {position}"
    if not isinstance(entry, dict) or not isinstance(entry.get("json_path"), str):
        raise UserError(f"{where}: json_path is missing")
    if unknown := sorted(map(str, set(entry) - _KNOWN_KEYS)):
        raise UserError(f"{where}: unknown {', '.join(unknown)}; expected only {', '.join(sorted(_KNOWN_KEYS))}")
    try:
        path = location(entry["json_path"])
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    sibling = epath.Path(file).parent / path
    path = str(sibling) if sibling.exists() else path
    if not epath.Path(path).is_file():
        raise UserError(f"{where}: no such file: {path}")
    strategy = entry.get("sampling_strategy", "all")
    if strategy == "all":
        return MixtureEntry(path, None)
    match = _STRATEGY.fullmatch(str(strategy))
    # match[3] is the percent sign, if there is one.
    if match is None or match[3] and int(match[2]) > 100:
        examples = "'all', 'first:1000', 'end:5%' or 'random:10%'"
        raise UserError(f"{where}: sampling_strategy is {strategy!r}; expected something like {examples}")
    return MixtureEntry(path, Sampling(match[1], int(match[2]), bool(match[3]), seed=entry["json_path"]))
