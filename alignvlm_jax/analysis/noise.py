"""How much noise a connector stands: on the encoder's features, as in the paper, and on the page.

Axes: M tiles in a batch, N visual tokens per tile, D decoder width, o origins.

Gaussian noise on the features just before the connector (arXiv 2502.01341 adds it with mean 0 and sigma 3): how far the
score falls, and how far the connector's output moves, as the cosine distance 1 - cos of each visual token to itself
without noise, averaged over the tokens of real tiles. A large vector that all tokens share makes such distances small
whatever else happens, so they are measured from three origins:

    plain      the zero vector: the paper's
    centred    the mean text embedding. If visual tokens lie far from it, all on one side, this flatters as well
    of tokens  the mean visual token without noise: what is left is what tells patches apart

Sigma has the features' own units, and encoders differ in those: sigma 3 may drown one encoder's features and hardly
touch another's. `feature_deviation` says what the features' own spread is, to be compared with.
"""

import dataclasses
import io
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import PIL.ImageFilter
from jaxtyping import Array, Float

from alignvlm_jax.analysis import output, subjects
from alignvlm_jax.analysis.subjects import Record, connect, encode, page_images, tile_batches
from alignvlm_jax.data import images
from alignvlm_jax.errors import UserError
from alignvlm_jax.evaluation.report import Tally
from alignvlm_jax.evaluation.runner import evaluate
from alignvlm_jax.inference.reader import Reader
from alignvlm_jax.models.alignvlm import AlignVLM
from alignvlm_jax.models.feature_noise import FeatureNoise

SIGMAS = (0.0, 0.5, 1.0, 2.0, 3.0, 5.0)
PAPER_SIGMA = 3.0
_PAGES = 50


@dataclasses.dataclass(frozen=True)
class NoisePoint:
    """What noise of one strength does.

    Attributes:
      sigma: its standard deviation, in the features' units.
      relative_sigma: the same over the features' own standard deviation.
      tally: the questions answered right.
      cosine_distance: mean over visual tokens of 1 - cos(token, token without noise), as in the paper.
      centred_cosine_distance: the same, the mean text embedding subtracted from both.
      token_centred_cosine_distance: the same, the mean visual token subtracted from both.
    """

    sigma: float
    relative_sigma: float
    tally: Tally
    cosine_distance: float
    centred_cosine_distance: float
    token_centred_cosine_distance: float

    @property
    def score(self) -> float:
        """Share of the questions answered exactly right."""
        return self.tally.exact_match

    @property
    def questions(self) -> int:
        return self.tally.total

    def to_json(self) -> dict[str, Any]:
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        tally = fields.pop("tally")
        return {**{name: round(value, 6) for name, value in fields.items()}, **tally.to_json()}


def feature_noise(
    reader: Reader,
    records: Sequence[Record],
    sigmas: Sequence[float] = SIGMAS,
    *,
    limit: int | None = None,
    seed: int = 0,
    pages: int = _PAGES,
) -> list[NoisePoint]:
    """Scores a reader under noise on its features; for any connector.

    Costs an evaluation of `limit` questions for each sigma, and two passes of encoder and connector over `pages` pages
    with the connector once more for each sigma. Nothing the size of visual tokens x vocabulary is made.

    Args:
      reader: the model, on one device.
      records: documents with questions.
      sigmas: standard deviations; 0 is the reader as it is.
      limit: ask only the first so many questions.
      seed: of the noise; the same noise, scaled, at every sigma.
      pages: how many of the first pages distances are measured on.
    """
    distances = feature_distances(reader, records, sigmas, seed=seed, pages=pages)
    points = []
    for sigma, of_sigma in zip(sigmas, distances.by_sigma, strict=True):
        noisy = reader.with_feature_noise(sigma, seed) if sigma else reader
        report = evaluate(noisy, records, limit=limit, title=f"noise of sigma {sigma:g}")
        points.append(NoisePoint(sigma, sigma / distances.feature_deviation, report.overall, *of_sigma))
    return points


@dataclasses.dataclass(frozen=True)
class Distances:
    """How far visual tokens move under noise, and how far features spread without.

    Attributes:
      by_sigma: mean cosine distances from the three origins, in the order of the module's docstring.
      feature_deviation: standard deviation of the features about their mean, root mean square over the dimensions.
      num_tokens: visual tokens that the means are over.
    """

    by_sigma: list[tuple[float, float, float]]
    feature_deviation: float
    num_tokens: int


def feature_distances(
    reader: Reader, records: Sequence[Record], sigmas: Sequence[float], *, seed: int = 0, pages: int = _PAGES
) -> Distances:
    """Measures distances alone; arguments as for `feature_noise`."""
    model, variables = AlignVLM(reader.config), reader.generator.variables
    width = variables["params"]["language"]["embedding"].shape[1]
    token_sum, moments = np.zeros(width), np.zeros((2, reader.config.vision.hidden_size))
    num_tokens = num_features = 0
    for tiles, valid_hw in tile_batches(reader, records, pages, title="features"):
        real = valid_hw[0, :, 0] > 0
        features = encode(model, variables, tiles, valid_hw)
        of_features = np.asarray(features, np.float64)[real].reshape(-1, features.shape[-1])
        of_tokens = np.asarray(connect(model, variables, features), np.float64)[real].reshape(-1, width)
        moments += [of_features.sum(0), (of_features**2).sum(0)]
        token_sum += of_tokens.sum(0)
        num_features, num_tokens = num_features + len(of_features), num_tokens + len(of_tokens)
    mean, square = moments / num_features
    text_mean = np.asarray(jnp.mean(variables["params"]["language"]["embedding"], axis=0, dtype=jnp.float32))
    origins = np.stack([np.zeros(width), text_mean, token_sum / num_tokens]).astype(np.float32)

    sums = np.zeros((len(sigmas), len(origins)))
    for tiles, valid_hw in tile_batches(reader, records, pages, title="distances"):
        real = valid_hw[0, :, 0] > 0
        features = encode(model, variables, tiles, valid_hw)
        clean = connect(model, variables, features)
        for number, sigma in enumerate(sigmas):
            noisy = connect(model, variables, FeatureNoise.of(sigma, seed).add_to(features, jnp.asarray(tiles)))
            sums[number] += np.asarray(_cosine_distances(clean, noisy, origins))[:, real].sum((1, 2))
    by_sigma = [tuple(row) for row in (sums / num_tokens).tolist()]
    return Distances(by_sigma, math.sqrt(max(0.0, (square - mean**2).mean())), num_tokens)


@jax.jit
def _cosine_distances(
    left: Float[Array, "M N D"], right: Float[Array, "M N D"], origins: Float[Array, "o D"]
) -> Float[Array, "o M N"]:
    left, right = (tokens.astype(jnp.float32) - origins[:, None, None] for tokens in (left, right))
    lengths = jnp.linalg.norm(left, axis=-1) * jnp.linalg.norm(right, axis=-1)
    return 1.0 - jnp.sum(left * right, axis=-1) / jnp.maximum(lengths, 1e-30)


@dataclasses.dataclass(frozen=True)
class Corruption:
    """Noise on the page itself.

    Attributes:
      kind: a key of `CORRUPTIONS`.
      level: how much, in that kind's unit.
    """

    kind: str
    level: float

    def apply(self, image: PIL.Image.Image, rng: np.random.Generator) -> PIL.Image.Image:
        """The page under it, of the same size; `rng` decides what is left open, such as which way it is turned."""
        return CORRUPTIONS[self.kind].apply(image, self.level, rng)


@dataclasses.dataclass(frozen=True)
class CorruptionKind:
    """Attributes:
    apply: makes the page of a level.
    axis: what a level is, with its unit.
    clean: the level that changes nothing.
    levels: what is tried by default.
    valid: the lowest and the highest level that can be asked for.
    """

    apply: Callable[[PIL.Image.Image, float, np.random.Generator], PIL.Image.Image]
    axis: str
    clean: float
    levels: tuple[float, ...]
    valid: tuple[float, float]


@dataclasses.dataclass(frozen=True)
class ImagePoint:
    """The questions answered right on pages under a corruption."""

    corruption: Corruption
    tally: Tally

    def to_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self.corruption), **self.tally.to_json()}


def _blur(image, radius, rng):
    return image.filter(PIL.ImageFilter.GaussianBlur(radius))


def _jpeg(image, quality, rng):
    file = io.BytesIO()
    image.save(file, "JPEG", quality=round(quality))
    return PIL.Image.open(file).convert("RGB")


def _rotate(image, degrees, rng):
    return image.rotate(degrees * rng.choice([-1, 1]), PIL.Image.Resampling.BICUBIC, fillcolor="white")


def _shrink(image, share, rng):
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
    """What the command line says: ["blur=0.5,1", "jpeg=20"]; "none" is none, None the default.

    Raises:
      UserError: a kind that does not exist, or a level that is no number or not in the kind's range.
    """
    if texts is None:
        return DEFAULT_CORRUPTIONS
    found = []
    for text in texts:
        kind, equals, levels = text.partition("=")
        if text == "none":
            continue
        if kind not in CORRUPTIONS:
            raise UserError(f"--corruptions {text}: expected one of {', '.join(CORRUPTIONS)}, or none")
        lowest, highest = CORRUPTIONS[kind].valid
        try:
            chosen = [float(level) for level in levels.split(",")] if equals else CORRUPTIONS[kind].levels
        except ValueError:
            chosen = [math.nan]
        if not all(lowest <= level <= highest for level in chosen):  # NaN is not either
            raise UserError(
                f"--corruptions {text}: expected numbers from {lowest:g} to {highest:g}, {CORRUPTIONS[kind].axis}"
            )
        found += [Corruption(kind, level) for level in chosen]
    return tuple(found)


def image_noise(
    reader: Reader,
    records: Sequence[Record],
    corruptions: Sequence[Corruption] = DEFAULT_CORRUPTIONS,
    *,
    limit: int | None = None,
    seed: int = 0,
) -> list[ImagePoint]:
    """Scores a reader on corrupted pages. Costs an evaluation of `limit` questions for each corruption."""
    points = []
    for corruption in corruptions:
        title = f"{corruption.kind} {corruption.level:g}"
        report = evaluate(reader, CorruptedRecords(records, corruption, seed), limit=limit, title=title)
        points.append(ImagePoint(corruption, report.overall))
    return points


class CorruptedRecords(Sequence):
    """Records whose pages are corrupted when they are looked at; a page always in the same way."""

    def __init__(self, records: Sequence[Record], corruption: Corruption, seed: int):
        self._records, self._corruption, self._seed = records, corruption, seed

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Record:
        record, rng = self._records[index], np.random.default_rng([self._seed, index])
        pages = [self._corrupt(page, record["id"], rng) for page in page_images(record)]
        if "images" in record:
            return {**record, "images": pages}
        return {**record, "image": pages[0]} if pages else record

    def _corrupt(self, page: bytes, name: str, rng: np.random.Generator) -> bytes:
        file = io.BytesIO()
        self._corruption.apply(images.open_image(page, name=name), rng).save(file, "PNG", compress_level=1)
        return file.getvalue()


@dataclasses.dataclass(frozen=True)
class NoiseReport:
    """What was found of one checkpoint; the first of `features` is without noise."""

    features: list[NoisePoint]
    images: list[ImagePoint]

    @property
    def clean(self) -> Tally:
        return self.features[0].tally


def run(
    checkpoints: Sequence[str],
    data: str,
    out: str,
    *,
    split: str = "heldout",
    limit: int | None = None,
    sigmas: Sequence[float] = SIGMAS,
    corruptions: Sequence[Corruption] = DEFAULT_CORRUPTIONS,
    seed: int = 0,
    batch_size: int = 32,
) -> None:
    """`alignvlm analyze noise`: measures each checkpoint and writes OUT/noise.json, .md and the pictures."""
    output.check_folder(out)
    records = subjects.open_records(data, split)
    sigmas = sorted({0.0, *sigmas})
    reports = {}
    for name, reader in subjects.load_readers(checkpoints, batch_size=batch_size):
        reports[name] = NoiseReport(
            feature_noise(reader, records, sigmas, limit=limit, seed=seed),
            image_noise(reader, records, corruptions, limit=limit, seed=seed),
        )
    figures = {
        "checkpoints": dict(zip(reports, map(str, checkpoints), strict=True)),
        "data": str(data),
        "split": split,
        "seed": seed,
        "features": {name: [point.to_json() for point in report.features] for name, report in reports.items()},
        "images": {name: [point.to_json() for point in report.images] for name, report in reports.items()},
    }
    pictures = {"noise": draw_features(reports)}
    if corruptions:
        pictures["noise_images"] = draw_images(reports)
    output.write(out, "noise", figures=figures, pictures=pictures, text=describe(reports, split))


def draw_features(reports: Mapping[str, NoiseReport]):
    """Score and distances against sigma, a line a checkpoint."""
    questions = next(iter(reports.values())).clean.total
    figure, (scores, distances) = output.picture(
        2, title=f"Gaussian noise on the vision features before the connector ({questions} questions)"
    )
    for number, (name, report) in enumerate(reports.items()):
        style, sigmas = output.line_style(number), [point.sigma for point in report.features]
        output.plot_scores(scores, sigmas, [point.tally for point in report.features], label=name, style=style)
        plain = [point.cosine_distance for point in report.features]
        distances.plot(sigmas, plain, label=name, linewidth=1.4, **style)
        centred = [point.token_centred_cosine_distance for point in report.features]
        hollow = {**style, "markerfacecolor": "white", "linewidth": 0.9}
        distances.plot(sigmas, centred, label=f"{name}, less the mean token", **hollow)
    distances.set_ylabel("mean cosine distance of visual tokens, 0-2")
    for axes in (scores, distances):
        axes.set_xlabel("sigma of the noise (units of the features)")
        axes.legend(fontsize=8)
    return figure


def draw_images(reports: Mapping[str, NoiseReport]):
    """Score against the level of each kind of corruption, a panel a kind."""
    kinds = list(dict.fromkeys(point.corruption.kind for report in reports.values() for point in report.images))
    figure, panels = output.picture(min(2, len(kinds)), -(-len(kinds) // 2), title="Noise on the page itself")
    for axes, kind in zip(panels, kinds, strict=False):
        for number, (name, report) in enumerate(reports.items()):
            points = [(CORRUPTIONS[kind].clean, report.clean)]
            points += [(p.corruption.level, p.tally) for p in report.images if p.corruption.kind == kind]
            levels, tallies = zip(*sorted(points, key=lambda point: point[0]), strict=True)
            output.plot_scores(axes, list(levels), list(tallies), label=name, style=output.line_style(number))
        if CORRUPTIONS[kind].clean:
            axes.invert_xaxis()  # to the right it always gets worse
        axes.set_xlabel(CORRUPTIONS[kind].axis)
        axes.legend(fontsize=8)
    for axes in panels[len(kinds) :]:
        axes.set_visible(False)
    return figure


def describe(reports: Mapping[str, NoiseReport], split: str) -> str:
    """What the pictures show, in words."""
    lines = ["# Noise", "", "![](noise.png)", ""]
    for name, report in reports.items():
        shown = min(report.features[1:], key=lambda point: abs(point.sigma - PAPER_SIGMA), default=None)
        lines.append(
            f"**{name}** answers {output.percent(report.clean)} of {report.clean.total} questions of split {split!r} "
            "right without noise."
        )
        if shown is not None:
            lost = 100 * (shown.score - report.clean.exact_match)
            lines.append(
                f"With noise of sigma {shown.sigma:g} on the features, {shown.relative_sigma:.2f} times their own "
                f"standard deviation, it is {output.percent(shown.tally)}, a change of {lost:+.1f} points; its visual "
                f"tokens lie at a mean cosine distance of {shown.cosine_distance:.4f} from themselves without noise; "
                f"{shown.centred_cosine_distance:.4f} once the mean text embedding is subtracted from both, "
                f"{shown.token_centred_cosine_distance:.4f} once the mean visual token is."
            )
        if shown is not None and report.clean.right:
            half = next((point for point in report.features if point.score < report.clean.exact_match / 2), None)
            lines.append(
                f"Half of its score is gone at sigma {half.sigma:g}."
                if half
                else f"It keeps at least half of its score up to sigma {report.features[-1].sigma:g}, the largest."
            )
        lines.append("")
    lines += _comparison(reports)
    lines += [
        "Sigma is in the units of the features, which differ between encoders: compare checkpoints of different "
        "encoders by sigma over the features' own standard deviation. The paper (3B models, nine benchmarks, sigma 3) "
        "reports a change of -1.67 points and a distance of 0.0036 for ALIGN, of -25.54 and 0.3938 for an MLP.",
        "",
    ]
    if any(report.images for report in reports.values()):
        lines += ["![](noise_images.png)", ""]
        for name, report in reports.items():
            worst = {}
            for point in report.images:
                best = worst.get(point.corruption.kind, point)
                worst[point.corruption.kind] = min(best, point, key=lambda point: point.tally.exact_match)
            said = [f"{output.percent(p.tally)} under {kind} {p.corruption.level:g}" for kind, p in worst.items()]
            lines.append(f"On the page itself, at its worst **{name}** answers {', '.join(said)}.")
        lines.append("")
    return "\n".join(lines)


def _comparison(reports: Mapping[str, NoiseReport]) -> list[str]:
    """Who loses least, if there are several with a score to lose: at noise as large as the features' own deviation and
    at the paper's sigma, at which a small model may have nothing left."""
    able = {name: report for name, report in reports.items() if report.clean.right and len(report.features) > 1}
    if len(able) < 2:
        return []
    first = next(iter(able.values())).features[1:]
    places = {
        min(range(len(first)), key=lambda i: abs(first[i].relative_sigma - 1)),
        min(range(len(first)), key=lambda i: abs(first[i].sigma - PAPER_SIGMA)),
    }
    lines = []
    for place in sorted(places):
        losses = {
            name: 100 * (report.features[1 + place].score - report.clean.exact_match) for name, report in able.items()
        }
        order = sorted(losses, key=lambda name: -losses[name])
        said = ", ".join(f"{name} {losses[name]:+.1f} points" for name in order)
        lines.append(f"Side by side at sigma {first[place].sigma:g}, from the least loss to the largest: {said}.")
    return [*lines, ""]
