"""The tree of errors: each says what happened, with the numbers, and what to do next."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

BackendErrorKind = Literal["oom", "unsupported", "shape", "kernel", "timeout", "device_lost"]


class PortaLMError(Exception):
    """Anything PortaLM reports on purpose. The CLI prints it as one line and exits 2."""


class ConfigError(PortaLMError, ValueError):
    """A setting that cannot work; the text names it, why, and the fix."""


# -- requests ---------------------------------------------------------------------------------


class InvalidRequest(PortaLMError, ValueError):
    """A request that can never be answered as asked; refused at the door, nothing else affected."""

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        """The field at fault, as the caller spelled it (OpenAI's error object has it too)."""


class RequestTooLarge(InvalidRequest):
    """A request that could not fit even in an empty engine."""


# -- models -----------------------------------------------------------------------------------


class ModelError(PortaLMError):
    """A model that cannot be found, read or run."""


class ModelNotFound(ModelError):
    """No checkpoint under that name, here or where it could be fetched from."""


class CheckpointError(ModelError):
    """A checkpoint file that is broken, truncated or incomplete."""

    def __init__(self, path: object, reason: str) -> None:
        super().__init__(f"cannot read checkpoint {str(path)!r}: {reason}")
        self.path = str(path)
        self.reason = reason


class UnsupportedModel(ModelError):
    """A well-formed checkpoint of an architecture or format that PortaLM does not run."""


# -- backends ---------------------------------------------------------------------------------


class BackendUnavailable(PortaLMError):
    """The asked-for backend cannot run on this machine."""

    def __init__(self, device: str, reason: str, available: Sequence[str]) -> None:
        super().__init__(
            f"device {device!r} cannot run here: {reason}. "
            f"Available on this machine: {', '.join(available) or 'none'}. "
            f"`portalm devices` explains each one."
        )
        self.device = device
        self.reason = reason


class BackendError(PortaLMError):
    """A device operation that failed. Only kind `device_lost` may end an engine."""

    def __init__(self, kind: BackendErrorKind, message: str) -> None:
        super().__init__(message)
        self.kind: BackendErrorKind = kind


class Unsupported(BackendError):
    """Something the backend does not claim in its `Capabilities`; raised at start-up."""

    def __init__(self, message: str) -> None:
        super().__init__("unsupported", message)


# -- engine -----------------------------------------------------------------------------------


class RequestFailed(PortaLMError):
    """A request that was fine and could not be finished: a fault of the engine or its device."""


class QueueTimeout(PortaLMError):
    """A request that waited in the queue as long as the server lets one wait."""


class EngineNotReady(PortaLMError):
    """The model is not loaded yet: a moment later the request may be fine."""


class CompilersBusy(PortaLMError):
    """Too many grammars wait to be compiled: a moment later there may be room for another."""


class EngineDead(PortaLMError):
    """The engine process has ended; requests in flight cannot be answered by it."""
