"""Which device XLA computes on, and how much memory it has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from portalm.backend import MemInfo
from portalm.errors import BackendError
from portalm_backends.portable import host_memory

_PCI = Path("/sys/bus/pci/devices")
_GOOGLE = "0x1ae0"
_CHIPS = {
    "0x0027": "v2 or v3",
    "0x005e": "v4",
    "0x0062": "v5p",
    "0x0063": "v5e",
    "0x006f": "v6e",
    "0x0076": "v7x",
}
"""PCI device ids of TPUs (from JAX's source) and their generations."""


def tpu_chips(pci: Path = _PCI) -> list[str]:
    """List the generation of each TPU chip on the PCI bus, without starting one."""
    chips = []
    for folder in sorted(pci.iterdir()) if pci.is_dir() else ():
        try:
            vendor, device = ((folder / name).read_text().strip() for name in ("vendor", "device"))
        except OSError:  # removed in the meantime, or not readable
            continue
        if vendor == _GOOGLE and device in _CHIPS:
            chips.append(_CHIPS[device])
    return chips


def require_room(step_bytes: int, room: MemInfo) -> None:
    """Raise `BackendError` of kind oom if the largest step does not fit in the free memory.

    Args:
        step_bytes: size of its temporaries and results, by the compiled program's own analysis.
        room: memory of the device after weights and KV cache were allocated.
    """
    if step_bytes > room.free:
        raise BackendError(
            "oom",
            f"the largest step takes {step_bytes / 2**20:.0f} MiB in addition to weights and KV "
            f"cache, and {room.free / 2**20:.0f} of {room.total / 2**20:.0f} MiB are free: lower "
            f"--max-num-batched-tokens, --max-num-seqs or --kv-cache-memory-bytes",
        )


def memory(device: Any) -> MemInfo:
    """Total and free bytes of a `jax.Device`; those of the host for a CPU device."""
    stats = None if device.platform == "cpu" else device.memory_stats()
    if not stats:
        return host_memory.memory()
    total = int(stats["bytes_limit"])
    return MemInfo(total=total, free=total - int(stats["bytes_in_use"]), host_shared=False)
