"""Every expression of the dashboard and of the alert rules names metrics that the service exports."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from pathlib import Path

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from engines.target_stats import TargetStats
from serve_app.admission import Admission
from serve_app.backend import ReplicaReport
from serve_app.diffusion_engine import EngineStats
from serve_app.replica_stats import diffusion_metrics, draft_metrics, target_metrics
from serve_app.telemetry import Telemetry
from unmask.config import ServeConfig
from unmask.pairing.server import DraftStats
from unmask.pairing.status import FIELDS

DEPLOY = Path(__file__).parents[3] / "deploy"
FUNCTIONS = {"sum", "rate", "by", "max", "histogram_quantile", "scalar", "avg_over_time", "le", "or", "absent"}


@functools.cache
def exported() -> frozenset[str]:
    """The names of all samples of a scrape with every role of replica."""
    stats = TargetStats(num_drafts=1, num_accepted_tokens_per_pos=[1])
    reports = [
        ReplicaReport(role="target", replica="t", pids=(1,), stats=target_metrics(stats, dict.fromkeys(FIELDS, 1.0))),
        ReplicaReport(role="draft", replica="d", pids=(1,), stats=draft_metrics(zeros(DraftStats))),
        ReplicaReport(role="diffusion", replica="l", pids=(1,), stats=diffusion_metrics(zeros(EngineStats))),
    ]
    telemetry = Telemetry(Admission(1, 1))
    telemetry.responses.labels("GET", "/health", "200").inc()
    telemetry.stream_errors.labels("503").inc()
    text = telemetry.exposition(reports, "m").decode()
    return frozenset(sample.name for family in text_string_to_metric_families(text) for sample in family.samples)


def zeros(cls: type) -> object:
    """An instance with 1 in every field."""
    return cls(**{field.name: 1 for field in dataclasses.fields(cls)})


def named(expression: str) -> set[str]:
    """Metrics that a PromQL expression names: words that are no function, label, duration or number."""
    bare = re.sub(r"\{[^}]*\}|\[[^\]]*\]|\b(?:by|without) \([^)]*\)", " ", expression)
    return {word for word in re.findall(r"[a-zA-Z_][\w:]*", bare) if word not in FUNCTIONS}


def expressions() -> list[tuple[str, str]]:
    rules = yaml.safe_load((DEPLOY / "prometheus" / "alerts.yaml").read_text())["groups"]
    board = json.loads((DEPLOY / "grafana" / "unmask.json").read_text())
    alerts = [(rule["alert"], rule["expr"]) for group in rules for rule in group["rules"]]
    panels = [(panel["title"], target["expr"]) for panel in board["panels"] for target in panel["targets"]]
    return alerts + panels


@pytest.mark.parametrize(("name", "expression"), expressions())
def test_expressions_name_metrics_that_exist(name: str, expression: str) -> None:
    metrics = named(expression)
    assert metrics
    assert metrics <= exported(), name


def test_a_metric_that_does_not_exist_is_found() -> None:
    assert named("rate(unmask_lost_total[5m])") - exported() == {"unmask_lost_total"}


def test_rules_are_complete() -> None:
    rules = yaml.safe_load((DEPLOY / "prometheus" / "alerts.yaml").read_text())["groups"][0]["rules"]
    for rule in rules:
        assert rule["labels"]["severity"] in ("page", "ticket")
        assert rule["annotations"]["summary"].endswith(".")


def test_prometheus_scrapes_what_the_service_serves_and_finds_its_rules() -> None:
    config = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yaml").read_text())
    assert config["rule_files"] == ["alerts.yaml"]
    assert (DEPLOY / "prometheus" / config["rule_files"][0]).is_file()
    [job] = config["scrape_configs"]
    assert job["metrics_path"] == "/metrics"
    assert job["authorization"]["type"] == "Bearer"
    port = ServeConfig().port
    assert job["static_configs"] == [{"targets": [f"127.0.0.1:{port}"]}]
    intervals = re.fullmatch(r"(\d+)s", config["global"]["scrape_interval"])
    # `rate` over the rules' shortest window needs two scrapes in it.
    assert intervals is not None
    assert 2 * int(intervals[1]) <= 60
