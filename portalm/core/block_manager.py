"""KV blocks: who holds which, which are free, and which can be found again by their tokens."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

NULL_BLOCK = 0
"""Padding is written here; never allocated."""


class BlockManager:
    """A pool of KV blocks with reference counts and a prefix cache.

    Every block but the null block is in one of three states: held (by one block table or more),
    cached (held by none, but found by its digest until it is needed) or free. Methods do all they
    say or change nothing.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        """All blocks free; `num_blocks` counts the null block."""
        self.block_size = block_size
        self.num_usable = num_blocks - 1
        self._num_holders = [0] * num_blocks
        self._unheld: OrderedDict[int, None] = OrderedDict.fromkeys(range(1, num_blocks))
        """Free and cached blocks, next to be taken first."""
        self._digest_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}
        self._num_cached = 0

    # -- what there is ------------------------------------------------------------------------

    @property
    def num_unheld(self) -> int:
        """Blocks that can be taken: free or cached."""
        return len(self._unheld)

    @property
    def num_held(self) -> int:
        """Blocks that some block table holds."""
        return self.num_usable - len(self._unheld)

    @property
    def num_cached(self) -> int:
        """Blocks that nobody holds but that a prefix hit may find."""
        return self._num_cached

    def num_holders(self, block: int) -> int:
        """Block tables that hold `block`."""
        return self._num_holders[block]

    def num_blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    # -- taking and giving back ---------------------------------------------------------------

    def grow(self, table: list[int], num_tokens: int) -> bool:
        """Extend `table` to hold `num_tokens` in all; False, changing nothing, if it cannot."""
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
        """One more holder for each of `blocks`, which are held or cached."""
        for block in blocks:
            if self._num_holders[block] == 0:
                del self._unheld[block]
                self._num_cached -= 1
            self._num_holders[block] += 1

    def release(self, table: list[int]) -> None:
        """One holder less for each block of `table`, which ends empty.

        Blocks that can be found again wait at the end of the line, the end of a chain before
        its beginning, which more requests share; blocks that cannot are taken next.
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
        """Blocks of the longest beginning of `digests` that can be found; not held yet."""
        blocks: list[int] = []
        for digest in digests:
            block = self._block_of.get(digest)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def num_unheld_of(self, blocks: Iterable[int]) -> int:
        """How many of `blocks` nobody holds: holding them takes as many from the pool."""
        return sum(self._num_holders[block] == 0 for block in blocks)

    def publish(self, block: int, digest: bytes) -> None:
        """Let a full, held block be found; the first block of a digest stays its block."""
        if digest not in self._block_of and block not in self._digest_of:
            self._block_of[digest] = block
            self._digest_of[block] = digest

    def unpublish(self, blocks: Iterable[int]) -> None:
        """Held blocks whose contents are not to be trusted are found no more."""
        for block in blocks:
            self._forget(block)

    def _forget(self, block: int) -> None:
        digest = self._digest_of.pop(block, None)
        if digest is not None:
            del self._block_of[digest]

    def clear_cache(self) -> None:
        """No block is found any more."""
        self._digest_of.clear()
        self._block_of.clear()
        self._num_cached = 0


class NoBlocks(BlockManager):
    """For models that keep no keys and values: every table is empty and long enough."""

    def __init__(self) -> None:
        """A pool of nothing."""
        super().__init__(num_blocks=1, block_size=1)

    def num_blocks_for(self, num_tokens: int) -> int:
        """None."""
        return 0

    def grow(self, table: list[int], num_tokens: int) -> bool:
        """True: there is nothing to take."""
        return True
