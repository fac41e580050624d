"""generation_config.json and the tokenizer's files: default sampling, and where answers end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import pytest

from portalm import LLM, SamplingParams
from portalm.errors import CheckpointError, ConfigError
from portalm.models.loader.config_json import read_config
from portalm.models.loader.generation_config import read_sampling_defaults
from portalm.server.schemas.chat import ChatRequest
from portalm.server.schemas.completions import CompletionRequest
from portalm.server.schemas.responses import ResponsesRequest
from tests.tiny import add_byte_tokenizer, make_config_folder

LLAMA_3 = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "eos_token_id": [2, 9]}


def add_defaults(folder: Path, values: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "generation_config.json").write_text(json.dumps(values))
    return folder


def write_metadata(path: Path, **values: Any) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    for name, value in values.items():
        add = writer.add_float32 if isinstance(value, float) else writer.add_int32
        add(f"general.sampling.{name}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


# -- reading ----------------------------------------------------------------------------------


def test_auto_reads_the_models_own_file(tmp_path: Path) -> None:
    add_defaults(tmp_path, LLAMA_3)

    assert read_sampling_defaults(tmp_path, "auto") == {"temperature": 0.6, "top_p": 0.9}
    assert read_sampling_defaults(tmp_path, "vllm") == {}


def test_a_model_without_the_file_has_the_apis_defaults(tmp_path: Path) -> None:
    assert read_sampling_defaults(tmp_path, "auto") == {}


def test_every_parameter_that_vllm_reads_is_read(tmp_path: Path) -> None:
    values = {
        "temperature": 0.5, "top_p": 0.8, "top_k": 20, "min_p": 0.1, "repetition_penalty": 1.05,
        "max_new_tokens": 2048, "num_beams": 4, "do_sample": False,
    }  # fmt: skip
    add_defaults(tmp_path, values)

    assert read_sampling_defaults(tmp_path, "auto") == {
        "temperature": 0.5, "top_p": 0.8, "top_k": 20, "min_p": 0.1, "repetition_penalty": 1.05,
        "max_tokens": 2048,
    }  # fmt: skip


def test_null_and_the_apis_own_values_are_no_defaults(tmp_path: Path) -> None:
    add_defaults(tmp_path, {"temperature": None, "top_p": 1.0, "top_k": 0})

    assert read_sampling_defaults(tmp_path, "auto") == {}


def test_a_path_names_a_file_or_its_folder(tmp_path: Path) -> None:
    other = add_defaults(tmp_path / "other", {"top_k": 7})
    add_defaults(tmp_path, LLAMA_3)

    for path in (other, other / "generation_config.json"):
        assert read_sampling_defaults(tmp_path, str(path)) == {"top_k": 7}
    with pytest.raises(ConfigError, match=r"no file .*nowhere.*pass auto, vllm, or the path"):
        read_sampling_defaults(tmp_path, str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match="must not be empty"):
        LLM(generation_config="", use_tqdm=False)


@pytest.mark.parametrize("value", [-1.0, "hot", [0.5], float("nan")])
def test_an_invalid_value_is_refused_with_its_file(tmp_path: Path, value: Any) -> None:
    add_defaults(tmp_path, {"temperature": value})

    with pytest.raises(CheckpointError, match=r"temperature.*--generation-config vllm") as caught:
        read_sampling_defaults(tmp_path, "auto")

    assert caught.value.path.endswith("generation_config.json")


def test_a_gguf_file_has_defaults_in_its_metadata(tmp_path: Path) -> None:
    path = write_metadata(
        tmp_path / "a.gguf", temp=0.6, top_k=20, top_p=0.95, min_p=0.05, penalty_repeat=1.1
    )

    assert read_sampling_defaults(path, "auto") == {
        "temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.05, "repetition_penalty": 1.1
    }  # fmt: skip
    assert read_sampling_defaults(path, "vllm") == {}


# -- applying ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose makers recommend greedy answers of 5 tokens, by top_k."""
    folder = add_byte_tokenizer(make_config_folder(tmp_path_factory.mktemp("defaults") / "tiny"))
    return add_defaults(folder, {"top_k": 1, "max_new_tokens": 5})


def make_llm(folder: Path, **settings: Any) -> LLM:
    return LLM(
        str(folder), device="cpu", load_format="dummy", dtype="float32", use_tqdm=False, **settings
    )


def test_an_llm_uses_the_models_defaults_where_a_call_passes_none(folder: Path) -> None:
    llm = make_llm(folder)
    greedy = SamplingParams(temperature=0.0, max_tokens=5)

    assert llm.get_default_sampling_params() == SamplingParams(top_k=1, max_tokens=5)
    [default] = llm.generate("abc", use_tqdm=False)
    [right] = llm.generate("abc", greedy, use_tqdm=False)
    assert default.outputs[0].token_ids == right.outputs[0].token_ids
    assert [t for d in llm.stream("abc") for t in d.token_ids] == right.outputs[0].token_ids
    [free] = llm.generate("abc", SamplingParams(max_tokens=5, ignore_eos=True), use_tqdm=False)
    assert free.outputs[0].token_ids != right.outputs[0].token_ids


def test_generation_config_vllm_leaves_the_apis_defaults(folder: Path) -> None:
    llm = make_llm(folder, generation_config="vllm")

    assert llm.get_default_sampling_params() == SamplingParams()


@pytest.mark.parametrize(
    ("make", "max_tokens"),
    [
        (lambda **body: CompletionRequest(prompt="x", **body), 5),
        (lambda **body: ChatRequest(messages=[], **body), 5),
        (lambda **body: ResponsesRequest(input="x", **body), 5),
    ],
    ids=["completions", "chat", "responses"],
)
def test_a_request_over_http_has_defaults_for_what_it_does_not_set(
    make: Any, max_tokens: int
) -> None:
    defaults = {"top_k": 3, "temperature": 0.6, "repetition_penalty": 1.2, "max_tokens": 5}

    unset = make().params(defaults)
    assert (unset.top_k, unset.temperature, unset.repetition_penalty) == (3, 0.6, 1.2)
    assert unset.max_tokens == max_tokens
    null = make(temperature=None).params(defaults)
    assert null.temperature == 0.6
    given = make(temperature=1.0, top_k=0).params(defaults)
    assert (given.top_k, given.temperature, given.repetition_penalty) == (0, 1.0, 1.2)


def test_a_completion_keeps_openais_length_unless_the_models_is_shorter() -> None:
    body = CompletionRequest(prompt="x")

    assert body.params({"max_tokens": 2048}).max_tokens == 16
    assert CompletionRequest(prompt="x", max_tokens=9).params({"max_tokens": 5}).max_tokens == 9


# -- where answers end ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "files",
    [
        {
            "tokenizer_config.json": {
                "eos_token": "<|im_end|>",
                "added_tokens_decoder": {"7": {"content": "<|im_end|>"}, "2": {"content": "</s>"}},
            }
        },
        {
            "tokenizer_config.json": {"eos_token": {"content": "<|im_end|>"}},
            "tokenizer.json": {"added_tokens": [{"id": 7, "content": "<|im_end|>"}]},
        },
        {
            "special_tokens_map.json": {"eos_token": "<|im_end|>"},
            "added_tokens.json": {"<|im_end|>": 7},
        },
    ],
    ids=["added_tokens_decoder", "tokenizer.json", "added_tokens.json"],
)
def test_the_tokenizers_eos_token_ends_an_answer_too(tmp_path: Path, files: dict[str, Any]) -> None:
    make_config_folder(tmp_path, eos_token_id=[2, 3])
    add_defaults(tmp_path, {"eos_token_id": 4})
    for name, values in files.items():
        (tmp_path / name).write_text(json.dumps(values))

    assert read_config(tmp_path, {}).eos_token_ids == (2, 3, 4, 7)


def test_an_eos_token_without_a_known_id_changes_nothing(tmp_path: Path) -> None:
    make_config_folder(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|end|>"}')

    assert read_config(tmp_path, {}).eos_token_ids == (2,)
