"""docs/models.md and docs/adding-a-model.md agree with the code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

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


@pytest.mark.parametrize(
    ("index", "path"),
    list(
        enumerate(
            (
                "portalm/models/smollm3.py",
                "portalm/models/registry.py",
                "tests/models/test_families.py",
                "portalm/conformance/tiny.py",
            )
        )
    ),
)
def test_the_guide_to_add_a_family_shows_the_code_of_smollm3(index: int, path: str) -> None:
    blocks = re.findall(
        r"```python\n(.*?)```", (PAGE.parent / "adding-a-model.md").read_text(), re.S
    )

    assert len(blocks) == 4
    assert blocks[index] in (PAGE.parents[1] / path).read_text()
