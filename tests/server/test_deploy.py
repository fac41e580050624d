"""Files in deploy/ use metrics, command line flags and probe endpoints that exist."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from portalm.cli.main import build_parser
from tests.server.conftest import RunningServer

DEPLOY = Path(__file__).parents[2] / "deploy"
DASHBOARD = json.loads((DEPLOY / "grafana-dashboard.json").read_text())
ALERTS = yaml.safe_load((DEPLOY / "alerts.yml").read_text())
[DEPLOYMENT, _] = yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text())
POD = DEPLOYMENT["spec"]["template"]["spec"]
[CONTAINER] = POD["containers"]


def serve(arguments: list[str]) -> Any:
    """Parse arguments of `portalm serve`; an unknown flag fails the test."""
    return build_parser().parse_args(["serve", *arguments])


def dockerfile(instruction: str) -> list[str]:
    text = (DEPLOY / "Dockerfile").read_text()
    [words] = re.findall(rf"^{instruction} (\[.*\])$", text, re.MULTILINE)
    return json.loads(words)


def unit() -> dict[str, str]:
    lines = (DEPLOY / "portalm.service").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if re.match(r"\w+=", line))


def rules() -> Iterator[str]:
    for group in ALERTS["groups"]:
        yield from (rule["expr"] for rule in group["rules"])


def queries() -> Iterator[str]:
    for panel in DASHBOARD["panels"]:
        yield from (target["expr"] for target in panel.get("targets", ()))
    for variable in DASHBOARD["templating"]["list"]:
        if variable["type"] == "query":
            yield variable["definition"]


@pytest.mark.parametrize("expressions", [rules, queries])
def test_every_metric_in_rules_and_queries_exists(null_server: RunningServer, expressions) -> None:
    with null_server.client() as http:
        body = {"prompt": "w5", "max_tokens": 2, "ignore_eos": True}
        http.post("/v1/completions", json=body).raise_for_status()
        text = http.get("/metrics").text
    families = text_string_to_metric_families(text)
    labels = {sample.name: set(sample.labels) for family in families for sample in family.samples}

    found = [
        match
        for expression in expressions()
        for match in re.findall(r"(portalm:\w+)(?:\{([^}]*)\})?", expression)
    ]

    assert len(found) > 10
    for name, selector in found:
        assert name in labels, name
        asked = set(re.findall(r"(\w+)\s*=~?", selector)) - {"instance"}  # added by Prometheus
        assert asked <= labels[name], (name, asked)


def promtool(*arguments: str) -> None:
    path = shutil.which("promtool")
    if path is None:
        pytest.skip("promtool is not installed: it is in Debian's package prometheus")
    command = [path, *arguments]
    done = subprocess.run(command, cwd=DEPLOY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_alert_rules_fire_on_test_data() -> None:
    promtool("check", "config", "prometheus.yml")  # checks the rule files that it names, too
    promtool("test", "rules", "alerts_test.yml")


def test_dashboard_queries_are_valid_promql(tmp_path: Path) -> None:
    asked = [q.replace("$__rate_interval", "1m").replace("$__range", "1h") for q in queries()]
    rules = [
        {"record": f"query:{i}", "expr": expression}
        for i, expression in enumerate(asked)
        if not expression.startswith("label_values(")  # a Grafana function
    ]
    path = tmp_path / "queries.yml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))

    promtool("check", "rules", str(path))


def test_the_ci_job_has_promtool() -> None:
    matrix = yaml.safe_load((DEPLOY.parent / "ci/matrix.yml").read_text())

    assert re.search(r"apt-get install .*\bprometheus\b", matrix["jobs"]["cpu"]["command"])


def test_flags_of_image_and_pod_are_valid() -> None:
    program, verb, *flags = dockerfile("ENTRYPOINT")
    pod = serve([*flags, *CONTAINER["args"]])  # Kubernetes appends args to the entrypoint

    assert (Path(program).name, verb) == ("portalm", "serve")
    assert pod.host == "0.0.0.0"
    assert [port["containerPort"] for port in CONTAINER["ports"]] == [pod.port]


def test_flags_of_the_systemd_unit_are_valid() -> None:
    program, verb, *flags = shlex.split(unit()["ExecStart"])

    arguments = serve(flags)
    assert (Path(program).name, verb) == ("portalm", "serve")
    assert float(unit()["TimeoutStopSec"]) > arguments.shutdown_timeout


def test_pod_has_time_to_drain_before_it_is_killed() -> None:
    [_, pause] = CONTAINER["lifecycle"]["preStop"]["exec"]["command"]
    drain = serve(CONTAINER["args"]).shutdown_timeout

    assert POD["terminationGracePeriodSeconds"] > drain + float(pause)


def test_probes_use_existing_endpoints(null_server: RunningServer) -> None:
    paths = {
        probe: CONTAINER[f"{probe}Probe"]["httpGet"]["path"]
        for probe in ("startup", "readiness", "liveness")
    }

    assert paths == {
        "startup": "/health/ready", "readiness": "/health/ready", "liveness": "/health/live",
    }  # fmt: skip
    metrics = DEPLOYMENT["spec"]["template"]["metadata"]["annotations"]["prometheus.io/path"]
    for path in {*paths.values(), metrics}:
        assert httpx.get(null_server.url + path).status_code == 200, path
