"""Stop strings in a text that arrives in pieces."""

from __future__ import annotations

import itertools

from hypothesis import example, given
from hypothesis import strategies as st

from portalm.text.stop_strings import StopStrings

short_texts = st.text(alphabet="ab\n", max_size=30)
stop_lists = st.lists(st.text(alphabet="ab\n", min_size=1, max_size=5), min_size=1, max_size=4)


def expected(text: str, stops: list[str], *, keep: bool) -> tuple[str, str | None]:
    """Search the whole text: the earliest end wins, then the longest stop string."""
    found = [(text.find(stop) + len(stop), -len(stop), stop) for stop in stops if stop in text]
    if not found:
        return text, None
    end, _, stop = min(found)
    return text[: end if keep else end - len(stop)], stop


def split(text: str, cuts: list[int]) -> list[str]:
    places = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    return [text[a:b] for a, b in itertools.pairwise(places)]


def run(pieces: list[str], stops: list[str], *, keep: bool = False) -> tuple[str, str | None]:
    matcher = StopStrings(stops, include_stop_str_in_output=keep)
    shown = ""
    for piece in pieces:
        text, stop = matcher.push(piece)
        shown += text
        if stop is not None:
            return shown, stop
    return shown + matcher.flush(), None


@given(short_texts, stop_lists, st.lists(st.integers(0, 100), max_size=12), st.booleans())
@example("aab", ["ab"], [1, 2], False)
@example("abab\n", ["abb", "ab\n"], [2, 4], True)
@example("aabaab", ["aabaaa", "baab"], [1, 2, 3, 4, 5], False)
def test_any_split_gives_the_same_result_as_the_whole_text(text, stops, cuts, keep):
    assert run(split(text, cuts), stops, keep=keep) == expected(text, stops, keep=keep)


@given(short_texts, stop_lists, st.lists(st.integers(0, 100), max_size=12))
def test_only_a_possible_start_of_a_stop_string_is_held_back(text, stops, cuts):
    matcher = StopStrings(stops)
    seen = shown = ""
    for piece in split(text, cuts):
        new, stop = matcher.push(piece)
        seen, shown = seen + piece, shown + new
        if stop is not None:
            return

        held = seen[len(shown) :]
        longest = max(
            (n for s in stops for n in range(1, len(s)) if seen.endswith(s[:n])), default=0
        )
        assert len(held) == longest


def test_text_without_the_start_of_a_stop_string_is_shown_at_once():
    assert StopStrings(["\n\nUser:"]).push("Hello") == ("Hello", None)


def test_the_stop_string_that_ends_first_wins_over_the_one_that_begins_first():
    assert run(["abcd"], ["abcd", "bc"]) == ("a", "bc")


def test_longest_of_stop_strings_with_the_same_end_wins():
    assert run(["xabc"], ["bc", "abc"]) == ("x", "abc")


def test_skipped_text_is_not_searched_and_starts_no_match():
    matcher = StopStrings(["END"])

    shown = matcher.skip("an END, E") + matcher.push("ND, ")[0] + matcher.push("now END")[0]

    assert shown == "an END, END, now "


def test_skip_returns_the_text_held_back():
    matcher = StopStrings(["END"])
    assert matcher.push("E") == ("", None)

    assert matcher.skip("ND") == "END"


def test_flushed_text_is_not_the_start_of_a_match():
    matcher = StopStrings(["END"])
    matcher.push("E")
    matcher.flush()

    assert matcher.push("NDE") == ("ND", None)
    assert matcher.push("ND") == ("", "END")


def test_repetitive_stop_string_is_searched_in_linear_time():
    matcher = StopStrings(["a" * 100_000 + "b"])

    shown = "".join(matcher.push("aaaa").text for _ in range(30_000)) + matcher.flush()

    assert shown == "a" * 120_000
