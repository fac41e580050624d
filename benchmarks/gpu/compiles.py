"""Counting the kernels that Triton compiles, or loads from its cache on disk."""

from __future__ import annotations

from typing import Any


class Compiles:
    """Kernels that Triton compiled or loaded since the start, or since `clear`.

    One that is loaded after startup would be compiled there on a machine whose cache is cold.
    """

    def __init__(self) -> None:
        """Start counting; where Triton is not installed, nothing is ever compiled."""
        self.names: list[str] = []
        """Names, one for each variant."""
        self.num_loaded = 0
        """Variants that were found in the cache on disk."""
        try:
            from triton import knobs
        except ImportError:
            return
        previous = knobs.compilation.listener

        def listen(*, src: Any, cache_hit: bool, **more: Any) -> None:
            self.names.append(src.name)
            self.num_loaded += cache_hit
            if previous is not None:
                previous(src=src, cache_hit=cache_hit, **more)

        knobs.compilation.listener = listen

    def clear(self) -> None:
        """Forget what was compiled so far."""
        self.names.clear()
        self.num_loaded = 0
