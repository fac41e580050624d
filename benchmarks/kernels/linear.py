"""Measure `linear` by rows and format, next to torch's and the machine's limits, in one run.

python benchmarks/kernels/linear.py [--shapes 1536x576,576x1536] [--rows 1,8,32,128]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from portalm.backend import load_backend

SHAPES = "960x576,576x576,3072x576,576x1536,49152x576,2048x2048"
ROWS = "1,4,8,16,32,64,128,512"


def median_s(call: Callable[[], object], *, seconds: float = 0.15) -> float:
    """Return the median time of a call over about `seconds` of calls."""
    call()
    times = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 3:
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def copies_beyond_cache(n: int, k: int, item: int) -> int:
    """Return how many weights to rotate through so that none stays in the CPU cache."""
    return max(1, -(-(256 << 20) // (n * k * item)))


def main() -> None:
    """Print a line for each shape, dtype and number of rows."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--shapes", default=SHAPES)
    parser.add_argument("--rows", default=ROWS)
    parser.add_argument("--dtypes", default="bfloat16,float32")
    parser.add_argument("--torch", action="store_true", help="time torch's linear as well")
    args = parser.parse_args()
    backend = load_backend("cpu")
    for dtype_name in args.dtypes.split(","):
        dtype = getattr(torch, dtype_name)
        for shape in args.shapes.split(","):
            n, k = map(int, shape.split("x"))
            weights = [
                backend.pack((torch.randn(n, k) / k**0.5).to(dtype))
                for _ in range(min(24, copies_beyond_cache(n, k, dtype.itemsize)))
            ]
            for rows in map(int, args.rows.split(",")):
                x = torch.randn(rows, k).to(dtype)
                turn = 0

                def run(x: torch.Tensor = x, weights: list[object] = weights) -> None:
                    nonlocal turn
                    turn = (turn + 1) % len(weights)
                    backend.linear(x, weights[turn])

                seconds = median_s(run)
                line = (
                    f"{dtype_name:9s} {n:6d} x {k:5d} rows {rows:4d}  {seconds * 1e6:9.1f} us  "
                    f"{n * k * dtype.itemsize / seconds / 1e9:6.1f} GB/s  "
                    f"{2 * rows * n * k / seconds / 1e9:6.1f} GFLOP/s"
                )
                if args.torch:
                    plain = torch.randn(n, k).to(dtype)
                    other = median_s(lambda x=x, w=plain: torch.nn.functional.linear(x, w))  # type: ignore[misc]
                    line += f"   torch {other * 1e6:9.1f} us"
                print(line, flush=True)


if __name__ == "__main__":
    main()
