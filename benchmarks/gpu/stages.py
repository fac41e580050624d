"""What gpu_run.py can run: stages, their parts (one process each), and the parts' sections."""

from __future__ import annotations

from dataclasses import dataclass

KERNEL_MODULES = ("torch", "numpy", "portalm.backend")
KIT_MODULES = (*KERNEL_MODULES, "portalm.conformance.laws")
ENGINE_MODULES = (*KERNEL_MODULES, "safetensors", "portalm.engine.engine")
SERVER_MODULES = (
    *ENGINE_MODULES,
    "tokenizers",
    "portalm.server.app",
    "portalm.server.run",
    "portalm.engine.client",
    "portalm.cli.main",
    "uvloop",
)


@dataclass(frozen=True, slots=True)
class Part:
    """One process of a stage."""

    name: str
    module: str
    """Run as `python -m MODULE SETTINGS`."""
    sections: dict[str, float]
    """Sections in the order in which they run, with their shares of the part's time."""
    imports: tuple[str, ...]
    """Modules that this part imports; gpu_run.py imports them first and reports what fails."""
    share: float = 1.0
    """Share of the stage's time."""
    is_default: bool = True
    """False: runs only if --only names it."""


@dataclass(frozen=True, slots=True)
class Stage:
    """A group of parts that share a time limit."""

    parts: tuple[Part, ...]
    seconds: float
    """Usual duration on a GPU; stages share --limit in proportion to it."""
    stops_run: bool = False
    """True: if one of its sections fails, no later stage runs."""


STAGES: dict[str, Stage] = {
    "smoke": Stage(
        (
            Part(
                "8b",
                "gpu.smoke",
                {"start": 30, "graph equals eager": 20, "prompt": 5, "256 streams": 5},
                ENGINE_MODULES,
            ),
        ),
        60,
        stops_run=True,
    ),
    "calib": Stage((Part("limits", "gpu.calib", {"limits": 20}, KERNEL_MODULES),), 20),
    "numerics": Stage(
        (
            # the first three need no engine, so a machine without msgspec runs them too
            Part(
                "operations",
                "gpu.numerics",
                {"compile": 30, "L2 captured": 10},
                KIT_MODULES,
                share=0.2,
            ),
            Part("llama", "gpu.numerics", {"L3 llama": 30}, ENGINE_MODULES, share=0.25),
            Part("all", "gpu.numerics", {"L0": 5, "L1": 60, "L2": 30}, KIT_MODULES, share=0.35),
            Part("models", "gpu.numerics", {"L4": 20, "L3": 40}, ENGINE_MODULES, share=0.2),
        ),
        160,
    ),
    "engine": Stage(
        (
            Part(
                "8b",
                "gpu.engine",
                {
                    "start": 60,
                    "decode": 30,
                    "offline": 45,
                    "prompts": 20,
                    "profile": 30,
                    "offline without mixed captures": 55,
                },
                ENGINE_MODULES,
                share=0.6,
            ),
            Part(
                "1b",
                "gpu.engine",
                {"start": 30, "decode": 15, "offline": 20, "prompts": 10, "profile": 15},
                ENGINE_MODULES,
                share=0.2,
            ),
            Part(
                "fp8",
                "gpu.engine",
                {"start": 60, "decode": 30, "offline": 30, "prompts": 15, "fixed lengths": 120},
                ENGINE_MODULES,
                share=0.2,
            ),
            Part(
                "transformers",
                "gpu.baseline",
                {"one stream": 60, "continuous batching": 60},
                ("torch", "transformers"),
                share=0.6,
                is_default=False,
            ),
        ),
        240,
    ),
    "kernels": Stage(
        (
            Part(
                "attention",
                "gpu.kernel_attention",
                {"decode": 15, "prefill": 15, "cache writes": 5},
                KERNEL_MODULES,
                share=0.4,
            ),
            Part(
                "layers",
                "gpu.kernel_layers",
                {"sampling": 6, "products": 20, "small operations": 4, "experts": 15},
                KERNEL_MODULES,
                share=0.6,
            ),
        ),
        80,
    ),
    "serve": Stage(
        (
            Part(
                "8b",
                "gpu.serve",
                {"start": 30, "all at once": 35, "one at a time": 5},
                SERVER_MODULES,
            ),
        ),
        70,
    ),
}
"""Stages in the order in which they run by default."""


def selected(part: Part, stage: str, only: list[str]) -> dict[str, float]:
    """Sections of a part that --only selects, with `start` before any other section.

    A text selects every section whose full name, "STAGE PART SECTION", contains it.
    """
    if not only:
        return dict(part.sections) if part.is_default else {}
    found = {
        section
        for section in part.sections
        if any(text in f"{stage} {part.name} {section}" for text in only)
    }
    if found and "start" in part.sections:
        found.add("start")
    return {section: share for section, share in part.sections.items() if section in found}
