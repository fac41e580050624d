"""How the XLA backend reports a machine, tested without JAX and without a TPU."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

from portalm.backend import MemInfo
from portalm.errors import BackendError
from portalm_backends.xla import memory
from portalm_backends.xla.backend import XlaBackend


def add_device(pci: Path, name: str, vendor: str, device: str) -> None:
    folder = pci / name
    folder.mkdir()
    (folder / "vendor").write_text(f"{vendor}\n")
    (folder / "device").write_text(f"{device}\n")


def test_only_tpus_are_counted_as_chips(tmp_path: Path) -> None:
    add_device(tmp_path, "0000:00:04.0", "0x1ae0", "0x0063")
    add_device(tmp_path, "0000:00:05.0", "0x1ae0", "0x0063")
    add_device(tmp_path, "0000:00:06.0", "0x1ae0", "0x0042")  # a network card of the same vendor
    add_device(tmp_path, "0000:00:07.0", "0x8086", "0x0063")

    assert memory.tpu_chips(tmp_path) == ["v5e", "v5e"]


def test_a_machine_without_a_pci_bus_has_no_chips(tmp_path: Path) -> None:
    assert memory.tpu_chips(tmp_path / "pci") == []


@pytest.mark.parametrize(("chips", "extra"), [([], "xla-cpu"), (["v5e"] * 4, "tpu")])
def test_missing_packages_are_named_with_the_extra_that_installs_them(
    chips: list[str], extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "tpu_chips", lambda: chips)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)

    report = XlaBackend.find()

    assert not report.is_available
    assert f"pip install 'portalm[{extra}]'" in report.summary
    assert "jax" in report.summary


def test_a_process_forked_from_one_that_uses_jax_cannot_use_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(XlaBackend, "_process_id", os.getpid() + 1)

    report = XlaBackend.find()

    assert not report.is_available
    assert "was forked from one that uses JAX" in report.summary


def test_without_a_tpu_the_backend_is_not_chosen_automatically() -> None:
    assert XlaBackend.rank < 0 or memory.tpu_chips()


def test_a_step_that_does_not_fit_is_refused_with_its_size() -> None:
    room = MemInfo(total=4 << 30, free=100 << 20, host_shared=False)

    memory.require_room(100 << 20, room)
    with pytest.raises(BackendError, match=r"takes 101 MiB .* 100 of 4096 MiB are free"):
        memory.require_room(101 << 20, room)
