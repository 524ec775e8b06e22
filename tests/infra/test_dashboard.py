"""The Grafana dashboard: its form, its queries, and that what they ask for is there."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import promql_parser as promql
import pytest
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import Dashboard
from logitmill.flows import metrics
from prometheus_client import REGISTRY

# What Prometheus itself adds to every series.
SCRAPED = {"job", "instance"}


@pytest.fixture
def dashboard(infra: Path) -> dict[str, Any]:
    return json.loads((infra / "dashboards/logitmill.json").read_text())  # type: ignore[no-any-return]


def served() -> dict[str, tuple[str, set[str]]]:
    """Series of `logitmill.flows.metrics` -> their kind and labels."""
    metrics._run.info({"run_key": "k", "model": "m"})
    return {
        sample.name: (family.type, set(sample.labels))
        for family in REGISTRY.collect()
        if family.name.startswith("logitmill_")
        for sample in family.samples
    }


def queries(dashboard: dict[str, Any]) -> list[str]:
    return [t["expr"] for panel in dashboard["panels"] for t in panel["targets"]]


def parse(query: str) -> promql.Expr:
    return promql.parse(query.replace("$job", ".*"))


def selectors(expression: promql.Expr, inside: str = "") -> Iterator[tuple[Any, str]]:
    """(selector, the function that is called on it)."""
    match expression:
        case promql.VectorSelector():
            yield expression, inside
        case promql.MatrixSelector():
            yield expression.vector_selector, inside
        case promql.Call():
            for argument in expression.args:
                yield from selectors(argument, expression.func.name)
        case promql.AggregateExpr():
            yield from selectors(expression.expr, inside)
        case promql.BinaryExpr():
            yield from selectors(expression.lhs, inside)
            yield from selectors(expression.rhs, inside)
        case promql.ParenExpr():
            yield from selectors(expression.expr, inside)


def mistakes(query: str) -> list[str]:
    """What a query asks of series that they do not have."""
    found, there = [], served()
    for selector, function in selectors(parse(query)):
        if selector.name not in there:
            found.append(f"no series {selector.name}")
            continue
        kind, labels = there[selector.name]
        asked = {matcher.name for matcher in selector.matchers.matchers}
        if unknown := asked - labels - SCRAPED:
            found.append(f"{selector.name} has no label {unknown}")
        counts = kind == "counter" or selector.name.endswith(("_bucket", "_sum", "_count"))
        if counts != (function in ("rate", "increase")):
            found.append(f"{function or 'no function'} of a {kind}, {selector.name}")
    return found


def test_queries_ask_for_what_is_there(dashboard: dict[str, Any]) -> None:
    assert [m for query in queries(dashboard) for m in mistakes(query)] == []


@pytest.mark.parametrize(
    ("query", "mistake"),
    [
        ("sum(rate(logitmill_token_total[5m]))", "no series logitmill_token_total"),
        ('logitmill_run_workers{worker="a"}', "logitmill_run_workers has no label {'worker'}"),
        ("logitmill_tokens_total", "no function of a counter, logitmill_tokens_total"),
        ("rate(logitmill_run_workers[5m])", "rate of a gauge, logitmill_run_workers"),
    ],
)
def test_a_query_that_asks_for_something_else_is_found(query: str, mistake: str) -> None:
    assert mistakes(query) == [mistake]


def test_everything_that_is_served_is_shown(dashboard: dict[str, Any]) -> None:
    shown = {s.name for query in queries(dashboard) for s, _ in selectors(parse(query))}
    unread = {name for name in served() if not name.endswith(("_created", "_sum", "_count"))}
    assert unread - shown == set()


def test_grafana_knows_every_field(dashboard: dict[str, Any]) -> None:
    assert _read(dashboard) == dashboard
    broken = copy.deepcopy(dashboard)
    broken["panels"][0]["gridpos"] = broken["panels"][0].pop("gridPos")
    assert _read(broken) != broken


def _read(dashboard: dict[str, Any]) -> dict[str, Any]:
    """A dashboard as Grafana's own models of it hold it, but for what they fill in."""
    encoded = JSONEncoder().encode(Dashboard.from_json(copy.deepcopy(dashboard)))
    return _shared(json.loads(encoded), dashboard)  # type: ignore[no-any-return]


def _shared(whole: Any, asked: Any) -> Any:
    match whole, asked:
        case dict(), dict():
            return {key: _shared(whole[key], asked[key]) for key in asked if key in whole}
        case list(), list() if len(whole) == len(asked):
            return [_shared(a, b) for a, b in zip(whole, asked, strict=True)]
    return whole


def test_panels_have_a_place_of_their_own(dashboard: dict[str, Any]) -> None:
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        assert panel["title"] and panel["description"]
        assert panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24
    for one, other in combinations([panel["gridPos"] for panel in panels], 2):
        beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        above = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert beside or above, (one, other)
