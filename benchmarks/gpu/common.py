"""Shared by the stages: models, settings, timing, and printing of results."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MARK = "RESULT "
"""Prefix of output lines that contain a result as JSON."""

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
    """Settings of a stage."""

    device: str
    """Name of the backend."""
    limit_s: float
    """Time limit of the stage."""
    is_tiny: bool
    """Use toy shapes; the figures mean nothing then."""

    def model(self, name: str) -> dict[str, Any]:
        """Configuration of the model 8b or 1b; the toy model if `is_tiny`."""
        return TINY if self.is_tiny else {"8b": LLAMA_8B, "1b": LLAMA_1B}[name]

    def scaled(self, real: int, tiny: int) -> int:
        """`tiny` if `is_tiny`, else `real`."""
        return tiny if self.is_tiny else real


def settings() -> Settings:
    """Read the settings that gpu_run.py passes as the first argument."""
    return Settings(**json.loads(sys.argv[1]))


def report(name: str, value: float | str | None, unit: str = "", **more: Any) -> None:
    """Print one result; gpu_run.py saves it immediately."""
    print(MARK + json.dumps({"name": name, "value": value, "unit": unit, **more}), flush=True)


def model_folder(config: dict[str, Any]) -> str:
    """Create a folder with a config.json and no weights."""
    folder = Path(tempfile.mkdtemp(prefix="gpu-run-"))
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def seconds(backend: Any, work: Callable[[], object], *, times: int = 20, warm: int = 3) -> float:
    """Median seconds per call of `work`, measured with the device's events if it is a GPU."""
    import torch

    for _ in range(warm):
        work()
    if backend.device().type == "cpu":
        taken = []
        for _ in range(times):
            begin = time.perf_counter()
            work()
            taken.append(time.perf_counter() - begin)
        return sorted(taken)[len(taken) // 2]
    pairs = [
        (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
        for _ in range(times)
    ]
    for begin, end in pairs:
        begin.record()
        work()
        end.record()
    torch.cuda.synchronize()
    return sorted(b.elapsed_time(e) for b, e in pairs)[times // 2] / 1e3
