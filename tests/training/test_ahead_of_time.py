"""Counts of the ahead-of-time report that need no compiler."""

from alignvlm_jax.training.ahead_of_time import full_bin_blocks


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
