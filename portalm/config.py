"""Settings: frozen, checked once, named as users know them. No torch.

The one place that reads the environment: PORTALM_CACHE_DIR, where models are kept, and what an
engine process inherits.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from portalm.errors import ConfigError

DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""The model that is used where none is named."""
DEFAULT_ENCODER = "sentence-transformers/all-MiniLM-L6-v2"
"""A small encoder that can be had without a model hub; tests and benchmarks use it."""
MAX_PROMPT_LOGPROB_ROWS = 256
"""Positions of prompts whose logprobs one step computes: each takes a row of logits."""


def cache_dir() -> Path:
    """The folder that models are kept in: $PORTALM_CACHE_DIR, or the user's cache folder."""
    chosen = os.environ.get("PORTALM_CACHE_DIR")  # noqa: TID251 - this is portalm.config
    if chosen:
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"  # noqa: TID251
    return Path(base).expanduser() / "portalm"


def engine_environment() -> dict[str, str]:
    """Variables of an engine process: ours, and one thread for each library's own pool.

    Backends have their own threads; idle ones of OpenMP and OpenBLAS would spin beside them.
    """
    return {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", **os.environ}  # noqa: TID251


DTypeName = Literal["float32", "float16", "bfloat16"]
LoadFormat = Literal["auto", "safetensors", "gguf", "dummy"]
Task = Literal["generate", "embed", "score"]
"""What may be asked of a model: text, a vector, how well two texts go together."""
PoolingName = Literal["mean", "cls", "last"]
SchedulingPolicy = Literal["fcfs", "priority"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding of a model."""

    theta: float = 10_000.0
    """Base of the frequencies."""
    rotary_dim: int | None = None
    """Leading dimensions of a head that rotate; None: all."""
    scaling: tuple[tuple[str, Any], ...] = ()
    """The checkpoint's rope_scaling as sorted pairs (rope_type, factor, ...); empty: none."""
    max_context: int | None = None
    """Longest text that will be computed, which some scalings depend on; None: the longest that the
    model was made for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolingConfig:
    """How a model's hidden states become one vector, where a request does not say."""

    pooling: PoolingName = "last"
    normalize: bool = True
    """Scale vectors to length 1."""
    max_tokens: int | None = None
    """Longest text that the model was trained on; None: its longest context."""
    is_purpose: bool = False
    """The checkpoint says how it is pooled: a decoder then embeds, and does not generate."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderConfig:
    """What only models that see a whole prompt at once have."""

    layer_norm_eps: float = 1e-12
    num_token_types: int = 2
    """Rows of the table that tells the second text of a pair from the first."""
    first_position: int = 0
    """Row of the position table that a prompt begins with."""
    num_labels: int = 1
    """Outputs of the classifier, where the model has one."""
    has_sigmoid: bool = True
    """Its output is a logit; False: a score as it is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """The shape of a model, read from its checkpoint (config.json or GGUF metadata)."""

    architecture: str
    """The first of `architectures`, for example LlamaForCausalLM."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    max_position: int
    """Longest context the model was made for, in tokens."""
    norm_eps: float = 1e-5
    rope: RopeConfig = field(default_factory=RopeConfig)
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    sliding_window: int | None = None
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    """Any of these ends an answer (config.json and generation_config.json together)."""
    dtype: DTypeName = "bfloat16"
    """The dtype that the weights were saved in, or the nearest one that can be computed in."""
    pooling: PoolingConfig = field(default_factory=PoolingConfig)
    encoder: EncoderConfig | None = None
    """None: a decoder."""
    values: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)
    """All of config.json, or what GGUF metadata spell under its names: what only one family has is
    read there, by that family."""

    def __post_init__(self) -> None:
        """Reject shapes that no model has; a broken file shows here first."""
        for name in (
            "vocab_size", "hidden_size", "intermediate_size", "num_layers",
            "num_heads", "num_kv_heads", "head_size", "max_position",
        ):  # fmt: skip
            if getattr(self, name) < 1:
                raise ConfigError(f"model config: {name} is {getattr(self, name)}, must be >= 1")
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"model config: num_heads ({self.num_heads}) must be a multiple of "
                f"num_kv_heads ({self.num_kv_heads})"
            )

    def serving(self, max_model_len: int) -> ModelConfig:
        """The same model for texts of at most so many tokens."""
        return replace(self, rope=replace(self.rope, max_context=max_model_len))


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """Limits of one engine step and of the KV pool it draws from."""

    max_batch_tokens: int = 2048
    """Tokens computed in one step, over all requests. Higher: throughput; lower: latency."""
    max_batch_requests: int = 256
    """Requests that may hold KV blocks at once."""
    max_model_len: int = 2048
    """Longest prompt plus answer, in tokens."""
    block_size: int = 16
    """Tokens per KV block."""
    num_blocks: int = 1024
    """KV blocks in the pool, the null block 0 included."""
    enable_prefix_caching: bool = True
    """Reuse full blocks of earlier requests that began with the same tokens."""
    enable_chunked_prefill: bool = True
    """Split long prompts over steps. False: a prompt must fit one step's budget whole."""
    policy: SchedulingPolicy = "fcfs"
    """Order of the queue: by arrival, or by `priority` (lower first) and then arrival."""
    max_prompt_logprob_rows: int = MAX_PROMPT_LOGPROB_ROWS
    """Prompt tokens a step of requests that asked for prompt_logprobs: bounds the logits."""
    keeps_kv: bool = True
    """False: an encoder, whose requests hold no blocks and are computed whole in one step."""

    def __post_init__(self) -> None:
        """Reject values that cannot work, naming the field and the fix."""
        _positive(
            self, "max_batch_tokens", "max_batch_requests", "max_model_len", "block_size",
            "max_prompt_logprob_rows",
        )  # fmt: skip
        if self.max_batch_tokens < self.max_batch_requests:
            raise ConfigError(
                f"max_batch_tokens ({self.max_batch_tokens}) must be at least max_batch_requests "
                f"({self.max_batch_requests}): each running request decodes one token a step"
            )
        if not self.enable_chunked_prefill and self.max_batch_tokens < self.max_model_len:
            raise ConfigError(
                f"without chunked prefill max_batch_tokens ({self.max_batch_tokens}) must be at "
                f"least max_model_len ({self.max_model_len}): raise the one, lower the other, or "
                f"leave chunked prefill on"
            )
        if self.keeps_kv and self.num_blocks < 2:
            raise ConfigError(
                f"num_blocks ({self.num_blocks}) must be at least 2: block 0 is the null block"
            )


CHECKPOINT_SCHEMES = ("awq", "bitsandbytes", "compressed-tensors", "gptq", "mxfp4")
"""How checkpoints write weights of few bits (portalm/quant)."""

QUANTIZATIONS = ("auto", "none", "int8", "int4", "fp8", *CHECKPOINT_SCHEMES)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Everything a user may set on an engine: the keywords of `LLM()` and the flags of `serve`."""

    model: str = DEFAULT_MODEL
    """A local folder or .gguf file, or a Hugging Face id."""
    tokenizer: str | None = None
    """Where the tokenizer is, if not with the model."""
    device: str = "auto"
    """Name of a backend (`portalm devices` lists them); auto takes the fastest that can run."""
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    """What weights and activations are computed in; auto: as the checkpoint, if the device can."""
    quantization: str = "auto"
    """What weights are computed with. auto: the values that the checkpoint has, in its own few bits
    where the device can and `dtype` is not float32; none: `dtype`, dequantised if need be; int8,
    int4: rounded where they have more, and activations to 8 bits; fp8: as int8, in float8; one of
    `CHECKPOINT_SCHEMES`: as auto, of a checkpoint that must be of that scheme."""
    max_model_len: int | None = None
    """Longest prompt plus answer; None: what the model was made for."""
    block_size: int = 16
    """Tokens per KV block."""
    gpu_memory_utilization: float | None = None
    """Share of the device's memory for weights, activations and KV together. None: 0.9 of a
    device's own memory; of memory shared with the host, no more KV than the batch can use."""
    kv_cache_memory_bytes: int | None = None
    """KV pool size in bytes; overrides gpu_memory_utilization."""
    kv_cache_dtype: Literal["auto", "float32", "float16", "bfloat16", "int8", "fp8"] = "auto"
    """What keys and values are stored in; auto: as `dtype`. int8, fp8 (float8 e4m3): rounded to 8
    bits with a scale for each token and KV head; room for nearly twice the tokens of 16 bits."""
    num_gpu_blocks_override: int | None = None
    """KV blocks to allocate; overrides every other size (tests force preemption with it)."""
    cpu_threads: int | None = None
    """Threads that compute where the device is the host; None: one for each core that the process
    may use (affinity and the container's limit count)."""
    max_num_seqs: int = 256
    """Requests that run at once."""
    max_num_batched_tokens: int = 2048
    """Tokens computed in one step."""
    enable_chunked_prefill: bool = True
    """Split long prompts over steps."""
    enable_prefix_caching: bool = True
    """Reuse KV blocks of earlier requests with the same beginning."""
    scheduling_policy: SchedulingPolicy = "fcfs"
    """fcfs or priority."""
    async_scheduling: bool = True
    """Plan a step while the one before runs, where the backend can; False: strictly in turn."""
    load_format: LoadFormat = "auto"
    """auto looks at the files; dummy makes random weights from the config."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    trust_remote_code: bool = False
    """Let a tokenizer run Python code that its repository ships."""
    hf_overrides: tuple[tuple[str, Any], ...] = ()
    """Replace values of the checkpoint's config.json; a mapping is accepted."""
    seed: int = 0
    """Seeds requests that bring none, and dummy weights."""
    enforce_eager: bool = False
    """Do not capture steps (for debugging; slower)."""
    max_logprobs: int = 20
    """Most logprobs a request may ask for."""
    chat_template: str | None = None
    """A Jinja template, or the path of one, instead of the model's."""

    def __post_init__(self) -> None:
        """Reject values that cannot work, naming the flag and the fix."""
        if not self.model:
            raise ConfigError("model must not be empty: give a folder, a .gguf file or a hub id")
        object.__setattr__(self, "hf_overrides", tuple(sorted(dict(self.hf_overrides).items())))
        _positive(self, "block_size", "max_num_seqs", "max_num_batched_tokens")
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
            raise ConfigError(f"gpu_memory_utilization must be in (0, 1], not {share}")
        if self.max_logprobs < 0:
            raise ConfigError(f"max_logprobs must be at least 0, not {self.max_logprobs}")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> EngineConfig:
        """The config that `values` spell; an unknown name is an error, never ignored."""
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ConfigError(f"unknown setting {unknown[0]!r}; known: {', '.join(sorted(known))}")
        return cls(**values)

    def scheduler_config(self, *, max_model_len: int, num_blocks: int | None) -> SchedulerConfig:
        """The scheduler's part, once the model's length and the KV pool's size are known.

        Args:
            max_model_len: longest prompt plus answer.
            num_blocks: in the pool; None: an encoder, which has none.
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
        """A copy with some settings changed, checked again."""
        return replace(self, **changes)


def _positive(config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"{name} must be a whole number of at least 1, not {value!r}")
