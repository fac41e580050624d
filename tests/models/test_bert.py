"""Encoders compared with transformers: tiny random checkpoints, and a real one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from portalm.config import DEFAULT_ENCODER, EngineConfig
from portalm.engine.engine import Engine
from portalm.engine.messages import AddRequest
from portalm.engine.scores import numbers
from portalm.errors import CheckpointError, InvalidRequest, RequestTooLarge, UnsupportedModel
from portalm.pooling_params import PoolingParams
from portalm.sampling_params import SamplingParams
from tests.tiny import run

PROMPTS = {str(n): [(7 * n + i * i) % 100 + 3 for i in range(n)] for n in (1, 2, 9, 40, 61)}
PROMPTS["9 again"] = [i + 30 for i in range(9)]

TINY: dict[str, Any] = {
    "vocab_size": 120,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}


MODERN: dict[str, Any] = {
    **TINY,
    "local_attention": 8,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
    "cls_token_id": 2,
    "sep_token_id": 1,
}


def save(model: Any, folder: Path) -> Any:
    """Set random weights, wide enough that no two states are equal, and save the model."""
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0, 0.2)
    model.save_pretrained(folder)
    return model.eval()


def make(kind: str, folder: Path) -> Any:
    import transformers

    torch.manual_seed(0)
    config, model = {
        "bert": (transformers.BertConfig(**TINY), transformers.BertModel),
        "bert with a prefix": (transformers.BertConfig(**TINY), transformers.BertForMaskedLM),
        "roberta": (
            transformers.RobertaConfig(**{**TINY, "max_position_embeddings": 66}),
            transformers.RobertaModel,
        ),
        "modernbert": (transformers.ModernBertConfig(**MODERN), transformers.ModernBertModel),
        "modernbert with biases": (
            transformers.ModernBertConfig(
                **MODERN, attention_bias=True, mlp_bias=True, norm_bias=True,
                layer_types=["sliding_attention", "full_attention", "sliding_attention"],
                rope_parameters={
                    "full_attention": {"rope_type": "default", "rope_theta": 5000.0},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 300.0},
                },
            ),
            transformers.ModernBertModel,
        ),
        "modernbert with a prefix": (
            transformers.ModernBertConfig(**MODERN), transformers.ModernBertForMaskedLM
        ),
    }[kind]  # fmt: skip
    made = save(model(config), folder)
    if "with a prefix" in kind:  # as sentence-transformers loads such a checkpoint
        path = folder / "config.json"
        path.write_text(path.read_text().replace("BertForMaskedLM", "BertModel"))
        return made.base_model
    return made


def engine_of(folder: Path, **settings: Any) -> Engine:
    values = {"model": str(folder), "max_num_seqs": 4, "max_num_batched_tokens": 70, **settings}
    return Engine(EngineConfig.from_dict(values))


def ask(engine: Engine, request_id: str, prompt: list[int], **options: Any) -> None:
    second = options.pop("second_text_start", None)
    engine.add(
        AddRequest(
            request_id=request_id,
            prompt_token_ids=prompt,
            params=SamplingParams(),
            seed=0,
            pooling=PoolingParams(**options),
            second_text_start=second,
        )
    )


def vectors(engine: Engine) -> dict[str, torch.Tensor]:
    """Run all requests and return their vectors, float64."""
    found = {}
    for request_id, outputs in run(engine).items():
        *_, output = outputs
        assert output.finish_reason == "stop", output
        assert output.token_ids == []
        found[request_id] = torch.tensor(numbers(output.pooled or b"")).double()
    return found


def nmse(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).square().sum() / expected.square().sum())


def states(model: Any, prompt: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        out: torch.Tensor = model(torch.tensor([prompt])).last_hidden_state[0].double()
    return out


@pytest.mark.parametrize("device", ["reference", "cpu"])
@pytest.mark.parametrize(
    "kind",
    [
        "bert",
        "bert with a prefix",
        "roberta",
        "modernbert",
        "modernbert with biases",
        "modernbert with a prefix",
    ],
)
def test_vectors_of_a_batch_equal_transformers(tmp_path: Path, kind: str, device: str) -> None:
    model = make(kind, tmp_path)
    engine = engine_of(tmp_path, device=device)
    pool = {"mean": lambda x: x.mean(0), "cls": lambda x: x[0], "last": lambda x: x[-1]}
    for name, prompt in PROMPTS.items():
        for pooling in pool:
            ask(engine, f"{name} {pooling}", prompt, pooling=pooling, normalize=False)

    found = vectors(engine)

    assert engine.stats().steps_total > 1  # the prompts do not fit in one step
    for name, prompt in PROMPTS.items():
        expected = states(model, prompt)
        for pooling, of in pool.items():
            assert nmse(found[f"{name} {pooling}"], of(expected)) < 1e-10, (name, pooling)


def test_a_vector_does_not_depend_on_the_other_requests_of_a_step(tmp_path: Path) -> None:
    make("bert", tmp_path)
    engine = engine_of(tmp_path, device="cpu", max_num_batched_tokens=256)
    ask(engine, "alone", PROMPTS["9"])
    alone = vectors(engine)["alone"]
    for name, prompt in PROMPTS.items():
        ask(engine, name, prompt)

    together = vectors(engine)["9"]

    assert torch.equal(together, alone)


def test_no_kv_block_is_used_and_no_prompt_is_split(tmp_path: Path) -> None:
    make("bert", tmp_path)
    engine = engine_of(tmp_path, device="cpu", max_num_batched_tokens=8)
    steps: list[int] = []
    engine.step_begins = steps.append
    for name in ("61", "40"):
        ask(engine, name, PROMPTS[name])

    vectors(engine)

    assert steps == [61, 40]  # a step fits the longest prompt, whatever max_num_batched_tokens is
    assert engine.stats().num_blocks == engine.stats().num_used_blocks == 0


def test_requests_that_an_encoder_cannot_serve_are_refused(tmp_path: Path) -> None:
    make("bert", tmp_path)
    engine = engine_of(tmp_path, device="cpu")

    with pytest.raises(RequestTooLarge, match="65 tokens, max_model_len is 64"):
        ask(engine, "long", [5] * 65)
    with pytest.raises(InvalidRequest, match="does not support generate"):
        engine.add(
            AddRequest(request_id="g", prompt_token_ids=[5], params=SamplingParams(), seed=0)
        )
    with pytest.raises(InvalidRequest, match="does not support score"):
        ask(engine, "s", [5], task="score")


@pytest.mark.parametrize(
    ("family", "more"),
    [
        ("Bert", {}),
        ("Roberta", {}),
        ("XLMRoberta", {}),
        ("ModernBert", {}),
        ("ModernBert", {"classifier_pooling": "mean"}),
    ],
    ids=["Bert", "Roberta", "XLMRoberta", "ModernBert", "ModernBert by the mean"],
)
def test_a_cross_encoders_scores_equal_transformers(
    tmp_path: Path, family: str, more: dict[str, Any]
) -> None:
    import transformers

    torch.manual_seed(0)
    shape = (MODERN if family == "ModernBert" else TINY) | more
    config = getattr(transformers, f"{family}Config")(**shape, num_labels=1)
    model = getattr(transformers, f"{family}ForSequenceClassification")(config)
    model = save(model, tmp_path)
    engine = engine_of(tmp_path, device="cpu")
    second = 4 if family == "Bert" else None  # the others have no token types
    for name, prompt in PROMPTS.items():
        ask(engine, name, prompt[:60], task="score", second_text_start=second)

    found = vectors(engine)

    for name, prompt in PROMPTS.items():
        ids = torch.tensor([prompt[:60]])
        types = (torch.arange(ids.shape[1]) >= 4).long()[None] if second else None
        pair = {} if family == "ModernBert" else {"token_type_ids": types}
        with torch.inference_mode():
            logit = model(ids, **pair).logits[0].double()
        torch.testing.assert_close(found[name], logit.sigmoid(), atol=1e-6, rtol=1e-6)


def test_a_score_without_an_activation_is_the_logit(tmp_path: Path) -> None:
    import transformers

    torch.manual_seed(0)
    config = transformers.BertConfig(**TINY, num_labels=1)
    model = save(transformers.BertForSequenceClassification(config), tmp_path)
    overrides = {"sbert_ce_default_activation_function": "torch.nn.modules.linear.Identity"}
    engine = engine_of(tmp_path, device="cpu", hf_overrides=overrides)
    ask(engine, "a", PROMPTS["9"], task="score")

    [score] = vectors(engine).values()

    with torch.inference_mode():
        logit = model(torch.tensor([PROMPTS["9"]])).logits[0].double()
    torch.testing.assert_close(score, logit, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"hidden_act": "relu"}, "hidden_act 'relu'"),
        ({"position_embedding_type": "relative_key"}, "relative_key"),
        ({"is_decoder": True}, "is_decoder true is not supported"),
        ({"architectures": ["BertForSequenceClassification"]}, "with 2 labels"),
        (
            {
                "model_type": "modernbert",
                "architectures": ["ModernBertForSequenceClassification"],
                "num_labels": 1,
                "classifier_pooling": "max",
            },
            "classifier_pooling 'max'",
        ),
        (
            {
                "model_type": "modernbert",
                "architectures": ["ModernBertModel"],
                "layer_types": ["full_attention"],
            },
            "layer_types",
        ),
    ],
    ids=lambda x: str(x)[:40],
)
def test_unsupported_encoder_settings_are_refused(
    tmp_path: Path, overrides: dict[str, Any], message: str
) -> None:
    make("bert", tmp_path)

    with pytest.raises(UnsupportedModel, match=message):
        engine_of(tmp_path, device="cpu", hf_overrides=overrides)


# -- sentence-transformers' files ---------------------------------------------------------------


def modules(folder: Path, pooling: dict[str, Any], *more: str) -> None:
    listed = [{"type": "sentence_transformers.models.Transformer", "path": ""}]
    listed += [{"type": "sentence_transformers.models.Pooling", "path": "1_Pooling"}]
    listed += [{"type": f"sentence_transformers.models.{kind}", "path": ""} for kind in more]
    (folder / "modules.json").write_text(json.dumps(listed))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))


@pytest.mark.parametrize(
    ("pooling", "more", "index", "is_normal"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, [], 0, False),
        ({"pooling_mode_lasttoken": True}, ["Normalize"], -1, True),
        ({"pooling_mode": "cls"}, ["Normalize"], 0, True),
    ],
    ids=["cls", "last", "newer spelling"],
)
def test_pooling_follows_the_models_files(
    tmp_path: Path, pooling: dict[str, Any], more: list[str], index: int, is_normal: bool
) -> None:
    model = make("bert", tmp_path)
    modules(tmp_path, pooling, *more)
    engine = engine_of(tmp_path, device="cpu")
    ask(engine, "a", PROMPTS["9"])

    [found] = vectors(engine).values()

    expected = states(model, PROMPTS["9"])[index]
    assert nmse(found, expected / expected.norm() if is_normal else expected) < 1e-10


def test_max_seq_length_of_the_files_is_the_default_max_model_len(tmp_path: Path) -> None:
    make("bert", tmp_path)
    (tmp_path / "sentence_bert_config.json").write_text('{"max_seq_length": 32}')

    assert engine_of(tmp_path, device="cpu").max_model_len == 32
    assert engine_of(tmp_path, device="cpu", max_model_len=64).max_model_len == 64


def test_unsupported_modules_are_named(tmp_path: Path) -> None:
    make("bert", tmp_path)

    modules(tmp_path, {"pooling_mode_max_tokens": True})
    with pytest.raises(
        UnsupportedModel, match="pooling max, which is not supported; supported: one of cls, mean"
    ):
        engine_of(tmp_path, device="cpu")
    modules(tmp_path, {"pooling_mode": "mean"}, "Dense")
    with pytest.raises(UnsupportedModel, match="module of type Dense"):
        engine_of(tmp_path, device="cpu")
    (tmp_path / "modules.json").write_text("{}")
    with pytest.raises(CheckpointError, match="must hold a list of modules"):
        engine_of(tmp_path, device="cpu")


# -- a real encoder -----------------------------------------------------------------------------

SENTENCES = [
    "A man is eating food.",
    "Someone is having a meal.",
    "The stock market fell sharply on Monday, as investors feared that prices would go on rising.",
    "Ein Mann isst.",
    "x",
]


@pytest.fixture(scope="module")
def expected(default_encoder: Path) -> torch.Tensor:
    """Sentence embeddings [N, C] computed by transformers in one padded batch."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(default_encoder)
    model = transformers.AutoModel.from_pretrained(default_encoder).eval()
    batch = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    with torch.inference_mode():
        hidden = model(**batch).last_hidden_state.double()
    mask = batch["attention_mask"][..., None]
    return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1))


@pytest.mark.model
@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-10), ("bfloat16", 5e-4)])
def test_a_real_encoders_sentences_equal_transformers(
    expected: torch.Tensor, dtype: str, bound: float
) -> None:
    from portalm import LLM

    llm = LLM(DEFAULT_ENCODER, device="cpu", dtype=dtype, use_tqdm=False)

    outputs = llm.embed(SENTENCES, use_tqdm=False)

    actual = torch.tensor([o.outputs.embedding for o in outputs]).double()
    assert nmse(actual, expected) < bound


@pytest.mark.model
def test_sentences_with_the_same_meaning_score_high(default_encoder: Path) -> None:
    from portalm import LLM

    llm = LLM(DEFAULT_ENCODER, device="cpu", use_tqdm=False)

    near, far = llm.score(SENTENCES[0], SENTENCES[1:3], use_tqdm=False)

    assert near.outputs.score > 0.6
    assert far.outputs.score < 0.2
    with pytest.raises(InvalidRequest, match="does not generate text; it embeds text: use"):
        llm.generate("Once")
    with pytest.raises(InvalidRequest, match="does not generate text"):
        llm.chat([{"role": "user", "content": "Hello"}])
