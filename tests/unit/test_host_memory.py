"""Memory that a process may use: the machine's, or less where a container limits it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from portalm_backends.portable import host_memory

GIB = 1 << 30
KIB = 1024


class Machine:
    """A procfs and a cgroup tree, in files."""

    def __init__(self, folder: Path) -> None:
        self.proc, self.cgroups = folder / "proc", folder / "cgroup"
        (self.proc / "self").mkdir(parents=True)
        self.cgroups.mkdir()
        self.write(
            "proc/meminfo",
            f"MemTotal: {64 * GIB // KIB} kB\nMemFree: 9 kB\nMemAvailable: {48 * GIB // KIB} kB\n",
        )

    def write(self, path: str, text: str | int) -> None:
        file = self.proc.parent / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text}\n")

    def gib(self) -> tuple[float, float]:
        """Total and free memory, in GiB."""
        info = host_memory.memory(self.proc, self.cgroups)
        assert info.host_shared
        return info.total / GIB, info.free / GIB


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_without_limits_it_is_the_memory_of_the_machine(machine: Machine) -> None:
    assert machine.gib() == (64, 48)


def test_a_cgroup_v2_limit_applies(machine: Machine) -> None:
    machine.write("proc/self/cgroup", "0::/a/b")
    machine.write("cgroup/a/b/memory.max", 8 * GIB)
    machine.write("cgroup/a/b/memory.current", 5 * GIB)

    assert machine.gib() == (8, 3)


def test_inactive_page_cache_counts_as_free(machine: Machine) -> None:
    machine.write("proc/self/cgroup", "0::/a")
    machine.write("cgroup/a/memory.max", 8 * GIB)
    machine.write("cgroup/a/memory.current", 5 * GIB)
    machine.write("cgroup/a/memory.stat", f"anon 7\ninactive_file {2 * GIB}\nactive_file 1")

    assert machine.gib() == (8, 5)


def test_the_lowest_limit_of_the_enclosing_cgroups_applies(machine: Machine) -> None:
    machine.write("proc/self/cgroup", "0::/a/b")
    machine.write("cgroup/a/b/memory.max", "max")
    machine.write("cgroup/a/b/memory.current", GIB)
    machine.write("cgroup/a/memory.max", 16 * GIB)
    machine.write("cgroup/a/memory.current", 4 * GIB)
    machine.write("cgroup/memory.max", 6 * GIB)
    machine.write("cgroup/memory.current", 5 * GIB)

    assert machine.gib() == (6, 1)


def test_inside_a_container_the_root_cgroup_applies(machine: Machine) -> None:
    machine.write("proc/self/cgroup", "0::/as/the/host/sees/it")
    machine.write("cgroup/memory.max", 4 * GIB)
    machine.write("cgroup/memory.current", GIB)

    assert machine.gib() == (4, 3)


def test_a_cgroup_v1_limit_applies(machine: Machine) -> None:
    machine.write("proc/self/cgroup", "5:cpu,cpuacct:/a\n4:memory:/a\n1:name=systemd:/a")
    machine.write("cgroup/memory/a/memory.limit_in_bytes", 8 * GIB)
    machine.write("cgroup/memory/a/memory.usage_in_bytes", 6 * GIB)
    machine.write("cgroup/memory/a/memory.stat", f"total_inactive_file {GIB}")
    machine.write("cgroup/memory/memory.limit_in_bytes", 2**63 - 4096)
    machine.write("cgroup/memory/memory.usage_in_bytes", 9 * GIB)

    assert machine.gib() == (8, 3)


def test_a_limit_above_the_machines_memory_is_ignored(machine: Machine) -> None:
    machine.write("proc/self/cgroup", "0::/a")
    machine.write("cgroup/a/memory.max", 640 * GIB)
    machine.write("cgroup/a/memory.current", GIB)

    assert machine.gib() == (64, 48)


def test_a_cgroup_above_its_limit_has_nothing_free(machine: Machine) -> None:
    machine.write("proc/self/cgroup", "0::/a")
    machine.write("cgroup/a/memory.max", GIB)
    machine.write("cgroup/a/memory.current", 2 * GIB)

    assert machine.gib() == (1, 0)


def test_without_procfs_it_is_the_physical_memory(tmp_path: Path) -> None:
    info = host_memory.memory(tmp_path / "none", tmp_path / "none")

    assert info.total == info.free > 0


def test_this_machine_has_memory() -> None:
    info = host_memory.memory()

    assert 0 < info.free <= info.total


def test_peak_is_the_maximum_of_resident_memory() -> None:
    size = 256 << 20
    with host_memory.peak() as used:
        torch.ones(size // 4)  # freed at once
        inside = used()
        torch.ones(size // 8)

    assert inside >= 0.9 * size
    assert used() >= inside


def test_peak_does_not_grow_after_its_block() -> None:
    with host_memory.peak() as used:
        pass
    before = used()

    kept = torch.ones(64 << 20)

    assert len(kept) and used() == before
