"""The report in a real browser: what cutoffs keep, what is behind its bars, and how it looks."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chromium import LAPTOP, need_browser, open_page, read_fifth_token
from logitmill.engine.records import DocumentScore
from logitmill.flows.report import render_report
from logitmill.flows.summary import Summary
from report_runs import (
    FACTS,
    LANGUAGES,
    OPERATIONS,
    SHORT,
    SOURCES,
    make_mixed,
    make_vocabulary,
    write_run,
)

pytest.importorskip("playwright", reason="Playwright's Python package is not installed")
duckdb = pytest.importorskip("duckdb")

PHONE = {"width": 360, "height": 740}
"""A narrow one."""


@dataclass(frozen=True)
class Report:
    """A report on disk, and the documents that it is of."""

    path: Path
    documents: Sequence[DocumentScore]

    def column(self, name: str) -> np.ndarray:
        """A column of the scored documents."""
        scored = [d.record for d in self.documents if d.record.status == "ok"]
        return np.array([getattr(record, name) for record in scored])

    @property
    def bins(self) -> np.ndarray:
        """The bin of every scored document."""
        return (self.column("bits_per_byte") / 0.02).astype(int)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with need_browser() as running:
        yield running


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    folder = tmp_path_factory.mktemp("run")
    documents = make_mixed()
    write_run(documents, folder)
    made = Summary()
    for score in documents:
        made.add(score)
    facts = {**FACTS, "uri": str(folder), "recipe": SHORT}
    html = render_report(
        made.counts(), made.outliers(), facts, OPERATIONS, make_vocabulary(documents)
    )
    (folder / "report.html").write_text(html)
    return Report(folder / "report.html", documents)


@pytest.fixture
def page(browser: Any, report: Report) -> Iterator[Any]:
    # What is pointed at stays where it is: focus scrolls at once.
    with open_page(browser, report.path, reduced_motion="reduce") as page:
        yield page


def kept(page: Any) -> dict[str, tuple[int, int]]:
    """Documents and bytes below, between and above the cutoffs, as the page says them."""
    found = {}
    for part in ("below", "between", "above"):
        titles = page.locator(f"[data-part={part}] [title]").evaluate_all(
            "all => all.map(e => e.title)"
        )
        documents, size = (int(re.sub(r"\D", "", title)) for title in titles)
        found[part] = (documents, size)
    return found


def leave(page: Any) -> None:
    """Go on to the next field; what was typed in this one is made good right after."""
    page.keyboard.press("Tab")
    page.evaluate("new Promise((done) => setTimeout(done))")


def counted(report: Report, low: int, high: int, mask: Any = True) -> dict[str, tuple[int, int]]:
    """The same of the documents' scores, for cutoffs that are edges of bins."""
    bins, sizes = report.bins, report.column("num_bytes")
    parts = {"below": bins < low, "between": (bins >= low) & (bins < high), "above": bins >= high}
    return {
        name: (int((part & mask).sum()), int(sizes[part & mask].sum()))
        for name, part in parts.items()
    }


def cutoffs(page: Any) -> tuple[int, int]:
    """The edges of bins where the cutoffs are."""
    values = [page.input_value(f"[name={name}-bits]") for name in ("lower", "upper")]
    low, high = (round(float(value) / 0.02) for value in values)
    return low, high


def nearest_edge(bins: np.ndarray, weights: np.ndarray, share: float) -> float:
    """How near the weight below the best edge comes to a share of it all."""
    edges = np.arange(bins.max() + 2)
    below = np.array([weights[bins < edge].sum() for edge in edges])
    return float(np.abs(below / weights.sum() - share).min())


def ask(query: str) -> Any:
    """The rows of a query that the page shows."""
    return duckdb.sql(query).df()


@pytest.mark.parametrize("weight", ["documents", "bytes"])
def test_typed_percentiles_keep_what_numpy_keeps(page: Any, report: Report, weight: str) -> None:
    page.select_option("[name=weight]", weight)
    weights = np.ones(len(report.bins)) if weight == "documents" else report.column("num_bytes")
    for low_share, high_share in ((30, 60), (10, 87.5), (0, 100)):
        page.fill("[name=lower-share]", str(low_share))
        page.fill("[name=upper-share]", str(high_share))
        leave(page)
        low, high = cutoffs(page)
        assert kept(page) == counted(report, low, high)
        for edge, share in ((low, low_share / 100), (high, high_share / 100)):
            below = weights[report.bins < edge].sum() / weights.sum()
            assert abs(below - share) == pytest.approx(nearest_edge(report.bins, weights, share))
        query = page.locator("#kept pre").first.text_content()
        assert len(ask(query)) == counted(report, low, high)["between"][0]


def test_what_is_chosen_is_a_command_too(page: Any, report: Report) -> None:
    page.select_option("[name=weight]", "bytes")
    page.fill("[name=lower-share]", "12.5")
    command = page.locator("#kept pre").nth(1).text_content()
    assert command == (
        f"logitmill filter {report.path.parent} --keep 12.5:60 --by none --weight bytes "
        "--out kept.parquet"
    )
    page.select_option("[name=language]", label="en")
    assert page.locator("#kept pre").count() == 1


def test_typed_bits_are_cutoffs_too(page: Any, report: Report) -> None:
    page.fill("[name=lower-bits]", "0.5")
    page.fill("[name=upper-bits]", "0.8")
    assert kept(page) == counted(report, 25, 40)
    page.fill("[name=upper-bits]", "0.3")
    assert kept(page)["between"] == (0, 0)
    leave(page)
    assert cutoffs(page) == (25, 25)
    page.fill("[name=upper-bits]", "")
    leave(page)
    assert cutoffs(page) == (25, 25)


def test_cutoffs_move_by_keyboard_and_by_pointer(page: Any, report: Report) -> None:
    low, high = cutoffs(page)
    handle = page.get_by_role("slider", name="Lower cutoff")
    handle.focus()
    for _ in range(3):
        page.keyboard.press("ArrowLeft")
    assert cutoffs(page) == (low - 3, high)
    assert kept(page) == counted(report, low - 3, high)
    assert float(handle.get_attribute("aria-valuenow")) == pytest.approx((low - 3) * 0.02)
    page.keyboard.press("End")
    after = cutoffs(page)
    assert after[0] == after[1] > high
    page.keyboard.press("Home")
    assert kept(page)["below"] == (0, 0)
    box = page.get_by_role("slider", name="Upper cutoff").bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 8)
    page.mouse.down()
    page.mouse.move(box["x"] + 60, box["y"] + 8, steps=4)
    page.mouse.up()
    assert cutoffs(page)[1] > high
    assert kept(page) == counted(report, *cutoffs(page))


def test_filters_show_what_numpy_selects(page: Any, report: Report) -> None:
    sources, languages = report.column("source"), report.column("language")
    sizes = report.column("num_bytes")
    names = {"line\nbreak\x01": "line\u240abreak\u2401", "": "(no language)"}
    for source in SOURCES:
        page.select_option("[name=source]", label=names.get(source, source))
        mask = sources == source
        assert kept(page) == counted(report, *cutoffs(page), mask)
        assert len(ask(page.locator("#kept pre").first.text_content())) == kept(page)["between"][0]
    page.select_option("[name=source]", "")
    page.select_option("[name=language]", label=names[""])
    page.select_option("[name=size]", label="1 kiB to 4 kiB")
    mask = (languages == LANGUAGES[2]) & (sizes >= 1024) & (sizes < 4096)
    assert kept(page) == counted(report, *cutoffs(page), mask)
    assert len(ask(page.locator("#kept pre").first.text_content())) == kept(page)["between"][0]
    bars = page.locator(".bar").evaluate_all("all => all.map(e => e.getAttribute('aria-label'))")
    assert sum(int(re.search(r": ([\d,]+) document", bar)[1]) for bar in bars) == mask.sum()


def test_colours_are_of_the_chosen_column(page: Any) -> None:
    assert page.locator("#legend li").count() == len(SOURCES)
    page.select_option("[name=colour]", "language")
    assert set(page.locator("#legend li").all_inner_texts()) == {"en", "de", "(no language)"}
    assert page.locator("#ecdf .step").count() == len(LANGUAGES)


def test_a_bar_leads_to_its_documents(page: Any, report: Report) -> None:
    bars = page.locator("#histogram .bar")
    bars.nth(6).click(position={"x": 2, "y": 120})
    behind = page.locator(".behind")
    label = bars.nth(6).get_attribute("aria-label")
    assert behind.locator("h4").inner_text() == label
    start, stop = (float(x) for x in re.match(r"([\d.]+) to ([\d.]+)", label).groups())
    of = {d.record.doc_id: d.record.bits_per_byte for d in report.documents}
    shown = behind.locator("tbody th").all_inner_texts()
    assert shown
    assert all(start - 1e-9 <= of[doc_id] < stop + 1e-9 for doc_id in shown)
    query = behind.locator("pre").first.text_content()
    rows = ask(query.replace("\nLIMIT 20", ""))
    assert f": {len(rows)} document" in label
    assert set(shown) <= set(rows.doc_id)
    assert behind.locator("pre").nth(1).text_content().startswith("logitmill inspect ")


def test_bars_open_by_keyboard_and_give_the_focus_back(page: Any) -> None:
    # All bars are one stop of the Tab key.
    assert page.locator("#histogram .bar[tabindex='0']").count() == 1
    page.locator("#histogram .bar[tabindex='0']").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    label = page.evaluate("document.activeElement.getAttribute('aria-label')")
    assert label == page.locator("#histogram .bar").nth(2).get_attribute("aria-label")
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.textContent") == label
    page.keyboard.press("Escape")
    assert page.locator(".behind").count() == 0
    assert page.evaluate("document.activeElement.getAttribute('aria-label')") == label


def test_marks_of_every_other_chart_lead_on(page: Any, report: Report) -> None:
    charts = page.locator("[data-behind]")
    names = charts.evaluate_all("all => all.map(e => e.dataset.behind)")
    assert {n.rpartition("-")[0] or n for n in names} >= {
        "position",
        "window",
        "calibration",
        "rank",
        "vocabulary",
        "operations",
    }
    for i in range(len(names)):
        mark = charts.nth(i).locator(".opens[tabindex='0']")
        mark.focus()
        page.keyboard.press("End")
        page.keyboard.press("Enter")
        assert page.locator(".behind").count() == 1, names[i]
        rows = ask(page.locator(".behind pre").first.text_content())
        assert len(rows), names[i]
    cell = page.get_by_role("button", name=re.compile("^code, de: "))
    cell.click()
    shown = page.locator(".behind tbody th").all_inner_texts()
    records = {d.record.doc_id: d.record for d in report.documents}
    assert shown
    assert {(records[d].source, records[d].language) for d in shown} == {("code", "de")}


def test_every_query_is_one_that_duckdb_takes(report: Report) -> None:
    html = report.path.read_text()
    data = json.loads(re.search(r'id="data">(.*?)</script>', html, re.DOTALL)[1])
    for marks in data["behind"].values():
        for query, *_ in marks.values():
            text = query.replace("{scores}", data["scores"]).replace("{tokens}", data["tokens"])
            duckdb.sql(text).fetchall()


def test_token_queries_find_the_tokens(report: Report) -> None:
    html = report.path.read_text()
    data = json.loads(re.search(r'id="data">(.*?)</script>', html, re.DOTALL)[1])
    most = max((d for d in report.documents), key=lambda d: int((d.tokens.rank >= 64).sum()))
    (query,) = next(
        q for label, q in data["behind"]["rank-0"].items() if label.startswith("rank 64")
    )
    found = duckdb.sql(query.replace("{tokens}", data["tokens"])).fetchall()
    assert found[0][1] == int(((most.tokens.rank >= 64) & (most.tokens.rank < 128)).sum())


def test_a_bar_of_the_vocabulary_finds_its_token(page: Any, report: Report) -> None:
    table = make_vocabulary(list(report.documents))
    scored = [d for d in report.documents if len(d.tokens)]
    for chart, column, name in (
        ("vocabulary-0", "token_id", "num_observed"),
        ("vocabulary-1", "top1_id", "num_first_choice"),
    ):
        bar = page.locator(f"[data-behind={chart}] .opens").nth(1)
        piece, counted = re.match(
            r"(.*): observed ([\d,]+)", bar.get_attribute("aria-label")
        ).groups()
        bar.click()
        rows = ask(page.locator(".behind pre").first.text_content().replace("LIMIT 20", ""))
        token_id = table["token"].to_pylist().index(piece.replace("\u2423", " "))
        assert rows.num_observed.sum() == int(counted.replace(",", "")) > 0
        of = {d.record.doc_id: int((getattr(d.tokens, column) == token_id).sum()) for d in scored}
        assert rows[name].tolist() == sorted(of.values(), reverse=True)
        assert all(
            of[doc_id] == found for doc_id, found in zip(rows.doc_id, rows[name], strict=True)
        )


def test_what_was_not_kept_is_said_behind_a_bar(browser: Any, tmp_path: Path) -> None:
    documents = make_mixed(20)
    made = Summary()
    for score in documents:
        made.add(score)
    facts = {**FACTS, "tiers": ["scores"]}
    vocabulary = make_vocabulary(documents)
    html = render_report(made.counts(), made.outliers(), facts, vocabulary=vocabulary)
    (tmp_path / "report.html").write_text(html)
    with open_page(browser, tmp_path / "report.html") as page:
        page.locator("[data-behind=vocabulary-0] .opens").first.click()
        said = page.locator(".behind pre").first.text_content()
        assert said.startswith("-- needs the tier tokens, which this run has not kept")


def test_tokens_are_read_by_pointer_and_by_arrow_keys(page: Any) -> None:
    _, readout = read_fifth_token(page)
    assert re.match(r"Token 5 .*: [\d.]+ bits, rank \d+, entropy", readout.inner_text())
    page.keyboard.press("Home")
    assert readout.inner_text().startswith("Token 1 ")
    badge = "getComputedStyle(document.querySelector('.tokens [data-r]'), '::after').content"
    assert page.evaluate(badge) == "none"
    page.get_by_label("Ranks beside tokens").check()
    assert json.loads(page.evaluate(badge)) == page.locator(".tokens [data-r]").first.get_attribute(
        "data-r"
    )
    assert page.locator(".tokens .w").count() > 0


def test_marks_say_what_they_are_under_the_pointer(page: Any) -> None:
    page.locator("#histogram .bar").nth(4).hover(position={"x": 2, "y": 150})
    assert page.locator("#tip").inner_text() == page.locator("#histogram .bar").nth(
        4
    ).get_attribute("aria-label")
    page.locator("#rank .opens").first.hover()
    assert "rank 1:" in page.locator("#tip").inner_text()


def test_queries_are_copied(browser: Any, report: Report) -> None:
    with open_page(browser, report.path, permissions=["clipboard-read", "clipboard-write"]) as page:
        button = page.locator("#kept button").first
        button.click()
        page.wait_for_function("document.querySelector('#kept button').textContent !== 'Copy'")
        query = page.locator("#kept pre").first.text_content()
        assert button.inner_text() == "Copied"
        assert page.evaluate("navigator.clipboard.readText()") == query


@pytest.mark.parametrize(("scheme", "viewport"), [("light", LAPTOP), ("dark", PHONE)])
def test_nothing_that_axe_objects_to(
    browser: Any, report: Report, scheme: str, viewport: Any
) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    options = {"color_scheme": scheme, "viewport": viewport, "bypass_csp": True}
    with open_page(browser, report.path, **options) as page:
        page.locator("#histogram .bar").nth(3).press("Enter")
        page.locator("details").first.evaluate("e => { e.open = true }")
        found = axe.run(page, {"exclude": [["article ~ article"]]}).response["violations"]
        assert [(v["id"], v["nodes"][0]["html"]) for v in found] == []
        dark = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 29)"
        assert dark == (scheme == "dark")


@pytest.mark.parametrize(
    "viewport", [PHONE, {"width": 640, "height": 400}], ids=["phone", "zoomed"]
)
def test_nothing_sticks_out_on_the_side(browser: Any, report: Report, viewport: Any) -> None:
    with open_page(browser, report.path, viewport=viewport, reduced_motion="reduce") as page:
        page.locator("#histogram .bar").nth(3).press("Enter")
        assert page.evaluate("document.documentElement.scrollWidth") == viewport["width"]
        assert page.evaluate("getComputedStyle(document.documentElement).scrollBehavior") == "auto"


def test_lines_of_commands_end_before_options(browser: Any, report: Report) -> None:
    with open_page(browser, report.path, viewport=PHONE) as page:
        lines = "all => all.map(e => [e.textContent, e.getClientRects().length])"
        options = page.locator("pre .option").evaluate_all(lines)
        assert {"--keep", "--context", "--doc"} <= {name for name, _ in options}
        assert {count for _, count in options} == {1}


def test_without_script_there_are_pictures_and_tables(browser: Any, report: Report) -> None:
    with open_page(browser, report.path, java_script_enabled=False) as page:
        assert page.locator("#static-histogram svg").first.is_visible()
        assert not page.locator("#explorer").is_visible()
        assert page.get_by_role("button", name=re.compile("^code, de: ")).is_visible()
        page.locator("#static-histogram summary").first.click()
        assert page.locator("#static-histogram table").first.is_visible()


def test_no_document_is_a_page_too(browser: Any, tmp_path: Path) -> None:
    made = Summary()
    html = render_report(made.counts(), made.outliers(), {})
    (tmp_path / "report.html").write_text(html)
    with open_page(browser, tmp_path / "report.html") as page:
        assert "Nothing to draw" in page.inner_text("#bits-per-byte")
