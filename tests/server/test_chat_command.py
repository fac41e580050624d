"""`portalm chat` and what `portalm serve` shows while it starts, on a terminal."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pexpect
import pytest

from portalm.cli.chat import read_message
from tests.server.conftest import ENDLESS, RunningServer

FIGURES = r"\[(\d+) tokens, [\d.]+ tokens/s, first token after \d+ ms"


def on_a_terminal(*arguments: str) -> pexpect.spawn:
    """The command with a terminal; it is ended where the object is not used any more."""
    command = ["-m", "portalm.cli.main", *arguments]
    return pexpect.spawn(
        sys.executable,
        command,
        timeout=30,
        encoding="utf-8",
        echo=False,
        dimensions=(24, 200),
        # where tests run in the background it is ignored, and would be here
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


@pytest.fixture(scope="module")
def here(default_model: Path) -> Iterator[pexpect.spawn]:
    """A conversation with the default model in the command's own process."""
    chat = on_a_terminal("chat", "--max-model-len", "2k", "--max-tokens", "1500")
    chat.expect(r" on cpu\. /help")
    chat.expect("> ")
    yield chat
    chat.sendline("/exit")
    chat.expect(pexpect.EOF)
    chat.close()
    assert chat.exitstatus == 0


@pytest.fixture
def there(model_server: RunningServer) -> Iterator[pexpect.spawn]:
    """A conversation with a server."""
    url = f"{model_server.url}/v1"
    chat = on_a_terminal("chat", "--url", url, "--max-tokens", "200")
    chat.expect_exact(f"small at {model_server.url}.")
    chat.expect("> ")
    yield chat
    chat.sendeof()
    chat.expect(pexpect.EOF)
    chat.close()
    assert chat.exitstatus == 0


@pytest.mark.model
def test_ctrl_c_ends_the_answer_and_the_conversation_goes_on(here, tmp_path: Path) -> None:
    here.sendline(ENDLESS)
    here.expect("13, 14")
    here.sendintr()
    here.expect(FIGURES + ", stopped")
    here.expect("> ")
    time.sleep(0.5)  # the prompt is shown a moment before it is waited at
    here.sendintr()
    here.expect("/exit ends the conversation")

    here.sendline("/clear")
    here.sendline("What is the capital of France?")
    here.expect("Paris")
    here.expect(FIGURES + r"\]")
    assert 1 < int(here.match.group(1)) < 1500
    here.sendline(f"/save {tmp_path}/said.json")
    here.expect("saved 2 messages to")

    said = json.loads((tmp_path / "said.json").read_text())
    assert [message["role"] for message in said] == ["user", "assistant"]


@pytest.mark.model
def test_a_server_answers_and_ctrl_c_ends_its_request(there, model_server, tmp_path: Path) -> None:
    there.sendline(ENDLESS)
    there.expect("13, 14")
    assert model_server.metric("num_requests_running") == 1
    there.sendintr()
    there.expect(FIGURES + ", stopped")
    model_server.wait_for("num_requests_running", 0)

    there.sendline("/clear")
    there.sendline("/system You are a pirate.")
    there.expect("system message: You are a pirate.")
    there.sendline('"""One line\nand another"""')
    there.expect(FIGURES)
    there.sendline("word " * 2100)  # refused: it is no part of the conversation
    there.expect("the server returned status 400: .*2048")
    there.sendline(f"/save {tmp_path}/said.json")
    there.expect("saved 3 messages to")
    said = json.loads((tmp_path / "said.json").read_text())
    assert said[0] == {"role": "system", "content": "You are a pirate."}
    assert said[1] == {"role": "user", "content": "One line\nand another"}

    there.sendline("/system -")
    there.expect("system message: none")
    there.sendline("/cleer")
    there.expect("unknown command /cleer")
    there.sendline("/help")
    there.expect("/save FILE")


def chat_of(url: str, text: str, *flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "portalm.cli.main", "chat", "--url", url, *flags],
        input=text, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


def test_from_a_pipe_there_are_answers_and_nothing_else(null_server: RunningServer) -> None:
    done = chat_of(null_server.url, "w5 w6\nw7\n", "--max-tokens", "3")

    assert done.returncode == 0, done.stderr
    assert [len(line.split("w")) - 1 for line in done.stdout.splitlines()] == [3, 3]
    assert done.stderr == ""


def test_a_question_that_is_refused_shows_in_the_exit_status(null_server: RunningServer) -> None:
    done = chat_of(null_server.url, "w5\n", "--temperature", "-1")

    assert done.returncode == 1
    assert "the server returned status 400: temperature" in done.stderr


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (("--device", "cpu"), "device cannot be set with --url"),
        (("--model", "other"), "model 'other' is not served here"),
    ],
    ids=["a setting of the engine", "a model that is not there"],
)
def test_what_the_server_cannot_honour_is_refused(null_server, flags, text: str) -> None:
    done = chat_of(null_server.url, "w5\n", *flags)

    assert done.returncode != 0
    assert text in done.stderr


def test_no_server_is_one_line() -> None:
    done = chat_of("http://127.0.0.1:9", "hello\n")

    assert done.returncode == 2
    assert done.stderr.startswith("portalm: no valid answer from http://127.0.0.1:9 ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["a"], "a"),
        (["a\\", "b\\", "c"], "a\nb\nc"),
        (['"""a', "", "b", '"""'], "a\n\nb"),
        (['"""a"""'], "a"),
    ],
    ids=["one line", "backslashes", "quotes", "quotes in one line"],
)
def test_a_message_may_have_several_lines(lines: list[str], message: str) -> None:
    left = iter([*lines, "the next message"])

    assert read_message(lambda _: next(left)) == message
    assert next(left) == "the next message"


@pytest.mark.slow
@pytest.mark.model
def test_a_server_shows_how_far_loading_is_on_a_terminal_alone(
    default_model: Path, model_server: RunningServer
) -> None:
    server = on_a_terminal("serve", "--port", "0", "--max-model-len", "1k")
    server.expect(r"Loading model: +[1-9]\d*%|Warming up: +\d+%")
    server.expect("PortaLM serves")
    server.sendintr()
    server.expect(pexpect.EOF)
    server.close()

    assert server.exitstatus == 0
    assert "Loading model" not in "".join(model_server.output)
