"""One minute that shows whether a GPU run makes sense: an 8B-shaped model starts and decodes.

Captures the buckets of 1 and 256 decodes and the largest mixed one, compares captured with
uncaptured steps, computes a prompt of 2,048 tokens, and requires that nothing is compiled after
`seal`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from gpu.common import Clock, Settings, report, run_sections, settings
from gpu.compiles import Compiles
from gpu.engine import ask, engine_config, finish, outputs_of
from portalm.backend import Bucket, load_backend

NUM_DECODES = 20
NEAR_TIE = 0.05
"""Logprobs this close may be ordered differently by a captured step and an uncaptured one, which
split the contexts differently."""


class Smoke:
    """The sections; each uses the engines of `start`."""

    def __init__(self, run: Settings) -> None:
        """Start nothing yet."""
        self.run = run
        self.compiles = Compiles()
        self.most = run.scaled(256, 4)
        self.engine: Any = None
        self.eager: Any = None

    def start(self, clock: Clock) -> None:
        """Start the model, and capture a few buckets."""
        from portalm.engine.engine import Engine

        begin = time.perf_counter()
        backend: Any = load_backend(self.run.device)
        report("smoke: backend", time.perf_counter() - begin, "s", summary=backend.find().summary)
        _keep_buckets(backend, {1, self.most})
        begin = time.perf_counter()
        # room for a second engine; the pool is sized by running the largest step, as in service
        config = engine_config(self.run, "8b", gpu_memory_utilization=0.45)
        self.engine = Engine(config, backend=backend)
        report("smoke: start", time.perf_counter() - begin, "s", **self.engine.ready.startup_s)
        begin = time.perf_counter()
        while self.engine.has_captures_left:
            self.engine.capture_next()
        report("smoke: captures", time.perf_counter() - begin, "s")
        count, loaded = len(self.compiles.names), self.compiles.num_loaded
        report("smoke: kernels at startup", count, "kernels", from_cache=loaded)
        self.compiles.clear()

    def equal(self, clock: Clock) -> None:
        """Compare decodes of captured steps with those of uncaptured steps."""
        from portalm.engine.engine import Engine

        prompts = [(1, self.run.scaled(512, 20)), (self.most, self.run.scaled(48, 8))]
        captured = [self._decode(self.engine, count, length) for count, length in prompts]
        self._require_no_compiles("decodes")
        eager_config = engine_config(
            self.run,
            "8b",
            enforce_eager=True,
            num_gpu_blocks_override=self.run.scaled(20_000, 512),
        )
        self.eager = Engine(eager_config, backend=self.engine.backend)
        for (count, length), found in zip(prompts, captured, strict=True):
            expected = self._decode(self.eager, count, length)
            num_ties = sum(
                self._compare(f"decode-{i}", length, found[f"decode-{i}"], expected[f"decode-{i}"])
                for i in range(count)
            )
            report(f"smoke: graph equals eager, {count} streams", count, "streams", ties=num_ties)
        self.eager.close()
        self.eager = None
        self.compiles.clear()

    def _decode(self, engine: Any, count: int, length: int) -> dict[str, list[int]]:
        """Greedy tokens of `count` requests."""
        num_out = min(NUM_DECODES, self.run.scaled(NUM_DECODES, 6))
        for i in range(count):
            ask(engine, f"decode-{i}", length, num_out)
        return outputs_of(engine)

    def _compare(
        self, name: str, length: int, found: Sequence[int], expected: Sequence[int]
    ) -> bool:
        """Raise if the tokens differ anywhere but at a near-tie; return True if there was one."""
        if found == expected:
            return False
        place = next(i for i, (a, b) in enumerate(zip(found, expected, strict=True)) if a != b)
        logprobs = self._logprobs(name, length, expected[:place])
        gap = abs(logprobs.get(expected[place], 0) - logprobs.get(found[place], -99))
        if gap > NEAR_TIE:
            raise AssertionError(
                f"{name}: token {place} of the captured steps is {found[place]}, of uncaptured "
                f"steps {expected[place]}; their logprobs differ by {gap:.3f}, at most {NEAR_TIE} "
                f"is a tie.\ncaptured: {found}\nuncaptured: {expected}"
            )
        return True

    def _logprobs(self, name: str, length: int, more: Sequence[int]) -> dict[int, float]:
        """Largest logprobs after the prompt of `name` and the tokens `more`, uncaptured."""
        ask(self.eager, name, length, 1, more=more, logprobs=8)
        best: dict[int, float] = {}
        while self.eager.has_work():
            for output in self.eager.step().outputs:
                for token in output.logprobs or []:
                    best |= dict(token.top)
        return best

    def prompt(self, clock: Clock) -> None:
        """Compute a prompt of 2,048 tokens, twice: the first may still compile larger tiles."""
        length = self.run.scaled(2048, 64)
        for name in ("first", "second"):
            ask(self.engine, name, length, 1)
            begin = time.perf_counter()
            finish(self.engine)
            report(f"smoke: prompt of {length}, {name}", (time.perf_counter() - begin) * 1e3, "ms")
        self._require_no_compiles("a prompt")

    def streams(self, clock: Clock) -> None:
        """Decode many streams whose prompts and lengths differ: mixed steps of many sizes."""
        for i in range(self.most):
            ask(self.engine, f"mixed-{i}", 5 + 7 * i % self.run.scaled(600, 50), 4 + i % 9)
        begin = time.perf_counter()
        num_tokens = finish(self.engine)
        taken = time.perf_counter() - begin
        report(f"smoke: {self.most} streams", num_tokens / taken, "tok/s")
        self._require_no_compiles("mixed steps")
        self.engine.close()

    def _require_no_compiles(self, what: str) -> None:
        names = sorted(set(self.compiles.names))
        report(f"smoke: compiles after seal, {what}", len(self.compiles.names), "kernels")
        if names:
            raise AssertionError(f"compiled after seal, in {what}: {', '.join(names)}")


def _keep_buckets(backend: Any, sizes: set[int]) -> None:
    """Let the engine capture decode buckets of these numbers of requests, and one mixed bucket."""
    all_buckets = backend.buckets

    def buckets(max_tokens: int, max_requests: int, max_blocks: int) -> list[Bucket] | None:
        found = all_buckets(max_tokens, max_requests, max_blocks)
        if found is None or backend.capabilities.static_shapes:
            return found
        mixed = [b for b in found if b.max_query_len > 1]
        decodes = [b for b in found if b.max_query_len == 1 and b.num_requests in sizes]
        return [*decodes, *([max(mixed)] if mixed else [])]

    backend.buckets = buckets


def main() -> None:
    """Run the sections."""
    run = settings()
    part = Smoke(run)
    run_sections(
        run,
        {
            "start": part.start,
            "graph equals eager": part.equal,
            "prompt": part.prompt,
            "256 streams": part.streams,
        },
    )


if __name__ == "__main__":
    main()
