"""Which words ALIGN uses: the mean of P over the patches of many pages, and how many of the words it can do without.

Axes: V vocabulary, k words kept, M tiles in a batch, S tile side, N features per tile.

The paper (arXiv 2502.01341) averages P over the patches of 100 document images: the likeliest word has 0.0118, some
3.4K of 128K words carry the mass, and a model pruned to those scores 0.12 points less. P itself, patches x words, is
never made: `usage` passes over the words in blocks.

Words should be chosen on other pages than those they are scored on; `run` takes them from the train split.
"""

import dataclasses
import functools
import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Float64
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter
from tqdm import tqdm

from alignvlm_jax.analysis import inputs, output
from alignvlm_jax.analysis.inputs import Record, encode, page_indices, tile_batches
from alignvlm_jax.backbones import trained_model
from alignvlm_jax.checkpoints.exported import is_alignvlm_folder
from alignvlm_jax.checkpoints.new_folder import refuse_taken
from alignvlm_jax.checkpoints.weights import ParameterReader, history_of_run, restore_params_into, write_checkpoint
from alignvlm_jax.config.serialization import config_to_dict
from alignvlm_jax.data.chat import ChatTokenizer
from alignvlm_jax.errors import UserError
from alignvlm_jax.evaluation.report import Tally
from alignvlm_jax.evaluation.runner import evaluate
from alignvlm_jax.inference.reader import Reader
from alignvlm_jax.inference.vocabulary import prune_vocabulary
from alignvlm_jax.interop.assemble import abstract_parameters
from alignvlm_jax.interop.import_pytorch import read_alignvlm
from alignvlm_jax.models.alignvlm import AlignVLM, AlignVLMConfig
from alignvlm_jax.models.connectors import AlignConfig

PAGES = 100
MASSES = (0.9, 0.99, 0.999)
THRESHOLD = 1e-6
PAPER_TOP = 0.0118
PAPER_KEPT = 3400
Statistics = Literal["full", "kept"]
_TOP = 20


@dataclasses.dataclass(frozen=True)
class VocabularyUse:
    """How ALIGN uses its words, over many patches.

    Attributes:
      mean: P averaged over patches; in the order of the embedding table, 0 where a word was pruned. Sums to 1.
      effective_per_patch: exp(entropy of P), averaged over patches: words that one patch is made of.
      patches: how many.
      pages: of how many pages.
    """

    mean: Float64[np.ndarray, " V"]
    effective_per_patch: float
    patches: int
    pages: int

    @property
    def shares(self) -> Float64[np.ndarray, " V"]:
        """Share of the mass that each word has, the most used first; sums to 1."""
        return np.sort(self.mean)[::-1]

    @property
    def effective_of_mean(self) -> float:
        """exp(entropy of `shares`): words that all patches together are made of."""
        used = self.shares[self.shares > 0]
        return float(np.exp(-(used * np.log(used)).sum()))

    def words_for(self, mass: float) -> int:
        """The fewest words that together have the share `mass`."""
        return int(np.searchsorted(np.cumsum(self.shares), mass - 1e-12) + 1)

    def words_above(self, probability: float = THRESHOLD) -> int:
        return int((self.mean > probability).sum())

    def kept_mass(self, k: int) -> float:
        """The share of the mass that the k most used words have together."""
        return float(self.shares[:k].sum())

    def top(self, k: int) -> list[tuple[int, float]]:
        """The k most used words with their mean probabilities."""
        return [(int(word), float(self.mean[word])) for word in np.argsort(-self.mean, kind="stable")[:k]]


def mean_distribution(reader: Reader, records: Sequence[Record], *, pages: int = PAGES) -> Float64[np.ndarray, " V"]:
    """P averaged over the patches of the first `pages` pages; sums to 1.

    Costs one pass of encoder and connector over the pages.
    """
    return vocabulary_use(reader, records, pages=pages).mean


def vocabulary_use(reader: Reader, records: Sequence[Record], *, pages: int = PAGES) -> VocabularyUse:
    """`mean_distribution` and what else is known of P; patches of tiles without any picture are not counted."""
    config = _align(reader.config)
    model, variables = AlignVLM(reader.config), reader.generator.variables
    of_words, effective, patches = 0.0, 0.0, 0
    for tiles, valid_hw in tile_batches(reader, records, pages, title="words"):
        real = valid_hw[0, :, 0] > 0
        features = encode(model, variables, tiles, valid_hw)
        usage, entropy = _use(model, variables, features, jnp.asarray(real, jnp.float32))
        entropy = np.asarray(entropy, np.float64)[real]
        of_words = of_words + np.asarray(usage, np.float64)
        effective, patches = effective + np.exp(entropy).sum(), patches + entropy.size
    # The sum differs from the number of patches by rounding alone.
    mean = of_words / of_words.sum()
    if config.kept_words is not None:
        kept, mean = mean, np.zeros(reader.config.language.vocab_size)
        mean[np.asarray(variables["params"]["connector"]["word_ids"])] = kept
    return VocabularyUse(mean, float(effective / patches), patches, len(page_indices(records, pages)))


@functools.partial(jax.jit, static_argnames="model")
def _use(model, variables, features, weights):
    def use(model):
        embedding, of_patches = model.language.embedding, jnp.broadcast_to(weights[:, None], features.shape[:2])
        entropy = model.connector(features, embedding).entropy
        return model.connector.usage(features, embedding, of_patches), entropy

    return model.apply(variables, method=use)


def _align(config: AlignVLMConfig, checkpoint: str | os.PathLike = "the checkpoint") -> AlignConfig:
    if not isinstance(config.connector, AlignConfig):
        name = inputs.CONNECTOR_NAMES[type(config.connector)]
        raise UserError(f"{checkpoint}'s connector is {name}: only ALIGN speaks in words of the language model")
    return config.connector


def pruned_reader(
    reader: Reader, usage: Float64[np.ndarray, " V"], k: int, *, statistics: Statistics = "full"
) -> Reader:
    """A reader that knows the k most used words only; arguments as for `inference.vocabulary.prune_vocabulary`.

    Costs the statistics of W2, V D^2 multiplications; its first answer compiles a model of a new shape.
    """
    params = reader.generator.variables["params"]
    config, params = prune_vocabulary(reader.config, params, usage, k, statistics=statistics)
    generator = reader.generator
    return Reader(config, params, reader.tokenizer, reader.tiling, batch_size=generator.batch_size, mesh=generator.mesh)


@dataclasses.dataclass(frozen=True)
class VocabularyPoint:
    """The score of a pruned model.

    Attributes:
      words: k.
      statistics: of which rows LN_V takes its own.
      kept_mass: what the words kept have of the vocabulary's mass of the mean P.
      tally: the questions answered right.
    """

    words: int
    statistics: Statistics
    kept_mass: float
    tally: Tally

    @property
    def score(self) -> float:
        """Share of the questions answered exactly right."""
        return self.tally.exact_match

    def to_json(self) -> dict[str, Any]:
        fields = {"words": self.words, "statistics": self.statistics, "kept_mass": round(self.kept_mass, 8)}
        return {**fields, **self.tally.to_json()}


def vocabulary_curve(
    reader: Reader,
    records: Sequence[Record],
    sizes: Sequence[int],
    *,
    usage: Float64[np.ndarray, " V"],
    limit: int | None = None,
    statistics: Statistics = "full",
) -> list[VocabularyPoint]:
    """Scores the reader pruned to each of `sizes` words; a size of all words that it knows is the reader itself.

    Costs for each size an evaluation of `limit` questions and the compilation of a model of another shape.

    Args:
      reader: the full model; a pruned one as it is.
      records: documents with questions.
      sizes: how many words to keep.
      usage: from `mean_distribution`, on other pages.
      limit: ask only the first so many questions.
      statistics: of which rows LN_V takes mean and variance, as for `inference.vocabulary.prune_vocabulary`.
    """
    shares = np.sort(usage / usage.sum())[::-1]
    everything = _align(reader.config).kept_words or len(usage)
    points = []
    for size in tqdm(sizes, desc="pruned", unit="model", dynamic_ncols=True, leave=None):
        pruned = reader if size == everything else pruned_reader(reader, usage, size, statistics=statistics)
        report = evaluate(pruned, records, limit=limit, title=f"{size:,} words")
        points.append(VocabularyPoint(size, statistics, float(shares[:size].sum()), report.overall))
    return points


def save_pruned(
    checkpoint: str | os.PathLike,
    usage: Float64[np.ndarray, " V"],
    k: int,
    out: str | os.PathLike,
    *,
    statistics: Statistics = "full",
) -> None:
    """Writes a checkpoint pruned to its k most used words as a workdir, weights in the dtypes they are stored in.

    `load`, `alignvlm ask` and `eval`, and `tools/export_pytorch.py` take it; training refuses it.

    Args:
      checkpoint: as for `inference.reader.load`.
      usage: from `mean_distribution` of this checkpoint.
      k: how many words to keep.
      out: must not exist, or be an empty folder.
      statistics: as for `inference.vocabulary.prune_vocabulary`.
    """
    folder = trained_model(checkpoint)
    if is_alignvlm_folder(folder):
        found = read_alignvlm(folder)
        config, params, tokenizer, history = found.config, found.params, found.tokenizer, found.history
        if found.progress.step:
            progress, trained = dataclasses.asdict(found.progress), config_to_dict(config)
            history = [*history, {"what": "trained", "progress": progress, "config": trained}]
    else:
        source = ParameterReader(folder)
        config, tokenizer = source.config, ChatTokenizer.from_folder(source.tokenizer_folder)
        abstract = flatten_dict(abstract_parameters(config.model), sep="/")
        stored = {path: leaf.update(dtype=source.dtypes[path]) for path, leaf in abstract.items()}
        params = restore_params_into(folder, unflatten_dict(stored, sep="/"))
        history = history_of_run(folder)
    num_words = len(usage)
    model, params = prune_vocabulary(config.model, params, usage, k, statistics=statistics)
    event = {"what": "pruned", "words kept": k, "of": num_words, "statistics of LN_V": f"{statistics} vocabulary"}
    config = dataclasses.replace(config, model=model)
    write_checkpoint(out, config, params, tokenizer, history=[*history, event])


@dataclasses.dataclass(frozen=True)
class VocabularyReport:
    """What was found of one checkpoint; `full` and `kept` are curves from few words to many."""

    use: VocabularyUse
    top_words: list[tuple[str, float]]
    full: list[VocabularyPoint]
    kept: list[VocabularyPoint]

    @property
    def whole(self) -> VocabularyPoint | None:
        """The model that nothing was pruned from, if it was scored."""
        return self.full[-1] if self.full and self.full[-1].words == len(self.use.mean) else None

    def to_json(self) -> dict[str, Any]:
        use = self.use
        return {
            "pages": use.pages,
            "patches": use.patches,
            "vocabulary": len(use.mean),
            "effective_words_of_mean": round(use.effective_of_mean, 3),
            "effective_words_per_patch": round(use.effective_per_patch, 4),
            "words_for_mass": {str(mass): use.words_for(mass) for mass in MASSES},
            f"words_above_{THRESHOLD:g}": use.words_above(),
            "top_words": [{"word": word, "probability": round(p, 6)} for word, p in self.top_words],
            "curve": [point.to_json() for point in (*self.full, *self.kept)],
        }


def default_sizes(use: VocabularyUse) -> list[int]:
    """Sizes for a curve: those that carry the masses, three below, each half the last, those above the threshold unless
    that is nearly all, and all words."""
    fewest, everything = use.words_for(MASSES[0]), len(use.mean)
    sizes = {use.words_above(), *(use.words_for(mass) for mass in MASSES), *(fewest // part for part in (2, 4, 8))}
    return sorted({everything} | {size for size in sizes if 0 < size < 0.95 * everything})


def run(
    checkpoints: Sequence[str],
    data: str,
    out: str,
    *,
    split: str = "heldout",
    usage_split: str = "train",
    pages: int = PAGES,
    sizes: Sequence[int] | None = None,
    limit: int | None = None,
    batch_size: int = 32,
    prune: int | None = None,
    save: str | None = None,
    statistics: Statistics = "full",
) -> None:
    """`alignvlm analyze vocabulary`: measures each checkpoint, writes OUT/vocabulary.*, and a pruned one to `save`."""
    if (prune is None) != (save is None) or prune is not None and len(checkpoints) > 1:
        raise UserError("--prune K and --save DIR go together, with one --checkpoint")
    for checkpoint in checkpoints:
        _check_sizes(checkpoint, sizes, prune)
    if save is not None:
        refuse_taken(save)
    output.check_folder(out)
    seen, records = inputs.open_records(data, usage_split), inputs.open_records(data, split)
    reports = {}
    for name, reader in inputs.load_readers(checkpoints, batch_size=batch_size):
        use = vocabulary_use(reader, seen, pages=pages)
        if save is not None:
            save_pruned(checkpoints[0], use.mean, prune, save, statistics=statistics)
            print(f"written: {save}, {prune:,} of {len(use.mean):,} words")
        everything = _align(reader.config).kept_words or len(use.mean)
        of_this = default_sizes(use) if everything == len(use.mean) else [everything]
        chosen = of_this if sizes is None else sorted(sizes)
        full = vocabulary_curve(reader, records, chosen, usage=use.mean, limit=limit)
        fewer = [size for size in chosen if size < everything]
        kept = vocabulary_curve(reader, records, fewer, usage=use.mean, limit=limit, statistics="kept")
        top = [(reader.tokenizer.token_text(word), p) for word, p in use.top(_TOP)]
        reports[name] = VocabularyReport(use, top, full, kept)
    figures = {
        "checkpoints": dict(zip(reports, map(str, checkpoints), strict=True)),
        "data": str(data),
        "usage_split": usage_split,
        "split": split,
        "vocabulary": {name: report.to_json() for name, report in reports.items()},
    }
    pictures = {"vocabulary": draw(reports)}
    output.write(out, "vocabulary", results=figures, plots=pictures, text=describe(reports, usage_split, split))


def _check_sizes(checkpoint: str, sizes: Sequence[int] | None, prune: int | None) -> None:
    """Refuses before any work what a checkpoint cannot be pruned to."""
    config = inputs.model_config(checkpoint)
    connector = _align(config, checkpoint)
    words = connector.kept_words or connector.vocab_size or config.language.vocab_size
    for option, size in (*(("--sizes", size) for size in sizes or ()), *([("--prune", prune)] if prune else [])):
        if size > words:
            raise UserError(f"{option} {size}: {checkpoint} has {words:,} words: take 1 to {words}")
        if connector.kept_words is not None and (size, option) != (words, "--sizes"):
            raise UserError(
                f"{option} {size}: {checkpoint} is pruned to {words:,} words and is not pruned again: take the full "
                f"model, or leave {option} out"
            )


def draw(reports: Mapping[str, VocabularyReport]):
    """How fast mass is covered, the score of pruned models, and the first checkpoint's top words."""
    figure, (mass, scores, words) = output.new_plot(3, title="The words that ALIGN uses")
    for number, (name, report) in enumerate(reports.items()):
        style = output.line_style(number)
        left_out = 1 - np.cumsum(report.use.shares)
        shown = np.maximum(left_out, 1e-7)
        size = np.arange(1, len(shown) + 1)
        mass.plot(size, shown, label=name, color=style["color"], linestyle=style["linestyle"])
        for share in MASSES:
            mass.plot(report.use.words_for(share), 1 - share, color=style["color"], marker=style["marker"])
        for curve, label in ((report.full, name), (report.kept, f"{name}, statistics of the words kept")):
            hollow = {} if curve is report.full else {"markerfacecolor": "white"}
            sizes, tallies = [point.words for point in curve], [point.tally for point in curve]
            if curve:
                output.plot_scores(scores, sizes, tallies, label=label, style={**style, **hollow})
    mass.set(xscale="log", yscale="log", ylim=(1e-7, 1.5), xlabel="words, the most used first")
    mass.set_ylabel("share of the mass of P that other words have")
    scores.set(xscale="log", xlabel="words kept")
    for axes in (mass, scores):
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if axes is scores else (1,)))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
    name, report = next(iter(reports.items()))
    labels = [ascii(word)[1:-1] if not word.isprintable() else f"\u201c{word}\u201d" for word, _ in report.top_words]
    places = np.arange(len(labels))[::-1]
    words.barh(places, [100 * p for _, p in report.top_words], color="#7f7f7f")
    words.set_yticks(places, labels, fontsize=7)
    words.set_xlabel(f"mean probability (%), {name}")
    for axes in (mass, scores):
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8)
    return figure


def describe(reports: Mapping[str, VocabularyReport], usage_split: str, split: str) -> str:
    """What the picture shows, in words."""
    lines = ["# Vocabulary", "", "![](vocabulary.png)", ""]
    for name, report in reports.items():
        use, (word, probability) = report.use, report.top_words[0]
        counts = [f"{use.words_for(mass):,} words carry {100 * mass:g} %" for mass in MASSES]
        lines += [
            f"**{name}**, over {use.patches:,} patches of {use.pages} pages of split {usage_split!r}: a patch is made "
            f"of {use.effective_per_patch:.2f} words on average (exp of the entropy of P), all patches together of "
            f"{use.effective_of_mean:.1f} of {len(use.mean):,}. Of the mass of the mean P, {', '.join(counts)}; "
            f"{use.words_above():,} words have more than {THRESHOLD:g}. The most used is {word!r} with "
            f"{probability:.4f}.",
            "",
        ]
        whole = report.whole
        if whole is not None and len(report.full) > 1:
            held = next(point for point in report.full if point.tally.interval[1] >= whole.score)
            lines += [
                f"All {whole.words:,} words answer {output.percent(whole.tally)} of {whole.tally.total} questions of "
                f"split {split!r} right. "
                + (
                    "None of the pruned models reaches that within its 95 % interval."
                    if held is whole
                    else "The smallest pruned model whose 95 % interval still reaches that has "
                    f"{held.words:,} words and answers {output.percent(held.tally)}."
                ),
            ]
            differ = [(full, kept) for full in report.full for kept in report.kept if full.words == kept.words]
            if differ:
                full, kept = max(differ, key=lambda pair: abs(pair[0].score - pair[1].score))
                lines.append(
                    f"LN_V's statistics taken of the words kept alone instead of all words change the score most at "
                    f"{full.words:,} words: {output.percent(kept.tally)} instead of {output.percent(full.tally)}."
                )
            lines.append("")
    lines += [
        f"The paper (3B, 128,256 words, 100 pages) has {PAPER_TOP} for its most used word, about {PAPER_KEPT:,} words "
        f"above {THRESHOLD:g}, and loses 0.12 points when pruned to those.",
        "",
    ]
    return "\n".join(lines)
