"""Settings of engines and models: frozen and checked once. Imports no torch.

Only this module reads environment variables: PORTALM_CACHE_DIR, the folder of cached models, and
the environment that an engine process inherits.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from portalm.errors import ConfigError

DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""Model used when none is given."""
DEFAULT_ENCODER = "sentence-transformers/all-MiniLM-L6-v2"
"""A small encoder that can be downloaded without a model hub, for tests and benchmarks."""
MAX_PROMPT_LOGPROB_ROWS = 256
"""Prompt positions whose logprobs are computed in one step; each needs a row of logits."""


def cache_dir() -> Path:
    """Folder of cached models: $PORTALM_CACHE_DIR, or portalm in the user's cache folder."""
    chosen = os.environ.get("PORTALM_CACHE_DIR")  # noqa: TID251 - this is portalm.config
    if chosen:
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"  # noqa: TID251
    return Path(base).expanduser() / "portalm"


def engine_environment() -> dict[str, str]:
    """Environment of an engine process: inherited, with one OpenMP and one OpenBLAS thread.

    Backends have their own threads; idle OpenMP and OpenBLAS threads would spin on the same cores.
    """
    return {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", **os.environ}  # noqa: TID251


DTypeName = Literal["float32", "float16", "bfloat16"]
LoadFormat = Literal["auto", "safetensors", "gguf", "dummy"]
Task = Literal["generate", "embed", "score"]
"""What a model can do: generate text, embed a text as a vector, score a pair of texts."""
PoolingName = Literal["mean", "cls", "last"]
SchedulingPolicy = Literal["fcfs", "priority"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding of a model."""

    theta: float = 10_000.0
    """Base of the frequencies."""
    rotary_dim: int | None = None
    """Number of leading dimensions of a head that are rotated; None: all."""
    scaling: tuple[tuple[str, Any], ...] = ()
    """The checkpoint's rope_scaling as sorted (name, value) pairs; empty: no scaling."""
    max_context: int | None = None
    """Longest context to be computed, in tokens, which some scalings depend on; None: the model's
    longest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolingConfig:
    """How a model's hidden states are pooled into one vector, unless a request sets it."""

    pooling: PoolingName = "last"
    normalize: bool = True
    """True: scale vectors to length 1."""
    max_tokens: int | None = None
    """Longest text the model was trained on, in tokens; None: its longest context."""
    is_purpose: bool = False
    """The checkpoint defines its pooling: a decoder then embeds and does not generate."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderConfig:
    """Settings of encoders, which compute a whole prompt in one step."""

    layer_norm_eps: float = 1e-12
    num_token_types: int = 2
    """Rows of the token type embedding, which distinguishes the two texts of a pair."""
    first_position: int = 0
    """Row of the position embedding for the first token of a prompt."""
    num_labels: int = 1
    """Number of outputs of the classifier, if the model has one."""
    has_sigmoid: bool = True
    """True: the classifier's output is a logit and gets a sigmoid; False: it is the score."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """The shape of a model, read from its checkpoint (config.json or GGUF metadata)."""

    architecture: str
    """First entry of config.json's `architectures`, for example LlamaForCausalLM."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    max_position: int
    """The model's longest context, in tokens."""
    norm_eps: float = 1e-5
    rope: RopeConfig = field(default_factory=RopeConfig)
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    sliding_window: int | None = None
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    """Token ids that end an answer (from config.json and generation_config.json)."""
    dtype: DTypeName = "bfloat16"
    """Dtype of the saved weights, or the nearest dtype that can be computed in."""
    pooling: PoolingConfig = field(default_factory=PoolingConfig)
    encoder: EncoderConfig | None = None
    """None for a decoder."""
    text_part_of: str | None = None
    """Architecture of the checkpoint if only its text part is loaded, as `architecture`."""
    values: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)
    """All of config.json, or GGUF metadata under config.json's names, with the family's defaults,
    and its own keys also under the common ones. A model family reads its own settings from it."""
    source: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)
    """config.json without any change, for transformers' config classes."""

    def __post_init__(self) -> None:
        """Reject impossible shapes: a broken checkpoint is found here first."""
        for name in (
            "vocab_size", "hidden_size", "intermediate_size", "num_layers",
            "num_heads", "num_kv_heads", "head_size", "max_position",
        ):  # fmt: skip
            if getattr(self, name) < 1:
                raise ConfigError(
                    f"model config: {name} must be at least 1, not {getattr(self, name)}"
                )
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"model config: num_heads ({self.num_heads}) must be a multiple of "
                f"num_kv_heads ({self.num_kv_heads})"
            )

    def serving(self, max_model_len: int) -> ModelConfig:
        """Return a copy for contexts of at most `max_model_len` tokens."""
        return replace(self, rope=replace(self.rope, max_context=max_model_len))


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """Limits of one engine step and of the KV block pool."""

    max_batch_tokens: int = 2048
    """Maximum tokens computed in one step, over all requests. Higher favors throughput, lower
    latency."""
    max_batch_requests: int = 256
    """Maximum number of requests that hold KV blocks at once."""
    max_model_len: int = 2048
    """Longest prompt plus answer, in tokens."""
    block_size: int = 16
    """Tokens per KV block."""
    num_blocks: int = 1024
    """KV blocks in the pool, including the null block 0."""
    enable_prefix_caching: bool = True
    """True: reuse full KV blocks of earlier requests that began with the same tokens."""
    enable_chunked_prefill: bool = True
    """True: split long prompts over several steps. False: a prompt is computed in one step."""
    policy: SchedulingPolicy = "fcfs"
    """Order of waiting requests. fcfs: by arrival. priority: lower priority first, then arrival."""
    max_prompt_logprob_rows: int = MAX_PROMPT_LOGPROB_ROWS
    """Maximum prompt tokens in one step for requests with prompt_logprobs; limits logits memory."""
    keeps_kv: bool = True
    """False for an encoder: its requests hold no KV blocks and run in one step."""

    def __post_init__(self) -> None:
        """Reject values that cannot work; the error names the field and the fix."""
        _positive(
            self, "max_batch_tokens", "max_batch_requests", "max_model_len", "block_size",
            "max_prompt_logprob_rows",
        )  # fmt: skip
        if self.max_batch_tokens < self.max_batch_requests:
            raise ConfigError(
                f"max_batch_tokens ({self.max_batch_tokens}) must be at least max_batch_requests "
                f"({self.max_batch_requests}): each running request decodes one token per step"
            )
        if not self.enable_chunked_prefill and self.max_batch_tokens < self.max_model_len:
            raise ConfigError(
                f"without chunked prefill, max_batch_tokens ({self.max_batch_tokens}) must be at "
                f"least max_model_len ({self.max_model_len}): raise max_batch_tokens, lower "
                f"max_model_len, or enable chunked prefill"
            )
        if self.keeps_kv and self.num_blocks < 2:
            raise ConfigError(
                f"num_blocks ({self.num_blocks}) must be at least 2: block 0 is the null block"
            )


CHECKPOINT_SCHEMES = (
    "awq",
    "bitsandbytes",
    "compressed-tensors",
    "gptq",
    "modelopt",
    "mxfp4",
)
"""Quantization schemes of checkpoints that can be loaded (portalm/quant)."""

QUANTIZATIONS = ("auto", "none", "int8", "int4", "fp8", *CHECKPOINT_SCHEMES)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """All settings of an engine: keyword arguments of `LLM` and flags of `portalm serve`."""

    model: str = DEFAULT_MODEL
    """Local folder, .gguf file, or Hugging Face id of the model."""
    tokenizer: str | None = None
    """Local folder or Hugging Face id of the tokenizer. None: the model's own."""
    device: str = "auto"
    """Name of the backend to run on (`portalm devices` lists them). auto: the fastest available."""
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    """Data type of weights and activations. auto: the checkpoint's, if the device supports it."""
    quantization: str = "auto"
    """How weights are stored and computed. auto: the checkpoint's values, kept quantized where the
    device supports it and `dtype` is not float32. none: `dtype`, dequantized if necessary. int8,
    int4: round weights that have more bits, and activations to 8 bits. fp8: the same in float8.
    The name of a checkpoint scheme (awq, bitsandbytes, compressed-tensors, gptq, modelopt, mxfp4):
    the same as auto, but the checkpoint must use that scheme."""
    max_model_len: int | None = None
    """Maximum tokens of a prompt and its answer together. None: the model's longest context."""
    block_size: int = 16
    """Tokens per KV block."""
    gpu_memory_utilization: float | None = None
    """Fraction of the device's memory, above 0 and at most 1, for weights, activations and KV cache
    together. None: 0.9 of a device's own memory; where memory is shared with the host, no more KV
    cache than max_num_seqs requests can use."""
    kv_cache_memory_bytes: int | None = None
    """Size of the KV cache in bytes; overrides gpu_memory_utilization. None: what memory allows."""
    kv_cache_dtype: Literal["auto", "float32", "float16", "bfloat16", "int8", "fp8"] = "auto"
    """Data type of cached keys and values. auto: `dtype`. int8, fp8 (float8 e4m3): 8 bits with a
    scale per token and KV head; holds nearly twice as many tokens as 16 bits."""
    num_gpu_blocks_override: int | None = None
    """Number of KV blocks to allocate; overrides every other size. None: what memory allows."""
    cpu_threads: int | None = None
    """Number of compute threads on the CPU. None: one per core that the process may use, by its
    affinity and the container's limit."""
    max_num_seqs: int = 256
    """Maximum number of requests in one step."""
    max_num_batched_tokens: int = 2048
    """Maximum number of tokens computed in one step, over all requests. Higher favors throughput,
    lower latency."""
    enable_chunked_prefill: bool = True
    """True: split long prompts over several steps. False: compute each prompt in one step."""
    enable_prefix_caching: bool = True
    """True: reuse KV blocks of earlier requests that began with the same tokens."""
    scheduling_policy: SchedulingPolicy = "fcfs"
    """Order of waiting requests. fcfs: by arrival. priority: lower priority first, then arrival."""
    async_scheduling: bool = True
    """True: plan a step while the previous one runs, if the backend supports it."""
    load_format: LoadFormat = "auto"
    """Format of the checkpoint. auto: detected from the files. dummy: random weights, for tests."""
    revision: str | None = None
    """Branch, tag or commit on the Hugging Face hub. None: the default branch."""
    trust_remote_code: bool = False
    """True: let a tokenizer run Python code from its repository."""
    hf_overrides: tuple[tuple[str, Any], ...] = ()
    """Values that replace those of the checkpoint's config.json; a mapping is accepted."""
    seed: int = 0
    """Seed of requests that have none, and of dummy weights."""
    enforce_eager: bool = False
    """True: run steps without capturing them as graphs; slower, for debugging."""
    generation_config: str = "auto"
    """Source of the sampling parameters that a request does not set. auto: the model's
    generation_config.json, or the metadata of its GGUF file. vllm: none, as in vLLM's flag; the
    API's own defaults. Otherwise the path of a generation_config.json or of its folder."""
    max_logprobs: int = 20
    """Maximum value of a request's logprobs and prompt_logprobs, at least 0."""
    chat_template: str | None = None
    """Jinja chat template, or the path of one. None: the model's own."""

    def __post_init__(self) -> None:
        """Reject values that cannot work; the error names the setting and the fix."""
        if not self.model:
            raise ConfigError(
                "model must not be empty: pass a folder, a .gguf file or a Hugging Face id"
            )
        object.__setattr__(self, "hf_overrides", tuple(sorted(dict(self.hf_overrides).items())))
        _positive(self, "block_size", "max_num_seqs", "max_num_batched_tokens")
        if not self.generation_config:
            raise ConfigError("generation_config must not be empty: pass auto, vllm or a path")
        if self.quantization not in QUANTIZATIONS:
            raise ConfigError(
                f"quantization must be one of {', '.join(QUANTIZATIONS)}, not {self.quantization!r}"
            )
        optional = (
            "max_model_len", "kv_cache_memory_bytes", "num_gpu_blocks_override", "cpu_threads"
        )  # fmt: skip
        for name in optional:
            if getattr(self, name) is not None:
                _positive(self, name)
        share = self.gpu_memory_utilization
        if share is not None and not 0 < share <= 1:
            raise ConfigError(f"gpu_memory_utilization must be above 0 and at most 1, not {share}")
        if self.max_logprobs < 0:
            raise ConfigError(f"max_logprobs must be at least 0, not {self.max_logprobs}")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> EngineConfig:
        """Build the config from a mapping; an unknown name is an error."""
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ConfigError(
                f"unknown setting {unknown[0]!r}; known settings: {', '.join(sorted(known))}"
            )
        return cls(**values)

    def scheduler_config(self, *, max_model_len: int, num_blocks: int | None) -> SchedulerConfig:
        """Derive the scheduler's settings.

        Args:
            max_model_len: maximum tokens of a prompt and its answer together.
            num_blocks: KV blocks in the pool; None for an encoder, which has none.
        """
        tokens = self.max_num_batched_tokens
        keeps_kv = num_blocks is not None
        if not (self.enable_chunked_prefill and keeps_kv):
            tokens = max(tokens, max_model_len)
        return SchedulerConfig(
            max_batch_tokens=tokens,
            max_batch_requests=min(self.max_num_seqs, tokens),
            max_model_len=max_model_len,
            block_size=self.block_size,
            num_blocks=num_blocks or 1,
            enable_prefix_caching=self.enable_prefix_caching and keeps_kv,
            enable_chunked_prefill=self.enable_chunked_prefill and keeps_kv,
            policy=self.scheduling_policy,
            keeps_kv=keeps_kv,
        )

    def with_(self, **changes: Any) -> EngineConfig:
        """Return a copy with some settings changed, checked again."""
        return replace(self, **changes)


def _positive(config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"{name} must be an integer of at least 1, not {value!r}")
