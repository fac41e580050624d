"""Settings and fixtures shared by all tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

# the same examples in every run, and no deadline: CI machines are busy
settings.register_profile("portalm", derandomize=True, deadline=None)
settings.load_profile("portalm")

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # tests use cached or generated models
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="session")
def default_model() -> Path:
    """The default model's file in the cache, where `make model` or `portalm pull` puts it."""
    from portalm.config import DEFAULT_MODEL

    return cached(DEFAULT_MODEL)


@pytest.fixture(scope="session")
def default_encoder() -> Path:
    """The default encoder's folder in the cache."""
    from portalm.config import DEFAULT_ENCODER

    return cached(DEFAULT_ENCODER)


def cached(model: str) -> Path:
    """Return the path of a cached model; fails the test if it is not in the cache."""
    from portalm.models.hub import find_cached

    path = find_cached(model)
    if path is None:
        pytest.fail(f"{model} is not in the cache: run `portalm pull {model}` (make test does)")
    return path
