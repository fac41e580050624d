"""Stop strings and grammars while the next step is already in flight on a late simulated GPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from portalm import LLM, SamplingParams
from portalm.backend import Backend
from portalm.outputs import RequestOutput
from portalm.sampling_params import StructuredOutputs
from portalm_backends.reference.backend import ReferenceBackend
from tests.gpu.fake_device import FakeGpu
from tests.gpu.plain import PlainGpu
from tests.tiny import add_byte_tokenizer, make_config_folder

PROMPTS = [f"number {i} " * (1 + 2 * i) for i in range(4)]
GRAMMARS: list[dict[str, Any]] = [
    {"regex": r"\d{3}-\d{4}"},
    {"json": {"type": "array", "items": {"type": "boolean"}, "minItems": 4, "maxItems": 4}},
]
FEW_BLOCKS = {
    "max_model_len": 160,
    "num_gpu_blocks_override": 13,
    "enable_prefix_caching": False,
}
"""Settings with too few blocks, so that requests are preempted."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return add_byte_tokenizer(make_config_folder(tmp_path_factory.mktemp("answers") / "tiny"))


def make_llm(folder: Path, backend: Backend, **settings: Any) -> LLM:
    return LLM(
        str(folder), backend=backend, load_format="dummy", max_num_seqs=8,
        max_num_batched_tokens=64, use_tqdm=False, **{"num_gpu_blocks_override": 256, **settings},
    )  # fmt: skip


def sampling(seed: int, **more: Any) -> SamplingParams:
    return SamplingParams(temperature=1.0, seed=seed, max_tokens=24, ignore_eos=True, **more)


@pytest.fixture(scope="module")
def asked(folder: Path) -> Iterator[tuple[dict[str, list[SamplingParams]], dict[str, Any]]]:
    """Sampling parameters of each prompt, and the reference's answers, by kind."""
    llm = make_llm(folder, ReferenceBackend())

    def answer(params: list[SamplingParams]) -> list[RequestOutput]:
        return llm.generate(PROMPTS, params, use_tqdm=False)

    free = [output.outputs[0].text for output in answer([sampling(i) for i in range(4)])]
    kinds = {
        # every other answer has none and continues while the others end
        "stop strings": [
            sampling(i, stop=[text[4 + i : 6 + i]] if i % 2 else None)
            for i, text in enumerate(free)
        ],
        "grammars": [
            sampling(i, structured_outputs=StructuredOutputs(**GRAMMARS[i // 2]) if i % 2 else None)
            for i in range(4)
        ],
    }
    yield kinds, {kind: summaries(answer(params)) for kind, params in kinds.items()}


def summaries(outputs: list[RequestOutput]) -> list[tuple[Any, ...]]:
    answers = [output.outputs[0] for output in outputs]
    return [(a.text, a.token_ids, a.finish_reason, a.stop_reason) for a in answers]


@pytest.mark.parametrize("kind", ["stop strings", "grammars"])
@pytest.mark.parametrize(
    "settings",
    [{}, pytest.param(FEW_BLOCKS, marks=pytest.mark.gpu_interpreted)],
    ids=["", "preempted"],
)
def test_answers_match_those_of_synchronous_steps(
    folder: Path, asked: Any, kind: str, settings: dict[str, Any]
) -> None:
    kinds, expected = asked
    gpu = FakeGpu(seed=5)
    with gpu.running():
        llm = make_llm(folder, PlainGpu(gpu), **settings)
        outputs = llm.generate(PROMPTS, kinds[kind], use_tqdm=False)
        llm.generate("after", sampling(0, stop=None), use_tqdm=False)
        metrics = llm.get_metrics()

    assert summaries(outputs) == expected[kind]
    assert {a[2] for a in expected[kind][1::2]} == {"stop"}
    assert metrics.num_used_blocks == 0
    assert bool(metrics.preemptions_total) == bool(settings)
