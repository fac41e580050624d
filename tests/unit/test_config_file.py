"""`--config FILE.yaml` has the names and the rules of the command line."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from portalm.cli.engine_flags import engine_settings
from portalm.cli.main import build_parser, main
from portalm.errors import ConfigError


def parse(folder: Path, text: str, *flags: str, verb: str = "serve") -> argparse.Namespace:
    (folder / "config.yaml").write_text(text)
    return build_parser().parse_args([verb, *flags, "--config", str(folder / "config.yaml")])


def test_a_file_uses_the_names_of_flags(tmp_path: Path) -> None:
    text = """
model: /models/llama
max-model-len: 32k
max_num_seqs: 8
enable-prefix-caching: false
enforce-eager: true
trust-remote-code: false
hf-overrides: {rope_theta: 5.0}
api-key: [one, two]
served-model-name: [big, small]
port: 9000
dtype: null
"""

    arguments = parse(tmp_path, text)

    assert engine_settings(arguments) == {
        "model": "/models/llama",
        "max_model_len": 32768,
        "max_num_seqs": 8,
        "enable_prefix_caching": False,
        "enforce_eager": True,
        "hf_overrides": (("rope_theta", 5.0),),
    }
    assert arguments.api_key == ["one", "two"]
    assert arguments.served_model_name == ["big", "small"]
    assert arguments.port == 9000


def test_the_command_line_overrides_the_file_in_any_order(tmp_path: Path) -> None:
    assert parse(tmp_path, "port: 9000", "--port", "8000").port == 8000


def test_a_positional_model_is_not_taken_for_a_list_value(tmp_path: Path) -> None:
    arguments = parse(tmp_path, "served-model-name: [big]", "folder")

    assert arguments.model_name == "folder"
    assert arguments.served_model_name == ["big"]


def test_subcommands_accept_a_config_file(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("input-len: 7")

    arguments = build_parser().parse_args(
        ["bench", "latency", "--config", str(tmp_path / "config.yaml")]
    )

    assert arguments.input_len == 7


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("max-model-length: 5", "'max-model-length' is not a flag of `portalm serve`"),
        ("config: other.yaml", "'config' is not a flag"),
        ("enforce-eager: 3", "must be true or false, not 3"),
        ("- model", "must be a mapping from flag names to values"),
        ("model: [", "is not valid YAML"),
    ],
)
def test_an_invalid_file_is_refused(tmp_path: Path, text: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        parse(tmp_path, text)


def test_an_invalid_value_is_refused_as_on_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse(tmp_path, "port: many")

    assert "argument --port: invalid int value: 'many'" in capsys.readouterr().err


def test_a_missing_file_is_reported_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    status = main(["serve", "--config", "/nowhere.yaml"])

    assert status == 2
    assert "portalm: cannot read --config" in capsys.readouterr().err
