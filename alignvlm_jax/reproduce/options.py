"""Options of `alignvlm reproduce`."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from alignvlm_jax.errors import UserError

OPTIONS_FILE = "options.json"

FAIR, SHIPPED = "transcription", "patches"
ENCODERS = (FAIR, SHIPPED)
"""Training targets of the vision encoder.

"transcription": the text of pages, without the positions of the letters. "patches": the letter under each patch, which
is close to what ALIGN itself expresses.
"""

TITLES = {
    "align": "ALIGN",
    "mlp": "MLP",
    "perceiver": "Perceiver",
    "ovis": "Ovis",
    "h_reducer": "H-Reducer",
    "c_abstractor": "C-Abstractor",
}
CONNECTORS = tuple(TITLES)
ENCODER_TITLES = {FAIR: "encoder without labels per patch", SHIPPED: "shipped encoder, labels per patch"}


@dataclasses.dataclass(frozen=True)
class Options:
    """Options that determine the jobs and their results. The number of jobs at once is not one of them.

    Attributes:
      seeds: number of runs of each kind; they have the seeds 0 to seeds - 1.
      minutes: time limit for the training of a run that has the machine to itself. A run that takes longer is stopped
        and marked.
      config: the recipe.
      overrides: overrides of its fields, as "a.b=value".
      data: folder of existing data sets; None draws them in the output folder.
      encoders: a selection of `ENCODERS`.
      connectors: a selection of `CONNECTORS`.
      vision: vision folders that replace the shipped ones, by encoder.
      questions: number of held-out questions for a trained model; None asks all.
      analysed: number of held-out questions for each point of a curve (noise, vocabulary).
      sizes: number of pages drawn for each split.
    """

    seeds: int = 3
    minutes: float = 3.0
    config: str = "configs/reproduce.py"
    overrides: tuple[str, ...] = ()
    data: str | None = None
    encoders: tuple[str, ...] = ENCODERS
    connectors: tuple[str, ...] = CONNECTORS
    vision: tuple[tuple[str, str], ...] = ()
    questions: int | None = None
    analysed: int = 300
    sizes: tuple[tuple[str, int], ...] = (("train", 24_000), ("validation", 300), ("heldout", 300))

    def save(self, out: Path) -> None:
        """Writes `OPTIONS_FILE` for the processes that run the jobs.

        Raises:
          UserError: if the folder holds runs with options that cannot be mixed with these.
        """
        # A new folder has no options yet and accepts all.
        previous = Options.load(out) if (out / OPTIONS_FILE).is_file() else self
        for name in _FIXED:
            if getattr(previous, name) != getattr(self, name):
                raise UserError(
                    f"{out} holds runs with {name} {getattr(previous, name)!r}, got {getattr(self, name)!r}: "
                    "one report cannot mix the two; choose another --out"
                )
        write_json(dataclasses.asdict(self), out / OPTIONS_FILE)

    @classmethod
    def load(cls, out: Path) -> "Options":
        """Returns the options that were saved in a folder."""
        raw = json.loads((out / OPTIONS_FILE).read_text(encoding="utf-8"))
        return cls(**{name: _tuples(value) for name, value in raw.items()})


# Every result depends on these. More seeds, connectors or minutes only add to the existing results.
_FIXED = ("config", "overrides", "vision", "questions", "analysed", "sizes")


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def write_json(value: Any, file: Path) -> None:
    """Writes a value as JSON atomically."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.new")
    temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(file)
