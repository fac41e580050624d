"""Scores of text pairs: forming the pairs, and the cosine similarity of two vectors."""

from __future__ import annotations

from typing import TypeVar

import numpy as np

from portalm.errors import InvalidRequest

T = TypeVar("T")


def as_pairs(first: T | list[T], second: T | list[T], names: tuple[str, str]) -> list[tuple[T, T]]:
    """Pair one item with each of many, or the items of two lists by position.

    Args:
        first: one item, or a list.
        second: one item, or a list.
        names: the caller's names of `first` and `second`, for errors.

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
            f"{names[0]} has {len(many)} texts and {names[1]} has {len(others)}: pass equal "
            f"numbers, or one {names[0]} for all",
            param=names[1],
        )
    return list(zip(many, others, strict=True))


def numbers(pooled: bytes) -> list[float]:
    """Decode a vector, or a single score, from the engine's float32 bytes."""
    values: list[float] = np.frombuffer(pooled, "<f4").tolist()
    return values


def cosine(first: bytes, second: bytes) -> float:
    """Cosine similarity of two vectors in the engine's float32 bytes; 0 if one has length 0."""
    a, b = (np.frombuffer(x, "<f4").astype(np.float64) for x in (first, second))
    length = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / length if length else 0.0
