"""Format of log lines, the same in every process: one line per record, as text or JSON."""

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
    """text: for people. json: one object per line."""
    level: LogLevel = "info"
    """Lowest level of PortaLM's own records to write; for libraries it is always warning."""

    def __post_init__(self) -> None:
        """Reject an unknown format or level."""
        for name, known in (("format", LogFormat), ("level", LogLevel)):
            if getattr(self, name) not in get_args(known):
                raise ConfigError(
                    f"log {name} must be one of {', '.join(get_args(known))}, "
                    f"not {getattr(self, name)!r}"
                )


def write_logs(process: str, config: LogConfig) -> None:
    """Write this process's log to stderr, with the name `process` in each line."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Json(process) if config.format == "json" else _Text(process))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    for package in ("portalm", "portalm_backends"):
        logging.getLogger(package).setLevel(config.level.upper())


def with_fields(**fields: Any) -> dict[str, Any]:
    """Build `extra` of a log call: named values to log after the message. None is left out."""
    return {"fields": {name: value for name, value in fields.items() if value is not None}}


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    return getattr(record, "fields", {})


class _Text(logging.Formatter):
    """`2026-11-21 16:40:01.123 INFO server: message name=value ...`, local time."""

    default_msec_format = "%s.%03d"

    def __init__(self, process: str) -> None:
        super().__init__(f"%(asctime)s %(levelname)s {process}: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        """Format the message and then the fields."""
        fields = "".join(f" {name}={_plain(value)}" for name, value in _fields(record).items())
        return super().formatMessage(record) + fields


def _plain(value: Any) -> str:
    """Format a value as one word, quoted as in JSON if it is not a plain word."""
    if isinstance(value, float):
        return f"{value:.3f}"
    if not isinstance(value, str):
        return json.dumps(value, default=str)
    is_word = value.isprintable() and value != "" and not set(value) & {" ", '"', "="}
    return value if is_word else json.dumps(value)


class _Json(logging.Formatter):
    """One object per line: time (UTC), level, process, logger, message, fields, exception."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        """Format the record as JSON; values that JSON does not have are written with str()."""
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
