"""Whether a step's lm_head runs once, over all rows that may be asked for, or twice, over those that are.

Two passes read the lm_head's weights twice, and compute B rows, then the B - 1 of the block that the step chose. One
pass computes B + B(B - 1) rows. As long as so few rows leave the product bound by reading its weights, that is the
cheaper way: B <= 8 for one sequence on a large GPU. The tokens are those of the same logits either way.
"""

from __future__ import annotations

import torch

__all__ = ["ONE_PASS_ROWS", "one_pass_rows"]

# The most rows of one pass, by compute capability: half of (bf16 tensor FLOP/s) / (bytes/s of memory), from data sheets
# and rounded down to whole tiles of 32 rows. Not measured. A CPU is bound by arithmetic from a few rows on.
ONE_PASS_ROWS: dict[tuple[int, int], int] = {
    (8, 0): 64,  # A100: 312 TFLOP/s, 2.0 TB/s
    (8, 6): 32,  # RTX 3090: 71, 0.94
    (8, 9): 64,  # RTX 4090: 165, 1.0
    (9, 0): 64,  # H200: 790 as reached, 4.3
    (10, 0): 128,  # B200: 2250, 8.0
    (12, 0): 32,  # RTX 5090: 210, 1.8
}


def one_pass_rows(device: torch.device) -> int:
    """The most rows, of all sequences together, that one pass of the lm_head may have on this device; 0: two passes."""
    if device.type != "cuda" or torch.version.hip is not None:
        return 0
    return ONE_PASS_ROWS.get(torch.cuda.get_device_capability(device), 0)
