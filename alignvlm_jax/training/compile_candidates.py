"""Programs that a search may compile: meshes, rows, recomputation and bins of a training step, with arithmetic on each.

Axis letters: L positions per bin, D model width, F MLP width, H query heads, G key-value heads, h head width.

    for candidate in rank(space, candidates(space, policies=("full", "attention_out"))):
        candidate.overrides()    # ["mesh.data=2", "mesh.fsdp=64", ...]

Nothing here compiles. `lower_bound` counts memory that no program can do without, so a candidate above the chip's
capacity need not be tried. `seconds_per_example` estimates time, to try the most promising candidates first. Both
ignore most of what a compiler does.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Sequence

from alignvlm_jax.config.experiment import ExperimentConfig
from alignvlm_jax.config.stages import StageConfig
from alignvlm_jax.models import rematerialization
from alignvlm_jax.models.alignvlm import tokens_per_tile
from alignvlm_jax.parallel.chips import Chip
from alignvlm_jax.training.flops import train_flops

KEPT = {
    rematerialization.ATTENTION_OUT: ("attention_out",),
    rematerialization.QKV: ("qkv",),
    rematerialization.MLP_IN: ("mlp_in",),
    rematerialization.DOTS: ("qkv", "attention_proj", "mlp_in", "mlp_out"),
    rematerialization.NONE: ("attention_out", "qkv", "attention_proj", "mlp_in", "mlp_out", "elementwise"),
}
"""Values of a layer that each name in `remat` keeps for the backward pass. "full" keeps none of them."""

_MOST_EXTRA_EXAMPLES = 1.1
_BLOCK = 512  # attention computes blocks of this many positions
_BFLOAT16_BYTES = 2
_LIKELY_SHARE = 0.75


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A program to try.

    Attributes:
      data: devices along `data`.
      fsdp: devices along `fsdp`.
      tensor: devices along `tensor`.
      rows: bins of a microbatch on each device of `data` x `fsdp`.
      language_remat: the decoder's `remat`, names separated by commas.
      vision_remat: the encoder's `remat`.
      tokens_per_bin: L.
      tiles_per_bin: tiles of a bin.
    """

    data: int
    fsdp: int
    tensor: int
    rows: int
    language_remat: str
    vision_remat: str
    tokens_per_bin: int
    tiles_per_bin: int

    @property
    def bins(self) -> int:
        """Bins of a microbatch."""
        return self.rows * self.data * self.fsdp

    def overrides(self) -> list[str]:
        """Returns the candidate as overrides of a config, "a.b=value"."""
        return [
            *(f"mesh.{axis}={getattr(self, axis)}" for axis in ("data", "fsdp", "tensor")),
            f"model.language.remat={self.language_remat}",
            f"model.vision.remat={self.vision_remat}",
            f"data.packing.tokens_per_bin={self.tokens_per_bin}",
            f"data.packing.tiles_per_bin={self.tiles_per_bin}",
            f"data.packing.bins_per_microbatch={self.bins}",
        ]

    def describe(self) -> str:
        """Returns the candidate as a short line."""
        return (
            f"data={self.data} fsdp={self.fsdp} tensor={self.tensor} rows={self.rows} bin={self.tokens_per_bin} "
            f"remat={self.language_remat}/{self.vision_remat}"
        )


@dataclasses.dataclass(frozen=True)
class Space:
    """All that the candidates of a search have in common.

    Attributes:
      experiment: gives the model, the bins and the tiles of a page.
      stage: the stage whose step is compiled.
      chip: the kind of chip.
      num_devices: devices of all slices.
      slices: number of slices, placed along `data`.
      capacity_bytes: memory that a program may use on a device.
      state_bytes: returns the bytes of trainable weights, of all weights and of the optimizer's state on a device, for
        the sizes of the mesh (data, fsdp, tensor).
    """

    experiment: ExperimentConfig
    stage: StageConfig
    chip: Chip
    num_devices: int
    slices: int
    capacity_bytes: int
    state_bytes: Callable[[int, int, int], tuple[int, int, int]]

    @property
    def page_tiles(self) -> int:
        """Tiles of a page of the largest size."""
        return self.experiment.data.tiling.max_tiles_per_image

    @property
    def pages_per_bin(self) -> int:
        """Pages of the largest size in a bin of the config."""
        return max(1, self.experiment.data.packing.tiles_per_bin // self.page_tiles)


def candidates(
    space: Space,
    *,
    policies: Sequence[str],
    vision_policies: Sequence[str] | None = None,
    rows: Sequence[int] = (1, 2, 4),
    pages: Sequence[int] = (),
    meshes: Sequence[tuple[int, int, int]] | None = None,
) -> list[Candidate]:
    """Returns the candidates that divide evenly and whose lower bound of memory fits.

    Args:
      space: what the candidates have in common.
      policies: values of the decoder's `remat`.
      vision_policies: values of the encoder's `remat`; by default that of the config. A frozen encoder has no backward
        pass, so only the config's value is tried.
      rows: bins of a microbatch per device.
      pages: pages of the largest size per bin; empty means the bins of the config.
      meshes: sizes (data, fsdp, tensor); None means all.
    """
    config = space.experiment
    packing = config.data.packing
    if vision_policies is None or "vision" not in space.stage.trainable:
        vision_policies = (config.model.vision.remat,)
    bins = [bin_of_pages(space, count) for count in pages] or [(packing.tokens_per_bin, packing.tiles_per_bin)]
    combinations = itertools.product(meshes or all_meshes(space.num_devices), rows, policies, vision_policies, bins)
    found = (
        Candidate(*mesh, rows_per_device, language, vision, *shape)
        for mesh, rows_per_device, language, vision, shape in combinations
    )
    return [
        candidate
        for candidate in found
        if misfit(space, candidate) is None and lower_bound(space, candidate) <= space.capacity_bytes
    ]


def all_meshes(num_devices: int) -> list[tuple[int, int, int]]:
    """Returns all sizes (data, fsdp, tensor) whose product is the number of devices."""
    return [
        (num_devices // (fsdp * tensor), fsdp, tensor)
        for tensor in range(1, num_devices + 1)
        if num_devices % tensor == 0
        for fsdp in range(1, num_devices // tensor + 1)
        if num_devices // tensor % fsdp == 0
    ]


def bin_of_pages(space: Space, pages: int) -> tuple[int, int]:
    """Returns the positions and tiles of a bin for `pages` pages, whose text has the share of the config's bins.

    A bin also holds an example of the largest size, and its positions are a multiple of attention's blocks.
    """
    packing = space.experiment.data.packing
    tokens = packing.tokens_per_bin * pages / space.pages_per_bin
    tokens = max(tokens, _largest_example(space))
    return math.ceil(tokens / _BLOCK) * _BLOCK, packing.tiles_per_bin * pages // space.pages_per_bin


def _largest_example(space: Space) -> int:
    return space.page_tiles * tokens_per_tile(space.experiment.model) + space.stage.max_text_tokens


def misfit(space: Space, candidate: Candidate) -> str | None:
    """Returns the reason why mesh, bins and model do not fit together, or None."""
    model = space.experiment.model
    for name, size in (
        ("language.num_heads", model.language.num_heads),
        ("language.num_kv_heads", model.language.num_kv_heads),
        ("language.intermediate_size", model.language.intermediate_size),
        ("vision.num_heads", model.vision.num_heads),
        ("vision.intermediate_size", model.vision.intermediate_size),
    ):
        if size % candidate.tensor:
            return f"tensor={candidate.tensor} does not divide {name}={size}"
    if candidate.data % space.slices:
        return f"data={candidate.data} is not a multiple of {space.slices} slices"
    pages = max(1, candidate.tiles_per_bin // space.page_tiles)
    in_microbatch = candidate.bins * pages
    examples = math.ceil(space.stage.global_batch / in_microbatch) * in_microbatch
    if examples > _MOST_EXTRA_EXAMPLES * space.stage.global_batch:
        return f"a step of whole microbatches has {examples} pages, global_batch is {space.stage.global_batch}"
    return None


def lower_bound(space: Space, candidate: Candidate) -> int:
    """Returns bytes that a device holds at least at the end of the decoder's forward pass.

    They are weights, optimizer state, gradients, the kept activations of all layers, and the products of one MLP.
    """
    model, tensor = space.experiment.model, candidate.tensor
    language, vision = model.language, model.vision
    trained, params, moments = space.state_bytes(candidate.data, candidate.fsdp, tensor)
    positions = candidate.rows * candidate.tokens_per_bin
    patches = candidate.rows * candidate.tiles_per_bin * vision.num_patches
    kept = language.num_layers * positions * _kept_values(language, candidate.language_remat, tensor)
    if "vision" in space.stage.trainable:
        kept += vision.num_layers * patches * _kept_values(vision, candidate.vision_remat, tensor)
    mlp = positions * (2 * language.intermediate_size / tensor + language.hidden_size)
    return int(params + moments + trained + _BFLOAT16_BYTES * (kept + mlp))


def _kept_values(part, remat: str, tensor: int) -> float:
    """Returns the number of values that a layer keeps per position: its input, and those that `remat` names."""
    sizes = {name: width / tensor for name, (width, _) in _products(part).items()}
    sizes |= {name: part.hidden_size for name in ("attention_proj", "mlp_out")}  # not split over tensor
    sizes["elementwise"] = part.intermediate_size / tensor  # the MLP's activation, among others
    return part.hidden_size + sum(sizes[name] for name in _kept(remat))


def _products(part) -> dict[str, tuple[int, int]]:
    """Returns the width and the FLOPs per position of each product of a layer; attention has none here."""
    width, inner = part.hidden_size, part.intermediate_size
    queries = part.num_heads * getattr(part, "head_width", width // part.num_heads)
    keys = getattr(part, "num_kv_heads", part.num_heads) * queries // part.num_heads
    num_gates = 2 if hasattr(part, "num_kv_heads") else 1  # the decoder's MLP is gated
    return {
        "attention_out": (queries, 0),
        "qkv": (queries + 2 * keys, 2 * width * (queries + 2 * keys)),
        "attention_proj": (width, 2 * width * queries),
        "mlp_in": (num_gates * inner, 2 * width * num_gates * inner),
        "mlp_out": (width, 2 * width * inner),
    }


def recomputed_flops(space: Space, candidate: Candidate) -> float:
    """Returns the FLOPs that a bin's backward pass spends on computing the layers' products again."""
    model = space.experiment.model
    language, vision = model.language, model.vision
    pages = max(1, candidate.tiles_per_bin // space.page_tiles)
    length = candidate.tokens_per_bin / pages
    # A page's causal pairs, with the blocks on the diagonal computed in full.
    pairs = length * (length + _BLOCK) / 2 / length
    total = candidate.tokens_per_bin * language.num_layers * _recomputed(language, candidate.language_remat, pairs)
    if "vision" in space.stage.trainable:
        patches = candidate.tiles_per_bin * vision.num_patches
        total += patches * vision.num_layers * _recomputed(vision, candidate.vision_remat, vision.num_patches)
    return total


def _recomputed(part, remat: str, pairs: float) -> float:
    """Returns the FLOPs per position of a layer, for `pairs` keys that a position attends to."""
    products = _products(part)
    flops = {name: count for name, (_, count) in products.items()}
    flops["attention_out"] = 4 * products["attention_out"][0] * pairs
    del flops["mlp_out"]  # no gradient needs the layer's output
    return sum(count for name, count in flops.items() if name not in _kept(remat))


def seconds_per_example(space: Space, candidate: Candidate) -> float:
    """Returns an estimate of a step's time per page: products, hidden gathers of weights, and exposed reductions."""
    model, stage, chip = space.experiment.model, space.stage, space.chip
    pages = max(1, candidate.tiles_per_bin // space.page_tiles)
    visual = candidate.tiles_per_bin * tokens_per_tile(model)
    needed = train_flops(
        model,
        stage.trainable,
        tiles=candidate.tiles_per_bin,
        tokens=candidate.tokens_per_bin,
        answer_tokens=max(1, (candidate.tokens_per_bin - visual) // 4),
        squared_lengths=float(candidate.tokens_per_bin) ** 2 / pages,
    ).total
    bins_per_device = candidate.rows / candidate.tensor
    executed = bins_per_device * (needed + recomputed_flops(space, candidate))
    products = executed / (chip.peak_flops / chip.devices_per_chip)
    # Bytes that a device sends in a microbatch. Weights are gathered as bfloat16 in both passes.
    trained, params, _ = space.state_bytes(candidate.data, candidate.fsdp, candidate.tensor)
    gathers = 2 * params / 4 * _BFLOAT16_BYTES * (candidate.fsdp - 1)
    reductions = trained * (candidate.fsdp - 1 + 2 * (candidate.data - 1) / candidate.data)
    hidden = candidate.rows * candidate.tokens_per_bin * model.language.hidden_size * _BFLOAT16_BYTES
    # Two sums over tensor in each pass; the recomputed pass repeats the first.
    reductions += 2 * (candidate.tensor - 1) / candidate.tensor * model.language.num_layers * 5 * hidden
    rate = (chip.ici_bandwidth or math.inf) / chip.devices_per_chip
    return (max(products, gathers / rate) + reductions / rate) / (candidate.bins * pages)


def rank(space: Space, found: Iterable[Candidate]) -> list[Candidate]:
    """Returns the candidates in the order in which to try them.

    The fastest come first by `seconds_per_example`. But candidates that leave room for the memory that `lower_bound`
    does not count come before the others.
    """

    def order(candidate):
        is_risky = lower_bound(space, candidate) > _LIKELY_SHARE * space.capacity_bytes
        return is_risky, seconds_per_example(space, candidate)

    return sorted(found, key=order)


def keeps_at_least(candidate: Candidate, other: Candidate) -> bool:
    """Returns whether a candidate differs from another only in keeping more activations, or in nothing."""
    if dataclasses.replace(candidate, language_remat="", vision_remat="") != dataclasses.replace(
        other, language_remat="", vision_remat=""
    ):
        return False
    return _kept(other.language_remat) <= _kept(candidate.language_remat) and _kept(other.vision_remat) <= _kept(
        candidate.vision_remat
    )


def _kept(remat: str) -> frozenset[str]:
    """Returns the values that `remat` keeps."""
    return frozenset(product for name in remat.split(",") for product in KEPT.get(name, ()))
