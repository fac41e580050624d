"""`portalm chat`, and the progress bars of `portalm serve`, on a terminal."""

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
    """Run the command on a pseudo-terminal; it ends when the returned object is deleted."""
    command = ["-m", "portalm.cli.main", *arguments]
    return pexpect.spawn(
        sys.executable,
        command,
        timeout=30,
        encoding="utf-8",
        echo=False,
        dimensions=(24, 200),
        # background test runs ignore SIGINT, and the child process would inherit that
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


@pytest.fixture(scope="module")
def local_chat(default_model: Path) -> Iterator[pexpect.spawn]:
    """A conversation with the default model, which runs in the command's process."""
    chat = on_a_terminal("chat", "--max-model-len", "2k", "--max-tokens", "1500")
    chat.expect(r" on cpu\. Type /help")
    chat.expect("> ")
    yield chat
    chat.sendline("/exit")
    chat.expect(pexpect.EOF)
    chat.close()
    assert chat.exitstatus == 0


@pytest.fixture
def remote_chat(model_server: RunningServer) -> Iterator[pexpect.spawn]:
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
def test_ctrl_c_ends_the_answer_and_the_conversation_continues(local_chat, tmp_path: Path) -> None:
    local_chat.sendline(ENDLESS)
    local_chat.expect("13, 14")
    local_chat.sendintr()
    local_chat.expect(FIGURES + ", stopped")
    local_chat.expect("> ")
    time.sleep(0.5)  # the prompt appears shortly before the command waits for input
    local_chat.sendintr()
    local_chat.expect("/exit ends the conversation")

    local_chat.sendline("/clear")
    local_chat.sendline("What is the capital of France?")
    local_chat.expect("Paris")
    local_chat.expect(FIGURES + r"\]")
    assert 1 < int(local_chat.match.group(1)) < 1500
    local_chat.sendline(f"/save {tmp_path}/said.json")
    local_chat.expect("saved 2 messages to")

    said = json.loads((tmp_path / "said.json").read_text())
    assert [message["role"] for message in said] == ["user", "assistant"]


@pytest.mark.model
def test_ctrl_c_aborts_the_request_on_the_server(remote_chat, model_server, tmp_path: Path) -> None:
    remote_chat.sendline(ENDLESS)
    remote_chat.expect("13, 14")
    assert model_server.metric("num_requests_running") == 1
    remote_chat.sendintr()
    remote_chat.expect(FIGURES + ", stopped")
    model_server.wait_for("num_requests_running", 0)

    remote_chat.sendline("/clear")
    remote_chat.sendline("/system You are a pirate.")
    remote_chat.expect("system message: You are a pirate.")
    remote_chat.sendline('"""One line\nand another"""')
    remote_chat.expect(FIGURES)
    remote_chat.sendline("word " * 2100)  # refused, so not added to the conversation
    remote_chat.expect("the server returned status 400: .*2048")
    remote_chat.sendline(f"/save {tmp_path}/said.json")
    remote_chat.expect("saved 3 messages to")
    said = json.loads((tmp_path / "said.json").read_text())
    assert said[0] == {"role": "system", "content": "You are a pirate."}
    assert said[1] == {"role": "user", "content": "One line\nand another"}

    remote_chat.sendline("/system -")
    remote_chat.expect("system message: none")
    remote_chat.sendline("/cleer")
    remote_chat.expect("unknown command /cleer")
    remote_chat.sendline("/help")
    remote_chat.expect("/save FILE")


def chat_of(url: str, text: str, *flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "portalm.cli.main", "chat", "--url", url, *flags],
        input=text, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


def test_with_a_pipe_only_answers_are_printed(null_server: RunningServer) -> None:
    done = chat_of(null_server.url, "w5 w6\nw7\n", "--max-tokens", "3")

    assert done.returncode == 0, done.stderr
    assert [len(line.split("w")) - 1 for line in done.stdout.splitlines()] == [3, 3]
    assert done.stderr == ""


def test_refused_question_sets_the_exit_status(null_server: RunningServer) -> None:
    done = chat_of(null_server.url, "w5\n", "--temperature", "-1")

    assert done.returncode == 1
    assert "the server returned status 400: temperature" in done.stderr


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (("--device", "cpu"), "device cannot be set with --url"),
        (("--model", "other"), "model 'other' is not served here"),
    ],
    ids=["engine setting", "unknown model"],
)
def test_options_that_the_server_cannot_apply_are_rejected(null_server, flags, text: str) -> None:
    done = chat_of(null_server.url, "w5\n", *flags)

    assert done.returncode != 0
    assert text in done.stderr


def test_unreachable_server_is_a_one_line_error() -> None:
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
def test_loading_progress_is_shown_only_on_a_terminal(
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
