"""Links between documents lead somewhere, and the indexes are complete."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.rglob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"])
FILE_NAME = re.compile(
    r"(?<![\w/.*])((?:docs|benchmarks|portalm|backends|tests|ci|csrc_\w+|deploy|examples)/[\w./-]*\w)"
)


def local_links(page: Path) -> list[str]:
    return [
        target.split("#")[0]
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text())
        if not re.match(r"[a-z]+:", target) and not target.startswith("#")
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_to_files(page: Path) -> None:
    missing = [link for link in local_links(page) if not (page.parent / link).exists()]

    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_paths_in_the_text_exist(page: Path) -> None:
    names = FILE_NAME.findall(page.read_text())
    missing = [
        name for name in names if not (ROOT / name).exists() and not list(ROOT.glob(f"{name}*"))
    ]

    assert missing == []


def test_the_index_links_every_page() -> None:
    linked = {(DOCS / link).resolve() for link in local_links(DOCS / "README.md")}
    pages = {
        page.resolve()
        for page in DOCS.rglob("*.md")
        if page.parent.name != "adr" and page != DOCS / "README.md"
    }

    assert pages <= linked


def test_the_adr_index_has_every_decision_with_date_and_status() -> None:
    index = (DOCS / "adr" / "README.md").read_text()
    for page in sorted((DOCS / "adr").glob("[0-9]*.md")):
        text = page.read_text()
        stated = re.search(r"^Date: (\S+)\. Status: ([^.]+)\.$", text, re.MULTILINE)
        number = int(page.name[:4])

        assert text.startswith(f"# {number}. "), page.name
        assert stated is not None, page.name
        assert f"| [{number}]({page.name}) | " in index, page.name
        assert f" | {stated[1]} | {stated[2]} |" in index, page.name
