"""A comparison in a real browser: how it looks, and what its marks and tokens say."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from chromium import LAPTOP, PHONE, need_browser, open_page, read_fifth_token
from logitmill.engine import EngineSettings
from logitmill.flows import Run, open_run
from logitmill.flows.compare import compare
from logitmill.flows.compare.page import render_comparison
from logitmill.flows.corpus import CorpusSpec
from logitmill.flows.publish import rewrite_report
from logitmill.flows.score import score_corpus
from test_compare import Corpus, write_run

pytest.importorskip("playwright", reason="Playwright's Python package is not installed")

TEXTS = "texts"
"""The comparison of two runs of the bundled model: all sections, tokens as text."""
IDS = {
    "scores": ("scores",),
    "topk": ("scores", "tokens", "topk"),
    "another corpus": ("scores",),
}
"""Comparisons of runs of token ids, by what both kept."""
REPORT = "report"
"""The report of a run beside another one."""


@pytest.fixture(scope="module")
def pages(
    finished: Run, corpus: Path, demo_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Comparisons on disk, by what they are of."""
    root = tmp_path_factory.mktemp("pages")
    fp8 = score_corpus(
        model=str(demo_folder),
        corpus=CorpusSpec(uri=str(corpus)),
        out=str(root / "fp8"),
        tiers=["tokens", "logits"],
        engine=EngineSettings(quantization="fp8"),
    )
    compared = {TEXTS: (finished, open_run(fp8))}
    base = Corpus(80, 0)
    for name, tiers in IDS.items():
        prefix = "other" if name == "another corpus" else "doc"
        compared[name] = (
            write_run(root / name / "a", base, tiers=tiers),
            write_run(
                root / name / "b", base.moved(0.4, 1), tiers=tiers, name=(prefix + "-{}").format
            ),
        )
    found = {}
    for name, (ours, theirs) in compared.items():
        found[name] = root / name / "compare.html"
        found[name].parent.mkdir(exist_ok=True)
        found[name].write_text(render_comparison(compare(ours, theirs)), "utf-8")
    found[REPORT] = root / "report.html"
    rewrite_report(open_run(fp8), str(found[REPORT]), finished)
    return found


@pytest.fixture(scope="module")
def browser(pages: dict[str, Path]) -> Iterator[Any]:
    # Runs are scored before: Playwright's loop would be in the way of theirs.
    with need_browser() as running:
        yield running


@pytest.fixture
def page(browser: Any, pages: dict[str, Path]) -> Iterator[Any]:
    with open_page(browser, pages[TEXTS], reduced_motion="reduce") as page:
        yield page


def headings(page: Any) -> list[str]:
    return page.locator("section").evaluate_all("all => all.map(e => e.id)")


def test_sections_are_those_of_what_was_kept(browser: Any, pages: dict[str, Path]) -> None:
    crowds, ids = ["shift", "provenance"], ["documents", "scatter", "shift", "provenance"]
    whole = ["documents", "scatter", "kl", "deltas", "shift", "tokens", "provenance"]
    for name, sections in (
        (TEXTS, whole),
        ("scores", ids),
        ("topk", whole),
        ("another corpus", crowds),
    ):
        with open_page(browser, pages[name]) as page:
            assert headings(page) == sections, name
            links = page.locator("nav a").evaluate_all("all => all.map(e => e.hash.slice(1))")
            assert links == sections, name


def test_a_report_has_what_is_different_from_another_run(
    browser: Any, pages: dict[str, Path]
) -> None:
    assert pages[REPORT].stat().st_size < 3_000_000
    with open_page(browser, pages[REPORT], reduced_motion="reduce") as page:
        found = headings(page)
        assert len(set(found)) == len(found)
        first = found.index("other-runs")
        sections = ["documents", "scatter", "kl", "deltas", "shift"]
        assert found[first + 1 : first + 6] == sections
        links = page.locator("nav a").evaluate_all("all => all.map(e => e.hash.slice(1))")
        assert links == [section for section in found if section not in sections]
        within = page.locator("#other-runs .contents a")
        assert within.evaluate_all("all => all.map(e => e.hash.slice(1))") == sections
        assert page.locator("#other-runs > section > h3").count() == 5
        with open_page(browser, pages[TEXTS], reduced_motion="reduce") as whole:
            tiles = [p.locator(".tiles").last.inner_text() for p in (page, whole)]
            assert tiles[0] == tiles[1]
            for section in sections:
                said = [p.locator(f"#{section}").inner_text() for p in (page, whole)]
                assert said[0] == said[1]
        for section in ("documents", "scatter"):
            mark = page.locator(f"#{section} .role-mark [aria-label]").last
            mark.hover()
            assert page.locator("#tip").inner_text() == mark.get_attribute("aria-label")


@pytest.mark.parametrize(("scheme", "viewport"), [("light", LAPTOP), ("dark", PHONE)])
@pytest.mark.parametrize("name", [TEXTS, REPORT, *IDS])
def test_nothing_that_axe_objects_to(
    browser: Any, pages: dict[str, Path], name: str, scheme: str, viewport: Any
) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    options = {"color_scheme": scheme, "viewport": viewport, "bypass_csp": True}
    with open_page(browser, pages[name], **options) as page:
        page.locator("details").evaluate_all("all => all.forEach(e => { e.open = true })")
        found = axe.run(page, {"exclude": [["article ~ article"]]}).response["violations"]
        assert [(v["id"], v["nodes"][0]["html"]) for v in found] == []
        dark = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 29)"
        assert dark == (scheme == "dark")


@pytest.mark.parametrize("viewport", [LAPTOP, PHONE], ids=["laptop", "phone"])
@pytest.mark.parametrize("name", [TEXTS, REPORT, *IDS])
def test_nothing_sticks_out_on_the_side(
    browser: Any, pages: dict[str, Path], name: str, viewport: Any
) -> None:
    with open_page(browser, pages[name], viewport=viewport) as page:
        page.locator("details").evaluate_all("all => all.forEach(e => { e.open = true })")
        assert page.evaluate("document.documentElement.scrollWidth") == viewport["width"]


def test_marks_say_what_they_are_under_the_pointer(page: Any) -> None:
    for section in ("documents", "scatter", "kl", "deltas"):
        mark = page.locator(f"#{section} .role-mark [aria-label]").last
        mark.hover()
        assert page.locator("#tip").inner_text() == mark.get_attribute("aria-label"), section
    page.locator("h1").hover()
    assert page.locator("#tip").is_hidden()


def test_a_document_leads_to_its_tokens(page: Any) -> None:
    link = page.locator("#scatter tbody a").first
    link.click()
    article = page.locator(page.evaluate("location.hash"))
    assert article.locator("h3").inner_text() == link.inner_text()
    assert article.evaluate("e => e.getBoundingClientRect().top < innerHeight")


def test_tokens_are_read_by_pointer_and_by_arrow_keys(page: Any) -> None:
    tokens, readout = read_fifth_token(page)
    title = tokens.locator("span").nth(4).get_attribute("title")
    said = readout.inner_text()
    assert said.startswith("Token 5 ") and said.endswith(title)
    numbers = re.fullmatch(r"log p (\S+) in A, (\S+) in B, change (\S+)", title)
    base, other, change = map(float, numbers.groups())
    assert other - base == pytest.approx(change, abs=0.02)
    page.keyboard.press("Home")
    assert readout.inner_text().startswith("Token 1 ")
