"""Measure what grammars cost: compiling, loading, masks, and the steps of other requests meanwhile.

    python benchmarks/engine/structured.py [--rows 32]

Runs the default model, prints the figures and writes them to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from portalm import LLM, SamplingParams
from portalm.engine.messages import StepOutputs
from portalm.sampling_params import StructuredOutputs
from portalm.structured.messages import LoadGrammar

RESULTS = Path(__file__).parents[1] / "results"
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer"},
        "tags": {"type": "array", "items": {"type": "string"}, "maxItems": 5},
        "kind": {"enum": ["a", "b"]},
    },
    "required": ["name", "age", "tags", "kind"],
}
WIDE = {
    "type": "object",
    "properties": {f"field_{i}": {"type": ["string", "integer"][i % 2]} for i in range(60)},
    "required": [f"field_{i}" for i in range(60)],
}
GRAMMARS: dict[str, dict[str, Any]] = {
    "schema of 4 properties": {"json": PERSON},
    "schema of 60 properties": {"json": WIDE},
    "json_object": {"json_object": True},
    "regex": {"regex": r"[A-Z][a-z]{1,20}( [A-Z][a-z]{1,20})*: \d{3}-\d{4}"},
    "choice": {"choice": ("yes", "no")},
}


def timed(call: Any, *args: Any) -> tuple[Any, float]:
    """Call it; return the result and milliseconds."""
    started = time.perf_counter()
    result = call(*args)
    return result, (time.perf_counter() - started) * 1000


@contextmanager
def timed_steps(
    llm: LLM, before: Callable[[int], None] = lambda step: None
) -> Iterator[list[float]]:
    """Context that collects the time of each step in ms; `before` is called with its index."""
    step, times = llm.engine.step, []

    def watched() -> StepOutputs:
        before(len(times))
        outputs, ms = timed(step)
        times.append(ms)
        return outputs

    llm.engine.step = watched  # type: ignore[method-assign]
    try:
        yield times
    finally:
        llm.engine.step = step  # type: ignore[method-assign]


def longest_step(llm: LLM, num_steps: int, at: int, then: Any) -> tuple[float, float]:
    """Return the median and longest step, ms, of 8 streams; `then` is called before step `at`."""
    params = SamplingParams(max_tokens=num_steps, ignore_eos=True, temperature=0.0)
    with timed_steps(llm, lambda step: then() if step == at else None) as times:
        llm.generate([f"number {i}" for i in range(8)], params, use_tqdm=False)
    measured = times[at:num_steps]
    return statistics.median(measured), max(measured)


def first_grammar(llm: LLM) -> dict[str, float]:
    """Measure other requests' steps while XGrammar and the first grammar are loaded."""
    compiled, compile_ms = timed(
        lambda: llm._compiler.compile(StructuredOutputs(json=PERSON)).result()
    )
    quiet = longest_step(llm, 300, 10, lambda: None)

    def load() -> None:
        llm.engine.load_grammar(
            LoadGrammar(
                key="first",
                data=compiled.data,
                vocabulary=llm._compiler.vocabulary,
                forget=[],
            )
        )

    disturbed = longest_step(llm, 300, 10, load)
    return {
        "compiler_start_and_compile_ms": compile_ms,
        "quiet_step_ms": quiet[0],
        "quiet_longest_step_ms": quiet[1],
        "loading_step_ms": disturbed[0],
        "loading_longest_step_ms": disturbed[1],
    }


def steps_with_masks(
    llm: LLM, params: list[SamplingParams], spent: list[tuple[int, float]]
) -> list[tuple[float, float]]:
    """Return microseconds of each step in which every request has a mask, and of its masks."""
    steps: list[tuple[float, float]] = []

    def note(index: int) -> None:
        """Note the step before, if its mask had all rows."""
        if index and spent and spent[-1][0] == len(params):
            steps.append((times[-1] * 1000, spent[-1][1]))

    with timed_steps(llm, note) as times:
        llm.generate([f"number {i}" for i in range(len(params))], params, use_tqdm=False)
    return steps


def masks(llm: LLM, rows: int) -> dict[str, dict[str, float]]:
    """Measure, by grammar: compiling, loading, and the mask per row in steps of `rows` requests."""
    build = llm.engine.runner._sampler._masks.build
    spent: list[tuple[int, float]] = []

    def watched(sampled: Any, num_rows: int) -> Any:
        mask, ms = timed(build, sampled, num_rows)
        if mask is not None:
            spent.append((len(sampled), ms * 1000))
        return mask

    llm.engine.runner._sampler._masks.build = watched  # type: ignore[method-assign]
    found = {}
    for name, asked in GRAMMARS.items():
        structured = StructuredOutputs(**asked)
        compiled, compile_ms = timed(lambda one=structured: llm._compiler.compile(one).result())
        load = LoadGrammar(key=name, data=compiled.data, vocabulary=None, forget=[])
        llm.engine.load_grammar(load)
        _, load_ms = timed(llm.engine._grammars[name].check)
        params = [
            SamplingParams(max_tokens=48, seed=i, structured_outputs=structured)
            for i in range(rows)
        ]
        spent.clear()
        steps = steps_with_masks(llm, params, spent)
        row_us = sorted(us / count for count, us in spent)
        found[name] = {
            "compile_ms": compile_ms,
            "compiled_kB": len(compiled.data) / 1000,
            "load_ms": load_ms,
            "mask_us_a_row": statistics.median(row_us),
            "mask_us_a_row_p99": row_us[int(0.99 * (len(row_us) - 1))],
            "mask_us_a_full_step": statistics.median(s[1] for s in steps) if steps else 0.0,
            "share_of_a_full_step": statistics.median(s[1] / s[0] for s in steps) if steps else 0.0,
        }
    llm.engine.runner._sampler._masks.build = build  # type: ignore[method-assign]
    return found


def main() -> None:
    """Run everything and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=32)
    rows = parser.parse_args().rows
    llm = LLM(max_model_len=1024, use_tqdm=False)
    llm.generate("warm", SamplingParams(max_tokens=4), use_tqdm=False)
    result = {
        "what": f"grammars on the default model (vocabulary of "
        f"{llm.engine.ready.vocab_size}), steps of {rows} requests",
        "load_average": os.getloadavg()[0],
        "first_grammar": first_grammar(llm),
        "grammars": masks(llm, rows),
    }
    print(json.dumps(result, indent=2))
    today = datetime.date.today().isoformat()
    file = RESULTS / f"{today}-{os.cpu_count()}cores-structured.json"
    file.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
