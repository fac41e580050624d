"""The engine without HTTP: one stream, many streams, prompts, a thousand requests, a profile."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from typing import Any

from gpu.common import Clock, Settings, model_folder, report, run_sections, settings
from gpu.compiles import Compiles
from gpu.lengths import FP8_ROWS, lengths_like_sharegpt
from gpu.profile import steady
from portalm.backend import Bucket

_FP8 = {"quantization": "fp8", "kv_cache_dtype": "fp8", "max_num_seqs": 512}
"""Settings of the part fp8."""


def engine_config(run: Settings, model: str, **more: Any) -> Any:
    """Configuration of an engine with random weights."""
    from portalm.config import EngineConfig

    return EngineConfig.from_dict(
        {
            "model": model_folder(run.model(model)),
            "load_format": "dummy",
            "device": run.device,
            "max_num_seqs": run.scaled(256, 4),
            "max_num_batched_tokens": run.scaled(8192, 64),
            "max_model_len": run.scaled(4096, 256),
            "enable_prefix_caching": False,
            **(_FP8 if model == "fp8" and not run.is_tiny else {}),
            **more,
        }
    )


def ask(
    engine: Any,
    name: str,
    length: int,
    num_out: int,
    *,
    more: Sequence[int] = (),
    logprobs: int | None = None,
) -> None:
    """Add a request with `length` random token ids, then `more`, that generates `num_out`."""
    from portalm.engine.messages import AddRequest
    from portalm.sampling_params import SamplingParams

    rng = random.Random(name)
    vocab = engine.model_config.vocab_size
    engine.add(
        AddRequest(
            request_id=name,
            prompt_token_ids=[*(rng.randrange(3, vocab) for _ in range(length)), *more],
            params=SamplingParams(
                temperature=0.0, max_tokens=num_out, ignore_eos=True, logprobs=logprobs
            ),
            seed=0,
        )
    )


def outputs_of(engine: Any) -> dict[str, list[int]]:
    """Run until no work is left; return the generated tokens by request.

    Raises:
        RuntimeError: a request ended with an error.
    """
    found: dict[str, list[int]] = {}
    while engine.has_work():
        for output in engine.step().outputs:
            if output.error is not None:
                raise RuntimeError(f"request {output.request_id} failed: {output.error}")
            found.setdefault(output.request_id, []).extend(output.token_ids)
    return found


def finish(engine: Any) -> int:
    """Run until no work is left; return the number of generated tokens."""
    return sum(len(tokens) for tokens in outputs_of(engine).values())


class Measured:
    """The sections; all use the engine of `start`."""

    def __init__(self, run: Settings) -> None:
        """Start nothing yet."""
        self.run = run
        self.model = run.part
        self.compiles = Compiles()
        self.engine: Any = None

    def start(self, clock: Clock) -> None:
        """Start the engine, and capture all of its steps."""
        self.engine = self._started("")

    def _started(self, kind: str, backend: Any = None) -> Any:
        from portalm.engine.engine import Engine

        self.compiles.clear()
        begin = time.perf_counter()
        engine = Engine(engine_config(self.run, self.model), backend=backend)
        taken = time.perf_counter() - begin
        report(f"{self.model}: start{kind}", taken, "s", **engine.ready.startup_s)
        begin, count = time.perf_counter(), 0
        while engine.capture_next():
            count += 1
        report(
            f"{self.model}: captures{kind}",
            time.perf_counter() - begin,
            "s",
            captures=count,
            kernels=len(self.compiles.names),
            kernels_from_cache=self.compiles.num_loaded,
            blocks=engine.ready.num_blocks,
        )
        self.compiles.clear()
        return engine

    def _report(self, name: str, value: float, unit: str, **more: Any) -> None:
        """Report a figure of this model, with the number of kernels compiled meanwhile."""
        report(f"{self.model}: {name}", value, unit, compiles=len(self.compiles.names), **more)
        self.compiles.clear()

    def decode(self, clock: Clock) -> None:
        """Measure tokens per second while all streams decode, at about one context length."""
        cases = [(1, 512), (64, 1024), (256, 1024)] if not self.run.is_tiny else [(1, 32), (4, 32)]
        for streams, context in cases:
            self._decode(streams, context)

    def _decode(self, streams: int, context: int) -> None:
        num_out = 60 if self.run.is_dry else self.run.scaled(160, 12)
        for i in range(streams):
            ask(self.engine, f"decode-{i}", max(1, context - num_out // 2), num_out)
        num_tokens, begin, end = 0, 0.0, 0.0
        while self.engine.has_work():
            count = sum(len(output.token_ids) for output in self.engine.step().outputs)
            if count == streams and not begin:  # every prompt is computed
                begin = time.perf_counter()
            elif begin and count == streams:
                num_tokens, end = num_tokens + count, time.perf_counter()
            elif begin:
                break
        finish(self.engine)
        if not num_tokens:
            raise RuntimeError(f"no step decoded all {streams} streams together")
        self._report(f"decode, {streams} x {context}", num_tokens / (end - begin), "tok/s")

    def prompts(self, clock: Clock) -> None:
        """Measure the TTFT of single prompts, and tokens per second of several prompts at once."""
        lengths = (1024, 2048, 8192) if not self.run.is_tiny else (32, 64)
        lengths = tuple(n for n in lengths if n < self.engine.max_model_len)
        for length in lengths:
            taken = []
            for i in range(6):
                ask(self.engine, f"alone-{length}-{i}", length, 1)
                begin = time.perf_counter()
                finish(self.engine)
                taken.append(time.perf_counter() - begin)
            self._report(f"TTFT, {length}", sorted(taken)[2] * 1e3, "ms")
        for length, count in ((2048, 16), (3584, 8)) if not self.run.is_tiny else ((64, 3),):
            for i in range(count):
                ask(self.engine, f"prefill-{i}", length, 1)
            begin = time.perf_counter()
            finish(self.engine)
            taken_s = time.perf_counter() - begin
            self._report(f"prefill, {length}", count * length / taken_s, "tok/s")

    def offline(self, clock: Clock) -> None:
        """Measure a thousand requests of mixed lengths, all submitted at once."""
        self._offline(self.engine, "")

    def _offline(self, engine: Any, kind: str) -> None:
        count = 50 if self.run.is_dry else self.run.scaled(1000, 6)
        pairs = lengths_like_sharegpt(count)
        if self.run.is_tiny:
            pairs = [(min(p, 60), min(o, 20)) for p, o in pairs]
        for i, (num_in, num_out) in enumerate(pairs):
            ask(engine, f"offline-{i}", num_in, num_out)
        begin = time.perf_counter()
        num_tokens = finish(engine)
        taken = time.perf_counter() - begin
        self._report(
            f"offline, {count} requests{kind}",
            num_tokens / taken,
            "tok/s",
            num_in=sum(p for p, _ in pairs),
            num_out=num_tokens,
            seconds=taken,
        )

    def fixed_lengths(self, clock: Clock) -> None:
        """Measure requests of one length each, in the rows that other engines publish."""
        rows = FP8_ROWS if not self.run.is_tiny else ((32, 8, 4),)
        for num_in, num_out, count in rows:
            num_out = min(num_out, self.engine.max_model_len - num_in)
            count = 8 if self.run.is_dry else count
            for i in range(count):
                ask(self.engine, f"fixed-{i}", num_in, 8 if self.run.is_dry else num_out)
            begin = time.perf_counter()
            num_tokens = finish(self.engine)
            taken = time.perf_counter() - begin
            name = f"{num_in} in, {num_out} out"
            self._report(name, num_tokens / taken, "tok/s", requests=count, seconds=taken)

    def offline_without_mixed(self, clock: Clock) -> None:
        """Measure the same requests with captures of decodes alone, in a second engine."""
        backend = self.engine.backend
        if not _keep_decode_buckets(backend):
            message = "not measured: this device captures no mixed steps"
            report(f"{self.model}: offline without mixed captures", None, message=message)
            return
        self.engine.close()
        self.engine = None  # its memory is needed
        engine = self._started(", decodes captured only", backend)
        self._offline(engine, ", decodes captured only")
        engine.close()

    def profile(self, clock: Clock) -> None:
        """Measure steady decoding: the device's idle time, and the time of each kernel."""
        for streams in (256, 64, 1) if not self.run.is_tiny else (2,):
            steady(self.engine, self.run, self.model, streams)


def _keep_decode_buckets(backend: Any) -> bool:
    """Let engines on `backend` capture decodes alone; return False if they already do."""
    all_buckets = backend.buckets
    found = all_buckets(8192, 256, 256)
    if found is None or backend.capabilities.static_shapes:
        return False
    if all(bucket.max_query_len == 1 for bucket in found):
        return False

    def buckets(max_tokens: int, max_requests: int, max_blocks: int) -> list[Bucket]:
        found = all_buckets(max_tokens, max_requests, max_blocks)
        return [bucket for bucket in found if bucket.max_query_len == 1]

    backend.buckets = buckets
    return True


def main() -> None:
    """Run the selected sections for the model that the part names."""
    run = settings()
    part = Measured(run)
    run_sections(
        run,
        {
            "start": part.start,
            "decode": part.decode,
            "offline": part.offline,
            "prompts": part.prompts,
            "fixed lengths": part.fixed_lengths,
            "profile": part.profile,
            "offline without mixed captures": part.offline_without_mixed,
        },
    )


if __name__ == "__main__":
    main()
