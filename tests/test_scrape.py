"""A real Prometheus over a run: it reads cluster/monitoring, and every query of the dashboard finds data."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote
from urllib.request import urlopen

import pytest
import yaml
from heads import Head
from test_monitoring import FOLDER
from waiting import free_port, until

pytestmark = [pytest.mark.ray, pytest.mark.full, pytest.mark.timeout(500)]

# What a run that goes well and asks no API has nothing to say of.
QUIET = ("ray_rsrlm_engines_lost_total", "ray_rsrlm_alarms_total", "ray_rsrlm_endpoint")


class Prometheus:
    """With the files of cluster/monitoring, looking at the nodes of a cluster every second."""

    def __init__(self, head: Head, folder: Path) -> None:
        config = yaml.safe_load((FOLDER / "prometheus.yml").read_text())
        config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
        (files,) = config["scrape_configs"][0]["file_sd_configs"]
        files["files"] = [str(head.folder / Path(name).name) for name in files["files"]]
        files["refresh_interval"] = "1s"
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        for name in config["rule_files"]:
            shutil.copy(FOLDER / name, folder)
        self._url = f"127.0.0.1:{free_port()}"
        self._process = subprocess.Popen(
            ["prometheus", "--config.file=prometheus.yml", f"--web.listen-address={self._url}"],
            cwd=folder,
            stdout=(folder / "prometheus.log").open("wb"),
            stderr=subprocess.STDOUT,
        )

    def ask(self, path: str) -> Any:
        """None where it does not answer yet."""
        try:
            with urlopen(f"http://{self._url}/api/v1/{path}", timeout=10) as answer:
                return json.load(answer)["data"]
        except OSError:
            return None

    def finds(self, query: str) -> bool:
        return bool((self.ask(f"query?query={quote(query)}") or {}).get("result"))

    def close(self) -> None:
        self._process.kill()
        self._process.wait(timeout=60)


@pytest.fixture
def prometheus(tmp_path: Path) -> Iterator[tuple[Head, Prometheus]]:
    if not shutil.which("prometheus"):
        pytest.skip("no prometheus here (Debian has a package): its queries are tested by names and labels alone")
    head = Head(cpus=2)
    try:
        until(lambda: (head.folder / "prom_metrics_service_discovery.json").exists())
        scraping = Prometheus(head, tmp_path)
        try:
            yield head, scraping
        finally:
            scraping.close()
    finally:
        head.close()


def dashboard() -> set[str]:
    """Its queries, for all runs, and counters over a time that a short run fills."""
    board = json.loads((FOLDER / "grafana" / "rsrlm.json").read_text())
    asked = {target["expr"] for panel in board["panels"] for target in panel.get("targets", [])}
    return {query.replace("$run", ".*").replace("$__rate_interval", "30s") for query in asked}


def test_every_query_of_the_dashboard_finds_data(
    prometheus: tuple[Head, Prometheus], tiny_chat_model: Path, tmp_path: Path
) -> None:
    head, scraping = prometheus
    config = {
        "name": "scraped",
        "runs": str(tmp_path / "runs"),
        "iterations": 2,
        "model": str(tiny_chat_model),
        "prompts": {"path": "builtin", "per_iteration": 12, "heldout": 4},
        "sample": {"responses": 3, "max_tokens": 24, "temperature": 0.8},
        "judge": {"kind": "digits", "min_mass": 0, "fence_salt": ""},
        "train": {"lr": 1e-3, "pairs_per_step": 3, "micro_batch": 2},
        "evaluate": {"max_tokens": 16, "kl": True},
        "engine": {"max_model_len": 768, "max_num_seqs": 2, "kv_cache_gib": 0.25},
        "ray": {"address": f"127.0.0.1:{head.port}"},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    run = subprocess.Popen(
        [sys.executable, "-m", "rsrlm.cli", "run", str(tmp_path / "config.yaml")],
        env=head.environ,
        stdout=(tmp_path / "run.log").open("wb"),
        stderr=subprocess.STDOUT,
    )
    missing = {query for query in dashboard() if not any(name in query for name in QUIET)}
    asked = len(missing)
    try:
        while run.poll() is None:
            missing -= {query for query in missing if scraping.finds(query)}
        missing -= {query for query in missing if scraping.finds(query)}
    finally:
        run.kill()
    assert run.returncode == 0, (tmp_path / "run.log").read_text()
    assert missing == set()
    assert asked >= 20
    (group,) = scraping.ask("rules")["groups"]
    assert {rule["health"] for rule in group["rules"]} == {"ok"}
    assert {rule["state"] for rule in group["rules"]} <= {"inactive", "pending"}
