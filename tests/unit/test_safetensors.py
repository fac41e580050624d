"""Memory used while a safetensors file is read."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from portalm.models.loader.config_json import read_config
from portalm.models.loader.safetensors import SafetensorsCheckpoint
from tests.tiny import make_config_folder

MIB = 1 << 20


def mapped_bytes(path: Path) -> int:
    """Bytes of the file that count as this process's memory."""
    is_this_file, total = False, 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if not first.endswith(":"):
            is_this_file = line.endswith(str(path))
        elif is_this_file and first == "Rss:":
            total += int(line.split()[1]) * 1024
    return total


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/smaps")
def test_pages_already_read_do_not_stay_in_memory(tmp_path: Path) -> None:
    folder = make_config_folder(tmp_path)
    file = folder / "model.safetensors"
    save_file({f"{i}": torch.full((16 * MIB,), i, dtype=torch.uint8) for i in range(12)}, file)
    checkpoint = SafetensorsCheckpoint(folder, read_config(folder, {}))

    most = 0
    for i in range(12):
        assert int(checkpoint.tensor(f"{i}").max()) == i  # every page is read
        most = max(most, mapped_bytes(file))

    assert 16 * MIB <= most <= 96 * MIB
