"""Memory that this process may use: the machine's, or less where a container limits it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from portalm.backend import MemInfo

_CGROUP_ROOT = Path("/sys/fs/cgroup")
_PROC = Path("/proc")
_RESET_PEAK = "5"
"""Written to clear_refs, it resets the peak resident size to the current size (man 5 proc)."""


def memory(proc: Path = _PROC, cgroup_root: Path = _CGROUP_ROOT) -> MemInfo:
    """Return total and free bytes: the minimum over the machine and all enclosing cgroups.

    Page cache that can be dropped counts as free.

    Args:
        proc: where procfs is mounted.
        cgroup_root: where control groups (version 1 or 2) are mounted.
    """
    info = _fields(proc / "meminfo", unit=1024)
    total = info.get("MemTotal") or _physical_bytes()
    free = info.get("MemAvailable", info.get("MemFree", total))
    for limit, used in _cgroup_limits(proc, cgroup_root):
        if limit < total:
            total = limit
        free = min(free, limit - used)
    return MemInfo(total=total, free=max(0, free), host_shared=True)


@contextmanager
def peak(proc: Path = _PROC) -> Iterator[Callable[[], int]]:
    """Yield a function that returns the peak of resident bytes, above those at the start.

    Where the kernel does not allow a reset of the peak, the peak since the process started is
    used: too much rather than too little.
    """
    status = proc / "self" / "status"
    start = _fields(status, unit=1024).get("VmRSS", 0)
    with suppress(OSError):  # some sandboxes forbid it; see above
        (proc / "self" / "clear_refs").write_text(_RESET_PEAK)
    at_the_end: int | None = None

    def used() -> int:
        if at_the_end is not None:
            return at_the_end
        return max(0, _fields(status, unit=1024).get("VmHWM", 0) - start)

    try:
        yield used
    finally:
        at_the_end = used()


def _physical_bytes() -> int:
    """Return the machine's memory, for systems without procfs."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _fields(path: Path, *, unit: int = 1) -> dict[str, int]:
    """Parse `Name: value` lines as numbers times `unit`; skip what cannot be parsed."""
    values: dict[str, int] = {}
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return values
    for line in lines:
        words = line.replace(":", " ").split()
        if len(words) > 1 and words[1].isdigit():
            values[words[0]] = int(words[1]) * unit
    return values


def _cgroup_limits(proc: Path, root: Path) -> Iterator[tuple[int, int]]:
    """(limit, bytes in use that cannot be dropped) of each control group around this process."""
    try:
        lines = (proc / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            yield from _limits_upwards(root, path, "memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            yield from _limits_upwards(
                root / "memory",
                path,
                "memory.limit_in_bytes",
                "memory.usage_in_bytes",
                "total_inactive_file",
            )


def _limits_upwards(
    root: Path, path: str, limit_name: str, used_name: str, cache_name: str
) -> Iterator[tuple[int, int]]:
    """Limits from the process's own group up to the root.

    In a container the path is often the host's and not visible. Then only the root is, which is
    the container's own group.
    """
    group = root / path.lstrip("/")
    for folder in (group, *group.parents):
        limit, used = _number(folder / limit_name), _number(folder / used_name)
        if limit is not None and used is not None:
            yield limit, used - _fields(folder / "memory.stat").get(cache_name, 0)
        if folder == root:
            return


def _number(path: Path) -> int | None:
    """Return the number in a file; None if there is no file or it says `max`."""
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None
