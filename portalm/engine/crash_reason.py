"""Why a process ended: its exit status, the last lines of its stderr, and the kernel's counters.

Drivers and native libraries end a process without an exception: a driver prints a line about a
memory fault and aborts, the C++ runtime prints an uncaught exception, and the kernel kills a
process that takes too much memory without any message.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

MAX_REASON = 300
"""Maximum length of a quoted reason, in characters."""

_FATAL_S = 120.0
"""Seconds before the end in which a line that reports a fatal error counts as the reason. A driver
may write a core dump between its message and the end."""

_LAST_S = 5.0
"""The same for any other line of a library, when no line reports a fatal error."""

_SIGNALS = {
    signal.SIGSEGV: "segmentation fault",
    signal.SIGABRT: "abort",
    signal.SIGBUS: "bus error",
    signal.SIGFPE: "arithmetic error",
    signal.SIGILL: "illegal instruction",
}
"""Signals that a process causes itself."""

_FATAL = re.compile(
    r"memory access fault by|HW exception by|_STATUS_ERROR"  # drivers
    r"|terminate called|libc\+\+abi: terminating|^\s*what\(\):"  # C++ runtimes
    r"|assertion .*failed|check failed|LLVM ERROR|^F\d{4} "  # assertions of C and C++ libraries
    r"|double free|corrupted|invalid pointer|stack smashing|cannot allocate memory|bad_alloc",
    re.IGNORECASE,
)
"""Parts of the lines with which native code reports a fatal error."""

_OWN_RECORD = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3} [A-Z]+ |\{\"time\": ")
"""Start of a log record (portalm/logs.py): the program was in order when it wrote it."""

_PYTHON_FATAL = "Fatal Python error: "
"""Start of faulthandler's report of a signal; the stack of the thread follows."""

_FRAME = re.compile(r'\s+File "(?:.*/)?(?P<file>[^"/]+)", line (?P<line>\d+) in (?P<name>\S+)')

_CONTROL = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]|[\x00-\x08\x0b-\x1f\x7f]")
"""Terminal sequences and control characters except tabs and newlines."""


@dataclass(frozen=True, slots=True)
class LogLine:
    """One line of a process's stderr."""

    time: float
    """time.monotonic() when it was read."""
    text: str


def describe_exit(
    status: int, lines: Sequence[LogLine], *, now: float, num_oom_kills: int = 0
) -> str:
    """Describe the end of a process in a few words, without its name.

    Args:
        status: exit status; -N if signal N ended it.
        lines: last lines of its stderr, oldest first.
        now: time.monotonic() when it ended.
        num_oom_kills: processes that the kernel killed for lack of memory while it ran.

    Returns:
        For example: `was ended by SIGABRT (abort): Memory access fault by GPU node-1 ...`.
    """
    reason = _fatal_lines(lines, now)
    if status >= 0:
        what = f"exited with status {status}"
        reason = reason or _last_line(lines, now)
    else:
        what = f"was ended by {_signal_name(-status)}"
        if -status in _SIGNALS:
            place = _place(lines)
            reason = ", ".join(text for text in (reason or _last_line(lines, now), place) if text)
        elif -status == signal.SIGKILL:
            reason = reason or _reason_of_kill(num_oom_kills)
        else:
            reason = reason or "another process sent the signal"
    return f"{what}: {reason or 'its log shows no reason'}"


def _signal_name(number: int) -> str:
    try:
        name = signal.Signals(number)
    except ValueError:  # a real-time signal
        return f"signal {number}"
    return f"{name.name} ({_SIGNALS[name]})" if name in _SIGNALS else name.name


def _reason_of_kill(num_oom_kills: int) -> str:
    if num_oom_kills:
        return (
            f"out of host memory, most likely: the kernel killed {num_oom_kills} process(es) for "
            f"lack of memory meanwhile (`dmesg` names them)"
        )
    return "another process sent the signal, or the kernel for lack of host memory (see `dmesg`)"


def _native(lines: Sequence[LogLine]) -> list[LogLine]:
    """Lines of libraries and of the interpreter: neither log records nor faulthandler's report."""
    return [line for line in lines[: _report(lines)] if not _OWN_RECORD.match(line.text)]


def _report(lines: Sequence[LogLine]) -> int:
    """Index of the first line of faulthandler's report; the number of lines if there is none."""
    starts = [i for i, line in enumerate(lines) if line.text.startswith(_PYTHON_FATAL)]
    return starts[-1] if starts else len(lines)


def _fatal_lines(lines: Sequence[LogLine], now: float) -> str:
    """Return the last lines that report a fatal error; empty if there are none."""
    found: list[str] = []
    for line in reversed(_native(lines)):
        if _FATAL.search(line.text) and now - line.time <= _FATAL_S:
            found.append(_plain(line.text))
        elif found:  # one error may take several lines: "terminate called ...", "  what(): ..."
            break
    return _shorten(" ".join(reversed(found)))


def _last_line(lines: Sequence[LogLine], now: float) -> str:
    """Return the last line of a library or of the interpreter, if it is recent."""
    recent = (line for line in reversed(_native(lines)) if now - line.time <= _LAST_S)
    return _shorten(next((text for line in recent if (text := _plain(line.text))), ""))


def _place(lines: Sequence[LogLine]) -> str:
    """Return the Python function that ran, from faulthandler's report; empty without one.

    A native thread has no Python function: then it is the main thread's, which is listed last.
    """
    report = [line.text for line in lines[_report(lines) :]]
    threads = [i for i, text in enumerate(report) if "(most recent call first)" in text]
    current = [i for i in threads if report[i].startswith("Current thread")]
    for i in current or threads[-1:]:
        if i + 1 < len(report) and (frame := _FRAME.match(report[i + 1])):
            where = f"{frame['name']} ({frame['file']}:{frame['line']})"
            return f"in {where}" if current else f"with the main thread in {where}"
    return ""


def _plain(text: str) -> str:
    return " ".join(_CONTROL.sub("", text).split()).removesuffix(".")


def _shorten(text: str) -> str:
    return text if len(text) <= MAX_REASON else f"{text[: MAX_REASON - 3]}..."


def oom_kills(path: Path = Path("/proc/vmstat")) -> int:
    """Processes of this machine that the kernel has killed for lack of memory; 0 if unknown.

    They include those killed for the limit of a control group (container).
    """
    try:
        found = re.search(r"^oom_kill (\d+)$", path.read_text(), re.MULTILINE)
    except OSError:
        return 0
    return int(found[1]) if found else 0
