"""`portalm run-batch`, which answers OpenAI batch files."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from portalm.cli.main import main
from tests.server.conftest import RunningServer, make_model_folder

COMPLETION = {"model": "tiny", "prompt": "w5 w6", "max_tokens": 6, "ignore_eos": True}
CHAT = {"messages": [{"role": "user", "content": "w7 w8"}], "max_tokens": 5, "ignore_eos": True}


def line(custom_id: Any, url: str, body: Any, **changes: Any) -> str:
    asked = {"custom_id": custom_id, "method": "POST", "url": url, "body": body, **changes}
    return json.dumps(asked)


LINES = {
    "completion": line("completion", "/v1/completions", COMPLETION),
    "chat": line("chat", "/v1/chat/completions", CHAT),
    "refused": line("refused", "/v1/completions", {**COMPLETION, "temperature": -1}),
    "unknown model": line("unknown model", "/v1/completions", {**COMPLETION, "model": "other"}),
    "broken": '{"custom_id": "broken"',
    "list": "[1, 2]",
    "again": line("chat", "/v1/chat/completions", CHAT),
    "no id": line(None, "/v1/completions", COMPLETION),
    "get": line("get", "/v1/models", {}, method="GET"),
    "nowhere": line("nowhere", "/v1/nothing", {}),
    "stream": line("stream", "/v1/completions", {**COMPLETION, "stream": True}),
    "no body": line("no body", "/v1/completions", "w5"),
    **{f"more {i}": line(f"more {i}", "/v1/completions", COMPLETION) for i in range(30)},
}


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = make_model_folder(tmp_path_factory.mktemp("batch") / "tiny")
    model = ["--model", str(folder), "--device", "null", "--load-format", "dummy"]
    return [*model, "--served-model-name", "tiny"]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory, flags: list[str]) -> tuple[int, list[Any]]:
    """Exit status and answers of a file with all of LINES, with at most four in flight."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "in.jsonl").write_text("\n".join([*LINES.values(), "", ""]))
    files = ["-i", str(folder / "in.jsonl"), "-o", str(folder / "out.jsonl")]

    status = main(["run-batch", *files, "--max-concurrency", "4", *flags])

    assert sorted(path.name for path in folder.iterdir()) == ["in.jsonl", "out.jsonl"]
    return status, [json.loads(one) for one in (folder / "out.jsonl").read_text().splitlines()]


def find(answers: list[Any], custom_id: str) -> Any:
    found = [one for one in answers if one["custom_id"] == custom_id and not one["error"]]
    assert len(found) == 1
    return found[0]


def test_every_line_gets_one_answer_and_errors_set_the_exit_status(ran) -> None:
    status, answers = ran

    assert status == 1
    assert len(answers) == len(LINES)
    assert len({one["id"] for one in answers}) == len(LINES)
    assert all(find(answers, f"more {i}")["response"]["status_code"] == 200 for i in range(30))


@pytest.mark.parametrize("name", ["completion", "chat", "refused", "unknown model"])
def test_answer_equals_the_servers_response(ran, name: str, null_server: RunningServer) -> None:
    asked = json.loads(LINES[name])
    with null_server.client() as http:
        expected = http.post(asked["url"], json=asked["body"])

    response = find(ran[1], name)["response"]

    assert response["status_code"] == expected.status_code
    for part in ("object", "choices", "usage"):
        assert response["body"].get(part) == expected.json().get(part)
    assert ("error" in response["body"]) == (expected.status_code != 200)


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("broken", "line 5: not valid JSON"),
        ("list", "line 6: not a JSON object"),
        ("again", "line 7: custom_id 'chat' was used by an earlier line"),
        ("no id", "line 8: custom_id must be a non-empty string"),
        ("get", "line 9: method must be POST, not 'GET'"),
        ("nowhere", "line 10: url must be one of "),
        ("stream", "line 11: stream must be false"),
        ("no body", "line 12: body must be an object"),
    ],
)
def test_invalid_line_gets_an_error_with_its_number(ran, name: str, problem: str) -> None:
    errors = [one for one in ran[1] if one["error"] is not None]
    [error] = [one for one in errors if one["error"]["message"].startswith(problem)]

    assert error["response"] is None
    assert error["error"]["code"] == "invalid_line"


def test_piped_lines_are_answered_at_once_and_sigterm_keeps_the_answers(
    flags: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "out.jsonl"
    command = [sys.executable, "-m", "portalm.cli.main", "run-batch", "-i", "-", "-o", str(out)]
    process = subprocess.Popen(
        [*command, *flags], stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdin is not None
    partial = tmp_path / "out.jsonl.partial"
    try:
        process.stdin.write(LINES["completion"] + "\n")
        process.stdin.flush()
        end = time.monotonic() + 60
        while not (partial.exists() and partial.stat().st_size) and time.monotonic() < end:
            time.sleep(0.05)
        process.terminate()  # the pipe is still open
        status = process.wait(20)
    finally:
        process.kill()
        _, said = process.communicate()

    [answer] = [json.loads(one) for one in partial.read_text().splitlines()]
    assert answer["custom_id"] == "completion"
    assert status == 130
    assert f"answers up to the failure are in {partial}" in said and "Traceback" not in said
    assert not out.exists()


def test_failed_engine_startup_leaves_no_output_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in.jsonl").write_text(LINES["completion"])
    files = ["-i", str(tmp_path / "in.jsonl"), "-o", str(tmp_path / "out.jsonl")]

    status = main(["run-batch", *files, "--model", str(tmp_path / "nothing.gguf")])

    assert status == 2
    assert "\nportalm: no model at" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_missing_input_file_is_a_one_line_error(capsys: pytest.CaptureFixture[str]) -> None:
    status = main(["run-batch", "-i", "/nowhere.jsonl", "-o", "/dev/null"])

    assert status == 2
    assert "cannot read --input-file" in capsys.readouterr().err
