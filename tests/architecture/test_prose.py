"""The words that ci/prose.yml rules out occur nowhere."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def check(*paths: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "ci/prose.py"), "check", *paths]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_no_docstring_message_or_doc_uses_a_ruled_out_word() -> None:
    done = check()

    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("suffix", "text", "kind"),
    [
        (".py", '"""Draw one token from each row."""\n', "docstring"),
        (".py", "x = 1\n'''Whoever asks first.'''\n", "docstring"),
        (".py", "# what became of it\n", "comment"),
        (".py", "def f(x):\n    raise ValueError(f'{x} is behind')\n", "error"),
        (".py", "parser.add_argument('--x', help='draws tokens')\n", "help"),
        (".py", "logger.warning('nobody asked %s', x)\n", "log"),
        (".py", "def test_the_drawn_token_is_kept():\n    assert True\n", "test name"),
        (".md", "# Title\n\nWeights of\nfew bits.\n", "doc"),
        (".h", "int x;  // goes on\n", "comment"),
    ],
)
def test_a_planted_word_is_found_in_every_kind_of_text(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, suffix: str, text: str, kind: str
) -> None:
    sys_path = [str(ROOT / "ci"), *sys.path]
    monkeypatch.setattr(sys, "path", sys_path)
    import prose

    (tmp_path / f"planted{suffix}").write_text(text)
    monkeypatch.setattr(prose, "ROOT", tmp_path)

    rules, _ = prose.load_rules()
    found = [
        item.kind
        for item in prose.items_of(f"planted{suffix}")
        if any(rule.find(" ".join(item.text.split())) for rule in rules)
    ]

    assert found == [kind]
