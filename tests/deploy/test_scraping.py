"""Prometheus' configuration: its two jobs, done as Prometheus does them, get the metrics of a server started as they say."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families
from scripted_engine import Live

# What Prometheus 3 says it takes, in its order of preference.
ACCEPT = (
    "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,application/openmetrics-text;version=0.0.1;q=0.5,"
    "text/plain;version=1.0.0;escaping=allow-utf-8;q=0.4,text/plain;version=0.0.4;q=0.3,*/*;q=0.2"
)


@pytest.fixture(scope="module")
def jobs(repo: Path) -> dict[str, dict[str, Any]]:
    config = yaml.safe_load((repo / "deploy" / "prometheus.yml").read_text(encoding="utf-8"))
    assert set(config) == {"global", "scrape_configs"}
    return {job["job_name"]: job for job in config["scrape_configs"]}


def scrape(job: dict[str, Any], port: int, key: str | None) -> httpx.Response:
    """One scrape of a job, its first target moved to ``port``."""
    headers = {"accept": ACCEPT}
    if (authorization := job.get("authorization")) is not None:
        assert authorization["credentials_file"]
        headers["authorization"] = f"{authorization['type']} {key}"
    return httpx.get(f"http://127.0.0.1:{port}{job['metrics_path']}", headers=headers)


def test_a_port_of_its_own_needs_no_key(jobs: dict[str, dict[str, Any]], start: Callable[..., Live]) -> None:
    live = start(api_key=("secret-of-somebody",), metrics_port=0)
    assert live.server.metrics is not None
    answer = scrape(jobs["mini-vllm"], live.server.metrics.port, None)
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert "vllm:num_requests_running" in {family.name for family in text_string_to_metric_families(answer.text)}


def test_the_servers_own_port_needs_one(jobs: dict[str, dict[str, Any]], start: Callable[..., Live]) -> None:
    live = start(api_key=("secret-of-prometheus",))
    job = jobs["mini-vllm-with-key"]
    assert scrape(job, live.port, "secret-of-prometheus").status_code == 200
    assert scrape(job, live.port, "wrong").status_code == 401


def test_every_job_has_a_target(jobs: dict[str, dict[str, Any]]) -> None:
    assert all(group["targets"] for job in jobs.values() for group in job["static_configs"])
