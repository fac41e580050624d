"""Weights and KV heads divided among devices give the tokens that one device gives."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

_ANSWERS = """
import sys, tempfile
from pathlib import Path
import jax
from portalm_backends.xla.backend import XlaBackend
from tests.tiny import ask, make_engine, run, tokens

def answers(num_devices):
    engine = make_engine(
        Path(tempfile.mkdtemp()), XlaBackend(num_devices), hf_overrides={"num_key_value_heads": 4}
    )
    ask(engine, "a", [5, 6, 7], max_tokens=24)
    ask(engine, "b", [9] * 70, max_tokens=24, temperature=1.0, top_p=0.9, logprobs=2)
    found = tokens(run(engine))
    holders = engine.runner._kv.layers[0].sharding.device_set
    return found, len(holders), engine.runner._kv.layers[0].sharding.is_fully_replicated

one, four = answers(1), answers(4)
assert one[0] == four[0], (one, four)
assert (one[1], four[1]) == (1, 4)
assert not four[2]
print("same")
"""


def test_four_devices_draw_the_tokens_of_one() -> None:
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    done = subprocess.run(
        [sys.executable, "-c", _ANSWERS],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
    )

    assert done.returncode == 0, done.stderr[-3000:]
    assert "same" in done.stdout
