"""Counts of the ahead-of-time report that need no compiler."""

import pytest

from alignvlm_jax.models.alignvlm import AlignVLMConfig
from alignvlm_jax.models.language import LanguageConfig
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


def test_a_row_of_text_needs_6_flops_per_weight_and_token_and_causal_attention():
    length, model = 8192, AlignVLMConfig(language=LLAMA_8B)
    flops = train_flops(model, ("language",), **ahead_of_time.text_contents(length))
    weights = 8_030_261_248 - 128_256 * 4096  # Llama-3.1-8B without the embedding table, which is only looked up
    attention = 3 * 32 * 4 * 4096 * length * (length + 1) / 2
    assert flops.total == pytest.approx(6 * weights * length + attention, rel=1e-4)  # norms have weights too
    assert flops.encoder == flops.connector == 0
