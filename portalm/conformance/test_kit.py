"""Collected with `-p portalm.conformance.plugin`: every case of the kit as a test."""

from __future__ import annotations

from portalm.conformance.check import Item
from portalm.conformance.plugin import check_item
from portalm.conformance.subject import Subject


def test_conformance(portalm_item: Item, portalm_subject: Subject) -> None:
    """The backend does what the seam says."""
    check_item(portalm_item, portalm_subject)
