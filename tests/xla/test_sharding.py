"""Weights and KV heads sharded over several devices give the same tokens as one device."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from portalm.errors import Unsupported
from portalm_backends.xla.backend import XlaBackend

_COMPARE = """
import tempfile
from pathlib import Path
from portalm import LLM, SamplingParams
from portalm_backends.xla.backend import XlaBackend
from tests.tiny import add_byte_tokenizer, make_config_folder

folder = add_byte_tokenizer(make_config_folder(Path(tempfile.mkdtemp()), num_key_value_heads=4))
prompts = [[5, 6, 7], [9] * 70]
params = [
    SamplingParams(max_tokens=24, temperature=0.0),
    SamplingParams(max_tokens=24, temperature=1.0, top_p=0.9, logprobs=2, seed=3),
]

def answers(num_devices):
    llm = LLM(
        str(folder), backend=XlaBackend(num_devices=num_devices), load_format="dummy",
        max_num_seqs=8, max_num_batched_tokens=64, use_tqdm=False,
    )
    found = [a.outputs[0].token_ids for a in llm.generate(prompts, params, use_tqdm=False)]
    sharding = llm.engine.runner.executor._kv.layers[0].sharding
    return found, len(sharding.device_set), sharding.is_fully_replicated

one, four = answers(1), answers(4)
assert one[0] == four[0], (one, four)
assert (one[1], four[1]) == (1, 4)
assert not four[2]
print("same")
"""


def test_four_devices_sample_the_same_tokens_as_one() -> None:
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    done = subprocess.run(
        [sys.executable, "-c", _COMPARE],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
    )

    assert done.returncode == 0, done.stderr[-3000:]
    assert "same" in done.stdout


@pytest.mark.parametrize("num_devices", [0, 1000])
def test_a_wrong_number_of_devices_is_refused_with_the_limits(num_devices: int) -> None:
    with pytest.raises(Unsupported, match=rf"num_devices must be from 1 to \d+, .*{num_devices}"):
        XlaBackend(num_devices=num_devices)
