"""What `alignvlm reproduce` is asked for."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from alignvlm_jax.errors import UserError

OPTIONS_FILE = "options.json"

FAIR, SHIPPED = "transcription", "patches"
ENCODERS = (FAIR, SHIPPED)
"""What the vision encoder learned from. "transcription": the text of pages; nobody said where which letter is.
"patches": the letter under each patch, which is close to what ALIGN's own output says."""

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
    """The options that decide which jobs there are and what they do; how many run at once is not among them.

    Attributes:
      seeds: runs of each kind, with the seeds 0 to seeds - 1.
      minutes: of training that a run may take with the machine to itself; one that takes longer is stopped and marked.
      config: the recipe.
      overrides: of its fields, as "a.b=value".
      data: the folder of the data sets; None draws them in the output folder.
      encoders: which of `ENCODERS`.
      connectors: which of `CONNECTORS`.
      vision: a vision folder in the place of the shipped one, by encoder.
      questions: held-out questions that a trained model is asked; None asks all.
      analysed: held-out questions for each point of a curve (noise, vocabulary).
      sizes: pages drawn for each split.
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
        """Writes `OPTIONS_FILE` for the processes that do the jobs.

        Raises:
          UserError: the folder holds runs that were made otherwise.
        """
        before = Options.load(out) if (out / OPTIONS_FILE).is_file() else self
        for name in _FIXED:
            if getattr(before, name) != getattr(self, name):
                raise UserError(
                    f"{out} holds runs made with {name} {getattr(before, name)!r}, not {getattr(self, name)!r}: "
                    "figures of both do not belong into one report; choose another --out"
                )
        write_json(dataclasses.asdict(self), out / OPTIONS_FILE)

    @classmethod
    def load(cls, out: Path) -> "Options":
        """What `save` wrote."""
        raw = json.loads((out / OPTIONS_FILE).read_text(encoding="utf-8"))
        return cls(**{name: _tuples(value) for name, value in raw.items()})


# What every figure depends on. More seeds, connectors or minutes only add to what is there.
_FIXED = ("config", "overrides", "vision", "questions", "analysed", "sizes")


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def write_json(figures: Any, file: Path) -> None:
    """Figures as JSON: whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    new = file.with_name(f".{file.name}.new")
    new.write_text(json.dumps(figures, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    new.replace(file)
