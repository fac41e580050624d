"""Scores of pairs of texts: which pairs there are, and how near two vectors are."""

from __future__ import annotations

from typing import TypeVar

import numpy as np

from portalm.errors import InvalidRequest

T = TypeVar("T")


def as_pairs(first: T | list[T], second: T | list[T], names: tuple[str, str]) -> list[tuple[T, T]]:
    """One with each of many, or each with the one in its place.

    Args:
        first: one, or a list.
        second: one, or a list.
        names: of both, as the caller spelled them.

    Raises:
        InvalidRequest: a list is empty, or both are lists of different lengths.
    """
    many, others = (one if isinstance(one, list) else [one] for one in (first, second))
    for name, found in zip(names, (many, others), strict=True):
        if not found:
            raise InvalidRequest(f"{name} must not be empty", param=name)
    if len(many) == 1:
        many = many * len(others)
    if len(many) != len(others):
        raise InvalidRequest(
            f"{names[0]} has {len(many)} texts and {names[1]} {len(others)}: give as many, or one "
            f"{names[0]} for all",
            param=names[1],
        )
    return list(zip(many, others, strict=True))


def numbers(pooled: bytes) -> list[float]:
    """The vector, or the one score, that the engine sent."""
    values: list[float] = np.frombuffer(pooled, "<f4").tolist()
    return values


def cosine(first: bytes, second: bytes) -> float:
    """Cosine of the angle between two vectors that the engine sent; 0 if one has no length."""
    a, b = (np.frombuffer(x, "<f4").astype(np.float64) for x in (first, second))
    length = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / length if length else 0.0
