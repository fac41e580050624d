"""The programs in examples/ and the code of the tutorials run and print what they promise."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.server.conftest import RunningServer, running_server

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
OFFLINE = {  # file: a regular expression that its output matches
    "offline_generate.py": r"(?s)Paris.*cold",
    "offline_chat.py": r"capital of France is Paris",
    "structured_output.py": r"\{'city': '.*', 'population': \d+\}",
    "embeddings.py": r"^0\.\d+  Choose 'forgot password'",
}
SERVED = {"openai_client.py": r"Paris"}

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def server(default_model: Path) -> Iterator[RunningServer]:
    with running_server("--max-model-len", "2k") as server:
        yield server


def run(*command: str) -> str:
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def code_blocks(page: str) -> str:
    """All Python code of a page, as one program."""
    text = (ROOT / "docs" / "tutorials" / page).read_text()
    return "\n".join(re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL))


def test_every_example_is_run_and_listed() -> None:
    programs = {path.name for path in EXAMPLES.glob("*.py")}
    table = (EXAMPLES / "README.md").read_text()

    assert programs == {*OFFLINE, *SERVED}
    assert all(f"| {name} |" in table for name in programs)


@pytest.mark.parametrize("name", OFFLINE)
def test_offline_example(name: str, default_model: Path, default_encoder: Path) -> None:
    assert re.search(OFFLINE[name], run(str(EXAMPLES / name)))


@pytest.mark.parametrize("name", SERVED)
def test_example_against_a_server(name: str, server: RunningServer) -> None:
    assert re.search(SERVED[name], run(str(EXAMPLES / name), server.url))


def test_python_api_tutorial(default_model: Path, default_encoder: Path) -> None:
    printed = run("-c", code_blocks("python-api.md"))

    assert "The capital of France is ->  Paris" in printed
    assert re.search(r"^(positive|negative)$", printed, re.MULTILINE)
    assert "384" in printed.splitlines()
    assert re.search(r"token id 1000000000.* outside the vocabulary", printed)


def test_first_server_tutorial(server: RunningServer) -> None:
    code = code_blocks("first-server.md")
    assert "http://127.0.0.1:8000" in code

    printed = run("-c", code.replace("http://127.0.0.1:8000", server.url))

    assert "Paris" in printed
    assert re.search(r"\{'name': '.*', 'is_capital': (True|False)\}", printed)
