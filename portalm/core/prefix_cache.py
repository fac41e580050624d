"""Names of full blocks: a chain of digests over their tokens and all before them."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from hashlib import blake2b

DIGEST_BYTES = 16
"""A collision would give one request another's context. By chance it comes with 2^-64 after 2^32
blocks; on purpose it costs about 2^64 digests, since blake2b has no known weakness. So a block's
tokens are not compared again. A fast non-cryptographic hash could be attacked."""


def root_hash(salt: str) -> bytes:
    """The digest that a chain of blocks begins with; requests of other salts share nothing.

    Salts are hashed apart from blocks (`person`): no salt can spell the digest of a block.
    """
    return blake2b(
        salt.encode("utf-8", "surrogatepass"), digest_size=DIGEST_BYTES, person=b"salt"
    ).digest()


def block_hash(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """The digest of a full block behind the block of digest `parent`."""
    return blake2b(parent + array("i", token_ids).tobytes(), digest_size=DIGEST_BYTES).digest()


def extend_hashes(
    hashes: list[bytes], token_ids: Sequence[int], *, salt: str, block_size: int
) -> None:
    """Append the digests of all full blocks of `token_ids` that `hashes` lacks."""
    while (len(hashes) + 1) * block_size <= len(token_ids):
        start = len(hashes) * block_size
        parent = hashes[-1] if hashes else root_hash(salt)
        hashes.append(block_hash(parent, token_ids[start : start + block_size]))
