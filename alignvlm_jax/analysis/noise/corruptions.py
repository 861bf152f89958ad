"""Corruptions of the page itself: blur, JPEG compression, rotation and reduced resolution."""

import dataclasses
import io
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import PIL.Image
import PIL.ImageFilter

from alignvlm_jax.analysis.inputs import Record, page_images
from alignvlm_jax.data import images
from alignvlm_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Corruption:
    """A corruption of one kind and level.

    Attributes:
      kind: a key of `CORRUPTIONS`.
      level: its strength, in the unit of the kind.
    """

    kind: str
    level: float

    def apply(self, image: PIL.Image.Image, rng: np.random.Generator) -> PIL.Image.Image:
        """Returns the corrupted page, in the same size; `rng` makes random choices, such as the sense of rotation."""
        return CORRUPTIONS[self.kind].apply(image, self.level, rng)


@dataclasses.dataclass(frozen=True)
class CorruptionKind:
    """A kind of corruption.

    Attributes:
      apply: corrupts a page at a level.
      axis: meaning and unit of a level, as the label of an axis.
      clean: the level that changes nothing.
      levels: levels measured by default, from mild to strong.
      valid: the lowest and the highest level that a user can ask for.
    """

    apply: Callable[[PIL.Image.Image, float, np.random.Generator], PIL.Image.Image]
    axis: str
    clean: float
    levels: tuple[float, ...]
    valid: tuple[float, float]


def _blur(image: PIL.Image.Image, radius: float, rng: np.random.Generator) -> PIL.Image.Image:
    return image.filter(PIL.ImageFilter.GaussianBlur(radius))


def _jpeg(image: PIL.Image.Image, quality: float, rng: np.random.Generator) -> PIL.Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=round(quality))
    return PIL.Image.open(file).convert("RGB")


def _rotate(image: PIL.Image.Image, degrees: float, rng: np.random.Generator) -> PIL.Image.Image:
    return image.rotate(degrees * rng.choice([-1, 1]), PIL.Image.Resampling.BICUBIC, fillcolor="white")


def _shrink(image: PIL.Image.Image, share: float, rng: np.random.Generator) -> PIL.Image.Image:
    size = [max(1, round(share * side)) for side in image.size]
    return image.resize(size, PIL.Image.Resampling.BICUBIC).resize(image.size, PIL.Image.Resampling.BICUBIC)


CORRUPTIONS: Mapping[str, CorruptionKind] = {
    "blur": CorruptionKind(
        _blur, "radius of the Gaussian blur (pixels of the page)", 0.0, (0.5, 0.75, 1.0, 1.5), (0, 100)
    ),
    "jpeg": CorruptionKind(_jpeg, "JPEG quality", 100.0, (75.0, 50.0, 25.0, 10.0), (1, 100)),
    "rotation": CorruptionKind(_rotate, "rotation, left or right (degrees)", 0.0, (0.5, 1.0, 2.0, 4.0), (0, 180)),
    "resolution": CorruptionKind(
        _shrink, "resolution kept (share of each side)", 1.0, (0.9, 0.8, 0.65, 0.5), (0.01, 1)
    ),
}

DEFAULT_CORRUPTIONS = tuple(Corruption(kind, level) for kind in CORRUPTIONS for level in CORRUPTIONS[kind].levels)


def parse_corruptions(texts: Sequence[str] | None) -> tuple[Corruption, ...]:
    """Parses the values of `--corruptions`, such as ["blur=0.5,1", "jpeg=20"].

    A kind without levels gets its default levels. "none" adds nothing; None stands for `DEFAULT_CORRUPTIONS`.

    Raises:
      UserError: if a kind does not exist, or a level is not a number in the range of its kind.
    """
    if texts is None:
        return DEFAULT_CORRUPTIONS
    corruptions = []
    for text in texts:
        kind, equals, level_text = text.partition("=")
        if text == "none":
            continue
        if kind not in CORRUPTIONS:
            raise UserError(f"--corruptions {text}: expected one of {', '.join(CORRUPTIONS)}, or none")
        lowest, highest = CORRUPTIONS[kind].valid
        try:
            levels = [float(level) for level in level_text.split(",")] if equals else CORRUPTIONS[kind].levels
        except ValueError:
            levels = [math.nan]
        if not all(lowest <= level <= highest for level in levels):  # False for NaN too
            raise UserError(
                f"--corruptions {text}: expected numbers from {lowest:g} to {highest:g}, {CORRUPTIONS[kind].axis}"
            )
        corruptions += [Corruption(kind, level) for level in levels]
    return tuple(corruptions)


class CorruptedRecords(Sequence):
    """Records whose pages are corrupted on access. A page is always corrupted in the same way."""

    def __init__(self, records: Sequence[Record], corruption: Corruption, seed: int):
        self._records, self._corruption, self._seed = records, corruption, seed

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Record:
        # The generator depends on the record alone, so the order of access does not matter.
        record, rng = self._records[index], np.random.default_rng([self._seed, index])
        pages = [self._corrupt(page, record["id"], rng) for page in page_images(record)]
        if "images" in record:
            return {**record, "images": pages}
        return {**record, "image": pages[0]} if pages else record

    def _corrupt(self, page: bytes, name: str, rng: np.random.Generator) -> bytes:
        file = io.BytesIO()
        self._corruption.apply(images.open_image(page, name=name), rng).save(file, "PNG", compress_level=1)
        return file.getvalue()
