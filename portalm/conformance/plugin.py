"""The kit as a pytest plugin, for backends in other packages.

pytest -p portalm.conformance.plugin --portalm-device X --pyargs portalm.conformance.test_kit
"""

from __future__ import annotations

import pytest

from portalm.backend import load_backend
from portalm.conformance.check import Item
from portalm.conformance.kit import all_items
from portalm.conformance.subject import Subject


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add --portalm-device and --portalm-level."""
    group = parser.getgroup("portalm")
    group.addoption("--portalm-device", default="auto", help="backend to check")
    group.addoption("--portalm-level", action="append", default=[], help="L0 to L4")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Create one test per case of each check."""
    if "portalm_item" in metafunc.fixturenames:
        items = all_items(metafunc.config.getoption("--portalm-level"))
        ids = [f"{item.level} {item.name}" for item in items]
        metafunc.parametrize("portalm_item", items, ids=ids)


@pytest.fixture(scope="session")
def portalm_subject(request: pytest.FixtureRequest) -> Subject:
    """Load the backend under test; one that cannot run is a failure, never a skip."""
    return Subject(load_backend(request.config.getoption("--portalm-device")))


def check_item(item: Item, subject: Subject) -> None:
    """Run one case; skip it if it needs something that is not claimed."""
    result = item.run(subject)
    if result.status == "unsupported":
        pytest.skip(f"not claimed: {result.message}")
    assert result.status == "pass", result.message
