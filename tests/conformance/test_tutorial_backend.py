"""The tutorial's backend: the page shows the files, and the files pass the kit."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from portalm.backend import load_backend, report_backends
from portalm.conformance.check import Item
from portalm.conformance.kit import all_items
from portalm.conformance.subject import Subject

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "tutorials" / "write-your-own-backend.md"
PACKAGE = ROOT / "examples" / "backends" / "minimal"


def shown(language: str) -> list[str]:
    """Return the non-empty lines of all code blocks of one language."""
    blocks = re.findall(rf"^```{language}\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    return [line for line in "".join(blocks).splitlines() if line.strip()]


def written(path: Path) -> list[str]:
    return [line for line in path.read_text().splitlines() if line.strip()]


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Subject]:
    """The example, found by the entry point in its pyproject.toml as if it were installed."""
    metadata = (PACKAGE / "pyproject.toml").read_text()
    entry = re.search(r'entry-points\."portalm\.backends"\]\n(\w+) = "(.+)"\n', metadata)
    assert entry is not None
    site = tmp_path_factory.mktemp("site")
    info = site / "portalm_minimal-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: portalm-minimal\nVersion: 0.1.0\n")
    (info / "entry_points.txt").write_text(f"[portalm.backends]\n{entry[1]} = {entry[2]}\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(site))
        patch.syspath_prepend(str(PACKAGE))
        assert report_backends()["minimal"].is_available
        yield Subject(load_backend("minimal"))
    sys.modules.pop("minimal_backend", None)


def is_quick(item: Item) -> bool:
    """Return whether the item is in the default run: what the example writes, and one model."""
    if item.level == "L1":
        return item.check in ("attend", "rope_kv_write")
    if item.level == "L3":
        return item.name == "greedy tokens[llama]"
    return True


ITEMS = [
    pytest.param(
        item,
        id=f"{item.level} {item.name}",
        marks=[] if is_quick(item) else pytest.mark.slow,
    )
    for item in all_items(["L0", "L1", "L2", "L3"])
]


def test_the_page_shows_the_files() -> None:
    assert shown("python") == written(PACKAGE / "minimal_backend.py")
    assert shown("toml") == written(PACKAGE / "pyproject.toml")


def test_it_is_as_short_as_the_page_says() -> None:
    assert len(written(PACKAGE / "minimal_backend.py")) < 65


def test_auto_does_not_pick_it(subject: Subject) -> None:
    assert subject.backend.rank < 0


@pytest.mark.parametrize("item", ITEMS)
def test_it_conforms(subject: Subject, item: Item) -> None:
    result = item.run(subject)

    assert result.status in ("pass", "unsupported"), result.message


def test_cases_of_another_dtype_count_as_not_claimed(subject: Subject) -> None:
    found = {item.check: item.run(subject).status for item in all_items(["L1"], "bfloat16")}

    assert set(found.values()) == {"unsupported"}
