"""What tests of XLA share: they run by `-m xla`, where the extra is installed."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

HERE = Path(__file__).parent
collect_ignore_glob = [] if importlib.util.find_spec("jax") else ["test_*.py"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.xla)


@pytest.fixture(scope="session")
def backend():  # type: ignore[no-untyped-def]
    from portalm_backends.xla.backend import XlaBackend

    return XlaBackend()
