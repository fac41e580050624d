"""Fixtures for the XLA tests. Run them with `-m xla`; without a TPU they use XLA's CPU client."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("jax", reason="JAX is not installed: install portalm[xla-cpu]")

from portalm_backends.xla.backend import XlaBackend

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.xla)


@pytest.fixture(scope="session")
def backend() -> Iterator[XlaBackend]:
    yield XlaBackend()
