"""KV blocks: which are held, free or cached, and how cached ones are found by their tokens."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

NULL_BLOCK = 0
"""The block that padding is written to; never allocated."""


class BlockManager:
    """A pool of KV blocks with reference counts and a prefix cache.

    Every block except the null block is in one of three states: held (by one block table or
    more), cached (held by none, but found by its digest until it is evicted) or free. Methods
    either complete or change nothing.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        """Start with all blocks free; `num_blocks` includes the null block."""
        self.block_size = block_size
        self.num_usable = num_blocks - 1
        self._num_holders = [0] * num_blocks
        self._unheld: OrderedDict[int, None] = OrderedDict.fromkeys(range(1, num_blocks))
        """Free and cached blocks, in the order in which they are taken."""
        self._digest_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}
        self._num_cached = 0

    # -- state ---------------------------------------------------------------------------------

    @property
    def num_unheld(self) -> int:
        """Blocks that can be taken: free or cached."""
        return len(self._unheld)

    @property
    def num_held(self) -> int:
        """Blocks held by at least one block table."""
        return self.num_usable - len(self._unheld)

    @property
    def num_cached(self) -> int:
        """Blocks that no block table holds but that a prefix hit can find."""
        return self._num_cached

    def num_holders(self, block: int) -> int:
        """Number of block tables that hold `block`."""
        return self._num_holders[block]

    def num_blocks_for(self, num_tokens: int) -> int:
        """Number of blocks needed for `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    # -- allocation ---------------------------------------------------------------------------

    def grow(self, table: list[int], num_tokens: int) -> bool:
        """Extend `table` to hold `num_tokens` in total; False, changing nothing, if it cannot."""
        num_new = -(-num_tokens // self.block_size) - len(table)
        if num_new <= 0:
            return True
        if num_new > len(self._unheld):
            return False
        table.extend(self._take() for _ in range(num_new))
        return True

    def _take(self) -> int:
        block, _ = self._unheld.popitem(last=False)
        if block in self._digest_of:  # evicted
            self._num_cached -= 1
            self._forget(block)
        self._num_holders[block] = 1
        return block

    def hold(self, blocks: Iterable[int]) -> None:
        """Add a holder to each of `blocks`, which are held or cached."""
        for block in blocks:
            if self._num_holders[block] == 0:
                del self._unheld[block]
                self._num_cached -= 1
            self._num_holders[block] += 1

    def release(self, table: list[int]) -> None:
        """Remove a holder from each block of `table`, and empty `table`.

        Blocks that become cached go to the end of the order of eviction, the last block of a
        prefix before the first, which more requests share. Blocks that become free are taken next.
        """
        for block in reversed(table):
            self._num_holders[block] -= 1
            if self._num_holders[block] == 0:
                self._unheld[block] = None
                if block in self._digest_of:
                    self._num_cached += 1
                else:
                    self._unheld.move_to_end(block, last=False)
        table.clear()

    # -- prefix cache -------------------------------------------------------------------------

    def find(self, digests: Sequence[bytes]) -> list[int]:
        """Return the blocks of the longest cached prefix of `digests`, without holding them."""
        blocks: list[int] = []
        for digest in digests:
            block = self._block_of.get(digest)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def num_unheld_of(self, blocks: Iterable[int]) -> int:
        """Number of `blocks` without a holder: holding them takes that many from the pool."""
        return sum(self._num_holders[block] == 0 for block in blocks)

    def publish(self, block: int, digest: bytes) -> None:
        """Add a full, held block to the prefix cache, unless its digest has a block already."""
        if digest not in self._block_of and block not in self._digest_of:
            self._block_of[digest] = block
            self._digest_of[block] = digest

    def unpublish(self, blocks: Iterable[int]) -> None:
        """Remove untrusted held blocks from the prefix cache."""
        for block in blocks:
            self._forget(block)

    def _forget(self, block: int) -> None:
        digest = self._digest_of.pop(block, None)
        if digest is not None:
            del self._block_of[digest]

    def clear_cache(self) -> None:
        """Empty the prefix cache; cached blocks become free."""
        self._digest_of.clear()
        self._block_of.clear()
        self._num_cached = 0


class NoBlocks(BlockManager):
    """The pool of a model without a KV cache: every block table is empty and always fits."""

    def __init__(self) -> None:
        """Start with a pool of no blocks."""
        super().__init__(num_blocks=1, block_size=1)

    def num_blocks_for(self, num_tokens: int) -> int:
        """0: no block is needed for any number of tokens."""
        return 0

    def grow(self, table: list[int], num_tokens: int) -> bool:
        """Return True: no block is needed."""
        return True
