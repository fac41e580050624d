"""Philox4x32-10: random numbers that are a function of a key and a counter.

Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

import torch

_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_MASK = 0xFFFFFFFF

Words = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def _mul_hi_lo(a: torch.Tensor, m: int) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low 32 bits of a * m, computed in halves; a is int64 holding 32 bits."""
    low, high = (a & 0xFFFF) * m, (a >> 16) * m
    middle = (low >> 16) + high  # below 2**49
    return middle >> 16, ((middle & 0xFFFF) << 16) | (low & 0xFFFF)


def philox(counter: Words, key: tuple[torch.Tensor, torch.Tensor]) -> Words:
    """Four random 32-bit words for each counter.

    Args:
        counter: four int64 tensors holding 32 bits, lowest word first; broadcast together.
        key: two int64 tensors holding 32 bits.

    Returns:
        Four int64 tensors holding 32 bits.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _mul_hi_lo(c0, _M0)
        high1, low1 = _mul_hi_lo(c2, _M1)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    return c0, c1, c2, c3


def gumbel(seed: torch.Tensor, position: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Gumbel noise as `SampleParams` defines it.

    Args:
        seed: int64 [R]
        position: int64 [R]
        vocab_size: V

    Returns:
        float32 [R, V]
    """
    num_groups = -(-vocab_size // 4)
    group = torch.arange(num_groups, dtype=torch.int64, device=seed.device)[None, :]
    seed, position = seed[:, None], position[:, None]
    zero = torch.zeros_like(group)
    words = philox(
        (group, zero, position & _MASK, (position >> 32) & _MASK),
        (seed & _MASK, (seed >> 32) & _MASK),
    )
    # 23 bits and a half: exact in float32, never 0 and never 1
    uniform = [((word >> 9).to(torch.float32) + 0.5) * 2.0**-23 for word in words]
    noise = -torch.log(-torch.log(torch.stack(uniform, dim=-1)))  # [R, V / 4, 4]
    return noise.flatten(1)[:, :vocab_size]
