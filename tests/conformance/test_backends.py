"""The kit on the backends that ship with PortaLM and run on any machine."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from portalm.backend import load_backend
from portalm.cli.main import main
from portalm.conformance.check import Item
from portalm.conformance.kit import all_items, run_kit
from portalm.conformance.report import as_json, as_markdown
from portalm.conformance.subject import Subject
from portalm.conformance.tiny import VARIANTS

ITEMS = all_items()
FAMILIES = set(VARIANTS) - {name for name in VARIANTS if name.startswith("llama")}


@pytest.fixture(scope="module", params=["reference", "cpu"])
def subject(request: pytest.FixtureRequest) -> Subject:
    return Subject(load_backend(request.param))


def marks(item: Item) -> list[pytest.MarkDecorator]:
    """Mark the greedy tokens of model families as slow: tests/models covers them too."""
    is_repeated = item.check == "greedy tokens" and item.case in FAMILIES
    return [pytest.mark.slow] if is_repeated else []


@pytest.mark.parametrize(
    "item", [pytest.param(i, id=f"{i.level} {i.name}", marks=marks(i)) for i in ITEMS]
)
def test_conforms(subject: Subject, item: Item) -> None:
    result = item.run(subject)

    assert result.status == "pass", result.message


def test_the_command_prints_and_writes_its_results(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "found.json"

    status = main(["conformance", "--device", "reference", "--level", "L0", "--json", str(path)])

    assert status == 0
    assert "L0 claims" in capsys.readouterr().out
    record = json.loads(path.read_text())
    assert record["counts"]["L0"]["fail"] == 0
    assert "| reference |" in as_markdown([record])


def test_an_unknown_level_is_refused_with_the_list_of_levels(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["conformance", "--device", "reference", "--level", "L9"]) == 2
    assert "L3 (models), L4 (serving)" in capsys.readouterr().err


def test_a_level_is_found_by_its_name() -> None:
    assert all_items(["models"]) == all_items(["L3"])


def test_the_pytest_plugin_runs_the_kit_on_a_named_device() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "portalm.conformance.plugin"]
    command += ["--portalm-device", "reference", "--portalm-level", "L0", "--noconftest"]
    command += ["-c", "/dev/null", "--pyargs", "portalm.conformance.test_kit"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


def test_results_are_written_as_json() -> None:
    backend = load_backend("reference")

    record = json.loads(as_json(backend, run_kit(backend, levels=["L0"])))

    assert record["device"] == "reference"
    assert all(result["status"] == "pass" for result in record["results"])
