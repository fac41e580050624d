"""Check and sample the repository's prose: docstrings, comments, messages, docs and test names.

python ci/prose.py check [PATH ...]    list words that ci/prose.yml rules out; exit status 1 if any
python ci/prose.py sample [--seed N]   print a random sample of what people read, for review
"""

from __future__ import annotations

import argparse
import ast
import io
import random
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
RULES = ROOT / "ci" / "prose.yml"
SAMPLE_SEED = 15
C_SUFFIXES = {".h", ".cpp", ".cuh", ".cu", ".hip", ".c", ".js"}
SKIPPED = ("tests/server/npm/", "benchmarks/quality/text/", "benchmarks/results/", "ci/prose.yml")


@dataclass(frozen=True)
class Item:
    """One piece of prose."""

    path: str
    line: int
    kind: str
    """docstring, comment, error, log, help, test name or doc."""
    text: str

    @property
    def first_line(self) -> str:
        """The first line of its text."""
        return self.text.strip().split("\n")[0]


@dataclass(frozen=True)
class Rule:
    """A pattern that may not occur, and what to write instead."""

    pattern: re.Pattern[str]
    instead: str
    allow: re.Pattern[str] | None

    def find(self, text: str) -> re.Match[str] | None:
        """The first match that is not allowed."""
        for match in self.pattern.finditer(text):
            if self.allow is None or not self.allow.match(text, match.start()):
                return match
        return None


def load_rules(path: Path = RULES) -> tuple[list[Rule], list[dict[str, str]]]:
    """Read the rules and their exceptions."""
    document: dict[str, Any] = yaml.safe_load(path.read_text())
    rules = [
        Rule(
            re.compile(entry["pattern"], re.IGNORECASE),
            entry["instead"],
            re.compile(entry["allow"], re.IGNORECASE) if "allow" in entry else None,
        )
        for entry in document["patterns"]
    ]
    return rules, document["exceptions"]


def tracked_files(paths: list[str] | None = None) -> list[str]:
    """Tracked files, and untracked ones that git does not ignore, under `paths`."""
    command = [
        "git",
        "ls-files",
        "--cached",
        "--others",
        "--exclude-standard",
        "--",
        *(paths or []),
    ]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return sorted(
        name
        for name in set(listed.splitlines())
        if (ROOT / name).is_file() and not name.startswith(SKIPPED)
    )


def items_of(name: str) -> Iterator[Item]:
    """Extract the prose of one file."""
    path = ROOT / name
    if path.suffix == ".py":
        # a call in a raise statement is visited twice
        yield from dict.fromkeys(_python_items(name, path.read_text()))
    elif path.suffix in C_SUFFIXES:
        yield from _c_items(name, path.read_text())
    elif path.suffix == ".md":
        yield from _markdown_items(name, path.read_text())
    elif path.suffix in {".yml", ".yaml", ".toml", ".cmake", ".sh"} or path.name in {
        "Makefile",
        "CMakeLists.txt",
        ".importlinter",
    }:
        yield from _hash_comments(name, path.read_text())


def _python_items(name: str, source: str) -> Iterator[Item]:
    tree = ast.parse(source)
    for node in ast.walk(tree):
        yield from _docstrings(name, node)
        if isinstance(node, ast.Raise) and node.exc is not None:
            yield from _strings(name, "error", node.exc)
        elif isinstance(node, ast.Call):
            yield from _call_items(name, node)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.name.startswith(
            "test_"
        ):
            yield Item(name, node.lineno, "test name", node.name.replace("_", " "))
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield Item(name, token.start[0], "comment", token.string.lstrip("# "))


def _docstrings(name: str, node: ast.AST) -> Iterator[Item]:
    """Docstrings of modules, classes and functions, and those after attributes."""
    body = getattr(node, "body", None)
    if not isinstance(body, list):
        return
    for statement in body:
        if (
            isinstance(statement, ast.Expr)
            and isinstance(statement.value, ast.Constant)
            and isinstance(statement.value.value, str)
        ):
            yield Item(name, statement.lineno, "docstring", statement.value.value)


def _call_items(name: str, call: ast.Call) -> Iterator[Item]:
    function = call.func
    called = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    owner = getattr(getattr(function, "value", None), "id", "")
    if owner in {"logger", "logging", "warnings"}:
        yield from _strings(name, "log", call)
    elif called.endswith("Error") or called in {"InvalidRequest", "Unsupported", "fail"}:
        yield from _strings(name, "error", call)
    for keyword in call.keywords:
        if keyword.arg in {"help", "description", "epilog"}:
            yield from _strings(name, "help", keyword.value)


def _strings(name: str, kind: str, node: ast.AST) -> Iterator[Item]:
    """Its literal text, with {} in place of each value of an f-string."""
    if isinstance(node, ast.JoinedStr):
        parts = [part.value if isinstance(part, ast.Constant) else "{}" for part in node.values]
        yield Item(name, node.lineno, kind, "".join(map(str, parts)))
    elif isinstance(node, ast.Constant):
        if isinstance(node.value, str) and " " in node.value:
            yield Item(name, node.lineno, kind, node.value)
    else:
        for child in ast.iter_child_nodes(node):
            yield from _strings(name, kind, child)


def _c_items(name: str, source: str) -> Iterator[Item]:
    for number, line in enumerate(source.splitlines(), 1):
        found = re.search(r"(?<![:\"'])//+!?\s?(.*)", line)
        if found:
            yield Item(name, number, "comment", found[1])
    for block in re.finditer(r"/\*(.*?)\*/", source, re.DOTALL):
        yield Item(name, source.count("\n", 0, block.start()) + 1, "comment", block[1])


def _hash_comments(name: str, source: str) -> Iterator[Item]:
    for number, line in enumerate(source.splitlines(), 1):
        found = re.search(r"(?:^|\s)#\s?(.*)", line)
        if found:
            yield Item(name, number, "comment", found[1])


def _markdown_items(name: str, source: str) -> Iterator[Item]:
    """Paragraphs, list entries, table rows and headings; no code."""
    text = re.sub(r"^```.*?^```", lambda m: "\n" * m[0].count("\n"), source, flags=re.M | re.S)
    start, lines = 1, list[str]()
    for number, line in enumerate([*text.splitlines(), ""], 1):
        begins = not line.strip() or re.match(r"\s*([-*|#]|\d+\.)", line)
        if begins and lines:
            yield Item(name, start, "doc", re.sub(r"`[^`]*`", "`code`", "\n".join(lines)))
            lines = []
        if line.strip():
            if not lines:
                start = number
            lines.append(line)


def faults(paths: list[str] | None = None) -> list[str]:
    """Every match of a rule, one line each; exceptions left out."""
    rules, exceptions = load_rules()
    found = []
    for name in tracked_files(paths):
        for item in items_of(name):
            text = " ".join(item.text.split())
            if any(e["path"] == name and e["text"] in text for e in exceptions):
                continue
            for rule in rules:
                match = rule.find(text)
                if match is not None:
                    left = max(0, match.start() - 40)
                    context = text[left : match.end() + 40]
                    found.append(
                        f"{name}:{item.line}: {item.kind}: {match[0]!r} "
                        f"(write: {rule.instead}) in: {context}"
                    )
    return found


def sample(seed: int, sizes: dict[str, int]) -> Iterator[str]:
    """`sizes[kind]` random items of each kind, as printable lines."""
    by_kind: dict[str, list[Item]] = {}
    for name in tracked_files():
        for item in items_of(name):
            is_source = not name.startswith(("tests/", "benchmarks/", "ci/"))
            if item.kind == "doc" or is_source:
                by_kind.setdefault(item.kind, []).append(item)
    for kind, count in sizes.items():
        pool = sorted(
            (item for item in by_kind.get(kind, []) if len(item.text.split()) >= 3),
            key=lambda item: (item.path, item.line),
        )
        yield f"{kind} ({count} of {len(pool)}, seed {seed})"
        for item in random.Random(seed).sample(pool, min(count, len(pool))):
            text = item.first_line if kind == "docstring" else " ".join(item.text.split())[:240]
            yield f"  {item.path}:{item.line}: {text}"


def main() -> int:
    """Run one of the commands."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    check = commands.add_parser("check", help="list words that ci/prose.yml rules out")
    check.add_argument("paths", nargs="*", help="files or folders (default: the repository)")
    sampling = commands.add_parser("sample", help="print a random sample for review")
    sampling.add_argument("--seed", type=int, default=SAMPLE_SEED, help="(default: %(default)s)")
    arguments = parser.parse_args()
    if arguments.command == "sample":
        for line in sample(arguments.seed, {"docstring": 100, "error": 20, "doc": 20}):
            print(line)
        return 0
    found = faults(arguments.paths)
    print("\n".join(found) or "no match")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
