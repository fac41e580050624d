"""The engine without HTTP: one stream, many streams, prompts, a thousand requests.

The second argument selects the part: 8b, 1b, or transformers with the shape of the 8B model.
"""

from __future__ import annotations

import random
import sys
import time
from typing import Any

import torch

from gpu.common import Settings, model_folder, report, settings


def make_engine(run: Settings, model: str, **more: Any) -> Any:
    """Create an engine with random weights, and capture all of its steps."""
    from portalm.config import EngineConfig
    from portalm.engine.engine import Engine

    begin = time.perf_counter()
    engine = Engine(
        EngineConfig.from_dict(
            {
                "model": model_folder(run.model(model)),
                "load_format": "dummy",
                "device": run.device,
                "max_num_seqs": run.scaled(256, 4),
                "max_num_batched_tokens": run.scaled(8192, 64),
                "max_model_len": run.scaled(4096, 256),
                "enable_prefix_caching": False,
                **more,
            }
        )
    )
    report(f"{model}: start", time.perf_counter() - begin, "s", **engine.ready.startup_s)
    begin = time.perf_counter()
    while engine.capture_next():
        pass
    report(f"{model}: captures", time.perf_counter() - begin, "s", blocks=engine.ready.num_blocks)
    return engine


def ask(engine: Any, name: str, length: int, num_out: int, seed: int = 0) -> None:
    """Add a request with random token ids that generates exactly `num_out` tokens."""
    from portalm.engine.messages import AddRequest
    from portalm.sampling_params import SamplingParams

    rng = random.Random(f"{name} {seed}")
    vocab = engine.model_config.vocab_size
    engine.add(
        AddRequest(
            request_id=name,
            prompt_token_ids=[rng.randrange(3, vocab) for _ in range(length)],
            params=SamplingParams(temperature=0.0, max_tokens=num_out, ignore_eos=True),
            seed=seed,
        )
    )


def finish(engine: Any) -> int:
    """Run until no work is left; return the number of generated tokens."""
    num_tokens = 0
    while engine.has_work():
        num_tokens += sum(len(output.token_ids) for output in engine.step().outputs)
    return num_tokens


def decode(engine: Any, run: Settings, model: str, streams: int, context: int) -> None:
    """Measure tokens per second while all `streams` decode at about `context` tokens."""
    num_out = run.scaled(160, 12)
    for i in range(streams):
        ask(engine, f"decode-{i}", max(1, context - num_out // 2), num_out)
    num_tokens, begin = 0, 0.0
    while engine.has_work():
        outputs = engine.step().outputs
        count = sum(len(output.token_ids) for output in outputs)
        if count == streams and not begin:  # every prompt is computed
            begin = time.perf_counter()
        elif begin and count == streams:
            num_tokens, end = num_tokens + count, time.perf_counter()
        elif begin:
            break
    finish(engine)
    if not num_tokens:
        report(
            f"FAILED {model}: decode, {streams} streams",
            None,
            message="no step decoded all streams together",
        )
        return
    report(f"{model}: decode, {streams} x {context}", num_tokens / (end - begin), "tok/s")


def prefill(engine: Any, run: Settings, model: str) -> None:
    """Measure the TTFT of single prompts, and tokens per second of several prompts at once."""
    for length in (run.scaled(1024, 32), run.scaled(2048, 64)):
        taken = []
        for i in range(6):
            ask(engine, f"alone-{length}-{i}", length, 1)
            begin = time.perf_counter()
            finish(engine)
            taken.append(time.perf_counter() - begin)
        report(f"{model}: TTFT, {length}", sorted(taken)[2] * 1e3, "ms")
    length, count = run.scaled(2048, 64), run.scaled(16, 3)
    for i in range(count):
        ask(engine, f"prefill-{i}", length, 1)
    begin = time.perf_counter()
    finish(engine)
    report(f"{model}: prefill, {length}", count * length / (time.perf_counter() - begin), "tok/s")


def lengths_like_sharegpt(count: int) -> list[tuple[int, int]]:
    """(prompt, answer) lengths in tokens; 1,000 pairs have 215,196 and 198,001 in total."""
    rng = random.Random(0)
    pairs = [
        (
            min(1024, 4 + int(rng.lognormvariate(4.6, 1.3))),
            min(1024, 4 + int(rng.lognormvariate(4.9, 1.1))),
        )
        for _ in range(count)
    ]
    for side, total in ((0, 215_196 * count // 1000), (1, 198_001 * count // 1000)):
        scale = total / sum(pair[side] for pair in pairs)
        scaled = [max(1, round(pair[side] * scale)) for pair in pairs]
        for i in range(abs(total - sum(scaled))):  # distribute the rounding error
            step = 1 if total > sum(scaled) else -1
            place = i % count
            scaled[place] = max(1, scaled[place] + step)
        pairs = [
            (s, pair[1]) if side == 0 else (pair[0], s)
            for s, pair in zip(scaled, pairs, strict=True)
        ]
    return pairs


def offline(engine: Any, run: Settings, model: str) -> None:
    """Measure a thousand requests of mixed lengths, all submitted at once."""
    count = run.scaled(1000, 6)
    pairs = lengths_like_sharegpt(count)
    if run.is_tiny:
        pairs = [(min(p, 60), min(o, 20)) for p, o in pairs]
    for i, (num_in, num_out) in enumerate(pairs):
        ask(engine, f"offline-{i}", num_in, num_out)
    begin = time.perf_counter()
    num_tokens = finish(engine)
    taken = time.perf_counter() - begin
    total_in = sum(p for p, _ in pairs)
    report(
        f"{model}: offline, {count} requests",
        num_tokens / taken,
        "tok/s",
        num_in=total_in,
        num_out=num_tokens,
        seconds=taken,
    )


def ours(run: Settings, model: str) -> None:
    """Measure everything with one engine."""
    engine = make_engine(run, model)
    streams = [(1, 512), (64, 1024), (256, 1024)] if not run.is_tiny else [(1, 32), (4, 32)]
    for count, context in streams:
        decode(engine, run, model, count, context)
    prefill(engine, run, model)
    offline(engine, run, model)
    engine.close()


def transformers(run: Settings) -> None:
    """Measure the 8B shape in transformers: a static cache and torch.compile; batching."""
    import transformers as hf

    config = hf.LlamaConfig(**{k: v for k, v in run.model("8b").items() if k != "torch_dtype"})
    device = "cpu" if run.is_tiny else "cuda"
    dtype = torch.float32 if run.is_tiny else torch.bfloat16
    with torch.device(device):
        model = hf.LlamaForCausalLM(config).to(dtype).eval()
    ids = torch.randint(3, config.vocab_size, (1, run.scaled(512, 16)), device=device)
    num_out = run.scaled(128, 4)
    options: dict[str, Any] = {"do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
    if not run.is_tiny:
        options["cache_implementation"] = "static"  # compiled by generate itself
    for _ in range(2 if not run.is_tiny else 1):
        begin = time.perf_counter()
        model.generate(ids, max_new_tokens=num_out, min_new_tokens=num_out, **options)
        if not run.is_tiny:
            torch.cuda.synchronize()
        taken = time.perf_counter() - begin
    report("transformers: one stream, static cache", num_out / taken, "tok/s")
    if run.is_tiny or not hasattr(model, "generate_batch"):
        text = "skipped: it needs a GPU and a version of transformers with generate_batch"
        report("transformers: continuous batching", None, message=text)
        return
    count = 200
    pairs = lengths_like_sharegpt(1000)[:count]
    rng = random.Random(0)
    prompts = [[rng.randrange(3, config.vocab_size) for _ in range(min(p, 1024))] for p, _ in pairs]
    settings_ = hf.GenerationConfig(
        max_new_tokens=198, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    begin = time.perf_counter()
    answers = model.generate_batch(inputs=prompts, generation_config=settings_)
    taken = time.perf_counter() - begin
    num_tokens = sum(len(answer.generated_tokens) for answer in answers.values())
    report(f"transformers: continuous batching, {count} requests", num_tokens / taken, "tok/s")


def main() -> None:
    """Run the part that the second argument names."""
    run, part = settings(), sys.argv[2]
    if part == "transformers":
        transformers(run)
    else:
        ours(run, part)


if __name__ == "__main__":
    main()
