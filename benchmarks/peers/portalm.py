"""PortaLM itself: `portalm serve` from the environment that runs the comparison."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from peers.base import MAX_CONTEXT, MAX_REQUESTS, Model, PeerUnavailable
from peers.server import ServerPeer


class PortaLM(ServerPeer):
    """`portalm serve`."""

    name = "portalm"
    extra_body = {  # noqa: RUF012 - read only
        "ignore_eos": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }

    def install(self) -> str:
        """Return the version; PortaLM is installed already."""
        return version("portalm")

    def prepare(self, model: Model, fmt: str) -> None:
        """Refuse a format for which PortaLM has no flag."""
        if fmt != "bf16" and "--quantization" not in self._help():
            raise PeerUnavailable(f"`portalm serve` has no --quantization {fmt} yet")

    def command(self, model: Model, fmt: str, port: int) -> list[str]:
        """Build the command line: defaults, except for the limits that all peers share."""
        command = [str(_executable()), "serve", str(model.folder), "--port", str(port)]
        command += ["--max-model-len", str(MAX_CONTEXT), "--max-num-seqs", str(MAX_REQUESTS)]
        command += ["--dtype", "bfloat16"]
        return [*command, "--quantization", "none" if fmt == "bf16" else fmt]

    def _help(self) -> str:
        command = [str(_executable()), "serve", "--help"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _executable() -> Path:
    return Path(sys.executable).with_name("portalm")
