"""`--config FILE.yaml`: read flags from a file, under their command line names."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from portalm.errors import ConfigError


class CommandParser(argparse.ArgumentParser):
    """Parser of a command that inserts the flags of its `--config` file before all others.

    So flags on the command line override the file, and the same rules check both.
    """

    def parse_known_args(  # type: ignore[override]  # typeshed: a namespace of any type
        self,
        args: Sequence[str] | None = None,
        namespace: argparse.Namespace | None = None,
    ) -> tuple[argparse.Namespace, list[str]]:
        """Parse the flags. Raises `ConfigError` if the `--config` file is invalid."""
        given = list(sys.argv[1:] if args is None else args)
        if "--config" in self._option_string_actions:
            finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
            finder.add_argument("--config")
            path = finder.parse_known_args(given)[0].config
            if path is not None:
                # --config again: it ends the value list of the file's last flag
                given = [*self._flags_of(path), "--config", path, *given]
        return super().parse_known_args(given, namespace)

    def _flags_of(self, path: str) -> list[str]:
        flags: list[str] = []
        for name, value in _read(path).items():
            flag = "--" + str(name).replace("_", "-")
            action = self._option_string_actions.get(flag)
            if action is None or flag in ("--config", "--help"):
                raise ConfigError(f"{path}: {name!r} is not a flag of `{self.prog}`")
            flags += _as_arguments(f"{path}: {name}", flag, value, action)
        return flags


def _read(path: str) -> dict[Any, Any]:
    import yaml

    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read --config: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must be a mapping from flag names to values")
    return values


def _as_arguments(where: str, flag: str, value: Any, action: argparse.Action) -> list[str]:
    """Convert a value to command line arguments; null gives none and keeps the flag's default."""
    if value is None:
        return []
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise ConfigError(f"{where} must be true or false, not {value!r}")
        no_flag = "--no-" + flag.removeprefix("--")
        if value:
            return [flag]
        return [no_flag] if no_flag in action.option_strings else []
    if isinstance(value, dict):
        return [f"{flag}={json.dumps(value)}"]
    if not isinstance(value, list):
        return [f"{flag}={value}"]
    texts = [str(one) for one in value]
    if action.nargs is not None:
        return [flag, *texts] if texts else []
    return [f"{flag}={text}" for text in texts]
