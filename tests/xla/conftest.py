"""What tests of XLA share. They run by `-m xla`, on XLA's CPU client where there is no TPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("jax", reason="JAX is not installed: the extra portalm[tpu] brings it")

from portalm_backends.xla.backend import XlaBackend

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.xla)


@pytest.fixture(scope="session")
def backend() -> Iterator[XlaBackend]:
    yield XlaBackend()
