"""The sets of taps that a student can be compared with its teacher at, by the names of `--taps`."""

from __future__ import annotations

BLOCKS = "blocks"
ATTENTION = r"(down_blocks\.\d+|up_blocks\.\d+|mid_block)\.attentions\.\d+"
# The modules of a student's U-Net that are tapped, as a pattern of their paths; None for those that its level names.
TAP_SETS: dict[str, str | None] = {
    BLOCKS: None,
    "resnets-attentions": r"mid_block|(down|up)_blocks\.\d+\.(resnets|attentions)\.\d+",
    "self-attention": rf"{ATTENTION}\.transformer_blocks\.\d+\.attn1",
}
