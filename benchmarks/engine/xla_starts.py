"""Measure XLA's time to the first token, without and with the files of an earlier start.

Each start is a separate process, from its first line to the first token of the default model on
XLA's CPU client: three programs (8 decodes; prompts of 128 tokens, in two forms), or all
programs of the default limits. Processor seconds are reported in addition to wall time, since
they are more reliable on a busy machine.

    python benchmarks/engine/xla_starts.py [--default-limits] [--out FILE.json]
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SMALL = {"max_num_seqs": 8, "max_num_batched_tokens": 128, "max_model_len": 1024}


def start_here(limits: dict[str, int]) -> None:
    """Load, compile and sample one token."""
    from portalm.config import DEFAULT_MODEL, EngineConfig
    from portalm.engine.engine import Engine
    from portalm.engine.messages import AddRequest
    from portalm.sampling_params import SamplingParams
    from portalm_backends.xla.backend import XlaBackend

    engine = Engine(EngineConfig(model=DEFAULT_MODEL, **limits), backend=XlaBackend())
    params = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)
    engine.add(AddRequest(request_id="0", prompt_token_ids=[5, 6, 7], params=params, seed=0))
    while engine.has_work():
        engine.step()
    engine.close()


def start(cache: Path, limits: dict[str, int]) -> dict[str, float]:
    """Measure one start in wall seconds and processor seconds."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(
        [sys.executable, __file__, "--here", json.dumps(limits)],
        env={**os.environ, "PORTALM_CACHE_DIR": str(cache)},
        check=True,
    )
    seconds = time.perf_counter() - started
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = used.ru_utime + used.ru_stime - before.ru_utime - before.ru_stime
    return {"seconds": round(seconds, 2), "processor_seconds": round(cpu, 2)}


def main() -> None:
    """Start twice, print both, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--default-limits",
        action="store_true",
        help="compile the programs of the default limits instead of three",
    )
    parser.add_argument("--out", type=Path, default=None, help="JSON file to write")
    parser.add_argument("--here", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.here:
        start_here(json.loads(arguments.here))
        return
    from portalm.config import cache_dir

    limits = {} if arguments.default_limits else SMALL
    with tempfile.TemporaryDirectory() as folder:
        for kept in cache_dir().iterdir():  # models are downloaded already, programs are not
            if kept.name != "xla":
                (Path(folder) / kept.name).symlink_to(kept)
        first, second = (start(Path(folder), limits) for _ in range(2))
    result = {
        "what": "from a process's start to its first token on XLA's CPU client",
        "limits": limits or "default",
        "date": datetime.date.today().isoformat(),
        "machine": platform.machine(),
        "first": first,
        "second": second,
        "ratio": round(first["seconds"] / second["seconds"], 2),
    }
    print(json.dumps(result, indent=1))
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
