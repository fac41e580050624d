"""All errors that PortaLM raises on purpose.

Each message says what is wrong, with the value and the limit, and what to do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

BackendErrorKind = Literal["oom", "unsupported", "shape", "kernel", "timeout", "device_lost"]


class PortaLMError(Exception):
    """Base of all errors raised on purpose. The CLI prints the message and exits with status 2."""


class ConfigError(PortaLMError, ValueError):
    """An invalid setting."""


# -- requests ---------------------------------------------------------------------------------


class InvalidRequest(PortaLMError, ValueError):
    """A request that can never be answered; rejected before it reaches the engine."""

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        """Name of the invalid field, as in OpenAI's error object; None: no single field."""


class RequestTooLarge(InvalidRequest):
    """A request that would not fit even into an idle engine."""


# -- models -----------------------------------------------------------------------------------


class ModelError(PortaLMError):
    """A model that cannot be found, read or run."""


class ModelNotFound(ModelError):
    """No checkpoint of that name, neither local nor downloadable."""


class CheckpointError(ModelError):
    """A checkpoint file that is broken, truncated or incomplete."""

    def __init__(self, path: object, reason: str) -> None:
        super().__init__(f"cannot read checkpoint {str(path)!r}: {reason}")
        self.path = str(path)
        self.reason = reason


class UnsupportedModel(ModelError):
    """A valid checkpoint of an architecture or format that PortaLM does not support."""


# -- backends ---------------------------------------------------------------------------------


class BackendUnavailable(PortaLMError):
    """The requested backend cannot run on this machine."""

    def __init__(self, device: str, reason: str, available: Sequence[str]) -> None:
        super().__init__(
            f"device {device!r} cannot run here: {reason}. "
            f"Available on this machine: {', '.join(available) or 'none'}. "
            f"Run `portalm devices` for the reasons."
        )
        self.device = device
        self.reason = reason


class BackendError(PortaLMError):
    """A failed device operation. Only the kind "device_lost" ends the engine."""

    def __init__(self, kind: BackendErrorKind, message: str) -> None:
        super().__init__(message)
        self.kind: BackendErrorKind = kind


class Unsupported(BackendError):
    """A feature that the backend does not declare in its `Capabilities`; raised at startup."""

    def __init__(self, message: str) -> None:
        super().__init__("unsupported", message)


# -- engine -----------------------------------------------------------------------------------


class RequestFailed(PortaLMError):
    """A valid request that could not be finished because the engine or its device failed."""


class QueueTimeout(PortaLMError):
    """A request that waited in the queue longer than the server allows."""


class EngineNotReady(PortaLMError):
    """The model is still loading; the request may succeed later."""


class CompilersBusy(PortaLMError):
    """Too many grammars are waiting to be compiled; the request may succeed later."""


class EngineDead(PortaLMError):
    """The engine process has exited, so its requests cannot be answered."""
