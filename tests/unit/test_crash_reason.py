"""Reasons for the end of a process, from its status and the last lines of its stderr."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from portalm.engine.crash_reason import MAX_REASON, LogLine, describe_exit, oom_kills
from portalm.engine.stderr_relay import StderrRelay

RECORD = "2026-11-21 16:40:01.123 ERROR engine: terminate called by an operator"
RECORD_JSON = '{"time": "2026-11-21T16:40:01.123Z", "message": "check failed"}'
GPU_FAULT = (
    "Memory access fault by GPU node-1 (Agent handle: 0x5581) on address 0x7f01. "
    "Reason: Page not present or supervisor privilege."
)
REPORT = [
    "Fatal Python error: Aborted",
    "",
    "Thread 0x00007f01 (most recent call first):",
    '  File "/usr/lib/python3.11/threading.py", line 320 in wait',
    "",
    "Current thread 0x00007f02 (most recent call first):",
    '  File "/opt/portalm/attention.py", line 120 in attend',
    '  File "/opt/portalm/backend.py", line 80 in step',
    "",
    "Extension modules: numpy.core (total: 1)",
]
REPORT_OF_A_NATIVE_THREAD = [
    line.replace("Current thread", "Thread") if "Current" in line else line for line in REPORT
]


def describe(status: int, *texts: str, age_s: float = 0.1, num_oom_kills: int = 0) -> str:
    lines = [LogLine(100.0 - age_s, text) for text in texts]
    return describe_exit(status, lines, now=100.0, num_oom_kills=num_oom_kills)


@pytest.mark.parametrize(
    "text",
    [
        GPU_FAULT,
        "HW Exception by GPU node-1 (Agent handle: 0x55) reason :GPU Hang",
        ":0:rocdevice.cpp:2984: aborting with error : HSA_STATUS_ERROR_OUT_OF_RESOURCES: no queue",
        "python: attend.cpp:51: void attend(): Assertion `size > 0' failed",
        "F0000 00:00:1732.5 12 pjrt_client.cc:88] Check failed: buffer != nullptr",
        "LLVM ERROR: out of memory",
        "malloc(): corrupted top size",
        "free(): invalid pointer",
        "*** stack smashing detected ***: terminated",
    ],
)
def test_line_of_native_code_is_the_reason_of_an_abort(text: str) -> None:
    found = describe(-signal.SIGABRT, RECORD, text, "Stack dump: 0", RECORD_JSON, *REPORT)

    assert found.startswith(f"was ended by SIGABRT (abort): {text.removesuffix('.')}")
    assert found.endswith(", in attend (attention.py:120)")


def test_uncaught_cpp_exception_includes_its_message() -> None:
    found = describe(
        -signal.SIGABRT,
        "loading",
        "terminate called after throwing an instance of 'std::runtime_error'",
        "  what():  no memory for the workspace",
    )

    assert found == (
        "was ended by SIGABRT (abort): terminate called after throwing an instance of "
        "'std::runtime_error' what(): no memory for the workspace"
    )


def test_segmentation_fault_names_the_python_function() -> None:
    assert describe(-signal.SIGSEGV, RECORD, *REPORT) == (
        "was ended by SIGSEGV (segmentation fault): in attend (attention.py:120)"
    )


def test_fault_of_a_native_thread_names_the_function_of_the_main_thread() -> None:
    found = describe(-signal.SIGABRT, GPU_FAULT, *REPORT_OF_A_NATIVE_THREAD)

    assert found.endswith("privilege, with the main thread in attend (attention.py:120)")


def test_log_records_are_no_reason() -> None:
    found = describe(-signal.SIGSEGV, RECORD, RECORD_JSON)

    assert found == "was ended by SIGSEGV (segmentation fault): its log shows no reason"


def test_fatal_line_counts_longer_than_any_other() -> None:
    """A driver may write a core dump between its message and the end."""
    assert "GPU node-1" in describe(-signal.SIGABRT, GPU_FAULT, age_s=60)
    assert "GPU node-1" not in describe(-signal.SIGABRT, GPU_FAULT, age_s=600)
    assert "no reason" in describe(-signal.SIGABRT, "UserWarning: slow", age_s=60)


def test_kill_by_the_kernel_is_distinguished_from_a_kill_by_a_process() -> None:
    by_kernel = describe(-signal.SIGKILL, "UserWarning: slow", num_oom_kills=1)
    unknown = describe(-signal.SIGKILL, "UserWarning: slow")

    assert by_kernel.startswith("was ended by SIGKILL: out of host memory, most likely")
    assert unknown.startswith("was ended by SIGKILL: another process sent the signal, or")


def test_status_of_an_uncaught_python_exception_includes_its_last_line() -> None:
    found = describe(1, "Traceback (most recent call last):", "ImportError: no module 'zmq'", "")

    assert found == "exited with status 1: ImportError: no module 'zmq'"


def test_other_signals_come_from_outside() -> None:
    assert describe(-signal.SIGTERM) == ("was ended by SIGTERM: another process sent the signal")
    assert describe(-40).startswith("was ended by signal 40: ")


def test_reason_is_one_short_line_without_terminal_sequences() -> None:
    found = describe(1, "\x1b[31mbad\x1b[0m\tvalue \x07" + "x" * 1000)

    assert found.startswith("exited with status 1: bad value xxx")
    assert found.endswith("...")
    assert len(found) == len("exited with status 1: ") + MAX_REASON


def test_kills_for_lack_of_memory_are_counted_by_the_kernel(tmp_path: Path) -> None:
    counters = tmp_path / "vmstat"
    counters.write_text("pgfault 9\noom_kill 3\noom_kill_other 8\n")

    assert oom_kills(counters) == 3
    assert oom_kills(tmp_path / "missing") == 0


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        (
            "import os, sys; print(sys.argv[1], file=sys.stderr); os.abort()",
            "was ended by SIGABRT (abort): Memory access fault by GPU node-1",
        ),
        (
            "import ctypes, faulthandler; faulthandler.enable()\ndef read(): ctypes.string_at(0)\n"
            "read()",
            "was ended by SIGSEGV (segmentation fault): in string_at (__init__.py:",
        ),
        ("raise SystemExit('no model')", "exited with status 1: no model"),
    ],
    ids=["abort", "segmentation fault", "exit"],
)
def test_relay_passes_on_and_keeps_what_a_child_writes(
    program: str, reason: str, capfd: pytest.CaptureFixture[str]
) -> None:
    async def run() -> tuple[int, list[LogLine]]:
        relay = StderrRelay()
        child = await asyncio.create_subprocess_exec(
            sys.executable, "-c", program, GPU_FAULT, stderr=relay.child_fd
        )
        relay.start()
        status = await child.wait()
        lines = relay.lines()
        relay.close()
        relay.close()
        return status, lines

    status, lines = asyncio.run(run())

    written = capfd.readouterr().err
    assert written
    assert [line.text for line in lines] == [text for text in written.splitlines() if text]
    assert describe_exit(status, lines, now=lines[-1].time).startswith(reason)


def test_relay_does_not_wait_for_a_grandchild_that_keeps_the_pipe() -> None:
    async def run() -> list[LogLine]:
        relay = StderrRelay()
        program = (
            "import subprocess, sys\n"
            "child = subprocess.Popen(['sleep', '20'])\n"
            "print(child.pid, file=sys.stderr, end='')"
        )
        child = await asyncio.create_subprocess_exec(
            sys.executable, "-c", program, stderr=relay.child_fd
        )
        relay.start()
        await asyncio.wait_for(child.wait(), 10)
        lines = relay.lines()
        relay.close()
        return lines

    [line] = asyncio.run(run())

    os.kill(int(line.text), signal.SIGKILL)  # its text has no line end: it counts all the same


def test_relay_keeps_little_of_much(capfd: pytest.CaptureFixture[str]) -> None:
    """A long line and many lines take little memory; all of them are passed on."""

    async def run() -> list[LogLine]:
        relay = StderrRelay()
        program = (
            "import sys; e = sys.stderr; e.write('x' * 300_000 + '\\n'); e.write('y\\n' * 9999)"
        )
        child = subprocess.Popen([sys.executable, "-c", program], stderr=relay.child_fd)
        relay.start()
        while child.poll() is None:
            await asyncio.sleep(0.01)
        lines = relay.lines()
        relay.close()
        return lines

    lines = asyncio.run(run())

    assert len(capfd.readouterr().err) == 300_001 + 2 * 9999
    assert len(lines) == 500
    assert {line.text for line in lines} == {"y"}
