"""The file gpu-run.json: predictions, results and what is done."""

from __future__ import annotations

import json
import platform
import time
from pathlib import Path
from typing import Any

Result = dict[str, Any]


class Record:
    """The file OUT/gpu-run.json, which is complete after every change."""

    def __init__(
        self, folder: Path, device: str, predictions: dict[str, Any], *, resume: bool
    ) -> None:
        """Read the existing file, or create one with the predictions.

        Args:
            folder: created if it does not exist.
            device: name of the backend.
            predictions: written only to a new file: they precede its first result.
            resume: sections that the file lists as done stay done; otherwise they run again.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "gpu-run.json"
        self.content: dict[str, Any] = {
            "device": device,
            "machine": platform.platform(),
            "predictions": predictions,
            "runs": [],
            "done": [],
            "results": [],
        }
        if self.path.exists():
            self.content = json.loads(self.path.read_text())
        if not resume:
            self.content["done"] = []
        self.number = len(self.content["runs"]) + 1
        self.content["runs"].append({"run": self.number, "began": time.strftime("%FT%TZ", _now())})
        self._write()

    def describe(self, **facts: Any) -> None:
        """Add facts about this run: arguments, versions, missing packages."""
        self.content["runs"][-1].update(facts)
        self._write()

    def add(self, result: Result) -> None:
        """Add a result and save the file."""
        self.content["results"].append({"run": self.number, **result})
        self._write()

    def fail(self, stage: str, name: str, message: str) -> None:
        """Add a failure of a stage, part or section."""
        self.add(
            {
                "stage": stage,
                "name": f"FAILED {name}",
                "value": None,
                "unit": "",
                "message": message,
            }
        )

    def finish(self, section: str) -> None:
        """Mark a section, by its full name, as done."""
        self.content["done"].append(section)
        self._write()

    def is_done(self, section: str) -> bool:
        """True if --resume need not run the section again."""
        return section in self.content["done"]

    def failures(self) -> list[Result]:
        """Failures of this run."""
        return [
            result
            for result in self.content["results"]
            if result["run"] == self.number and result["name"].startswith("FAILED")
        ]

    def table(self) -> str:
        """Format this run's results, one per line, with goal and prediction if there are any."""
        lines = [f"{'':<56}{'measured':>12} {'':<8}{'predicted':>11}{'goal':>10}{'limit':>10}"]
        for result in self.content["results"]:
            if result["run"] != self.number:
                continue
            value = result["value"]
            if not isinstance(value, int | float):
                if "message" in result:
                    text = result["message"].strip().splitlines() or [""]
                    lines.append(f"{result['name']}: {text[-1][:160]}")
                continue
            more = ""
            if found := self.content["predictions"].get(result["name"]):
                columns = ((found.get("predicted"), 11), (found["goal"], 10), (found["limit"], 10))
                more = "".join(
                    " " * width if x is None else f"{x:>{width},.6g}" for x, width in columns
                )
            lines.append(f"{result['name']:<56}{value:>12,.5g} {result['unit']:<8}{more}")
        return "\n".join(lines)

    def _write(self) -> None:
        whole = self.path.with_suffix(".part")
        whole.write_text(json.dumps(self.content, indent=1) + "\n")
        whole.replace(self.path)


def _now() -> time.struct_time:
    return time.gmtime()
