"""Compare PortaLM with other engines on this CPU: same weights, token ids and machine, in one run.

Each round starts, measures and stops every peer in turn. The results are medians over the rounds,
with the lowest and the highest value. Servers are measured over HTTP, libraries in a separate
process. Each figure is shown with its share of the machine's limit (memory bandwidth at the size of
the weights, multiply-adds), measured in the same round. CPU seconds over wall seconds show whether
all processors were busy.

    python benchmarks/compare_cpu.py [--quick] [--rounds 3] [--peers portalm,llama.cpp]

Peers are installed into virtual environments under $PORTALM_BENCH_DIR (~/.cache/portalm-bench), and
models are written there. `--prepare` does only that, so that nothing is built while measuring.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from peers import PEERS
from peers import ceilings as machine
from peers.base import FORMATS, Model, Peer, PeerUnavailable, Running, Settings
from peers.cases import CASES, Case
from peers.checkpoints import MODELS, read_shape, write_model
from peers.process import machine_cpu_s
from peers.report import draw_plot, to_markdown
from tokenizers import Tokenizer

RESULTS = Path(__file__).parent / "results"
SAMPLE = "The capital of France is"
SAMPLE_OUT = 8


@dataclass(slots=True)
class Row:
    """One peer with one model in one format, over the rounds."""

    peer: str
    model: str
    fmt: str
    version: str = ""
    problem: str | None = None
    """The reason why there are no figures."""
    sample: str = ""
    """Its continuation of SAMPLE; peers with the same weights mostly agree."""
    figures: dict[str, list[float]] = field(default_factory=dict)
    """Column -> one value per round."""
    cpu_over_wall: dict[str, list[float]] = field(default_factory=dict)
    """Column -> CPU seconds of the peer's processes over wall seconds, per round."""
    others_over_wall: dict[str, list[float]] = field(default_factory=dict)
    """The same for all other processes of the machine, including the client of a server."""
    slowest_round_s: float = 0.0

    def add(self, column: str, value: float) -> None:
        """Add one round's value."""
        self.figures.setdefault(column, []).append(value)


@dataclass(slots=True)
class Bench:
    """State shared by all rounds."""

    peers: dict[str, Peer]
    cases: Sequence[Case]
    program: Path
    """The program that measures the ceilings."""
    max_round_s: float
    """Seconds: a peer that takes longer with a model and format is not run with them again."""
    tokenizers: dict[str, Tokenizer] = field(default_factory=dict)

    def measure(self, row: Row, model: Model, seed: int) -> None:
        """Start a peer, measure every case, stop it."""
        running = self.peers[row.peer].launch(model, row.fmt)
        try:
            self._ask_sample(row, running, model)
            words = _words(self.tokenizers[model.name])
            for case in self.cases:
                self._run_case(row, running, case, case.prompts(words, seed))
            row.add("pss_bytes", running.process.peak_pss_bytes)
            row.add("rss_bytes", running.process.peak_rss_bytes)
        finally:
            running.close()

    def _ask_sample(self, row: Row, running: Running, model: Model) -> None:
        """Measure the start up to the first token, then run every case once to warm up."""
        tokenizer = self.tokenizers[model.name]
        prompt = tokenizer.encode(SAMPLE, add_special_tokens=False).ids
        [answer] = running.ask([prompt], SAMPLE_OUT, 1)
        row.add("start", answer.first - running.process.started)
        row.sample = answer.text or tokenizer.decode(list(answer.token_ids))
        words = _words(tokenizer)
        for concurrency in sorted({case.concurrency for case in self.cases}):
            warm = CASES[2].prompts(words, seed=-concurrency) * concurrency
            running.ask(warm[:concurrency], 4, concurrency)

    def _run_case(
        self, row: Row, running: Running, case: Case, prompts: Sequence[list[int]]
    ) -> None:
        cpu, all_cpu = running.process.cpu_s(), machine_cpu_s()
        wall = time.monotonic()
        answers = running.ask(prompts, case.num_out, case.concurrency)
        wall = time.monotonic() - wall
        cpu, all_cpu = running.process.cpu_s() - cpu, machine_cpu_s() - all_cpu
        row.add(case.name, case.value(answers))
        row.cpu_over_wall.setdefault(case.name, []).append(cpu / wall)
        row.others_over_wall.setdefault(case.name, []).append((all_cpu - cpu) / wall)
        running.process.note_pss()


def _words(tokenizer: Tokenizer) -> list[int]:
    """Return token ids of plain words, so that every engine's answer is likely to be text."""
    vocab = tokenizer.get_vocab()
    return sorted(i for word, i in vocab.items() if re.fullmatch("Ġ[a-z]{2,}", word))


def run_round(
    bench: Bench,
    rows: Sequence[Row],
    models: dict[str, Model],
    ceilings: dict[str, list[dict[str, float]]],
    round_: int,
) -> None:
    """Run one round: for every model and format, the ceilings, then every peer."""
    for model_name, fmt in dict.fromkeys((row.model, row.fmt) for row in rows):
        model = models[model_name]
        ceiling = machine.measure(bench.program, read_shape(model), fmt)
        ceilings.setdefault(f"{model_name} {fmt}", []).append(asdict(ceiling))
        print(f"round {round_}: {model_name} {fmt}: {ceiling}", file=sys.stderr)
        for row in rows:
            is_due = row.problem is None and row.slowest_round_s <= bench.max_round_s
            if is_due and (row.model, row.fmt) == (model_name, fmt):
                _run_or_note(bench, row, model, round_)


def prepare(bench: Bench, rows: Sequence[Row], models: dict[str, Model]) -> None:
    """Install peers and convert models; failures are recorded in the rows."""
    versions: dict[str, str] = {}
    for row in rows:
        peer = bench.peers[row.peer]
        try:
            peer.check_format(row.fmt)
            if row.peer not in versions:
                versions[row.peer] = peer.install()
            row.version = versions[row.peer]
            peer.prepare(models[row.model], row.fmt)
        except PeerUnavailable as error:
            row.problem = str(error)
            print(f"{row.peer}, {row.model} {row.fmt}: {error}", file=sys.stderr)
    for name, model in models.items():
        bench.tokenizers[name] = Tokenizer.from_file(str(model.folder / "tokenizer.json"))


def _run_or_note(bench: Bench, row: Row, model: Model, round_: int) -> None:
    started = time.monotonic()
    try:
        bench.measure(row, model, seed=round_)
    except (PeerUnavailable, OSError) as error:
        row.problem = (
            f"{type(error).__name__}: {error}" if isinstance(error, OSError) else str(error)
        )
    row.slowest_round_s = max(row.slowest_round_s, time.monotonic() - started)
    print(f"round {round_}: {asdict(row)}", file=sys.stderr)


def describe_machine(settings: Settings) -> dict[str, Any]:
    """Describe the machine and the run."""
    names = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return {
        "date": datetime.date.today().isoformat(),
        "machine": platform.machine(),
        "cpu": names[0] if names else platform.processor(),
        "num_cpus": len(settings.cpus),
        "instructions": machine.instructions(),
        "python": platform.python_version(),
    }


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peers", type=_one_of(PEERS), default=list(PEERS))
    parser.add_argument("--models", type=_one_of(MODELS), default=list(MODELS))
    parser.add_argument("--formats", type=_one_of(FORMATS), default=list(FORMATS))
    names = [case.name for case in CASES]
    parser.add_argument("--cases", type=_one_of(names), default=names, help="columns")
    parser.add_argument(
        "--quick", action="store_true", help="one short round, to check that everything runs"
    )
    parser.add_argument(
        "--prepare", action="store_true", help="install peers and convert models, then exit"
    )
    parser.add_argument(
        "--max-round-s",
        type=float,
        default=900.0,
        help="a peer that takes longer with a model and format is not run again with them",
    )
    parser.add_argument("--torch-args", default="", help="arguments for pip when it installs torch")
    parser.add_argument("--name", default="compare-cpu", help="name of the result files")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result files")
    return parser.parse_args()


def _one_of(known: Sequence[str] | dict[str, Any]) -> Any:
    def parse(text: str) -> list[str]:
        chosen = text.split(",")
        if unknown := set(chosen) - set(known):
            raise argparse.ArgumentTypeError(f"no {unknown}; there are {', '.join(known)}")
        return chosen

    return parse


def main() -> None:
    """Prepare, measure, and write the table, the JSON and the plot."""
    arguments = parse_arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended"))  # so that peers are stopped too
    cache = Path(os.environ.get("PORTALM_BENCH_DIR") or "~/.cache/portalm-bench").expanduser()
    settings = Settings(cache, torch_args=tuple(shlex.split(arguments.torch_args)))
    cases = [case for case in CASES if case.name in arguments.cases]
    if arguments.quick:
        cases = [case.shortened() for case in cases]
    bench = Bench(
        {name: PEERS[name](settings) for name in arguments.peers},
        cases,
        machine.build(cache),
        arguments.max_round_s,
    )
    models = {name: write_model(name, cache) for name in arguments.models}
    rows = [
        Row(peer, model, fmt)
        for model in models
        for fmt in arguments.formats
        for peer in bench.peers
    ]
    prepare(bench, rows, models)
    if arguments.prepare:
        return

    ceilings: dict[str, list[dict[str, float]]] = {}
    shapes = {name: read_shape(model) for name, model in models.items()}
    for round_ in range(1 if arguments.quick else arguments.rounds):
        run_round(bench, rows, models, ceilings, round_)
        result = {
            **describe_machine(settings),
            "rounds": round_ + 1,
            "is_quick": arguments.quick,
            "cases": [asdict(case) for case in cases],
            "ceilings": ceilings,
            "limits": machine.limits(ceilings, cases, shapes),
            "rows": [asdict(row) for row in rows],
        }
        write(result, arguments.out, arguments.name + "-quick" * arguments.quick, settings)


def write(result: dict[str, Any], folder: Path, name: str, settings: Settings) -> None:
    """Write JSON, table and plot; called after each round, so that partial results exist."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = folder / f"{result['date']}-{name}"
    Path(f"{stem}.json").write_text(json.dumps(result, indent=1) + "\n")
    table = to_markdown(result)
    Path(f"{stem}.md").write_text(table)
    print(table)
    draw_plot(Path(f"{stem}.json"), settings)


if __name__ == "__main__":
    main()
