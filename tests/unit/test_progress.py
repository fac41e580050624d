"""Progress is a bar on a terminal and one line per phase in a log file."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import subprocess
import sys
import termios
from pathlib import Path

import pytest

import portalm
from portalm.cli.main import main
from tests.tiny import add_byte_tokenizer, make_config_folder

BAR = """
from portalm.progress import ProgressBar
with ProgressBar("Answering", 300, unit="requests") as bar:
    for i in range(300):
        bar.update(f"{i}.0 tok/s")
"""
LOADING = """
from portalm.progress import LoadingBar
with LoadingBar() as bar:
    for phase in ("load", "capture", "warm_up"):
        for i in range(101):
            bar.show(phase, i / 100)
"""


def stderr_of(script: str) -> str:
    """What `script` writes to a stderr that is a pipe."""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False
    )
    return done.stderr


def terminal_of(script: str) -> str:
    """What `script` writes to a stderr that is a terminal."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))  # a bar is cut to the width, which is 0 at first
    with subprocess.Popen([sys.executable, "-c", script], stderr=theirs) as process:
        os.close(theirs)
        text = b""
        with contextlib.suppress(OSError):  # EIO: the other end is closed
            while chunk := os.read(ours, 1 << 16):
                text += chunk
    os.close(ours)
    assert process.returncode == 0
    return text.decode()


def test_a_log_file_gets_one_line_for_many_items() -> None:
    text = stderr_of(BAR)

    assert re.fullmatch(r"Answering: 300/300 requests in \d+\.\d s, 299\.0 tok/s\n", text)


def test_a_log_file_gets_one_line_per_loading_phase() -> None:
    text = stderr_of(LOADING)

    phases = ("Loading model", "Capturing steps", "Warming up")
    assert re.fullmatch("".join(rf"{phase}: \d+\.\d s\n" for phase in phases), text)


def test_a_phase_that_fails_is_named_in_the_log_file() -> None:
    text = stderr_of(LOADING.replace("bar.show(phase", "1 / 0; bar.show(phase"))

    assert re.match(r"Loading model: failed after \d+\.\d s\n", text)


@pytest.mark.parametrize(
    ("script", "phase"), [(BAR, "Answering"), (LOADING, "Loading model")], ids=["items", "loading"]
)
def test_a_terminal_gets_a_bar(script: str, phase: str) -> None:
    text = terminal_of(script)

    assert f"\r{phase}:" in text
    assert "|" in text
    assert " in 0." not in text


def test_a_hidden_bar_writes_nothing() -> None:
    hidden = BAR.replace('unit="requests"', 'unit="requests", is_shown=False')

    assert stderr_of(hidden) == ""
    assert stderr_of(LOADING.replace("LoadingBar()", "LoadingBar(is_shown=False)")) == ""


def test_generate_writes_one_line_per_phase_to_a_log_file(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = add_byte_tokenizer(make_config_folder(tmp_path / "tiny"))
    flags = ("--model", str(folder), "--device", "null", "--load-format", "dummy")

    assert main(["generate", "hello", "--raw", "--max-tokens", "4", *flags]) == 0

    text = capfd.readouterr().err
    assert re.findall(r"^Loading model: .*$", text, re.MULTILINE) == [text.splitlines()[0]]
    assert "\r" not in text
    assert "%|" not in text


def test_bars_are_made_in_one_place() -> None:
    """Only portalm/progress.py imports tqdm: another bar would fill log files."""
    package = Path(portalm.__file__).parent
    found = [
        str(path.relative_to(package))
        for path in package.rglob("*.py")
        if re.search(r"^\s*(from|import) tqdm", path.read_text(), re.MULTILINE)
    ]

    assert found == ["progress.py"]
