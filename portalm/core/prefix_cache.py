"""Digests of full blocks: each covers the tokens of its block and of all blocks before it."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from hashlib import blake2b

DIGEST_BYTES = 16
"""A collision would give one request the context of another. After 2^32 blocks its probability is
2^-64 by chance; an attack costs about 2^64 digests, since blake2b has no known weakness. So tokens
are not compared again. A fast non-cryptographic hash could be attacked."""


def root_hash(salt: str) -> bytes:
    """The digest before a request's first block; requests with different salts share nothing.

    Salts are hashed with another `person` than blocks, so no salt can equal a block's digest.
    """
    return blake2b(
        salt.encode("utf-8", "surrogatepass"), digest_size=DIGEST_BYTES, person=b"salt"
    ).digest()


def block_hash(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """The digest of the full block that follows the block with digest `parent`."""
    return blake2b(parent + array("i", token_ids).tobytes(), digest_size=DIGEST_BYTES).digest()


def extend_hashes(
    hashes: list[bytes], token_ids: Sequence[int], *, salt: str, block_size: int
) -> None:
    """Append to `hashes` the digests of full blocks of `token_ids` that it does not have yet."""
    while (len(hashes) + 1) * block_size <= len(token_ids):
        start = len(hashes) * block_size
        parent = hashes[-1] if hashes else root_hash(salt)
        hashes.append(block_hash(parent, token_ids[start : start + block_size]))
