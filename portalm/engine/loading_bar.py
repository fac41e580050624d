"""How far loading is, on the terminal."""

from __future__ import annotations

from types import TracebackType

from tqdm import tqdm

_WORDS = {"load": "Loading model", "capture": "Capturing steps", "warm_up": "Warming up"}


class LoadingBar:
    """A bar on stderr; gone when it is closed."""

    def __init__(self, *, is_shown: bool | None = None) -> None:
        """None: it is shown if stderr is a terminal."""
        self._bar = tqdm(
            total=100,
            desc=_WORDS["load"],
            bar_format="{desc}: {percentage:3.0f}%|{bar}| {elapsed}",
            disable=None if is_shown is None else not is_shown,
            leave=False,
        )

    def show(self, phase: str, share: float) -> None:
        """What `portalm.engine.setup.Progress` tells."""
        self._bar.set_description_str(_WORDS[phase], refresh=False)
        self._bar.n = int(100 * share)
        self._bar.refresh()

    def __enter__(self) -> LoadingBar:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._bar.close()
