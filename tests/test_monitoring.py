"""cluster/monitoring asks for metrics that rsrlm exports, by the names that Ray gives them."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from rsrlm.runtime.metrics import COUNTERS, GAUGES
from rsrlm.settings.machine import Weights

FOLDER = Path(__file__).parent.parent / "cluster" / "monitoring"
EXPORTED = {f"ray_{name}_total": tag for name, (_, tag) in COUNTERS.items()} | {
    f"ray_{name}": tag for name, (_, tag) in GAUGES.items()
}


def queries() -> list[str]:
    board = json.loads((FOLDER / "grafana" / "rsrlm.json").read_text())
    (groups,) = yaml.safe_load((FOLDER / "rules.yml").read_text())["groups"]
    return [
        *(target["expr"] for panel in board["panels"] for target in panel.get("targets", [])),
        *(rule["expr"] for rule in groups["rules"]),
    ]


def test_every_query_asks_for_what_is_exported() -> None:
    """A counter is asked for as a rate, an increase or a sum; labels are those that the metric has."""
    for query in queries():
        names = re.findall(r"ray_rsrlm_\w+", query)
        assert names
        assert set(names) <= EXPORTED.keys()
        for name in names:
            if name.endswith("_total"):
                assert re.search(rf"(rate\(|increase\(|sum by \(\w+\) \(){name}", query)
        labels = {"run"} | {EXPORTED[name] for name in names}
        for found in re.findall(r"by \(([^)]*)\)", query):
            assert set(re.split(r", ", found)) <= labels
        assert set(re.findall(r"(\w+)=~?\"", query)) <= labels


def test_everything_exported_is_shown() -> None:
    asked = {name for query in queries() for name in re.findall(r"ray_rsrlm_\w+", query)}
    assert EXPORTED.keys() - asked == {"ray_rsrlm_engines_up_total", "ray_rsrlm_engines_restarted_total"}


def test_panels_do_not_lie_upon_each_other() -> None:
    board = json.loads((FOLDER / "grafana" / "rsrlm.json").read_text())
    taken = [
        (x, y)
        for panel in board["panels"]
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(taken) == len(set(taken))
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])


def test_slow_weights_are_half_the_deadline() -> None:
    deadline = Weights().deadline_s
    (rule,) = [query for query in queries() if "publish_seconds" in query and ">" in query]
    assert rule.endswith(f"> {deadline / 2:.0f}")


def test_prometheus_reads_the_rules_that_are_there() -> None:
    config = yaml.safe_load((FOLDER / "prometheus.yml").read_text())
    assert all((FOLDER / name).is_file() for name in config["rule_files"])
    monitor = yaml.safe_load((FOLDER / "podmonitor.yaml").read_text())
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    base = (FOLDER.parent / "kuberay" / "base" / "rayjob.yaml").read_text()
    assert base.count(f"name: {endpoint['port']}, containerPort: 8080") == 2  # of head and workers


def test_prometheus_can_read_all_of_it(tmp_path: Path) -> None:
    promtool = shutil.which("promtool")
    if not promtool:
        pytest.skip("no promtool here (Debian's package prometheus has it): names and labels are tested alone")
    recorded = [
        {"record": f"query:{number}", "expr": query.replace("$__rate_interval", "1m")}
        for number, query in enumerate(queries())
    ]
    rules = tmp_path / "rules.yml"
    rules.write_text(yaml.safe_dump({"groups": [{"name": "queries", "rules": recorded}]}))
    for arguments in (["config", FOLDER / "prometheus.yml"], ["rules", rules]):
        done = subprocess.run([promtool, "check", *map(str, arguments)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
