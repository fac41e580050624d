"""Place programs that read the same memory on the same die of a GPU made of several.

AMD's gfx942 and gfx950 consist of dies (XCDs), each with an L2 cache of its own, and give
consecutive programs of a launch to the dies in turn. Programs next to each other, which usually
read the same keys or weights, would each fill another cache. The functions below number programs
anew: `in_ranges` gives each die one range of consecutive numbers, `in_groups` gives the dies groups
of them in turn. With one die they change nothing.

Source: AMD ROCm documentation, "Deep dive into the MI300 compute and memory partition modes".
"""

import math

import triton
import triton.language as tl


@triton.jit
def in_ranges(program, num_programs, DIES: tl.constexpr):
    """Number in 0 to num_programs - 1, each used once; those of one die are consecutive.

    `program` is the linear index of the program in its launch, the first axis fastest.
    """
    if DIES == 1:
        return program
    die = program % DIES
    share, rest = num_programs // DIES, num_programs % DIES  # the first `rest` dies have one more
    return die * share + tl.minimum(die, rest) + program // DIES


@triton.jit
def in_groups(program, num_programs, SIZE: tl.constexpr, DIES: tl.constexpr):
    """Number in 0 to num_programs - 1, each used once; SIZE consecutive ones are on one die.

    Low numbers start first on every die. `program` is as for `in_ranges`.
    """
    if DIES == 1 or SIZE == 1:
        return program
    start = program // (DIES * SIZE) * (DIES * SIZE)
    count = tl.minimum(num_programs - start, DIES * SIZE)  # fewer in the last round
    return start + in_ranges(program - start, count, DIES)


@triton.jit
def deal(number, count, PILES: tl.constexpr):
    """Index in 0 to count - 1, each used once: every PILES-th from 0, then every one from 1, ...

    Where indices are in order of length, a range of consecutive numbers then has its share of the
    long ones.
    """
    if PILES == 1:
        return number
    share, rest = count // PILES, count % PILES  # the first `rest` piles have one more
    most = rest * (share + 1)
    later = rest + (number - most) // tl.maximum(share, 1)
    pile = tl.where(number < most, number // (share + 1), later)
    return (number - pile * share - tl.minimum(pile, rest)) * PILES + pile


def num_piles(num_groups: int, num_dies: int) -> int:
    """Piles to `deal` each of `num_groups` groups into, so that a die's range is whole piles."""
    return num_dies // math.gcd(num_groups, num_dies)
