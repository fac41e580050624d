"""Counting the kernels that Triton compiles."""

from __future__ import annotations

from typing import Any


class Compiles:
    """Names of the kernels that Triton compiled since the start, or since `clear`."""

    def __init__(self) -> None:
        """Start counting; where Triton is not installed, nothing is ever compiled."""
        self.names: list[str] = []
        try:
            from triton import knobs
        except ImportError:
            return
        previous = knobs.compilation.listener

        def listen(*, src: Any, cache_hit: bool, **more: Any) -> None:
            if not cache_hit:
                self.names.append(src.name)
            if previous is not None:
                previous(src=src, cache_hit=cache_hit, **more)

        knobs.compilation.listener = listen

    def clear(self) -> None:
        """Forget what was compiled so far."""
        self.names.clear()
