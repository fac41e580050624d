"""benchmarks/gpu_run.py runs on a machine without a GPU; its figures mean nothing there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path
from typing import Any

import pytest

from portalm_backends.gpu_common.buckets import mixed_sizes

ROOT = Path(__file__).parents[2]
SCRIPT = str(ROOT / "benchmarks/gpu_run.py")
STAGES = ("smoke", "calib", "numerics", "engine", "kernels", "serve")


def gpu_run(folder: Path, *arguments: str, limit: int = 300) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, SCRIPT, "--out", str(folder), "--limit", str(limit), *arguments]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def record(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "gpu-run.json").read_text())
    return content


def results(folder: Path) -> dict[str, dict[str, Any]]:
    return {r["name"]: r for r in record(folder)["results"]}


def python(code: str) -> str:
    """Run code that imports the stages; their package is not importable from the tests."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT / "benchmarks",
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_predictions_are_written_first_and_a_failed_smoke_stops_the_run(tmp_path: Path) -> None:
    done = gpu_run(tmp_path, "--stages", "smoke,calib", "--device", "none", limit=60)

    assert done.returncode == 1
    content = record(tmp_path)
    assert content["predictions"]["8b: decode, 256 x 1024"]["goal"] == 17_500
    assert [r["name"] for r in content["results"]] == ["FAILED 8b start", "FAILED calib"]
    assert "'none'" in content["results"][0]["message"]
    assert "Traceback" in content["results"][0]["message"]
    assert "Traceback" in done.stdout, "the traceback is printed"
    assert content["results"][1]["message"] == "not run: the stage smoke failed"


def test_a_part_is_stopped_at_its_time_limit_and_its_output_is_kept(tmp_path: Path) -> None:
    found = python(
        "from pathlib import Path; import sys\n"
        "from gpu.processes import run_part\n"
        "command = [sys.executable, '-c', 'print(5, flush=True); import time; time.sleep(99)']\n"
        f"print(run_part(command, 2.0, {{}}, Path({str(tmp_path / 'log')!r}), print))"
    )

    assert found.splitlines() == ["5", "(None, '5')"]
    assert (tmp_path / "log").read_text() == "5\n"


def test_resume_skips_what_is_done_and_logs_are_kept(tmp_path: Path) -> None:
    call = ("--stages", "calib", "--device", "reference", "--tiny", "--resume")

    first, second = gpu_run(tmp_path, *call), gpu_run(tmp_path, *call)

    assert first.returncode == second.returncode == 0, first.stdout + first.stderr
    assert {r["run"] for r in record(tmp_path)["results"]} == {1}
    assert len(record(tmp_path)["runs"]) == 2
    assert "RESULT" in (tmp_path / "logs/1-calib-limits.log").read_text()
    assert record(tmp_path)["runs"][0]["versions"]["torch"]


def test_a_part_that_lacks_a_module_is_skipped_with_the_reason(tmp_path: Path) -> None:
    broken = tmp_path / "packages/torch"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise ImportError('no torch here')\n")

    done = gpu_run(
        tmp_path, "--stages", "calib,numerics", "--device", "reference", "--tiny",
        "--packages", str(broken.parent),
    )  # fmt: skip

    assert done.returncode == 1
    skipped = ["calib limits", "numerics operations", "numerics llama", "numerics all"]
    assert {f"FAILED {name}" for name in skipped} < set(results(tmp_path))
    message = results(tmp_path)["FAILED calib limits"]["message"]
    assert "skipped: cannot import torch: ImportError: no torch here" in message


def test_only_selects_sections_by_name() -> None:
    found = python(
        "import json; from gpu.stages import STAGES, selected\n"
        "def names(*only):\n"
        "    return [f'{s} {p.name} {n}' for s, stage in STAGES.items() for p in stage.parts\n"
        "            for n in selected(p, s, list(only))]\n"
        "print(json.dumps([names('engine 1b offline'), names('one stream'), names()]))"
    )

    only, baseline, default = json.loads(found)
    assert only == ["engine 1b start", "engine 1b offline"]
    assert baseline == ["engine transformers one stream"]
    assert not any("transformers" in name for name in default), "minutes long, so not by default"


def test_a_section_that_fails_or_takes_too_long_does_not_stop_the_next() -> None:
    output = python(
        "import time\n"
        "from gpu.common import Settings, run_sections\n"
        "def wrong(clock): raise ValueError('planted')\n"
        "def slow(clock):\n"
        "    while True:\n"
        "        try: time.sleep(9)\n"
        "        except Exception: pass\n"
        "run = Settings('reference', 'p', {'wrong': 1, 'slow': 1, 'good': 8}, 3.0, True)\n"
        "run_sections(run, {'wrong': wrong, 'slow': slow, 'good': lambda clock: None})"
    )

    lines = output.splitlines()
    failed = [json.loads(line.removeprefix("RESULT ")) for line in lines if "RESULT" in line]
    assert [f["name"] for f in failed] == ["FAILED p wrong", "FAILED p slow"]
    assert "ValueError: planted" in failed[0]["message"]
    assert "time limit" in failed[1]["message"]
    assert lines[-1] == "DONE good"


def test_predictions_stay_below_the_limits_and_follow_the_code() -> None:
    found = json.loads(
        python(
            "import json; from gpu.predict import MIXED_SIZES, predictions\n"
            "print(json.dumps([predictions(), MIXED_SIZES]))"
        )
    )

    predictions, sizes = found
    assert sizes == mixed_sizes(8192)
    for name, figure in predictions.items():
        limit, predicted = figure["limit"], figure["predicted"]
        if limit is None or predicted is None:
            continue
        is_rate = figure["unit"] in ("tok/s", "TB/s", "TFLOP/s")
        assert 0.5 * limit < predicted < limit if is_rate else predicted > limit, name


def wheel(folder: Path, name: str, tags: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(folder / f"{name}-1.0-{tags}.whl", "w") as archive:
        archive.writestr(f"{name}/__init__.py", "value = 1\n")
        archive.writestr(f"{name}-1.0.dist-info/METADATA", f"Name: {name}\nVersion: 1.0\n")


def test_a_pack_adds_what_this_python_lacks(tmp_path: Path) -> None:
    pack = tmp_path / "pack"
    wheel(pack / "wheels", "planted_here", "py3-none-any")
    wheel(pack / "wheels", "planted_other", "cp27-cp27m-any")
    wheel(pack / "wheels", "numpy", "py3-none-any")  # older than the installed one
    native = pack / "native"
    native.mkdir()
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    (native / f"_planted{suffix}").write_bytes(b"")
    (native / "_planted.cpython-27-x86_64-linux-gnu.so").write_bytes(b"")
    (pack / "triton/KEY").mkdir(parents=True)
    (pack / "pack.json").write_text(json.dumps({"triton": "0.0"}))

    python(
        "from pathlib import Path; from gpu.environment import prepare; import json, sys\n"
        f"out = Path({str(tmp_path)!r})\n"
        "found = prepare(out, out / 'pack', '')\n"
        "(out / 'found.json').write_text(json.dumps([found.variables, found.notes]))"
    )

    variables, notes = json.loads((tmp_path / "found.json").read_text())
    assert (tmp_path / "packages/planted_here/__init__.py").exists()
    assert not (tmp_path / "packages/numpy").exists()
    assert (tmp_path / f"source/portalm_backends/_planted{suffix}").is_symlink()
    assert str(tmp_path / "packages") in variables["PYTHONPATH"]
    assert not list((tmp_path / "triton-cache").iterdir()), "another Triton's kernels"
    assert len(notes) == 3
    assert any(note.startswith("planted_other-1.0-cp27") for note in notes)
    assert any("Triton 0.0" in note for note in notes)


def test_the_thousand_requests_have_the_published_total_lengths() -> None:
    totals = python(
        "from gpu.lengths import lengths_like_sharegpt as f\n"
        "print(*[sum(pair[i] for pair in f(1000)) for i in (0, 1)])"
    )

    assert totals == "215196 198001"


@pytest.mark.gpu_interpreted
@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_runs_on_any_machine(tmp_path: Path, stage: str) -> None:
    done = gpu_run(tmp_path, "--stages", stage, "--device", "reference", "--tiny")

    assert done.returncode == 0, done.stdout + done.stderr
    assert results(tmp_path)


@pytest.mark.gpu_compiled
def test_the_smoke_stage_passes_on_a_dry_gpu(tmp_path: Path) -> None:
    done = gpu_run(tmp_path, "--stages", "smoke", "--device", "dry", limit=500)

    assert done.returncode == 0, done.stdout + done.stderr
    found = results(tmp_path)
    assert found["smoke: kernels at startup"]["value"] > 0
    assert found["smoke: compiles after seal, mixed steps"]["value"] == 0
