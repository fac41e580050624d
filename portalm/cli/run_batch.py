"""`portalm run-batch`: answer a file of requests."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import AsyncIterator, Iterator
from typing import IO, TYPE_CHECKING

from portalm.cli.answer_flags import add_answer_flags
from portalm.cli.engine_flags import add_engine_flags

if TYPE_CHECKING:
    from portalm.config import EngineConfig


def add_run_batch(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `portalm run-batch`: answer a file in OpenAI's batch format."""
    parser = commands.add_parser("run-batch", help="answer a file of requests, without a server")
    parser.add_argument(
        "-i", "--input-file", required=True, help="JSON Lines file of requests; - reads stdin"
    )
    parser.add_argument(
        "-o", "--output-file", required=True,
        help="file for the answers, in the order they finish; - writes to stdout",
    )  # fmt: skip
    parser.add_argument(
        "--served-model-name",
        nargs="+",
        default=[],
        help="model names that requests may use (default: the value of --model)",
    )
    parser.add_argument(
        "--max-concurrency", type=int, default=256, help="maximum number of requests in flight"
    )
    add_answer_flags(parser)
    add_engine_flags(parser)
    parser.set_defaults(run=run_run_batch)


def run_run_batch(arguments: argparse.Namespace) -> int:
    """Answer every line; return 1 if one did not get status 200."""
    import asyncio

    from portalm.cli.engine_flags import engine_settings
    from portalm.config import EngineConfig
    from portalm.errors import ConfigError

    if arguments.max_concurrency < 1:
        raise ConfigError(f"--max-concurrency must be at least 1, not {arguments.max_concurrency}")
    engine = EngineConfig.from_dict(engine_settings(arguments))
    with _input(arguments.input_file) as lines, _output(arguments.output_file) as out:
        try:
            num_good, num_bad = asyncio.run(_answer(arguments, engine, lines, out))
        except asyncio.CancelledError:
            raise KeyboardInterrupt from None  # SIGTERM, as Ctrl-C
    print(f"{num_good + num_bad} requests answered, {num_bad} with an error", file=sys.stderr)
    return 1 if num_bad else 0


async def _answer(
    arguments: argparse.Namespace, engine: EngineConfig, lines: IO[bytes], out: IO[str]
) -> tuple[int, int]:
    import asyncio
    import signal

    from portalm.cli.answer_flags import answer_format
    from portalm.progress import ProgressBar
    from portalm.server.batch import answer_lines

    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    num_good = num_bad = 0
    answers = answer_lines(
        engine,
        _read(lines),
        served_model_names=arguments.served_model_name,
        max_in_flight=arguments.max_concurrency,
        form=answer_format(arguments),
    )
    with ProgressBar("Answering", _count(lines), unit="requests") as bar:
        async with contextlib.aclosing(answers):
            async for answer in answers:
                out.write(json.dumps(answer, ensure_ascii=False) + "\n")
                response = answer["response"]
                is_good = response is not None and response["status_code"] == 200
                num_good, num_bad = num_good + is_good, num_bad + (not is_good)
                bar.update()
    return num_good, num_bad


def _count(lines: IO[bytes]) -> int | None:
    """Number of requests in a file; None for a pipe."""
    if not lines.seekable():
        return None
    count = sum(1 for line in lines if line.strip())
    lines.seek(0)
    return count


async def _read(lines: IO[bytes]) -> AsyncIterator[bytes]:
    """Yield the lines. Waiting for the next line of a pipe does not block running requests."""
    import asyncio

    from portalm.errors import PortaLMError
    from portalm.server.auth import MAX_BODY_BYTES

    if lines.seekable():
        for line in lines:
            yield line
        return
    reader = asyncio.StreamReader(limit=MAX_BODY_BYTES)
    protocol = asyncio.StreamReaderProtocol(reader)
    await asyncio.get_running_loop().connect_read_pipe(lambda: protocol, lines)
    try:
        while line := await reader.readline():
            yield line
    except ValueError:
        raise PortaLMError(
            f"a line of the input is longer than the limit of {MAX_BODY_BYTES} bytes"
        ) from None


@contextlib.contextmanager
def _input(path: str) -> Iterator[IO[bytes]]:
    from portalm.errors import ConfigError

    if path == "-":
        yield sys.stdin.buffer
        return
    try:
        file = open(path, "rb")  # noqa: SIM115 - closed below
    except OSError as error:
        raise ConfigError(f"cannot read --input-file: {error}") from None
    with file:
        yield file


@contextlib.contextmanager
def _output(path: str) -> Iterator[IO[str]]:
    """Open the output. It is renamed to `path` when complete; on a failure `path`.partial stays."""
    from portalm.errors import ConfigError

    if path == "-":
        yield sys.stdout
        return
    partial = f"{path}.partial"
    try:
        file = open(partial, "w", buffering=1, encoding="utf-8", errors="backslashreplace")  # noqa: SIM115 - closed below
    except OSError as error:
        raise ConfigError(f"cannot write --output-file: {error}") from None
    with file:
        try:
            yield file
        except BaseException:
            if file.tell():
                print(f"answers up to the failure are in {partial}", file=sys.stderr)
            else:
                os.remove(partial)
            raise
    os.replace(partial, path)
