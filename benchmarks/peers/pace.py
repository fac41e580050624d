"""AMD PACE: `pace-server`, for processors with AVX512-BF16."""

from __future__ import annotations

import shutil

from peers.base import MAX_REQUESTS, Model, PeerUnavailable, Venv, cpu_flags
from peers.server import ServerPeer, free_port

_NEEDS = ("avx512f", "avx512_bf16")


class Pace(ServerPeer):
    """A router and one engine with the continuous-batching scheduler."""

    name = "pace"
    health_path = "/v1/health"
    formats = ("bf16",)

    def install(self) -> str:
        """Refuse unsupported processors before anything is downloaded."""
        if missing := set(_NEEDS) - cpu_flags():
            raise PeerUnavailable(f"it needs {', '.join(sorted(missing))}, this CPU has none")
        if shutil.which("numactl") is None:
            raise PeerUnavailable("pace-server needs numactl: apt install numactl")
        venv = Venv(self.settings, self.name)
        venv.install(["amd-pace"])
        return venv.version("amd-pace")

    def command(self, model: Model, fmt: str, port: int) -> list[str]:
        """Build the command line: the router listens on `port`, the engine connects to it."""
        cpus = self.settings.cpus
        return [
            str(Venv(self.settings, self.name).python.with_name("pace-server")),
            *("--server_model", str(model.folder), "--dtype", "bfloat16"),
            *("--router_host", "127.0.0.1", "--router_port", str(port)),
            *("--server_host", "127.0.0.1", "--server_port", str(free_port())),
            *("--kv_cache_type", "SLAB_POOL", "--serve_type", "continuous_batch"),
            *("--max_num_running_reqs", str(MAX_REQUESTS), "--kv_cache_memory_gb", "2"),
            *("--numa_physcpubind", f"{cpus[0]}-{cpus[-1]}"),
        ]
