"""The dashboard asks for what the server exports, for all of it, in queries that Prometheus would take."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from scripted_engine import Live

PREFIX = "vllm:"
FUNCTIONS = {"rate", "increase", "histogram_quantile", "vector", "label_values"}
AGGREGATIONS = {"sum", "max", "min", "avg", "count"}
WORDS = {"by", "without", "or", "and", "unless"}
TOKEN = re.compile(
    r"""\s*(?:(?P<name>[a-zA-Z_:][\w:]*)|(?P<text>"(?:[^"\\]|\\.)*")|(?P<range>\[(?:\d+[smhd]|\$__rate_interval)\])"""
    r"""|(?P<number>\d+(?:\.\d+)?)|(?P<operator>=~|!~|!=|[=+*/,-])|(?P<open>[({])|(?P<close>[)}]))"""
)


def tokens(query: str) -> list[tuple[str, str]]:
    """(kind, text) of each piece of a query. Raises ValueError at what is none."""
    found, at, query = [], 0, query.strip()
    while at < len(query):
        match = TOKEN.match(query, at)
        if match is None:
            raise ValueError(f"what is {query[at : at + 20]!r}?")
        found.append((str(match.lastgroup), match[str(match.lastgroup)]))
        at = match.end()
    return found


def problems(query: str) -> Iterator[str]:
    """What is wrong with the shape of a query."""
    pieces = tokens(query)
    stack: list[tuple[str, str]] = []  # (bracket, the word before it)
    for i, (kind, text) in enumerate(pieces):
        before = pieces[i - 1] if i else ("", "")
        after = pieces[i + 1] if i + 1 < len(pieces) else ("", "")
        if kind == "open":
            stack.append((text, before[1] if before[0] == "name" else ""))
        elif kind == "close":
            if not stack or stack.pop()[0] != {")": "(", "}": "{"}[text]:
                yield f"{text} closes nothing"
        elif kind == "name" and after[1] == "(" and text not in FUNCTIONS | AGGREGATIONS | WORDS:
            yield f"there is no function {text}"
        elif kind == "name" and text in AGGREGATIONS and after[1] not in ("(", "by", "without"):
            yield f"{text} of what?"
        elif kind == "range":
            inside = [word for bracket, word in stack if bracket == "("]
            if not inside or inside[-1] not in ("rate", "increase"):
                yield "a range stands outside rate() and increase()"
    if stack:
        yield f"{stack[-1][0]} is not closed"
    for name, function in rated(pieces):
        if not re.search(r"_(total|bucket|sum|count)$", name):
            yield f"{function} of {name}, which is no counter"
    if "histogram_quantile" in query and "by (le)" not in query:
        yield "a quantile needs its buckets: sum by (le)"


def rated(pieces: list[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """(metric, function) wherever a rate is taken."""
    for (kind, function), (_, bracket), (_, metric) in zip(pieces, pieces[1:], pieces[2:], strict=False):
        if kind == "name" and function in ("rate", "increase") and bracket == "(":
            yield metric, function


def metrics_in(query: str) -> set[str]:
    """Names of series that a query reads."""
    return {text for kind, text in tokens(query) if kind == "name" and text.startswith(PREFIX)}


@pytest.fixture(scope="module")
def dashboard(repo: Path) -> dict[str, Any]:
    return dict(json.loads((repo / "deploy" / "grafana" / "dashboard.json").read_text(encoding="utf-8")))


@pytest.fixture(scope="module")
def queries(dashboard: dict[str, Any]) -> list[str]:
    """Of all panels and variables."""
    found = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]
    found += [v["definition"] for v in dashboard["templating"]["list"] if v["type"] == "query"]
    assert len(found) > 40
    return found


@pytest.fixture
def exported(start: Callable[..., Live]) -> dict[str, set[str]]:
    """Names of the samples of each family of a real /metrics, after a request and a refusal."""
    live = start()
    httpx.post(f"{live.url}/generate", json={"prompt": "Once", "max_tokens": 4}).raise_for_status()
    live.llm.metrics.reject("queue_requests")
    text = httpx.get(f"{live.url}/metrics/prometheus").text
    return {family.name: {sample.name for sample in family.samples} for family in text_string_to_metric_families(text)}


def test_panels_have_ids_of_their_own_and_do_not_overlap(dashboard: dict[str, Any]) -> None:
    panels = dashboard["panels"]
    ids = [panel["id"] for panel in panels]
    assert len(set(ids)) == len(ids)
    cells: dict[tuple[int, int], int] = {}
    for panel in panels:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                assert cells.setdefault((x, y), panel["id"]) == panel["id"]
    assert all(panel["title"] and (panel["type"] == "row" or panel["description"]) for panel in panels)


def test_targets_of_a_panel_have_letters_of_their_own(dashboard: dict[str, Any]) -> None:
    for panel in dashboard["panels"]:
        letters = [target["refId"] for target in panel.get("targets", ())]
        assert len(set(letters)) == len(letters)
        assert all(t["datasource"]["uid"] == "${datasource}" for t in panel.get("targets", ()))


def test_queries_are_well_formed(queries: list[str]) -> None:
    assert [f"{query}: {what}" for query in queries for what in problems(query)] == []


def test_the_dashboard_asks_for_what_is_exported(queries: list[str], exported: dict[str, set[str]]) -> None:
    samples = set().union(*exported.values())
    assert {name for query in queries for name in metrics_in(query)} <= samples


def test_all_that_is_exported_is_on_the_dashboard(queries: list[str], exported: dict[str, set[str]]) -> None:
    asked = {name for query in queries for name in metrics_in(query)}
    assert [family for family, samples in exported.items() if not samples & asked] == []


def test_labels_exist(queries: list[str], start: Callable[..., Live]) -> None:
    live = start()
    live.llm.metrics.reject("queue_requests")
    families = text_string_to_metric_families(httpx.get(f"{live.url}/metrics/prometheus").text)
    known = {label for family in families for sample in family.samples for label in sample.labels} | {"instance", "job"}
    used = {label for query in queries for label in re.findall(r"(\w+)=~?\"", query)}
    used |= {label for query in queries for group in re.findall(r"by \(([^)]*)\)", query) for label in group.split(", ")}
    assert used <= known


@pytest.mark.parametrize("page", ["docs/operations.md", "docs/reliability.md", "deploy/README.md"])
def test_metrics_named_on_pages_exist(page: str, repo: Path, exported: dict[str, set[str]]) -> None:
    text = (repo / page).read_text(encoding="utf-8")
    known = set(exported).union(*exported.values())  # a histogram is named as a whole
    assert {name for name in re.findall(r"\bvllm:\w+", text) if name not in known} == set()


@pytest.mark.parametrize(
    "query",
    ["sum(rate(vllm:x_total[5m])", "sun(vllm:x)", "rate(vllm:x[5m])", "vllm:x_total[5m]", "sum(vllm:x_total}",
     "histogram_quantile(0.5, sum(rate(vllm:x_bucket[5m])))", "sum + 1"],
)  # fmt: skip
def test_the_check_sees_what_is_wrong(query: str) -> None:
    assert list(problems(query)) != []


def test_the_check_sees_what_is_no_query() -> None:
    with pytest.raises(ValueError, match="what is"):
        tokens("sum(vllm:x) ; 3")
