"""Shared by the parts: models, settings, sections, and printing of results."""

from __future__ import annotations

import json
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

MARK = "RESULT "
"""Prefix of output lines that contain a result as JSON."""

DONE = "DONE "
"""Prefix of output lines that name a finished section."""

LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 16384,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
"""Llama-3.1-8B without its rope scaling, which does not affect speed."""

LLAMA_1B = {
    **LLAMA_8B,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "head_dim": 64,
    "tie_word_embeddings": True,
}
"""Llama-3.2-1B."""

TINY = {
    **LLAMA_8B,
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "torch_dtype": "float32",
}
"""A toy model, to test the script itself."""


@dataclass(frozen=True)
class Settings:
    """Settings of a part, which gpu_run.py passes as its first argument."""

    device: str
    """Name of the backend."""
    part: str
    """Name of the part: 8b, 1b, ..."""
    sections: dict[str, float]
    """Sections to run, in order, with their shares of the time."""
    limit_s: float
    """Time limit of the part."""
    is_tiny: bool
    """Use toy shapes; the figures mean nothing then."""

    @property
    def is_dry(self) -> bool:
        """True for a dry GPU (dry.py): launches are real, values and figures mean nothing."""
        return self.device.startswith("dry")

    def model(self, name: str) -> dict[str, Any]:
        """Configuration of the model 8b or 1b; the toy model if `is_tiny`."""
        if self.is_tiny:
            return TINY
        found = {"8b": LLAMA_8B, "fp8": LLAMA_8B, "1b": LLAMA_1B}[name]
        return {**found, "num_hidden_layers": 2} if self.is_dry else found  # all layers are equal

    def scaled(self, real: int, tiny: int) -> int:
        """`tiny` if `is_tiny`, else `real`."""
        return tiny if self.is_tiny else real


def settings() -> Settings:
    """Read the settings from the command line."""
    return Settings(**json.loads(sys.argv[1]))


def report(name: str, value: float | str | None, unit: str = "", **more: Any) -> None:
    """Print one result; gpu_run.py saves it immediately."""
    print(MARK + json.dumps({"name": name, "value": value, "unit": unit, **more}), flush=True)


def fail(name: str, message: str) -> None:
    """Print a failure as a result."""
    report(f"FAILED {name}", None, message=message)


_START_SHARE = 0.7
"""Most of a part's time that its section `start` may take."""


class OutOfTime(BaseException):
    """A section reached its time limit; not an `Exception`, so that no check swallows it."""


class Clock:
    """Time left for the current section."""

    def __init__(self, seconds: float) -> None:
        """Start the clock."""
        self._until = time.monotonic() + seconds

    def left(self) -> float:
        """Seconds left."""
        return self._until - time.monotonic()


Section = Callable[[Clock], None]


def run_sections(run: Settings, sections: Mapping[str, Section]) -> None:
    """Run the selected sections; a failure or timeout of one does not stop the next ones.

    Each section gets its share of the time that is left, so time that one does not use goes to
    those after it. If `start` fails, nothing after it can run: it gets more.
    """
    until = time.monotonic() + 0.97 * run.limit_s
    names = list(run.sections)
    for i, name in enumerate(names):
        share = run.sections[name] / sum(run.sections[other] for other in names[i:])
        if name == "start":
            share = max(share, _START_SHARE)
        limit = share * max(until - time.monotonic(), 0.1)
        label = f"{run.part} {name}"
        try:
            with _limited(limit):
                sections[name](Clock(limit))
            print(DONE + name, flush=True)
            continue
        except OutOfTime:
            fail(label, f"stopped at its time limit of {limit:.0f} s")
        except Exception:
            traceback.print_exc()
            fail(label, traceback.format_exc())
        if name == "start":
            return


@contextmanager
def _limited(seconds: float) -> Iterator[None]:
    """Raise `OutOfTime` in this thread after `seconds`."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def model_folder(config: dict[str, Any]) -> str:
    """Create a folder with a config.json and no weights."""
    folder = Path(tempfile.mkdtemp(prefix="gpu-run-"))
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)
