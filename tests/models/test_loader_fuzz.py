"""Damaged checkpoints load or are refused: no other error, no crash, no unbounded memory."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.models.gguf_writer import write_gguf
from tests.models.test_gguf_families import FILES, convert
from tests.models.test_llama import saved
from tests.models.test_quantized_checkpoints import CASES, save


def safetensors(folder: Path) -> Path:
    return saved(folder / "tiny")


def gguf(folder: Path) -> Path:
    from safetensors.torch import load_file
    from transformers import AutoConfig

    plain = saved(folder / "plain")
    (folder / "file").mkdir()
    config, tensors = AutoConfig.from_pretrained(plain), load_file(plain / "model.safetensors")
    write_gguf(folder / "file" / "model.gguf", "llama", config, tensors)
    return folder / "file"


def experts(folder: Path) -> Path:
    """Write DeepSeek's GGUF file, with stacked experts and kv_b_proj in two parts."""
    (folder / "file").mkdir()
    file = next(f for f in FILES if f.name == "deepseek2" and not f.is_old)
    _, path = convert(folder, file, file.make())
    path.rename(folder / "file" / "model.gguf")
    return folder / "file"


def quantized(name: str) -> Callable[[Path], Path]:
    return lambda folder: save(folder / "tiny", CASES[name], is_plain=False)


KINDS = {
    "safetensors": safetensors,
    "gguf": gguf,
    "gguf of experts": experts,
    **{
        name: quantized(name)
        for name in ("awq", "gptq in act order", "w8a8", "fp8 by blocks", "bitsandbytes nf4")
    },
}


def fuzz(source: Path, count: int) -> None:
    completed = subprocess.run(
        [sys.executable, "-m", "tests.models.fuzz_worker", str(source), str(count)],
        capture_output=True,
        text=True,
        timeout=900,
        cwd=Path(__file__).parents[2],
    )
    assert completed.returncode == 0, completed.stdout + completed.stderr[-4000:]


@pytest.mark.parametrize("kind", ["safetensors", "gguf", "gguf of experts", "awq"])
def test_damaged_files_load_or_are_refused(tmp_path: Path, kind: str) -> None:
    fuzz(KINDS[kind](tmp_path), 60)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_many_more_damaged_files(tmp_path: Path, kind: str) -> None:
    fuzz(KINDS[kind](tmp_path), 1500)
