"""Pooling the hidden states of decoders: chunked, during generation, with a prefix cache."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from portalm.config import EngineConfig
from portalm.engine.engine import Engine
from portalm.engine.messages import AddRequest, TokenOutput
from portalm.engine.scores import numbers
from portalm.errors import InvalidRequest
from portalm.pooling_params import PoolingParams
from portalm.sampling_params import SamplingParams
from portalm_backends.null.backend import NullBackend
from portalm_backends.reference.backend import ReferenceBackend
from tests.tiny import ask, make_engine, run, tokens

PROMPTS = {str(n): [(7 * n + i * i) % 250 for i in range(n)] for n in (1, 2, 17, 33, 90)}
POOLINGS = ("mean", "cls", "last")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("llama")
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256,
            hidden_size=64,
            intermediate_size=112,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
        )
    ).eval()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.2)
    model.save_pretrained(folder)
    return folder, model.model


def engine_of(folder: Path, **settings: Any) -> Engine:
    values = {"model": str(folder), "max_num_seqs": 8, "max_num_batched_tokens": 24, **settings}
    return Engine(EngineConfig.from_dict(values))


def pool(engine: Engine, request_id: str, prompt: list[int], **options: Any) -> None:
    engine.add(
        AddRequest(
            request_id=request_id,
            prompt_token_ids=prompt,
            params=SamplingParams(),
            seed=0,
            pooling=PoolingParams(**{"normalize": False, **options}),
        )
    )


def vector(outputs: list[TokenOutput]) -> torch.Tensor:
    *notices, output = outputs  # outputs before it only report that it was scheduled
    assert not any(notice.finish_reason or notice.pooled for notice in notices)
    assert (output.finish_reason, output.token_ids) == ("stop", [])
    return torch.tensor(numbers(output.pooled or b"")).double()


def expected_of(model: Any, prompt: list[int], pooling: str) -> torch.Tensor:
    with torch.inference_mode():
        states = model(torch.tensor([prompt])).last_hidden_state[0].double()
    return {"mean": states.mean(0), "cls": states[0], "last": states[-1]}[pooling]


def nmse(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).square().sum() / expected.square().sum())


@pytest.mark.parametrize("device", ["reference", "cpu"])
def test_vectors_of_chunked_prompts_during_generation_equal_transformers(
    llama: tuple[Path, Any], device: str
) -> None:
    folder, model = llama
    alone = engine_of(folder, device=device)
    ask(alone, "generated", PROMPTS["17"], max_tokens=24)
    text = tokens(run(alone))["generated"]

    engine = engine_of(folder, device=device)
    ask(engine, "generated", PROMPTS["17"], max_tokens=24)
    for name, prompt in PROMPTS.items():
        for pooling in POOLINGS:
            pool(engine, f"{name} {pooling}", prompt, pooling=pooling)
    outputs = run(engine)

    assert engine.stats().last_step_tokens <= 24
    assert engine.stats().num_used_blocks == 0
    assert tokens({"generated": outputs.pop("generated")})["generated"] == text
    for name, prompt in PROMPTS.items():
        for pooling in POOLINGS:
            expected = expected_of(model, prompt, pooling)
            assert nmse(vector(outputs[f"{name} {pooling}"]), expected) < 1e-10, (name, pooling)


def test_only_the_last_tokens_state_may_come_from_the_prefix_cache(
    llama: tuple[Path, Any],
) -> None:
    folder, model = llama
    engine = engine_of(folder, device="cpu")
    ask(engine, "before", PROMPTS["90"], max_tokens=1)
    run(engine)

    for pooling in POOLINGS:
        pool(engine, pooling, PROMPTS["90"], pooling=pooling)
        *_, output = run(engine)[pooling]

        assert output.num_cached_tokens == (80 if pooling == "last" else 0)
        assert nmse(vector([output]), expected_of(model, PROMPTS["90"], pooling)) < 1e-10


def test_a_preempted_prompt_is_pooled_from_its_first_token(llama: tuple[Path, Any]) -> None:
    folder, model = llama
    settings = {"max_num_batched_tokens": 8, "max_model_len": 128, "num_gpu_blocks_override": 13}
    engine = engine_of(folder, device="cpu", enable_prefix_caching=False, **settings)
    for name in ("first", "second"):  # three blocks each, then four: more than the pool has
        ask(engine, name, list(range(40)), max_tokens=40)
    pool(engine, "pooled", PROMPTS["90"], pooling="mean")

    outputs = run(engine)

    assert engine.stats().preemptions_total > 0
    assert nmse(vector(outputs["pooled"]), expected_of(model, PROMPTS["90"], "mean")) < 1e-10


def test_a_vector_is_truncated_first_and_then_normalized(llama: tuple[Path, Any]) -> None:
    folder, model = llama
    engine = engine_of(folder, device="cpu")
    pool(engine, "a", PROMPTS["17"], normalize=None, dimensions=10)

    found = vector(run(engine)["a"])

    cut = expected_of(model, PROMPTS["17"], "last")[:10]
    assert nmse(found, cut / cut.norm()) < 1e-10


def test_an_aborted_prompt_leaves_no_sum(llama: tuple[Path, Any]) -> None:
    folder, model = llama
    engine = engine_of(folder, device="cpu")
    pool(engine, "a", PROMPTS["90"], pooling="mean")
    engine.step()

    [ended] = engine.abort(["a"])
    pool(engine, "a", PROMPTS["33"], pooling="mean")  # the same id, another prompt

    assert ended.finish_reason == "abort"
    found = vector(run(engine)["a"])
    assert nmse(found, expected_of(model, PROMPTS["33"], "mean")) < 1e-10
    assert engine.stats().num_used_blocks == 0


class PoisonedState(ReferenceBackend):
    """States of prompts that begin with token 9 are NaN."""

    def take_rows(self, x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        out = super().take_rows(x, rows)
        return torch.where(self.poison[rows.long(), None], torch.nan, out)

    def embed(self, token_ids: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        self.poison = token_ids == 9
        return super().embed(token_ids, table)


def test_nan_states_fail_only_their_own_request(tmp_path: Path) -> None:
    engine = make_engine(tmp_path, PoisonedState())
    pool(engine, "bad", [9, 5, 9], pooling="mean")
    pool(engine, "good", [5, 6, 7], pooling="mean")

    outputs = run(engine)

    *_, bad = outputs["bad"]
    assert (bad.finish_reason, bad.pooled) == ("error", None)
    assert "NaN or infinity" in (bad.error or "")
    assert torch.isfinite(vector(outputs["good"])).all()


# on the null device the first numbers of a hidden state are the token's id and position


@pytest.mark.parametrize("in_flight", [1, 2], ids=["one step in flight", "two steps in flight"])
def test_each_vector_is_returned_once_with_steps_in_flight(tmp_path: Path, in_flight: int) -> None:
    engine = make_engine(tmp_path, NullBackend(max_steps_in_flight=in_flight), device="null")
    prompts = {str(n): [3 + (n + i) % 400 for i in range(n)] for n in (1, 5, 64, 65, 200)}
    ask(engine, "generated", [5, 6], max_tokens=30)
    for name, prompt in prompts.items():
        pool(engine, name, prompt, pooling="mean")

    outputs = run(engine)

    assert len(tokens({"": outputs.pop("generated")})[""]) == 30
    for name, prompt in prompts.items():
        found = vector(outputs[name])
        assert found[0] == pytest.approx(sum(prompt) / len(prompt))
        assert found[1] == pytest.approx((len(prompt) - 1) / 2)


def test_states_of_steps_planned_before_a_preemption_are_dropped(tmp_path: Path) -> None:
    settings = {"max_num_batched_tokens": 8, "max_model_len": 128, "num_gpu_blocks_override": 13}
    device = NullBackend(max_steps_in_flight=2)
    engine = make_engine(tmp_path, device, enable_prefix_caching=False, **settings)
    for name in ("first", "second"):
        ask(engine, name, list(range(40)), max_tokens=40)
    prompt = list(range(90))
    pool(engine, "pooled", prompt, pooling="mean")

    outputs = run(engine)

    assert engine.stats().preemptions_total > 0
    assert vector(outputs["pooled"])[0] == pytest.approx(sum(prompt) / len(prompt))


def test_other_prompts_are_pooled_again_after_a_failed_step(tmp_path: Path) -> None:
    backend = NullBackend(fail_at_step=2, fail_kind="kernel", max_steps_in_flight=2)
    engine = make_engine(tmp_path, backend)
    pool(engine, "small", [9] * 100, pooling="mean")
    pool(engine, "large", [8] * 200, pooling="mean")

    outputs = run(engine)

    reasons = {name: many[-1].finish_reason for name, many in outputs.items()}
    assert sorted(reasons.values()) == ["error", "stop"]
    [name] = [name for name, reason in reasons.items() if reason == "stop"]
    assert vector(outputs[name])[0] == {"small": 9, "large": 8}[name]


def test_prompts_are_pooled_in_smaller_steps_where_memory_runs_out(tmp_path: Path) -> None:
    backend = NullBackend(fail_at_step=2, fail_kind="oom", max_steps_in_flight=2)
    engine = make_engine(tmp_path, backend)
    pool(engine, "small", [9] * 100, pooling="mean")
    pool(engine, "large", [8] * 200, pooling="mean")

    outputs = run(engine)

    assert vector(outputs["small"])[0] == 9
    assert vector(outputs["large"])[0] == 8


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"pooling": "max"}, "pooling must be one of mean, cls, last, not 'max'"),
        ({"normalize": 1}, "normalize must be true or false"),
        ({"dimensions": 0}, "dimensions must be an integer of at least 1, not 0"),
        ({"truncate_prompt_tokens": -2}, "truncate_prompt_tokens must be an integer"),
        ({"task": "classify"}, "task must be one of embed, score"),
        ({"task": "score", "dimensions": 3}, "dimensions cannot be used with task"),
    ],
    ids=lambda x: str(x)[:40],
)
def test_bad_parameters_are_refused_by_name(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message) as caught:
        PoolingParams(**values)

    assert caught.value.param in values


def embedder(folder: Path, *, names_prefix: bool, architecture: str) -> Any:
    """Save a Qwen3 embedding model: no head, and files that configure the pooling."""
    from safetensors.torch import load_file, save_file
    from transformers import Qwen3Config, Qwen3Model

    torch.manual_seed(0)
    model = Qwen3Model(
        Qwen3Config(
            vocab_size=256,
            hidden_size=64,
            intermediate_size=112,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            max_position_embeddings=256,
            tie_word_embeddings=False,
        )
    ).eval()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.2)
    model.save_pretrained(folder)
    if names_prefix:
        path = folder / "model.safetensors"
        tensors = {f"model.{name}": tensor for name, tensor in load_file(path).items()}
        save_file(tensors, path, metadata={"format": "pt"})
    config = folder / "config.json"
    config.write_text(config.read_text().replace("Qwen3Model", architecture))
    modules = [
        {"type": f"sentence_transformers.models.{kind}", "path": path}
        for kind, path in (("Transformer", ""), ("Pooling", "1_Pooling"), ("Normalize", "2"))
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_lasttoken": true}')
    return model


@pytest.mark.parametrize(
    ("architecture", "names_prefix"),
    [("Qwen3Model", False), ("Qwen3ForCausalLM", False), ("Qwen3ForCausalLM", True)],
)
def test_an_embedding_model_needs_no_head(
    tmp_path: Path, architecture: str, names_prefix: bool
) -> None:
    model = embedder(tmp_path, names_prefix=names_prefix, architecture=architecture)
    engine = engine_of(tmp_path, device="cpu")
    for name, prompt in PROMPTS.items():
        pool(engine, name, prompt, normalize=None)

    outputs = run(engine)

    for name, prompt in PROMPTS.items():
        expected = torch.nn.functional.normalize(expected_of(model, prompt, "last"), dim=0)
        assert nmse(vector(outputs[name]), expected) < 1e-10
    with pytest.raises(InvalidRequest, match="does not support generate; supported tasks: embed"):
        ask(engine, "g", [5])
