"""API keys, from flags and from a file that may change while the server runs."""

from __future__ import annotations

import hashlib
import hmac
import logging
from collections.abc import Sequence
from pathlib import Path

from portalm.errors import ConfigError

logger = logging.getLogger(__name__)


class ApiKeys:
    """Valid API keys, kept as digests only."""

    def __init__(self, keys: Sequence[str] = (), file: Path | None = None) -> None:
        """Load the keys.

        Args:
            keys: keys from flags.
            file: file with one key per line; empty lines and lines that start with # are ignored.

        Raises:
            ConfigError: the file cannot be read, or has no key.
        """
        self._given = [_digest(key.encode()) for key in keys]
        self._file = file
        self._digests = self._given + self._read()

    def _read(self) -> list[bytes]:
        if self._file is None:
            return []
        try:
            lines = [line.strip() for line in self._file.read_bytes().splitlines()]
        except OSError as error:
            raise ConfigError(f"--api-key-file cannot be read: {error}") from None
        found = [_digest(line) for line in lines if line and not line.startswith(b"#")]
        if not found:  # without keys the server would be open to all
            raise ConfigError(f"--api-key-file {str(self._file)!r} has no key: write one per line")
        return found

    def reload(self) -> None:
        """Read the file again; if it cannot be used, keep the current keys."""
        try:
            self._digests = self._given + self._read()
        except ConfigError as error:
            logger.error("API keys are unchanged: %s", error)
        else:
            logger.warning("API keys reloaded: %d are valid", len(self._digests))

    def __bool__(self) -> bool:
        """Whether a key is required."""
        return bool(self._digests)

    def tenant(self, authorization: bytes) -> str | None:
        """Id of the tenant whose key the Authorization header has; None if no key is valid."""
        scheme, _, given = authorization.partition(b" ")
        digest = _digest(given.strip())
        # compare with every key, so that the time taken reveals nothing
        matches = [key for key in self._digests if hmac.compare_digest(digest, key)]
        return digest.hex()[:16] if matches and scheme.lower() == b"bearer" else None


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
