"""docs/support-matrix.md matches the records in docs/support."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ci.support_matrix import FOLDER, PAGE, page
from portalm.backend import load_backend
from portalm.conformance.report import as_markdown

RECORDS = {path.stem: json.loads(path.read_text()) for path in FOLDER.glob("*.json")}


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text() == page()


def test_failed_results_are_all_counted() -> None:
    for device, record in RECORDS.items():
        failed = sum(count["fail"] for count in record["counts"].values())
        assert failed == len([r for r in record["results"] if r["status"] == "fail"]), device


@pytest.mark.parametrize("device", sorted(RECORDS.keys() & {"cpu", "reference"}))
def test_recorded_claims_are_those_of_the_backend(device: str) -> None:
    claimed = load_backend(device).capabilities

    assert RECORDS[device]["capabilities"]["features"] == sorted(claimed.features)
    assert RECORDS[device]["capabilities"]["dtypes"] == sorted(claimed.dtypes)


@pytest.mark.parametrize("device", sorted(RECORDS.keys() & {"cuda", "rocm"}))
def test_a_gpu_record_says_run_only_if_the_readme_does(device: str) -> None:
    readme = (Path(__file__).parents[2] / "backends" / device / "README.md").read_text()

    assert (RECORDS[device]["checked"] == "run") == ("not run on a GPU" not in readme)


def test_a_model_shows_the_worst_of_its_checks() -> None:
    record = RECORDS["reference"]
    case = {"level": "L3", "seconds": 1.0, "nmse": None, "message": ""}
    results = [
        {**case, "check": check, "case": model, "status": status}
        for check, model, status in (
            ("greedy tokens", "llama", "pass"),
            ("model logprobs", "llama", "pass"),
            ("greedy tokens", "mixtral", "fail"),
            ("model logprobs", "mixtral", "pass"),
            ("greedy tokens", "gpt2", "unsupported"),
        )
    ]

    page = as_markdown([{**record, "results": results}, {**record, "device": "b", "results": []}])

    for line in (
        "| llama | passes | not run |",
        "| mixtral | fails | not run |",
        "| gpt2 | not claimed | not run |",
    ):
        assert line in page
