"""Rules of the block manager, one per test."""

from __future__ import annotations

from portalm.core.block_manager import NULL_BLOCK, BlockManager


def make_blocks(num_usable: int = 4) -> BlockManager:
    return BlockManager(num_usable + 1, block_size=4)


def grown(blocks: BlockManager, num_tokens: int) -> list[int]:
    table: list[int] = []
    assert blocks.grow(table, num_tokens)
    return table


def digests(count: int) -> list[bytes]:
    return [bytes([i]) * 16 for i in range(count)]


def test_the_null_block_is_never_allocated() -> None:
    blocks = make_blocks(4)

    table = grown(blocks, 16)

    assert sorted(table) == [1, 2, 3, 4]
    assert NULL_BLOCK not in table


def test_a_table_grows_by_whole_blocks_and_only_when_needed() -> None:
    blocks = make_blocks()
    table: list[int] = []
    lengths = []
    for num_tokens in (1, 4, 5, 3):
        blocks.grow(table, num_tokens)
        lengths.append(len(table))

    assert lengths == [1, 1, 2, 2]


def test_a_table_that_cannot_grow_is_unchanged() -> None:
    blocks = make_blocks(4)
    table = grown(blocks, 4)

    assert not blocks.grow(table, 17)
    assert len(table) == 1
    assert blocks.num_unheld == 3


def test_a_block_is_free_when_its_last_holder_releases_it() -> None:
    blocks = make_blocks()
    first = grown(blocks, 8)
    second = list(first)
    blocks.hold(second)

    blocks.release(first)
    assert (first, blocks.num_held) == ([], 2)

    blocks.release(second)
    assert (second, blocks.num_held) == ([], 0)


def test_the_longest_cached_prefix_is_found() -> None:
    blocks = make_blocks()
    table = grown(blocks, 12)
    names = digests(4)
    for i in (0, 1, 3):
        blocks.publish(table[min(i, 2)], names[i])

    assert blocks.find(names) == table[:2]
    assert blocks.find(names[1:2]) == table[1:2]
    assert blocks.find(names[2:]) == []


def test_cached_blocks_are_evicted_after_free_ones_are_taken() -> None:
    blocks = make_blocks(4)
    table = grown(blocks, 8)
    cached = list(table)
    for block, name in zip(table, digests(2), strict=True):
        blocks.publish(block, name)
    blocks.release(table)
    assert (blocks.num_cached, blocks.num_unheld) == (2, 4)

    grown(blocks, 8)
    assert blocks.find(digests(2)) == cached

    grown(blocks, 4)
    assert blocks.find(digests(2)) == cached[:1]  # the end of the prefix was evicted first
    assert blocks.num_cached == 1


def test_a_hit_makes_a_block_the_last_to_be_evicted() -> None:
    blocks = make_blocks(3)
    tables = [grown(blocks, 4) for _ in range(3)]
    names = digests(3)
    for table, name in zip(tables, names, strict=True):
        blocks.publish(table[0], name)
        blocks.release(table)

    hit = blocks.find(names[:1])
    blocks.hold(hit)
    blocks.release(hit)
    grown(blocks, 8)

    assert [len(blocks.find([name])) for name in names] == [1, 0, 0]


def test_a_held_block_is_not_evicted() -> None:
    blocks = make_blocks(2)
    table = grown(blocks, 4)
    blocks.publish(table[0], digests(1)[0])
    blocks.release(table)
    hit = blocks.find(digests(1))
    assert blocks.num_unheld_of(hit) == 1
    blocks.hold(hit)

    assert blocks.num_unheld_of(hit) == 0
    assert not blocks.grow([], 8)
    assert blocks.find(digests(1)) == hit


def test_a_digest_keeps_its_first_block() -> None:
    blocks = make_blocks()
    first, second = grown(blocks, 4), grown(blocks, 4)
    blocks.publish(first[0], digests(1)[0])
    blocks.publish(second[0], digests(1)[0])

    assert blocks.find(digests(1)) == first
    blocks.release(second)
    assert blocks.num_cached == 0


def test_an_untrusted_block_is_free_when_released() -> None:
    blocks = make_blocks()
    table = grown(blocks, 4)
    blocks.publish(table[0], digests(1)[0])

    blocks.unpublish(table)
    blocks.release(table)

    assert blocks.find(digests(1)) == []
    assert (blocks.num_cached, blocks.num_unheld) == (0, 4)


def test_clearing_the_cache_frees_its_blocks() -> None:
    blocks = make_blocks(4)
    table = grown(blocks, 8)
    for block, name in zip(table, digests(2), strict=True):
        blocks.publish(block, name)
    blocks.release(table)

    blocks.clear_cache()

    assert blocks.find(digests(2)) == []
    assert (blocks.num_cached, blocks.num_unheld) == (0, 4)
    assert len(grown(blocks, 16)) == 4
