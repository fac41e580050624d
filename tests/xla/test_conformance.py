"""The conformance kit on the XLA backend, levels L0 to L4."""

from __future__ import annotations

import pytest

from portalm.conformance.check import Item
from portalm.conformance.kit import all_items
from portalm.conformance.subject import Subject
from portalm_backends.xla.backend import XlaBackend

ITEMS = all_items()


@pytest.fixture(scope="module")
def subject(backend: XlaBackend) -> Subject:
    return Subject(backend)


@pytest.mark.parametrize("item", ITEMS, ids=[f"{i.level} {i.name}" for i in ITEMS])
def test_conforms(subject: Subject, item: Item) -> None:
    result = item.run(subject)

    if result.status == "unsupported":
        pytest.skip(f"not claimed: {result.message}")
    assert result.status == "pass", result.message
