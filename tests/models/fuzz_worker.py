"""Loads damaged copies of a checkpoint one after another, with a limit on memory.

`python -m tests.models.fuzz_worker FOLDER COUNT` exits with 0 if each copy loads or is refused with
a `PortaLMError`. Otherwise it prints the seed and the damage of each copy that did not.
"""

from __future__ import annotations

import random
import resource
import shutil
import sys
import traceback
from collections import Counter
from pathlib import Path

from portalm.config import EngineConfig
from portalm.engine.engine import Engine
from portalm.errors import PortaLMError

MEMORY_LIMIT = 2 << 30
"""Bytes of address space that loads may use in addition to what the process has."""
ABSURD = (0, 1, 2**31 - 1, 2**32, 2**40, 2**63 - 1, 2**64 - 1)


def load(folder: Path) -> None:
    """Load the checkpoint as a server does at startup."""
    files = sorted(folder.glob("*.gguf"))
    settings = {
        "model": str(files[0] if files else folder),
        "device": "cpu",
        "max_model_len": 64,
        "max_num_seqs": 2,
        "num_gpu_blocks_override": 8,
    }
    engine = Engine(EngineConfig.from_dict(settings))
    engine.close()


def break_one(folder: Path, rng: random.Random) -> str:
    """Damage a file in `folder`, mostly in its header, and return a description."""
    path = rng.choice(sorted(folder.iterdir()))
    data = bytearray(path.read_bytes())
    area = min(len(data), 4096) if rng.random() < 0.8 else len(data)
    kind = rng.choice(("cut", "flip", "flip", "number", "number", "swap"))
    at = rng.randrange(area)
    if kind == "cut":
        del data[at:]
    elif kind == "flip":
        for _ in range(rng.choice((1, 1, 3, 20))):
            data[rng.randrange(area)] ^= 1 << rng.randrange(8)
    elif kind == "number":
        value = rng.choice(ABSURD).to_bytes(8, "little")[: rng.choice((4, 8))]
        data[at : at + len(value)] = value
    else:  # change digits of a JSON header
        digits = [i for i in range(area) if chr(data[i]).isdigit()]
        for i in rng.sample(digits, min(len(digits), rng.choice((1, 2, 8)))):
            data[i] = ord(rng.choice("0123456789"))
    path.write_bytes(data)
    return f"{kind} at {at} of {path.name}"


def main() -> int:
    """Run the command; see the module's docstring."""
    source, count = Path(sys.argv[1]), int(sys.argv[2])
    load(source)  # so that the limit does not count imports and threads
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY_LIMIT,) * 2)
    results: Counter[str] = Counter()
    for seed in range(count):
        rng, folder = random.Random(seed), source.parent / "broken"
        shutil.copytree(source, folder)
        damage = break_one(folder, rng)
        try:
            load(folder)
            results["loaded"] += 1
        except PortaLMError:
            results["refused"] += 1
        except BaseException:
            traceback.print_exc()
            print(f"seed {seed}: {damage}", file=sys.stderr)
            results["failed"] += 1
        shutil.rmtree(folder)
    print(dict(results))
    return 1 if results["failed"] or not results["refused"] else 0


if __name__ == "__main__":
    sys.exit(main())
