"""PortaLM against other engines on this CPU: the same weights, token ids and machine, in one run.

Every peer is started, asked and ended in turn, several rounds; the figures are medians with the
least and the most of the rounds. Servers are asked over HTTP, libraries in a process of their own.
Beside each figure is its share of what the machine could do at most (memory bandwidth at the size
of the weights, multiply-adds), measured in the same round. CPU seconds over wall seconds tell
whether all processors worked.

    python benchmarks/compare_cpu.py [--quick] [--rounds 3] [--peers portalm,llama.cpp]

Peers are installed into virtual environments under $PORTALM_BENCH_DIR (~/.cache/portalm-bench),
models are written there; `--prepare` does only that, so that nothing is built while measuring.
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
    """Why there are no figures."""
    sample: str = ""
    """What it continued SAMPLE with: peers with the same weights mostly agree."""
    figures: dict[str, list[float]] = field(default_factory=dict)
    """Column -> a value for each round."""
    cpu_over_wall: dict[str, list[float]] = field(default_factory=dict)

    def add(self, column: str, value: float) -> None:
        """One round's value."""
        self.figures.setdefault(column, []).append(value)


@dataclass(slots=True)
class Bench:
    """What all rounds share."""

    peers: dict[str, Peer]
    cases: Sequence[Case]
    tokenizers: dict[str, Tokenizer] = field(default_factory=dict)

    def run_round(self, row: Row, model: Model, seed: int) -> None:
        """Start a peer, measure every case, end it."""
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
        """The first token ends the start; then everything once, so that nothing is lazy later."""
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
        cpu, wall = running.process.cpu_s(), time.monotonic()
        answers = running.ask(prompts, case.num_out, case.concurrency)
        wall = time.monotonic() - wall
        cpu = running.process.cpu_s() - cpu
        row.add(case.name, case.value(answers))
        row.cpu_over_wall.setdefault(case.name, []).append(cpu / wall)
        running.process.note_pss()


def _words(tokenizer: Tokenizer) -> list[int]:
    """Ids of plain words, so that every engine's answer is likely to be text."""
    vocab = tokenizer.get_vocab()
    return sorted(i for word, i in vocab.items() if re.fullmatch("Ġ[a-z]{2,}", word))


def measure(
    bench: Bench, models: Sequence[Model], formats: Sequence[str], rounds: int, program: Path
) -> tuple[list[Row], dict[str, Any]]:
    """All rounds: in each one every peer in turn; and the ceilings, by model and format."""
    rows = [
        Row(peer, model.name, fmt) for model in models for fmt in formats for peer in bench.peers
    ]
    by_name = {model.name: model for model in models}
    prepare(bench, rows, by_name)
    measured: dict[str, Any] = {}
    for round_ in range(rounds):
        for model in models:
            for fmt in formats:
                ceiling = machine.measure(program, read_shape(model), fmt)
                measured.setdefault(f"{model.name} {fmt}", []).append(asdict(ceiling))
                print(f"round {round_}: {model.name} {fmt}: {ceiling}", file=sys.stderr)
                for row in rows:
                    if (row.model, row.fmt) == (model.name, fmt) and row.problem is None:
                        _run_or_note(bench, row, model, round_)
    return rows, measured


def prepare(bench: Bench, rows: Sequence[Row], models: dict[str, Model]) -> None:
    """Install peers and convert models; what cannot be is noted in its rows."""
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
    try:
        bench.run_round(row, model, seed=round_)
    except (PeerUnavailable, OSError) as error:
        row.problem = (
            f"{type(error).__name__}: {error}" if isinstance(error, OSError) else str(error)
        )
    print(f"round {round_}: {asdict(row)}", file=sys.stderr)


def describe_machine(settings: Settings) -> dict[str, Any]:
    """What a reader needs to place the figures."""
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
    """The flags."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peers", type=_one_of(PEERS), default=list(PEERS))
    parser.add_argument("--models", type=_one_of(MODELS), default=list(MODELS))
    parser.add_argument("--formats", type=_one_of(FORMATS), default=list(FORMATS))
    parser.add_argument("--quick", action="store_true", help="one short round, to see that it runs")
    parser.add_argument("--prepare", action="store_true", help="install and convert, then end")
    parser.add_argument("--torch-args", default="", help="for pip where it installs torch")
    parser.add_argument("--name", default="compare-cpu", help="of the result files")
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
    """Prepare, measure, write the table, the JSON and the picture."""
    arguments = parse_arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended"))  # so that peers are ended too
    cache = Path(os.environ.get("PORTALM_BENCH_DIR") or "~/.cache/portalm-bench").expanduser()
    settings = Settings(cache, torch_args=tuple(shlex.split(arguments.torch_args)))
    cases = [case.shortened() for case in CASES] if arguments.quick else list(CASES)
    bench = Bench({name: PEERS[name](settings) for name in arguments.peers}, cases)
    models = [write_model(name, cache) for name in arguments.models]
    program = machine.build(cache)
    rounds = 0 if arguments.prepare else 1 if arguments.quick else arguments.rounds

    rows, ceilings = measure(bench, models, arguments.formats, rounds, program)
    if arguments.prepare:
        return
    shapes = {model.name: read_shape(model) for model in models}
    result = {
        **describe_machine(settings),
        "rounds": rounds,
        "is_quick": arguments.quick,
        "cases": [asdict(case) for case in cases],
        "ceilings": ceilings,
        "limits": machine.limits(ceilings, cases, shapes),
        "rows": [asdict(row) for row in rows],
    }
    stem = arguments.out / f"{result['date']}-{arguments.name}{'-quick' * arguments.quick}"
    arguments.out.mkdir(parents=True, exist_ok=True)
    table = to_markdown(result)
    print(table)
    Path(f"{stem}.md").write_text(table)
    Path(f"{stem}.json").write_text(json.dumps(result, indent=1) + "\n")
    draw_plot(Path(f"{stem}.json"), settings)


if __name__ == "__main__":
    main()
