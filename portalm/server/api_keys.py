"""API keys: given one by one, or in a file that may change while the server runs."""

from __future__ import annotations

import hashlib
import hmac
import logging
from collections.abc import Sequence
from pathlib import Path

from portalm.errors import ConfigError

logger = logging.getLogger(__name__)


class ApiKeys:
    """The keys that are valid, as digests: the keys themselves are not kept."""

    def __init__(self, keys: Sequence[str] = (), file: Path | None = None) -> None:
        """Keys that were given one by one, and those of a file, one a line.

        Empty lines and those that begin with # are no keys.

        Raises:
            ConfigError: the file cannot be read, or no key is in it.
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
        if not found:  # no keys would mean that everybody may come in
            raise ConfigError(f"--api-key-file {str(self._file)!r} has no key: write one a line")
        return found

    def reload(self) -> None:
        """Read the file again; if it cannot be used, the keys stay as they were."""
        try:
            self._digests = self._given + self._read()
        except ConfigError as error:
            logger.error("API keys stay as they were: %s", error)
        else:
            logger.warning("API keys read again: %d are valid", len(self._digests))

    def __bool__(self) -> bool:
        """False: everybody may come in."""
        return bool(self._digests)

    def tenant(self, authorization: bytes) -> str | None:
        """Whose key an Authorization header holds; None: no valid one."""
        scheme, _, given = authorization.partition(b" ")
        digest = _digest(given.strip())
        # every key is compared, so that the time tells nothing
        matches = [key for key in self._digests if hmac.compare_digest(digest, key)]
        return digest.hex()[:16] if matches and scheme.lower() == b"bearer" else None


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
