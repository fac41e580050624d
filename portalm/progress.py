"""Progress on stderr: a bar if stderr is a terminal, otherwise one line per finished phase."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from tqdm import tqdm

_LOADING_PHASES = {"load": "Loading model", "capture": "Capturing steps", "warm_up": "Warming up"}


class ProgressBar:
    """Progress of one phase that handles items one by one. Use it as a context manager.

    A log file gets a line such as "Answering: 8/8 requests in 2.1 s, 95.0 tok/s" at the end.
    """

    def __init__(self, phase: str, total: int | None, *, unit: str, is_shown: bool = True) -> None:
        """Show an empty bar.

        Args:
            phase: what is being done, for example "Answering".
            total: number of items; None if unknown.
            unit: what an item is, in the plural, for example "requests".
            is_shown: False: write nothing at all.
        """
        self._phase, self._total, self._unit = phase, total, unit
        self._writes_line = is_shown and not sys.stderr.isatty()
        self._count = 0
        self._note = ""
        self._started = time.perf_counter()
        self._bar = tqdm(
            total=total, desc=phase, unit=unit, disable=not is_shown or self._writes_line
        )

    def update(self, note: str = "") -> None:
        """Count one more item.

        Args:
            note: shown after the count, for example the speed so far; empty: keep the last one.
        """
        self._count += 1
        if note:
            self._note = note
            self._bar.set_postfix_str(note, refresh=False)
        self._bar.update()

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._bar.close()
        if self._writes_line:
            count = str(self._count) if self._total is None else f"{self._count}/{self._total}"
            seconds = time.perf_counter() - self._started
            note = f", {self._note}" if self._note else ""
            _write_line(f"{self._phase}: {count} {self._unit} in {seconds:.1f} s{note}")


class LoadingBar:
    """Progress of loading an engine, phase by phase. Use it as a context manager.

    The bar disappears when it is closed. A log file gets a line such as "Loading model: 3.2 s" for
    each phase.
    """

    def __init__(self, *, is_shown: bool = True) -> None:
        """Show the first phase, "load", at 0 %."""
        self._writes_line = is_shown and not sys.stderr.isatty()
        self._phase = "load"
        self._started = time.perf_counter()
        self._bar = tqdm(
            total=100,
            desc=_LOADING_PHASES[self._phase],
            bar_format="{desc}: {percentage:3.0f}%|{bar}| {elapsed}",
            disable=not is_shown or self._writes_line,
            leave=False,
        )

    def show(self, phase: str, share: float) -> None:
        """Show how far loading is: `EngineProgress.phase` and `EngineProgress.share`."""
        if phase != self._phase:
            self._end_phase()
            self._phase, self._started = phase, time.perf_counter()
        self._bar.set_description_str(_LOADING_PHASES[phase], refresh=False)
        self._bar.n = int(100 * share)
        self._bar.refresh()

    def _end_phase(self, outcome: str = "") -> None:
        if self._writes_line:
            seconds = time.perf_counter() - self._started
            _write_line(f"{_LOADING_PHASES[self._phase]}: {outcome}{seconds:.1f} s")

    def __enter__(self) -> LoadingBar:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._bar.close()
        self._end_phase("" if error is None else "failed after ")


def _write_line(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
