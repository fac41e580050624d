"""`portalm bench serve`: measure a running OpenAI-compatible server under load."""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from portalm.cli.bench.figures import report, sample_length, spread_ms

if TYPE_CHECKING:
    import httpx

_WORDS = """
    time year people way day man thing woman life child world school state family student
    group country problem hand part place case week company system program question work
    number night point home water room mother area money story fact month lot right study book
    eye job word
""".split()  # noqa: SIM905 - 60 quoted words are no easier to read


def add_bench_serve(kinds: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `portalm bench serve`: load test of any OpenAI-compatible server."""
    serve = kinds.add_parser("serve", help="load test of an OpenAI-compatible server")
    serve.add_argument("--base-url", default="http://127.0.0.1:8000", help="base URL of the server")
    serve.add_argument(
        "--model", default=None, help="name of the model (default: the server's first)"
    )
    serve.add_argument("--api-key", default=None, help="API key to send (default: none)")
    serve.add_argument("--num-prompts", type=int, default=100, help="total number of requests")
    serve.add_argument(
        "--max-concurrency", type=int, default=32, help="maximum number of requests in flight"
    )
    serve.add_argument(
        "--request-rate",
        type=float,
        default=math.inf,
        help="requests per second, arriving at random times (Poisson) "
        "(default: no limit, as fast as --max-concurrency allows)",
    )
    serve.add_argument("--input-len", type=int, default=200, help="words per prompt, on average")
    serve.add_argument("--output-len", type=int, default=120, help="tokens per answer, on average")
    serve.add_argument(
        "--fixed-lengths",
        action="store_true",
        help="use exactly these lengths; otherwise lengths vary around them",
    )
    serve.add_argument(
        "--seed", type=int, default=0, help="seed of lengths, words and arrival times"
    )
    serve.add_argument(
        "--temperature", type=float, default=0.0, help="sampling temperature; 0 is greedy"
    )
    serve.add_argument(
        "--goodput",
        nargs="+",
        default=[],
        metavar="NAME:MS",
        help="limits in milliseconds that a good answer meets, for example ttft:500 itl:50 "
        "e2el:10000; reports the rate of good answers (default: none)",
    )
    serve.add_argument(
        "--result-json", default=None, help="file to write all figures to as JSON (default: none)"
    )
    serve.add_argument(
        "--plot",
        default=None,
        help="PNG file to plot the distributions to; needs matplotlib (default: none)",
    )
    serve.set_defaults(run=run_bench_serve)


@dataclass(slots=True)
class BenchRequest:
    """One request to send."""

    prompt: str
    num_out: int
    start_s: float
    """Arrival time, in seconds after the first request's."""


@dataclass(slots=True)
class BenchAnswer:
    """Measurements of one answer; times in seconds."""

    ttft: float | None = None
    """Time to the first text."""
    gaps: list[float] = field(default_factory=list)
    """Times between two pieces of text."""
    e2el: float = 0.0
    num_in: int = 0
    num_out: int = 0
    error: str | None = None


def make_requests(arguments: argparse.Namespace) -> list[BenchRequest]:
    """Generate requests; lengths, words and arrival times depend only on the seed."""
    rng = random.Random(arguments.seed)

    def length(mean: int) -> int:
        return sample_length(rng, mean, is_fixed=arguments.fixed_lengths)

    planned, now = [], 0.0
    for _ in range(arguments.num_prompts):
        words = rng.choices(_WORDS, k=length(arguments.input_len))
        planned.append(BenchRequest(" ".join(words), length(arguments.output_len), now))
        if math.isfinite(arguments.request_rate):
            now += rng.expovariate(arguments.request_rate)
    return planned


def parse_goodput(limits: Sequence[str]) -> dict[str, float]:
    """Parse NAME:MS limits into seconds by name. Raises `ConfigError`."""
    from portalm.errors import ConfigError

    found = {}
    for limit in limits:
        name, _, milliseconds = limit.partition(":")
        try:
            if name not in ("ttft", "itl", "e2el"):
                raise ValueError
            found[name] = float(milliseconds) / 1000
        except ValueError:
            raise ConfigError(
                f"--goodput must be NAME:MS with NAME one of ttft, itl, e2el; got {limit!r}"
            ) from None
    return found


def summarize(
    answers: Sequence[BenchAnswer], wall_s: float, limits: dict[str, float]
) -> dict[str, Any]:
    """Compute throughput, percentiles in milliseconds, errors and goodput."""
    good = [a for a in answers if a.error is None]
    spans = {
        "ttft": [a.ttft for a in good if a.ttft is not None],
        "itl": [gap for a in good for gap in a.gaps],
        "e2el": [a.e2el for a in good],
    }
    summary: dict[str, Any] = {
        "completed": len(good),
        "failed": len(answers) - len(good),
        "errors": sorted({a.error for a in answers if a.error is not None})[:10],
        "duration_s": wall_s,
        "request_throughput": len(good) / wall_s,
        "output_throughput": sum(a.num_out for a in good) / wall_s,
        "total_token_throughput": sum(a.num_in + a.num_out for a in good) / wall_s,
    }
    for name, values in spans.items():
        summary |= spread_ms(name, values)
    if limits:
        summary["request_goodput"] = sum(_is_good(a, limits) for a in good) / wall_s
    return summary


def _is_good(answer: BenchAnswer, limits: dict[str, float]) -> bool:
    mean_gap = sum(answer.gaps) / len(answer.gaps) if answer.gaps else 0.0
    seen = {"ttft": answer.ttft or 0.0, "itl": mean_gap, "e2el": answer.e2el}
    return all(seen[name] <= limit for name, limit in limits.items())


def run_bench_serve(arguments: argparse.Namespace) -> int:
    """Send the requests and print a table; return 1 if a request failed."""
    import asyncio
    import time

    limits = parse_goodput(arguments.goodput)
    planned = make_requests(arguments)
    started = time.perf_counter()
    answers = asyncio.run(_ask_all(arguments, planned))
    summary = summarize(answers, time.perf_counter() - started, limits)
    report(summary, arguments.result_json)
    if arguments.plot:
        _plot(answers, arguments.plot)
    return 1 if summary["failed"] else 0


async def _ask_all(
    arguments: argparse.Namespace, planned: Sequence[BenchRequest]
) -> list[BenchAnswer]:
    import asyncio
    import time

    import httpx

    from portalm.errors import PortaLMError
    from portalm.progress import ProgressBar

    headers = {"Authorization": f"Bearer {arguments.api_key}"} if arguments.api_key else {}
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(
        base_url=arguments.base_url, headers=headers, timeout=None, limits=limits
    ) as http:
        try:
            models = await http.get("/v1/models")
            models.raise_for_status()
        except httpx.HTTPError as error:
            raise PortaLMError(
                f"no server answers at {arguments.base_url} ({error}): check --base-url"
            ) from error
        model = arguments.model or models.json()["data"][0]["id"]
        room = asyncio.Semaphore(arguments.max_concurrency)
        first = time.perf_counter()

        async def one(request: BenchRequest) -> BenchAnswer:
            await asyncio.sleep(request.start_s - (time.perf_counter() - first))
            async with room:
                answer = await _ask(http, model, request, arguments.temperature)
            bar.update()
            return answer

        with ProgressBar("Answering", len(planned), unit="requests") as bar:
            return await asyncio.gather(*map(one, planned))


async def _ask(
    http: httpx.AsyncClient, model: str, request: BenchRequest, temperature: float
) -> BenchAnswer:
    import json
    import time

    import httpx

    body = {
        "model": model,
        "prompt": request.prompt,
        "max_tokens": request.num_out,
        "temperature": temperature,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    answer = BenchAnswer()
    sent = last = time.perf_counter()
    try:
        async with http.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != 200:
                text = (await response.aread()).decode(errors="replace")
                answer.error = f"{response.status_code}: {text[:200]}"
                return answer
            async for line in response.aiter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                chunk = json.loads(line[6:])
                if "error" in chunk:
                    answer.error = str(chunk["error"].get("message"))
                    return answer
                if usage := chunk.get("usage"):
                    answer.num_in, answer.num_out = (
                        usage["prompt_tokens"],
                        usage["completion_tokens"],
                    )
                if any(choice.get("text") for choice in chunk["choices"]):
                    now = time.perf_counter()
                    if answer.ttft is None:
                        answer.ttft = now - sent
                    else:
                        answer.gaps.append(now - last)
                    last = now
    except (httpx.HTTPError, ValueError) as error:
        answer.error = f"{type(error).__name__}: {error}"
    answer.e2el = time.perf_counter() - sent
    return answer


def _plot(answers: Sequence[BenchAnswer], path: str) -> None:
    from portalm.errors import ConfigError

    try:
        from matplotlib import pyplot
    except ImportError:
        raise ConfigError("--plot needs matplotlib: pip install matplotlib") from None
    good = [a for a in answers if a.error is None]
    spans = {
        "time to first token (ms)": [1000 * a.ttft for a in good if a.ttft is not None],
        "between tokens (ms)": [1000 * gap for a in good for gap in a.gaps],
        "whole answer (s)": [a.e2el for a in good],
    }
    figure, axes = pyplot.subplots(1, len(spans), figsize=(12, 3.5))
    for axis, (title, values) in zip(axes, spans.items(), strict=True):
        axis.hist(values, bins=40)
        axis.set_title(title)
    figure.tight_layout()
    figure.savefig(path)
