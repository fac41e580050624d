"""All cases of the kit as tests; pytest collects them with `-p portalm.conformance.plugin`."""

from __future__ import annotations

from portalm.conformance.check import Item
from portalm.conformance.plugin import check_item
from portalm.conformance.subject import Subject


def test_conformance(portalm_item: Item, portalm_subject: Subject) -> None:
    """The backend conforms to one case of the interface."""
    check_item(portalm_item, portalm_subject)
