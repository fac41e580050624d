"""Fixtures: real servers in separate processes, on the loopback interface."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from tests.tiny import make_config_folder

START_S = 90
PLUGINS = Path(__file__).parents[1] / "plugins"
"""Folder of the test package house_plugins."""

ENDLESS = (  # the default model continues this until it reaches the limit
    "Write all numbers from 1 to 1000, separated by commas: 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12,"
)


@dataclass
class RunningServer:
    """A server process, its URL and the lines that it has written."""

    url: str
    process: subprocess.Popen[str]
    output: list[str]

    def client(self, **options: object) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=60, **options)

    def metric(self, name: str) -> float:
        """Current value of the metric `portalm:{name}`, which must have one sample."""
        text = self.client().get("/metrics").text
        [value] = re.findall(rf"^portalm:{name}(?:{{[^}}]*}})? (\S+)$", text, re.MULTILINE)
        return float(value)

    def wait_for(self, name: str, value: float, seconds: float = 10) -> None:
        """Wait until the metric has the value; fails after `seconds`."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if self.metric(name) == value:
                return
            time.sleep(0.05)
        raise AssertionError(f"{name} is {self.metric(name)}, not {value}")

    def engine_pid(self) -> int:
        """Process id of the server's engine."""
        found = subprocess.run(
            ["pgrep", "-P", str(self.process.pid), "-f", "portalm.engine"],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        return int(found.stdout.split()[0])


@contextlib.contextmanager
def running_server(*flags: str) -> Iterator[RunningServer]:
    """Run `portalm serve` with these flags on a free port."""
    command = [sys.executable, "-m", "portalm.cli.main", "serve", "--port", "0", *flags]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd="/",
        env={**os.environ, "PYTHONPATH": str(PLUGINS)},
    )  # fmt: skip
    output: list[str] = []
    found: list[str] = []
    ready = threading.Event()

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            output.append(line)
            match = re.search(r"on (https?://127\.0\.0\.1:\d+)", line)
            if match and not found:
                found.append(match.group(1))
                ready.set()
        ready.set()

    threading.Thread(target=read, daemon=True).start()
    try:
        ready.wait(START_S)
        assert found, "".join(output)
        yield RunningServer(found[0], process, output)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def make_model_folder(folder: Path) -> Path:
    """Write a tiny config and a tokenizer of 512 words, for the null device."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    make_config_folder(folder)
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, 512)}}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "</s>", "bos_token": "<s>"}')
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.content }} {% endfor %}"
    )
    return folder


@pytest.fixture(scope="session")
def model_server(default_model: Path) -> Iterator[RunningServer]:
    """A server of the default model with a context of 2048 tokens."""
    with running_server("--max-model-len", "2k", "--served-model-name", "small") as server:
        yield server


@pytest.fixture(scope="session")
def null_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    folder = make_model_folder(tmp_path_factory.mktemp("server") / "tiny")
    flags = ("--device", "null", "--load-format", "dummy", "--served-model-name", "tiny", "alias")
    with running_server(str(folder), *flags) as server:
        yield server


BYTE_0 = 3
"""Token id of byte 0 in the byte model's vocabulary: byte b is token BYTE_0 + b."""
EOS = 2


def make_byte_model_folder(folder: Path) -> Path:
    """Write a tiny config and a tokenizer of bytes and a few words, for a device that computes."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    spelled = _byte_characters()
    words = ["th", "the", "he", "\u0120the", "ll"]
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2}
    vocab |= {char: BYTE_0 + byte for byte, char in enumerate(spelled)}
    vocab |= {word: len(vocab) + i for i, word in enumerate(words)}
    merges = [("t", "h"), ("th", "e"), ("h", "e"), ("\u0120", "the"), ("l", "l")]
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name) for name in ("<unk>", "<s>", "</s>")])
    make_config_folder(folder, vocab_size=len(vocab))
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "</s>", "bos_token": "<s>"}')
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    return folder


def _byte_characters() -> list[str]:
    """The character that byte-level vocabularies use for each byte: itself if printable."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


@pytest.fixture(scope="session")
def byte_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server on a device that computes, so that sampled tokens depend on the whole request."""
    folder = make_byte_model_folder(tmp_path_factory.mktemp("bytes") / "tiny")
    flags = ("--load-format", "dummy", "--dtype", "float32", "--served-model-name", "bytes")
    with running_server(str(folder), *flags) as server:
        yield server
