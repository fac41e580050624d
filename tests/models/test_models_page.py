"""docs/models.md lists the model families that the code supports."""

from __future__ import annotations

import re
from pathlib import Path

from portalm.models.loader.gguf_families import FAMILIES
from portalm.models.registry import ARCHITECTURES

PAGE = Path(__file__).parents[2] / "docs" / "models.md"


def columns(heading: str) -> list[set[str]]:
    """The names in backticks in each column of the first table of a section."""
    section = PAGE.read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("| ")]
    return [
        {name for cell in column for name in re.findall(r"`([^`]+)`", cell)}
        for column in zip(*rows, strict=True)
    ]


def test_every_registered_architecture_is_listed_and_no_other() -> None:
    assert columns("Decoders")[2] | columns("Encoders")[2] == set(ARCHITECTURES)


def test_every_gguf_architecture_is_listed_and_no_other() -> None:
    assert columns("Decoders")[3] == set(FAMILIES)


def test_no_line_of_the_page_is_too_long_to_read() -> None:
    assert [line for line in PAGE.read_text().splitlines() if len(line) > 120] == []
