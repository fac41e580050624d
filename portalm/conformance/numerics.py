"""Tolerances: NMSE, its bound for each dtype, and rounding of inputs to a dtype."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from portalm.conformance.base import CheckFailed

FloatArray: TypeAlias = npt.NDArray[np.floating[Any]]

F32Array: TypeAlias = npt.NDArray[np.float32]

DTYPES = ("float32", "float16", "bfloat16")
"""Data types of weights and activations that a backend may claim."""

NMSE_BOUND = {"float32": 1e-11, "float16": 1e-6, "bfloat16": 1e-4}
"""Largest normalized mean squared error of one operation, given inputs rounded to the dtype.

Rounding a result once to a dtype of unit roundoff u costs an NMSE of about u^2 / 6:
  float32   u = 2^-24: 6e-16. The bound allows sums of thousands of terms in any order and
            exponentials with errors of a few units in the last place, but not products in TF32
            or float16 (u = 2^-11: 4e-8).
  float16   u = 2^-11: 4e-8. The bound allows five roundings of that size in a row (their squares
            add): intermediate norms, probabilities or products may be rounded.
  bfloat16  u = 2^-8: 2.5e-6. The bound is forty times that, about six roundings in a row.
A wrong operation is far outside: leaving one token of 300 out of an attention costs about 1e-3.
"""


def nmse(actual: FloatArray, expected: FloatArray) -> float:
    """Mean squared error divided by the mean square of `expected`; 0 if both are zero."""
    error = float(np.sum(np.square(actual.astype(np.float64) - expected)))
    scale = float(np.sum(np.square(expected.astype(np.float64))))
    if scale == 0.0:
        return 0.0 if error == 0.0 else float("inf")
    return error / scale


def require_close(what: str, actual: FloatArray, expected: FloatArray, bound: float) -> float:
    """Return the NMSE; raise `CheckFailed` if it exceeds `bound` or a value is not finite."""
    if actual.shape != expected.shape:
        raise CheckFailed(f"{what}: shape {list(actual.shape)}, expected {list(expected.shape)}")
    broken = np.argwhere(~np.isfinite(actual))
    if len(broken):
        raise CheckFailed(
            f"{what}: {len(broken)} of {actual.size} values are not finite, the first at "
            f"{broken[0].tolist()} (a slot without a token was read, or a value overflowed)"
        )
    error = nmse(actual, expected)
    if error > bound:
        worst = np.unravel_index(np.argmax(np.abs(actual - expected)), actual.shape)
        raise CheckFailed(
            f"{what}: NMSE {error:.2e} exceeds {bound:.0e}; worst at "
            f"{[int(i) for i in worst]}: got {actual[worst]:.8g}, expected {expected[worst]:.8g}",
            nmse=error,
            bound=bound,
        )
    return error


def require_equal(what: str, actual: npt.NDArray[Any], expected: npt.NDArray[Any]) -> None:
    """Raise `CheckFailed` unless both have the same bits (any NaN equals any NaN)."""
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
    """Return the torch dtype named `name`."""
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def rounded(x: FloatArray, dtype: str) -> npt.NDArray[np.float32]:
    """Round `x` to `dtype` and return it as float32, which represents all values of `dtype`."""
    single = torch.from_numpy(np.ascontiguousarray(x, np.float32))
    array: npt.NDArray[np.float32] = single.to(torch_dtype(dtype)).float().numpy()
    return array


def random_array(shape: tuple[int, ...], dtype: str, seed: int, scale: float = 1.0) -> F32Array:
    """Return normally distributed numbers, rounded to `dtype`; the same for the same seed."""
    return rounded(np.random.default_rng(seed).standard_normal(shape) * scale, dtype)
