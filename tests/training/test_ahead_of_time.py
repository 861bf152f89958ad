"""Counts of the ahead-of-time report that need no compiler."""

import pytest

from alignvlm_jax.models.alignvlm import AlignVLMConfig
from alignvlm_jax.models.language import LanguageConfig
from alignvlm_jax.models.vision import VisionConfig
from alignvlm_jax.training import ahead_of_time
from alignvlm_jax.training.ahead_of_time import full_bin_blocks
from alignvlm_jax.training.flops import train_flops

LLAMA_8B = LanguageConfig(
    hidden_size=4096, intermediate_size=14336, num_layers=32, num_heads=32, num_kv_heads=8, tie_word_embeddings=False
)


def test_blocks_between_the_pages_of_a_full_bin_do_not_run():
    # 29 blocks of 512 positions, which are 435 pairs on and below the diagonal. Each page has 15 blocks, and the pages
    # share the one in the middle.
    blocks = full_bin_blocks(14_848, 14_848, 2)
    assert {blocks(kernel, 29, True) for kernel in ("fwd", "dq", "dkv")} == {2 * 15 * 16 // 2 - 1}
    assert full_bin_blocks(14_848, 14_848, 1)("fwd", 29, True) == 435
    # Half of a bin is padding.
    assert full_bin_blocks(2048, 1024, 1)("fwd", 4, True) == 3
    # A tile of the encoder is one block.
    assert blocks("fwd", 1, False) == 1


def test_branches_are_padding_for_the_kernel():
    # Two pages of four blocks, each followed by four blocks of branches.
    assert full_bin_blocks(8192, 8192, 2, 4096)("fwd", 16, True) == 2 * 4 * 5 // 2


def test_flops_of_a_bin_of_trees_count_each_branch_once():
    """Two pages of 100 tokens with three branches of ten: a branch attends to its page and to itself."""
    model = AlignVLMConfig(vision=VisionConfig(image_size=140, patch_size=14))
    contents = ahead_of_time._tree_contents(model, 2, 300, pages=2, questions=3, branch_tokens=60)
    branch = sum(100 + own for own in range(1, 11))
    pairs = 2 * (100 * 101 / 2 + 3 * branch)
    assert contents["tokens"] == 260 and (contents["squared_lengths"] + contents["tokens"]) / 2 == pairs
    alone = ahead_of_time._tree_contents(model, 2, 300, pages=2, questions=1, branch_tokens=60)
    assert alone == ahead_of_time._contents(model, 2, 260, pages=2), "one branch is an ordinary example"


def test_a_row_of_text_needs_6_flops_per_weight_and_token_and_causal_attention():
    length, model = 8192, AlignVLMConfig(language=LLAMA_8B)
    flops = train_flops(model, ("language",), **ahead_of_time.text_contents(length))
    weights = 8_030_261_248 - 128_256 * 4096  # Llama-3.1-8B without the embedding table, which is only looked up
    attention = 3 * 32 * 4 * 4096 * length * (length + 1) / 2
    assert flops.total == pytest.approx(6 * weights * length + attention, rel=1e-4)  # norms have weights too
    assert flops.encoder == flops.connector == 0
