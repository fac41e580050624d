"""When two blocks have the same digest."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from portalm.core.prefix_cache import DIGEST_BYTES, block_hash, extend_hashes, root_hash

TOKENS = st.lists(st.integers(0, 2**31 - 1), max_size=20)


def names(token_ids: list[int], salt: str = "", block_size: int = 4) -> list[bytes]:
    found: list[bytes] = []
    extend_hashes(found, token_ids, salt=salt, block_size=block_size)
    return found


def test_only_full_blocks_have_digests() -> None:
    assert [len(names([1] * n)) for n in (0, 3, 4, 7, 8)] == [0, 0, 1, 1, 2]
    assert {len(name) for name in names([1] * 8)} == {DIGEST_BYTES}


@given(TOKENS, TOKENS)
def test_digests_are_equal_exactly_as_far_as_the_tokens_are(
    first: list[int], second: list[int]
) -> None:
    num_equal = 0
    while ((num_equal + 1) * 4 <= min(len(first), len(second))) and first[
        : (num_equal + 1) * 4
    ] == second[: (num_equal + 1) * 4]:
        num_equal += 1

    pairs = list(zip(names(first), names(second), strict=False))

    assert [a == b for a, b in pairs] == [i < num_equal for i in range(len(pairs))]


def test_a_digest_covers_all_tokens_before_its_block() -> None:
    assert names([1] * 8)[1] != names([2] * 4 + [1] * 4)[1]
    assert names([1] * 8)[0] != names([1] * 8)[1]


def test_different_salts_give_different_digests() -> None:
    assert len({names([1] * 4, salt=salt)[0] for salt in ("", "a", "b")}) == 3


def test_no_salt_collides_with_a_block() -> None:
    data = bytes(DIGEST_BYTES) + bytes(16)  # a parent of zeros, four tokens 0: valid text

    assert root_hash(data.decode()) != block_hash(bytes(DIGEST_BYTES), [0] * 4)


def test_a_salt_may_be_any_text() -> None:
    assert root_hash("\ud800") != root_hash("é")


def test_digests_are_extended_as_tokens_are_added() -> None:
    found = names(list(range(9)))
    tokens = list(range(30))

    extend_hashes(found, tokens, salt="", block_size=4)

    assert found == names(tokens)
