"""Start, measure and stop a peer's processes with all their children."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

SAMPLE_S = 0.25
END_TIMEOUT_S = 20.0
_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")


class Process:
    """A command and all of its descendants."""

    def __init__(
        self,
        command: Sequence[str],
        log: Path,
        *,
        environment: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        is_piped: bool = False,
    ) -> None:
        """Start `command`; its output goes to `log`, or to `popen.stdout` if piped."""
        pipe = subprocess.PIPE if is_piped else None
        with log.open("w") as out:
            self.started = time.monotonic()
            self.popen = subprocess.Popen(
                command,
                stdin=pipe or subprocess.DEVNULL,
                stdout=pipe or out,
                stderr=out,
                env={**os.environ, **(environment or {})},
                cwd=cwd,
                text=True,
                start_new_session=True,
            )
        self.log = log
        self.peak_rss_bytes = 0
        self.peak_pss_bytes = 0
        self._cpu_s: dict[int, float] = {}
        self._is_ended = threading.Event()
        self._sampler = threading.Thread(target=self._sample, daemon=True)
        self._sampler.start()

    def is_alive(self) -> bool:
        """Whether the command itself is running."""
        return self.popen.poll() is None

    def cpu_s(self) -> float:
        """CPU seconds that its processes have used."""
        for pid in _tree(self.popen.pid):
            with contextlib.suppress(OSError, IndexError):
                stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                self._cpu_s[pid] = (int(stat[11]) + int(stat[12])) / _TICKS
        return sum(self._cpu_s.values())

    def note_pss(self) -> None:
        """Read memory use, shared pages counted once; slow, so done between measurements."""
        total = 0
        for pid in _tree(self.popen.pid):
            with contextlib.suppress(OSError):
                for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                    if line.startswith("Pss:"):
                        total += int(line.split()[1]) * 1024
        self.peak_pss_bytes = max(self.peak_pss_bytes, total)

    def end(self) -> None:
        """Terminate its processes, and kill them after a timeout."""
        self._is_ended.set()
        pids = _tree(self.popen.pid)
        self.popen.terminate()
        try:
            self.popen.wait(END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.popen.kill()
            self.popen.wait()
        for pid in pids[1:]:  # children that survived it
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for stream in (self.popen.stdin, self.popen.stdout):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()
        self._sampler.join()

    def _sample(self) -> None:
        while not self._is_ended.wait(SAMPLE_S):
            total = 0
            for pid in _tree(self.popen.pid):
                with contextlib.suppress(OSError, IndexError):
                    total += int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE
            self.peak_rss_bytes = max(self.peak_rss_bytes, total)


def machine_cpu_s() -> float:
    """Return the CPU seconds that all processes of the machine have used, stolen time included."""
    names = Path("/proc/stat").read_text().splitlines()[0].split()[1:]
    user, nice, system, _idle, _iowait, irq, softirq, steal = (int(one) for one in names[:8])
    return (user + nice + system + irq + softirq + steal) / _TICKS


def _tree(root: int) -> list[int]:
    """Return `root` and its living descendants."""
    pids = [root]
    for pid in pids:  # grows during the iteration
        with contextlib.suppress(OSError):
            for task in Path(f"/proc/{pid}/task").iterdir():
                pids.extend(int(child) for child in (task / "children").read_text().split())
    return pids
