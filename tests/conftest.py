"""What several folders of tests share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

# the same examples every time, and no clock: CI machines are busy
settings.register_profile("portalm", derandomize=True, deadline=None)
settings.load_profile("portalm")

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # tests take models from the cache or make them
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="session")
def default_model() -> Path:
    """The default model's file in the cache; `make model` (or `portalm pull`) puts it there."""
    from portalm.config import DEFAULT_MODEL
    from portalm.models.hub import find_cached

    path = find_cached(DEFAULT_MODEL)
    if path is None:
        pytest.fail("the default model is not in the cache: run `portalm pull` (make test does)")
    return path
