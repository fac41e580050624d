"""Predict how much of the tensor cores' peak prompts reach on Hopper, from the compiled loop.

`python -m tests.gpu.tensor_core_overlap` prints, for prompts over 16-bit caches on sm_90, the
instructions of a warp per tile, how many of them are issued while the warp has nothing for the
tensor cores in flight, and the share of the peak. Nothing is run on a GPU.

A warp group waits for its products in `WARPGROUP.DEPBAR`; up to its next `HGMMA` the tensor cores
work for the other groups only, which do the same if they run in step. A tile therefore takes the
time of its products, or of what is issued meanwhile if that is longer, plus the time of the exposed
instructions. Programs on one multiprocessor are independent, so that they fill each other's gaps
until a limit of the multiprocessor is reached. Latencies are left out: this is an upper bound, to
compare variants with.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from tests.gpu.kernel_budgets import Launch, launches
from tests.gpu.loop_instructions import main_loop

NAMES = ("attention, prefill", "attention, prefill, head 64", "attention, prefill, head 256")

_WAIT, _PRODUCT = "WARPGROUP.DEPBAR", "HGMMA"

_OPERATIONS_PER_CYCLE = 4096
"""Of a multiprocessor's tensor cores, with 16-bit operands."""

_EXP_CYCLES = 8
"""Cycles of a scheduler per MUFU instruction of a warp: 16 results per multiprocessor and cycle."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Overlap:
    """The loop of one program over tiles without masks."""

    num_warps: int
    programs: int
    """Programs per multiprocessor."""
    needed: int
    """Cycles of the multiprocessor's tensor cores for one program's tile at their peak rate."""
    products: int
    """Cycles of the instructions that do it; more if warp groups repeat each other's work."""
    exposed: int
    """Instructions of a warp that are issued with nothing in flight."""
    exposed_exps: int
    total: int
    """Instructions of a warp per tile."""
    exps: int
    waits: int
    """Times per tile that a warp waits for its products."""

    @property
    def share(self) -> float:
        """Share of the tensor cores' peak."""
        warps = self.num_warps // 4  # of a program, per scheduler
        hidden = self.total - self.exposed, self.exps - self.exposed_exps
        alone = max(self.products, warps * _cycles(*hidden)) + warps * _cycles(
            self.exposed, self.exposed_exps
        )
        together = self.programs * max(self.products, warps * _cycles(self.total, self.exps))
        return self.programs * self.needed / max(alone, together)


def overlap_of(launch: Launch, target: str = "sm_90") -> Overlap:
    """Compile a launch and count its loop."""
    compiled = launch.compile(target)
    names = [text.split() for text in main_loop(compiled.assembly)]
    loop = [words[1] if words[0].startswith("@") else words[0] for words in names]
    first = next(i for i, name in enumerate(loop) if name.startswith(_WAIT))
    products = exposed = exposed_exps = 0
    is_exposed = False
    for name in loop[first:] + loop[:first]:
        if name.startswith(_WAIT):
            is_exposed = True
        elif shape := re.match(rf"{_PRODUCT}\.64x(\d+)x16", name):
            is_exposed = False
            products += 2 * 64 * 16 * int(shape[1]) // _OPERATIONS_PER_CYCLE
        if is_exposed:
            exposed += 1
            exposed_exps += name.startswith("MUFU")
    constants = launch.constants
    operations = 4 * constants["ROWS"] * constants["TILE"] * constants["D"]
    return Overlap(
        needed=operations // _OPERATIONS_PER_CYCLE,
        num_warps=launch.num_warps,
        programs=compiled.resources.occupancy,
        products=products * launch.num_warps // 4,
        exposed=exposed,
        exposed_exps=exposed_exps,
        total=len(loop),
        exps=sum(name.startswith("MUFU") for name in loop),
        waits=sum(name.startswith(_WAIT) for name in loop),
    )


def _cycles(instructions: int, exps: int) -> int:
    """Cycles of a scheduler for instructions of one warp, `exps` of which are exponentials."""
    return max(instructions, _EXP_CYCLES * exps)


def main() -> None:
    """Run the command line."""
    for name in NAMES:
        found = overlap_of(launches("sm_90")[name]("sm_90"))
        print(
            f"{name:30} {found.total:4} instructions, {found.exposed:3} exposed, "
            f"{found.products:5} cycles of products, {found.programs} programs: "
            f"{found.share:.0%} of the peak",
            flush=True,
        )


if __name__ == "__main__":
    main()
