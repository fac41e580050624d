"""OpenVINO GenAI: continuous batching through its Python API, weights exported by optimum-intel.

Its defaults apply: keys and values in 8 bits, and activations too where the weights are quantized.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

from peers.base import MAX_CONTEXT, MAX_REQUESTS, Answer, Model, PeerUnavailable, Venv, last_error
from peers.worker import Generate, WorkerPeer, serve_calls

EXPORT_TIMEOUT_S = 1800
_BLOCK = 32
"""Tokens per block of its KV cache on a CPU."""
_WEIGHTS = {
    "bf16": ("fp16",),
    "int8": ("int8",),
    "int4": ("int4", "--group-size", "32", "--sym"),
}
"""Format names of the exporter, which has no bf16; `load` sets a property for computing in bf16."""


class OpenVINO(WorkerPeer):
    """`ContinuousBatchingPipeline` in a worker process."""

    name = "openvino"
    module = "peers.openvino"

    def install(self) -> str:
        """Install without torchvision, which would install another torch."""
        venv = Venv(self.settings, self.name)
        venv.install(["openvino-genai", "optimum-intel"], left_out=["torchvision"])
        return venv.version("openvino-genai")

    def prepare(self, model: Model, fmt: str) -> None:
        """Export the weights."""
        target = self._exported(model, fmt)
        if target.exists():
            return
        scratch = target.with_name(f"{target.name}.part")
        shutil.rmtree(scratch, ignore_errors=True)
        log = self.settings.log_of(f"export-{target.name}")
        with log.open("w") as out:
            done = subprocess.run(
                [
                    str(Venv(self.settings, self.name).python.with_name("optimum-cli")),
                    *("export", "openvino", "--model", str(model.folder)),
                    *("--task", "text-generation-with-past"),
                    *("--weight-format", *_WEIGHTS[fmt], str(scratch)),
                ],
                stdout=out,
                stderr=subprocess.STDOUT,
                timeout=EXPORT_TIMEOUT_S,
                check=False,
            )
        if done.returncode:
            raise PeerUnavailable(f"optimum-cli export failed: {last_error(log)}")
        scratch.rename(target)

    def arguments(self, model: Model, fmt: str) -> list[str]:
        """Return the worker's arguments: the exported model and the size of its cache in tokens."""
        return [str(self._exported(model, fmt)), str(MAX_REQUESTS * MAX_CONTEXT)]

    def _exported(self, model: Model, fmt: str) -> Path:
        return self.settings.cache / "models" / f"{model.name}-openvino-{fmt}"


def load() -> Generate:
    """Load the pipeline; return the function that answers prompts."""
    openvino: Any = import_module("openvino")
    genai: Any = import_module("openvino_genai")
    scheduler = genai.SchedulerConfig()
    scheduler.max_num_seqs = MAX_REQUESTS
    scheduler.max_num_batched_tokens = 2048
    scheduler.enable_prefix_caching = True
    scheduler.num_kv_blocks = int(sys.argv[2]) // _BLOCK
    pipeline = genai.ContinuousBatchingPipeline(
        sys.argv[1],
        scheduler_config=scheduler,
        device="CPU",
        properties={"INFERENCE_PRECISION_HINT": "bf16", "PERFORMANCE_HINT": "LATENCY"},
    )
    next_id = 0

    def generate(prompts: list[list[int]], num_out: int, concurrency: int) -> list[Answer]:
        nonlocal next_id
        config = genai.GenerationConfig()
        config.max_new_tokens = num_out
        config.min_new_tokens = num_out
        config.ignore_eos = True
        config.do_sample = False
        waiting = list(enumerate(prompts))[::-1]
        running: dict[int, Any] = {}
        sent: dict[int, float] = {}
        first: dict[int, float] = {}
        token_ids: dict[int, list[int]] = {i: [] for i in range(len(prompts))}
        answers: dict[int, Answer] = {}
        while waiting or running:
            while waiting and len(running) < concurrency:
                index, prompt = waiting.pop()
                ids = openvino.Tensor(import_module("numpy").array([prompt], dtype="int64"))
                sent[index] = time.monotonic()
                running[index] = pipeline.add_request(next_id, ids, config)
                next_id += 1
            pipeline.step()
            now = time.monotonic()
            for index, handle in list(running.items()):
                while handle.can_read():
                    for output in handle.read().values():
                        token_ids[index] += output.generated_ids
                if token_ids[index]:
                    first.setdefault(index, now)
                if len(token_ids[index]) >= num_out:
                    del running[index]
                    answers[index] = Answer(
                        sent=sent[index],
                        first=first[index],
                        last=now,
                        num_tokens=len(token_ids[index]),
                        token_ids=tuple(token_ids[index]),
                    )
        return [answers[index] for index in range(len(prompts))]

    return generate


if __name__ == "__main__":
    serve_calls(load)
