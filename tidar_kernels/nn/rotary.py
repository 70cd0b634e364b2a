"""Rotary positions (Su et al. 2021): cos and sin of every row. `tk.rotary_append` rotates on the way into the cache."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..ops import checks
from ..patterns.arguments import check_device, check_dtype, check_instance, check_int, check_number

__all__ = ["RotaryEmbedding", "apply_rotary"]


class RotaryEmbedding(nn.Module):
    """cos and sin of rotary positions, in the half-split layout of Llama and Qwen.

    Args:
        head_dim: even.
        theta: base of the frequencies.
        device: of the frequencies, float32 `[head_dim / 2]`; None for PyTorch's default device, as in its modules.

    Raises:
        TypeError, ValueError: `head_dim` is no even int >= 1, `theta` no number > 0, or there is no such device.
    """

    inv_freq: Tensor

    def __init__(self, head_dim: int, theta: float = 10_000.0, device: torch.device | str | None = None) -> None:
        super().__init__()
        theta = check_number("theta", theta)
        if theta <= 0.0:
            raise ValueError(f"theta: expected > 0, got {theta}")
        if check_int("head_dim", head_dim, 1, 2**31) % 2:
            raise ValueError(f"head_dim: expected an even number for rotary positions, got {head_dim}")
        # Computed in float32 on the CPU, whatever the defaults: the same bits on every device.
        inv_freq = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim)
        device = torch.get_default_device() if device is None else check_device("device", device)
        self.register_buffer("inv_freq", inv_freq.to(device), persistent=False)

    def forward(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """`positions` int `[..., rows]` -> `(cos, sin)`, each `[..., rows, 1, head_dim]`, for `apply_rotary`.

        The sign of the rotation is folded into `sin`, so that applying it is one roll and no concatenation.

        Raises:
            TypeError: `positions` is no tensor of real numbers, or `dtype` no float dtype that computes. ValueError:
                they are on another device than the frequencies.
        """
        if check_instance("positions", positions, Tensor).is_complex():
            raise TypeError(f"positions: expected an int dtype, got {positions.dtype}")
        if positions.device != self.inv_freq.device:
            raise ValueError(f"positions: expected device {self.inv_freq.device}, got {positions.device}")
        if check_dtype("dtype", dtype) is None:
            raise TypeError("dtype: expected a float dtype that computes, got None")
        angle = positions.to(torch.float32).unsqueeze(-1) * self.inv_freq.to(torch.float32)
        cos, sin = angle.cos(), angle.sin()
        return (
            torch.cat([cos, cos], dim=-1).unsqueeze(-2).to(dtype),
            torch.cat([-sin, sin], dim=-1).unsqueeze(-2).to(dtype),
        )


def apply_rotary(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate `x [batch, rows, heads, head_dim]` by `(cos, sin)` from `RotaryEmbedding`."""
    checks.tensor("x", x, 4)
    cos, sin = checks.rotary(rotary)
    return x * cos + torch.roll(x, x.shape[-1] // 2, dims=-1) * sin
