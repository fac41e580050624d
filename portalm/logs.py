"""How log lines look: one a record, as text for people or as JSON, the same in every process."""

from __future__ import annotations

import json
import logging
import sys
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any, Literal, get_args

from portalm.errors import ConfigError

LogFormat = Literal["text", "json"]
LogLevel = Literal["debug", "info", "warning", "error"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LogConfig:
    """How a process writes its log."""

    format: LogFormat = "text"
    """text for people; json: one object a line."""
    level: LogLevel = "info"
    """The least of our own records that is written; of libraries' it is warning."""

    def __post_init__(self) -> None:
        """Reject what does not exist."""
        for name, known in (("format", LogFormat), ("level", LogLevel)):
            if getattr(self, name) not in get_args(known):
                raise ConfigError(
                    f"log {name} must be one of {', '.join(get_args(known))}, "
                    f"not {getattr(self, name)!r}"
                )


def write_logs(process: str, config: LogConfig) -> None:
    """Write this process's log to stderr from now on; `process` says who speaks, in each line."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Json(process) if config.format == "json" else _Text(process))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    for package in ("portalm", "portalm_backends"):
        logging.getLogger(package).setLevel(config.level.upper())


def with_fields(**fields: Any) -> dict[str, Any]:
    """`extra` of a log call: values with names, beside the message. None is left out."""
    return {"fields": {name: value for name, value in fields.items() if value is not None}}


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    return getattr(record, "fields", {})


class _Text(logging.Formatter):
    """`2026-11-21 16:40:01.123 INFO server: message name=value ...`, local time."""

    default_msec_format = "%s.%03d"

    def __init__(self, process: str) -> None:
        super().__init__(f"%(asctime)s %(levelname)s {process}: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        """The message, then the fields."""
        fields = "".join(f" {name}={_plain(value)}" for name, value in _fields(record).items())
        return super().formatMessage(record) + fields


def _plain(value: Any) -> str:
    """A value as a word; one that could be taken for several words is quoted, as in JSON."""
    if isinstance(value, float):
        return f"{value:.3f}"
    if not isinstance(value, str):
        return json.dumps(value, default=str)
    is_word = value.isprintable() and value != "" and not set(value) & {" ", '"', "="}
    return value if is_word else json.dumps(value)


class _Json(logging.Formatter):
    """One object a line: time (UTC), level, process, logger, message, fields, exception."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        """The record as JSON; what JSON does not know is written as str() has it."""
        time = datetime.fromtimestamp(record.created, timezone.utc)
        line: dict[str, Any] = {
            "time": time.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "process": self._process,
            "logger": record.name,
            "message": record.getMessage(),
        }
        for name, value in _fields(record).items():
            line[name] = round(value, 6) if isinstance(value, float) else value
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)
