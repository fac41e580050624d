"""Count kernels that are compiled after startup: each one delays requests by up to a second."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

logger = logging.getLogger(__name__)


class LateCompiles:
    """Kernels compiled, or loaded from Triton's cache on disk, while the backend is sealed."""

    def __init__(self) -> None:
        """Count nothing yet."""
        self.kernels: Counter[str] = Counter()
        """Number of compilations by kernel."""

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Context in which compilations are counted; the first one of each kernel is logged."""
        from triton import knobs

        before = knobs.runtime.jit_post_compile_hook

        def compiled(**about: Any) -> Any:
            self._note(about["fn"].name, about["repr"])
            return None if before is None else before(**about)

        knobs.runtime.jit_post_compile_hook = compiled
        try:
            yield
        finally:
            if knobs.runtime.jit_post_compile_hook is compiled:
                knobs.runtime.jit_post_compile_hook = before

    def _note(self, name: str, variant: str) -> None:
        self.kernels[name] += 1
        if self.kernels[name] == 1:
            logger.warning(
                "kernel %s was compiled while serving, which delays requests; startup should have "
                "compiled this variant: %s (reported once per kernel)",
                name,
                variant,
            )
