"""Rematerialization by name: which values of a layer the backward pass keeps, and which it computes again.

A layer's `remat` is a comma-separated list of the values that are kept:

    attention_out   the result of attention
    qkv             queries, keys and values
    mlp_in          the products before the nonlinearity of the MLP
    dots            the products of all linear layers (the scores of attention grow with the square of the length, and
                    are never kept)

or one of these words alone:

    none            no rematerialization: keep everything
    full            keep only the inputs of each layer
    auto            the least recomputation that fits in memory. `training/remat_choice.py` finds it before the first
                    step; elsewhere, it is "full".
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax

from alignvlm_jax.ops.checkpoint_names import ATTENTION_OUT, MLP_IN, QKV

NONE, FULL, AUTO = "none", "full", "auto"
DOTS = "dots"

WORDS = (NONE, FULL, AUTO)
"""Values of `remat` that stand alone."""

KEPT = (ATTENTION_OUT, QKV, MLP_IN, DOTS)
"""Values of a layer that `remat` can list."""


class Candidate(NamedTuple):
    """Values of `remat` that "auto" can choose, one for each part."""

    vision: str
    language: str

    def __str__(self) -> str:
        """Names the parts, or only the value if both have the same."""
        if self.vision == self.language:
            return self.language
        return f"{self.language} in the decoder and {self.vision} in the encoder"


CANDIDATES = (
    Candidate(NONE, NONE),
    Candidate(f"{ATTENTION_OUT},{DOTS}", f"{ATTENTION_OUT},{DOTS}"),
    # The decoder saves several times as many FLOPs per byte: its layers are wider and its rows are longer than a tile.
    Candidate(FULL, f"{ATTENTION_OUT},{DOTS}"),
    Candidate(FULL, f"{ATTENTION_OUT},{QKV},{MLP_IN}"),
    Candidate(FULL, f"{ATTENTION_OUT},{QKV}"),
    Candidate(FULL, ATTENTION_OUT),
    Candidate(FULL, FULL),
)
"""Candidates of "auto", the least recomputation first."""


def canonical(remat: str | Sequence[str]) -> str:
    """Returns the words of `remat` as one string: ("qkv", "attention_out") -> "attention_out,qkv".

    Known names are in the order of `KEPT`, each once. Unknown ones are last, so that a check can name them.
    """
    words = remat.split(",") if isinstance(remat, str) else remat
    words = dict.fromkeys(word.strip() for word in words)
    return ",".join(sorted(words, key=lambda word: KEPT.index(word) if word in KEPT else len(KEPT)))


def policy(remat: str) -> Callable[..., bool]:
    """Returns the policy of `jax.checkpoint` for any value of `remat` but "none"."""
    policies = jax.checkpoint_policies
    if remat in (FULL, AUTO):
        return policies.nothing_saveable
    names = remat.split(",")
    named = policies.save_only_these_names(*(name for name in names if name != DOTS))
    if DOTS not in names:
        return named
    # Products with batch dimensions are those of attention.
    return policies.save_from_both_policies(named, policies.dots_with_no_batch_dims_saveable)
