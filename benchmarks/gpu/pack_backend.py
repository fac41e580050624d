"""A dry GPU that compiles for the Triton of another Python, for pack.py.

Triton finds a compiled kernel by a hash of its source, the options, and Triton's own files. One of
those is a native module, which differs between builds for different Pythons though it compiles the
same code. Here the hash is that of the GPU machine's Triton.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

from gpu.dry_backend import DryCudaBackend

KEY = "PORTALM_PACK_TRITON_KEY"
"""Environment variable: file with the target's `triton_key()`."""

LAUNCHERS = "PORTALM_PACK_LAUNCHERS"
"""Environment variable: folder for the C sources of the launchers."""


class PackingCudaBackend(DryCudaBackend):
    """CUDA on a dry GPU; compiled kernels are stored for another build of the same Triton."""

    name = "dry-pack"

    def __init__(self) -> None:
        """Make this process dry, and change its hash of Triton, for good."""
        from triton.runtime import cache, driver

        key = Path(os.environ[KEY]).read_text()
        cache.triton_key = lambda: key
        super().__init__()
        active: Any = driver.active
        count_launches, folder = active.launcher_cls, Path(os.environ[LAUNCHERS])

        def launcher(source: Any, metadata: Any) -> Any:
            text = launcher_source(source, metadata)
            if text is not None:
                (folder / f"{hashlib.sha256(text.encode()).hexdigest()}.c").write_text(text)
            return count_launches(source, metadata)

        active.launcher_cls = launcher


def launcher_source(source: Any, metadata: Any) -> str | None:
    """C source of the module that launches a kernel; None if this Triton has one for all.

    Triton 3.6 compiles one for each signature, 0.1 to 0.3 s each, at the first launch.
    """
    from triton.backends.nvidia import driver

    make_launcher = getattr(driver, "make_launcher", None)
    if make_launcher is None:
        return None
    constants = {
        (source.fn.arg_names.index(place),) if isinstance(place, str) else place: value
        for place, value in source.constants.items()
    }
    descriptors = getattr(metadata, "tensordesc_meta", None)
    text: str = make_launcher(constants, dict(source.signature), descriptors)
    return text
