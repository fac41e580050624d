"""Sampling parameters of a request: frozen, checked once, with the names of vLLM and OpenAI."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, NoReturn

from portalm.errors import InvalidRequest

MAX_LOGPROBS = 20
"""Largest value of `logprobs` and `prompt_logprobs`, as in OpenAI's API."""

MAX_GRAMMAR_BYTES = 128 << 10
"""Largest JSON schema, regex or grammar, and largest sum of all choices, in bytes of UTF-8."""
MAX_CHOICES = 4096
"""Largest number of texts in `choice`."""

_MAX_SEED = 2**63 - 1
_MAX_COUNT = 2**31 - 1
"""Largest count: devices store counts as int32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StructuredOutputs:
    """Constraint on the answer: exactly one of json, regex, choice, grammar, json_object."""

    json: str | Mapping[str, Any] | None = None
    """JSON schema that the answer is valid against, as text or as a mapping (stored as text)."""
    regex: str | None = None
    """Regular expression that the whole answer matches."""
    choice: tuple[str, ...] | None = None
    """Texts that the answer is one of; 1 to 4096 non-empty strings."""
    grammar: str | None = None
    """Context-free grammar in GBNF (llama.cpp's EBNF) that the answer matches, starting at its rule
    `root`."""
    json_object: bool = False
    """True: the answer is a JSON object, of any schema."""
    whitespace_pattern: str | None = None
    """Whitespace allowed between JSON tokens: an empty text, `[ \\n\\r\\t]*` or
    `[ \\n\\r\\t]{0,N}`. None: one line, formatted as by Python's json.dumps (with free whitespace
    small models may write nothing else). Only with json and json_object."""
    additional_properties: bool = False
    """True: objects may have properties that the schema does not list, unless it forbids them.
    False: only listed properties, in objects that list any."""

    def __post_init__(self) -> None:
        """Normalize the values, then reject invalid ones; the error names the field."""
        put = object.__setattr__
        if isinstance(self.json, Mapping):
            put(self, "json", _as_json(self.json))
        if self.choice is not None:
            put(self, "choice", _as_tuple("choice", self.choice))
        given = [
            name
            for name in ("json", "regex", "choice", "grammar", "json_object")
            if getattr(self, name) not in (None, False)
        ]
        if len(given) != 1:
            _refuse(
                "structured_outputs",
                "needs exactly one of json, regex, choice, grammar and json_object; got "
                + (" and ".join(given) or "none"),
            )
        for name in ("json_object", "additional_properties"):
            if not isinstance(getattr(self, name), bool):
                _refuse(
                    "structured_outputs",
                    f"{name} must be true or false, not {getattr(self, name)!r}",
                )
        for name in ("json", "regex", "grammar", "whitespace_pattern"):
            _check_text(name, getattr(self, name))
        self._check_choice()
        if self.whitespace_pattern is not None and given[0] not in ("json", "json_object"):
            _refuse(
                "structured_outputs",
                f"whitespace_pattern needs json or json_object; got {given[0]}",
            )

    def _check_choice(self) -> None:
        if self.choice is None:
            return
        if not self.choice or len(self.choice) > MAX_CHOICES:
            _refuse(
                "structured_outputs",
                f"choice must have 1 to {MAX_CHOICES} texts; got {len(self.choice)}",
            )
        if any(not isinstance(text, str) or not text for text in self.choice):
            _refuse("structured_outputs", "choice must contain only non-empty strings")
        _check_text("choice", "".join(self.choice))


def _check_text(name: str, text: Any) -> None:
    if text is None:
        return
    if not isinstance(text, str):
        _refuse("structured_outputs", f"{name} must be a string, not {type(text).__name__}")
    try:
        num_bytes = len(text.encode())
    except UnicodeEncodeError:
        _refuse("structured_outputs", f"{name} is not valid Unicode: it contains a lone surrogate")
    if num_bytes > MAX_GRAMMAR_BYTES:
        _refuse(
            "structured_outputs",
            f"{name} has {num_bytes} bytes, more than the limit of {MAX_GRAMMAR_BYTES}",
        )


def _as_json(schema: Mapping[str, Any]) -> str:
    try:
        return json.dumps(schema, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        _refuse("structured_outputs", f"json is not a JSON schema: {error}")


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the tokens of one request are sampled, and when generation ends."""

    n: int = 1
    """Number of answers to generate, 1 to 1024; they share the prompt's KV blocks."""
    presence_penalty: float = 0.0
    """Subtracted from the logit of every token that was already generated; -2 to 2."""
    frequency_penalty: float = 0.0
    """Subtracted from the logit of a token once for each time it was generated; -2 to 2."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens that occur in the prompt or the
    answer; above 0, where 1 changes nothing."""
    temperature: float = 1.0
    """Divides the logits; at least 0, where 0 always takes the most likely token (greedy)."""
    top_p: float = 1.0
    """Sample from the smallest set of most likely tokens whose total probability reaches this:
    above 0, at most 1."""
    top_k: int = 0
    """Sample from this many most likely tokens; 0 or -1: from all."""
    min_p: float = 0.0
    """Exclude tokens with less than this fraction of the highest probability; 0 to 1."""
    seed: int | None = None
    """Seed of the random numbers: the same seed gives the same tokens, alone or in a batch. None:
    derived from the engine's seed."""
    stop: tuple[str, ...] = ()
    """Texts that end the answer when generated. A single string is accepted."""
    stop_token_ids: tuple[int, ...] = ()
    """Token ids that end the answer when generated."""
    ignore_eos: bool = False
    """True: continue after the model's end-of-sequence token."""
    max_tokens: int | None = 16
    """Maximum number of tokens to generate, at least 1. None: up to the model's context length."""
    min_tokens: int = 0
    """Number of tokens to generate before end-of-sequence, stop tokens and stop strings count."""
    logprobs: int | None = None
    """Number of most likely tokens, 0 to 20, whose log probabilities are returned at each generated
    position, plus the sampled token. None: return no log probabilities."""
    prompt_logprobs: int | None = None
    """The same as `logprobs` for each prompt token except the first."""
    detokenize: bool = True
    """False: return token ids without text; `stop` must be empty."""
    skip_special_tokens: bool = True
    """True: leave special tokens out of the text."""
    spaces_between_special_tokens: bool = True
    """True: put a space between special tokens in the text."""
    include_stop_str_in_output: bool = False
    """True: keep the stop string, or the text of the stop token, at the end of the text."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Values to add to the logits, by token id; -100 to 100 each."""
    allowed_token_ids: tuple[int, ...] | None = None
    """Token ids that may be sampled. None: all."""
    bad_words: tuple[str, ...] = ()
    """Texts that must not be generated: the last token of each is not sampled after its other
    tokens."""
    structured_outputs: StructuredOutputs | None = None
    """Constraint on the answer (a schema, regex, choice or grammar). A mapping of the fields of
    `StructuredOutputs` is accepted. None: no constraint."""
    logits_processors: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of the logits processors to apply, by the name of an installed processor (see
    `portalm.logits_processor`)."""

    def __post_init__(self) -> None:
        """Normalize the values, then reject invalid ones; the error names the field."""
        put = object.__setattr__
        put(self, "stop", _as_tuple("stop", self.stop))
        put(self, "stop_token_ids", _as_tuple("stop_token_ids", self.stop_token_ids))
        put(self, "bad_words", _as_tuple("bad_words", self.bad_words))
        put(self, "top_k", 0 if self.top_k == -1 else self.top_k)
        put(self, "logit_bias", _int_keys(self.logit_bias or {}))
        put(self, "logits_processors", _by_name(self.logits_processors))
        if self.allowed_token_ids is not None:
            put(self, "allowed_token_ids", _as_tuple("allowed_token_ids", self.allowed_token_ids))
        if isinstance(self.structured_outputs, Mapping):
            put(self, "structured_outputs", _as_structured(self.structured_outputs))
        self._check_flags()
        self._check_numbers()
        self._check_sequences()

    def _check_flags(self) -> None:
        for name in (
            "ignore_eos", "detokenize", "skip_special_tokens", "spaces_between_special_tokens",
            "include_stop_str_in_output",
        ):  # fmt: skip
            if not isinstance(getattr(self, name), bool):
                _refuse(name, f"must be true or false, not {getattr(self, name)!r}")

    def _check_numbers(self) -> None:
        _integer("n", self.n, low=1, high=1024)
        _number("presence_penalty", self.presence_penalty, low=-2, high=2)
        _number("frequency_penalty", self.frequency_penalty, low=-2, high=2)
        _number("repetition_penalty", self.repetition_penalty, above=0)
        _number("temperature", self.temperature, low=0)
        _number("top_p", self.top_p, above=0, high=1)
        _integer("top_k", self.top_k, low=0, high=_MAX_COUNT)
        _number("min_p", self.min_p, low=0, high=1)
        if self.seed is not None:
            _integer("seed", self.seed, low=-_MAX_SEED, high=_MAX_SEED)
        if self.max_tokens is not None:
            _integer("max_tokens", self.max_tokens, low=1, high=_MAX_COUNT)
        _integer("min_tokens", self.min_tokens, low=0, high=_MAX_COUNT)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            _refuse("min_tokens", f"({self.min_tokens}) is above max_tokens ({self.max_tokens})")
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if value is not None:
                _integer(name, value, low=0, high=MAX_LOGPROBS)

    def _check_sequences(self) -> None:
        if any(not isinstance(s, str) or not s for s in self.stop):
            _refuse("stop", "must contain only non-empty strings")
        if self.stop and not self.detokenize:
            _refuse("stop", "needs detokenize=True: stop strings are searched in the text")
        if any(not isinstance(s, str) or not s for s in self.bad_words):
            _refuse("bad_words", "must contain only non-empty strings")
        for token_id in self.stop_token_ids:
            _integer("stop_token_ids", token_id, low=0)
        if self.allowed_token_ids is not None:
            if not self.allowed_token_ids:
                _refuse("allowed_token_ids", "must not be empty: no token could be sampled")
            for token_id in self.allowed_token_ids:
                _integer("allowed_token_ids", token_id, low=0)
        for token_id, bias in self.logit_bias.items():
            _integer("logit_bias", token_id, low=0)
            _number("logit_bias", bias, low=-100, high=100)

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature == 0.0

    @property
    def has_penalties(self) -> bool:
        """Whether earlier tokens change the logits through a penalty."""
        return (
            self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
            or self.repetition_penalty != 1.0
        )

    @property
    def needs_history(self) -> bool:
        """Whether the host needs each sampled token before the next one can be sampled."""
        return (
            self.has_penalties
            or bool(self.bad_words or self.logits_processors)
            or self.structured_outputs is not None
        )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SamplingParams:
        """Build the parameters from a mapping; an unknown name is an error."""
        known = {f.name for f in fields(cls)}
        for name in values:
            if name not in known:
                _refuse(name, f"is not a sampling parameter; known: {', '.join(sorted(known))}")
        return cls(**values)


def _as_structured(values: Mapping[str, Any]) -> StructuredOutputs:
    known = {f.name for f in fields(StructuredOutputs)}
    for name in values:
        if name not in known:
            _refuse(
                "structured_outputs", f"has no field {name!r}; known: {', '.join(sorted(known))}"
            )
    return StructuredOutputs(**values)


def _as_tuple(name: str, value: Any) -> tuple[Any, ...]:
    """Convert to a tuple: a single string or integer becomes one item, None becomes none."""
    if value is None:
        return ()
    if isinstance(value, str | int):
        return (value,)
    try:
        return tuple(value)
    except TypeError:
        _refuse(name, f"must be a list, not {value!r}")


def _int_keys(bias: Mapping[Any, float]) -> dict[int, float]:
    try:
        return {int(token_id): float(value) for token_id, value in bias.items()}
    except (TypeError, ValueError, AttributeError):
        raise InvalidRequest(
            "logit_bias must map token ids to numbers, for example {50256: -100}",
            param="logit_bias",
        ) from None


def _by_name(processors: Any) -> dict[str, Any]:
    if not isinstance(processors, Mapping) or not all(isinstance(k, str) for k in processors):
        raise InvalidRequest(
            "logits_processors must map names of installed processors to their arguments, "
            'for example {"no_digits": null}',
            param="logits_processors",
        )
    return dict(processors)


def _refuse(name: str, problem: str) -> NoReturn:
    raise InvalidRequest(f"{name} {problem}", param=name)


def _number(
    name: str,
    value: object,
    *,
    low: float | None = None,
    above: float | None = None,
    high: float | None = None,
) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        _refuse(name, f"must be a number, not {value!r}")
    if not math.isfinite(value):
        _refuse(name, f"must be finite, not {value}")
    if (
        (low is not None and value < low)
        or (above is not None and value <= above)
        or (high is not None and value > high)
    ):
        lower = (
            f"at least {low}" if low is not None else f"above {above}" if above is not None else ""
        )
        is_near = high is not None and (high < _MAX_COUNT or value > high)
        upper = f"at most {high}" if is_near else ""  # an error about 0 need not name 2**31
        _refuse(name, f"must be {' and '.join(x for x in (lower, upper) if x)}, not {value}")


def _integer(name: str, value: object, *, low: int, high: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        _refuse(name, f"must be an integer, not {value!r}")
    _number(name, value, low=low, high=high)


def as_token_ids(values: Sequence[int]) -> list[int]:
    """Return `values` as a list. Raises `InvalidRequest` if one is not an integer."""
    ids = list(values)
    for token_id in ids:
        if isinstance(token_id, bool) or not isinstance(token_id, int):
            raise InvalidRequest(
                f"prompt token ids must be integers, not {token_id!r}", param="prompt"
            )
    return ids
