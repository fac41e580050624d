"""How near is near: NMSE, its bound for each dtype, and rounding inputs to a dtype."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from portalm.conformance.base import CheckFailed

FloatArray: TypeAlias = npt.NDArray[np.floating[Any]]

F32Array: TypeAlias = npt.NDArray[np.float32]

DTYPES = ("float32", "float16", "bfloat16")
"""Dtypes of weights and activations that a backend may claim."""

NMSE_BOUND = {"float32": 1e-11, "float16": 1e-6, "bfloat16": 1e-4}
"""Largest normalised mean squared error of one operation whose inputs are rounded already.

Rounding a result once to a dtype of unit roundoff u costs an NMSE of about u^2 / 6:
  float32   u = 2^-24: 6e-16. The bound leaves room for sums of thousands of terms in any order
            and for exponentials good to a few units in the last place, but none for products in
            TF32 or float16 (u = 2^-11: 4e-8).
  float16   u = 2^-11: 4e-8. The bound is five roundings of that size in a row (their squares
            add): a norm, a probability or a product may be rounded on the way.
  bfloat16  u = 2^-8: 2.5e-6. The bound is forty times that, about six roundings in a row.
A wrong operation is far outside: one token of 300 left out of an attention costs about 1e-3.
"""


def nmse(actual: FloatArray, expected: FloatArray) -> float:
    """Mean squared error over the mean square of what is expected; 0 for two zeros."""
    error = float(np.sum(np.square(actual.astype(np.float64) - expected)))
    scale = float(np.sum(np.square(expected.astype(np.float64))))
    if scale == 0.0:
        return 0.0 if error == 0.0 else float("inf")
    return error / scale


def require_close(what: str, actual: FloatArray, expected: FloatArray, bound: float) -> float:
    """The NMSE; `CheckFailed`, with the numbers, if it is above `bound` or not finite."""
    if actual.shape != expected.shape:
        raise CheckFailed(f"{what}: shape {list(actual.shape)}, expected {list(expected.shape)}")
    broken = np.argwhere(~np.isfinite(actual))
    if len(broken):
        raise CheckFailed(
            f"{what}: {len(broken)} of {actual.size} values are not finite, the first at "
            f"{broken[0].tolist()} (a slot that holds no token was read, or it overflowed)"
        )
    error = nmse(actual, expected)
    if error > bound:
        worst = np.unravel_index(np.argmax(np.abs(actual - expected)), actual.shape)
        raise CheckFailed(
            f"{what}: NMSE {error:.2e} is above {bound:.0e}; worst at "
            f"{[int(i) for i in worst]}: got {actual[worst]:.8g}, expected {expected[worst]:.8g}",
            nmse=error,
            bound=bound,
        )
    return error


def require_equal(what: str, actual: npt.NDArray[Any], expected: npt.NDArray[Any]) -> None:
    """`CheckFailed` unless both hold the same bits (any NaN equals any NaN)."""
    if actual.shape != expected.shape:
        raise CheckFailed(f"{what}: shape {list(actual.shape)}, expected {list(expected.shape)}")
    differs = actual != expected
    if np.issubdtype(actual.dtype, np.floating):
        differs = differs | (np.signbit(actual) != np.signbit(expected))
        differs &= ~(np.isnan(actual) & np.isnan(expected))
    places = np.argwhere(differs)
    if len(places):
        first = tuple(places[0])
        raise CheckFailed(
            f"{what}: {len(places)} of {actual.size} values differ, the first at "
            f"{places[0].tolist()}: got {actual[first]!r}, expected {expected[first]!r}"
        )


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype called `name`."""
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def rounded(x: FloatArray, dtype: str) -> npt.NDArray[np.float32]:
    """`x` rounded to `dtype`, as float32 (which holds every value of the smaller ones)."""
    single = torch.from_numpy(np.ascontiguousarray(x, np.float32))
    array: npt.NDArray[np.float32] = single.to(torch_dtype(dtype)).float().numpy()
    return array


def random_array(shape: tuple[int, ...], dtype: str, seed: int, scale: float = 1.0) -> F32Array:
    """Normal numbers that `dtype` has: the same for a seed."""
    return rounded(np.random.default_rng(seed).standard_normal(shape) * scale, dtype)
