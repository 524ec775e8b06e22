"""The report as a page: what it says, that it loads nothing, and that no text breaks out of it."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from dataclasses import asdict
from html.parser import HTMLParser
from itertools import pairwise
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from logitmill.engine.frequencies import Frequency
from logitmill.engine.recipes import PRESETS, Recipe
from logitmill.engine.records import DocumentRecord, DocumentScore
from logitmill.flows.report import describe_recipe, render_report, totals, wording
from logitmill.flows.report.documents import histogram_panel
from logitmill.flows.report.explorer import Explorer
from logitmill.flows.report.panel import Material, make_scale
from logitmill.flows.summary import COUNTS, OUTLIERS, Summary
from logitmill.flows.vocabulary import tabulate
from report_runs import EVIL, FACTS, OPERATIONS, SHORT, make, make_mixed, make_run


def render(made: Summary, **facts: Any) -> str:
    """The report of a summary."""
    return render_report(made.counts(), made.outliers(), {**FACTS, **facts})


class Page(HTMLParser):
    """What a browser would make of a page: its elements and its visible text."""

    VOID = frozenset({"meta", "img", "br", "link", "input", "hr"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text: list[str] = []
        self.scripts: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if "script" in self.open:
            self.scripts.append(data)
        elif "style" not in self.open:
            self.text.append(data)

    @property
    def words(self) -> str:
        """The text, and what is said or shown of elements, with single spaces."""
        shown = [
            v or "" for _, a in self.elements for k, v in a.items() if k in ("title", "aria-label")
        ]
        return " ".join(" ".join(self.text + shown).split())

    def tags(self, name: str) -> list[dict[str, str | None]]:
        """Attributes of the elements of a name."""
        return [attributes for tag, attributes in self.elements if tag == name]


@pytest.fixture(scope="module")
def html() -> str:
    return render(make_run())


@pytest.fixture(scope="module")
def page(html: str) -> Page:
    return Page(html)


def test_headline_is_the_totals(page: Page) -> None:
    table = make_run().counts().to_pylist()
    (ok,) = (
        [r for r in table if r["panel"] == "status/ok" and r["source"] == s] for s in ["source0"]
    )
    assert len(ok) == 1
    rows = [r for r in table if r["panel"] == "status/ok"]
    nll, tokens, size, hits = (sum(r[c] for r in rows) for c in ("nll", "tokens", "bytes", "hits"))
    words = page.words
    assert "40 documents of s3://bucket/text/*.parquet (32 kB, 8,000 tokens)" in words
    assert f"Bits per byte {nll / size / math.log(2):.3f}" in words
    assert f"Token perplexity {math.exp(nll / tokens):.2f} token-weighted" in words
    assert f"Top-1 accuracy {100 * hits / tokens:.1f} %" in words
    assert "Tokens per second 2,000 8,000 tokens in 4.0 s on cpu" in words
    assert words.index("Bits per byte") < words.index("Token perplexity")


def test_failed_documents_are_named_before_any_panel(page: Page) -> None:
    words = page.words
    said = "1 of 41 documents could not be scored: 1 not valid UTF-8."
    assert words.index(said) < words.index("How predictable the documents are")
    assert "broken invalid_utf8 byte 7 source0" in words


def test_everything_known_of_the_run_is_there(page: Page) -> None:
    words = page.words
    for text in ("0123abcd", "sha256:feed", "cafe01234567", "dtype float32", "torch 2.11.0"):
        assert text in words
    assert "Every token is scored exactly once, in windows of at most 2,048 tokens." in words
    assert "reads 1 token before" in words
    assert (
        "logitmill score org/model 's3://bucket/text/*.parquet' --out s3://bucket/runs "
        "--recipe rolling --context 2048 --overlap 1 --prefix auto --keep tokens" in words
    )
    assert "run = open_run('s3://bucket/runs/0123abcd')" in words


def test_page_loads_nothing(html: str, page: Page) -> None:
    assert not page.tags("link")
    assert not page.tags("img")
    for tag, attributes in page.elements:
        for name in ("src", "srcset", "data", "action", "poster", "xlink:href"):
            assert name not in attributes, (tag, attributes)
        assert (attributes.get("href") or "#").startswith("#")
    assert not re.search(r"url\s*\(\s*['\"]?\s*(?!#)", html)
    assert "@import" not in html
    # Namespaces are names.
    addresses = set(re.findall(r"https?://[^\s\"'<>]*", html))
    assert addresses <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}


def test_policy_allows_the_one_script_only(page: Page) -> None:
    (policy,) = (a["content"] for a in page.tags("meta") if "http-equiv" in a)
    data, script = page.scripts
    assert json.loads(data)["uri"] == FACTS["uri"]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy is not None
    assert "default-src 'none'" in policy
    assert f"script-src 'sha256-{digest}'" in policy


def test_page_is_well_formed_and_in_order(page: Page) -> None:
    assert not page.open
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert len(ids) == len(set(ids))
    targets = {(a["href"] or "").removeprefix("#") for a in page.tags("a")}
    assert targets <= set(ids)


def test_axes_have_units(page: Page) -> None:
    titles = [t for t in page.text if t.strip()]
    for title in (
        "bits per byte",
        "bytes",
        "bits per token",
        "position in the document (tokens, log scale)",
        "probability of the first choice",
        "expected calibration error (20 bins)",
        "surprisal (bits per token)",
    ):
        assert title in titles


def test_histogram_holds_every_document() -> None:
    made = make_run()
    made.add(make("far", np.full(40, 90.0), "x" * 80))
    counts = made.counts()
    panel = histogram_panel(Material(totals.Totals.of(counts), Explorer.of(counts), FACTS))
    for chart in panel.charts:
        assert sum(int(row[1].replace(",", "")) for row in chart.numbers.rows) == 41
        labels = re.findall(r": (\d+) documents?,", chart.svg)
        assert sum(map(int, labels)) == 41


def test_scale_shows_all_or_says_what_is_beyond() -> None:
    near = make_scale({b: 100 for b in range(40, 80)}, 0.02)
    assert (near.factor, near.last) == (1, 79)
    assert (near.start(40), near.stop(40)) == (0.8, 0.82)
    far = make_scale({b: 100 for b in range(40, 80)} | {4000: 1}, 0.02)
    assert far.last == 79
    assert far.bar(4000) == 79
    assert make_scale(dict.fromkeys(range(500), 1), 0.02).factor == 25


def test_many_sources_are_drawn_as_nine(page: Page) -> None:
    made = make_run(num_sources=12)
    sums = totals.Totals.of(made.counts())
    assert len(sums.labels) == 9
    assert sums.labels[-1] == "all other sources (4)"
    assert sum(row["documents"] for row in sums.by("status/ok", "label").values()) == 40
    assert "all other sources (4)" in Page(render(made)).words


def test_sources_that_some_panels_do_not_tell_apart() -> None:
    counts = make_run().counts()
    is_folded = pc.equal(counts["panel"], "calibration")
    sources = pc.if_else(is_folded, "(other)", counts["source"])
    folded = counts.set_column(counts.column_names.index("source"), "source", sources)
    sums = totals.Totals.of(folded)
    assert sums.labels == ["source0", "source1", "source2", "other sources"]
    told_apart = totals.Totals.of(counts)
    assert sums.total("calibration")["hits"] == told_apart.total("calibration")["hits"]
    assert "other sources:" in Page(render_report(folded, OUTLIERS.empty_table(), FACTS)).words


def test_heatmap_colours_by_surprisal() -> None:
    made = Summary()
    bits = np.array([0.1, 0.25, 0.9, 1.0, 3.0, 7.0, 15.0, 40.0])
    made.add(make("d", bits, "ab\ncd\tef" * 10))
    page = Page(render(made))
    spans = [a for a in page.tags("span") if re.fullmatch("s[0-7]", a.get("class") or "")]
    # Eight equal steps of the logarithm of 1 + bits, 2.5 standard deviations around its mean.
    logs = np.log(1 + bits)
    low, high = max(0.0, logs.mean() - 2.5 * logs.std()), logs.mean() + 2.5 * logs.std()
    levels = np.clip(np.floor(8 * (logs - low) / (high - low)), 0, 7).astype(int)
    assert [a["class"] for a in spans] == [f"s{n}" for n in levels]
    assert spans[4]["title"] == "3.0 bits, rank 65, entropy 2.2 bits"
    assert [a.get("data-r") for a in spans] == [None, "2", "9", "28", "65", "126", "217", None]
    assert "ab\u21b5\ncd\u21e5\tef" in "".join(page.text)


def test_windows_begin_where_the_recipe_says() -> None:
    made = Summary()
    score = make("d", np.ones(300), "abcd" * 300)
    score.record.num_windows = 10
    made.add(score)
    recipe = {**SHORT, "context": 32}
    spans = [a for a in Page(render(made, recipe=recipe)).tags("span") if "title" in a]
    borders = [i for i, a in enumerate(spans) if (a["class"] or "").endswith(" w")]
    # 32 tokens in the first window, 32 in the second, which reads one that is scored already.
    assert borders == [32, 64]
    assert (spans[64]["title"] or "").endswith("first of window 3")
    other = Page(render(made, recipe={"name": "of tomorrow", "context": 128}))
    assert not [a for a in other.tags("span") if (a.get("class") or "").endswith(" w")]


def cut_run(context: int) -> Summary:
    """12 documents of 512 tokens in windows side by side: 6 bits after 1 token of context, 4 after
    2 or 3, 2 after more, everywhere."""
    recipe, made = Recipe(name="rolling", context=context), Summary()
    for n in range(12):
        windows = recipe.windows(513, has_prefix=True)
        read = np.concatenate([1 + np.arange(w.num_targets) for w in windows])
        bits = np.select([read == 1, read < 4], [6.0, 4.0], 2.0)
        score = make(f"d{n}", bits, "abcd" * 512, "ab"[n % 2])
        score.record.num_windows, score.windows = len(windows), windows
        made.add(score)
    return made


def test_position_in_the_window_is_as_high_as_the_saw_tooth() -> None:
    page = Page(render(cut_run(64), recipe={**SHORT, "context": 64}))
    # 7 of 8 windows are later ones: in each 6 + 2 * 4 + 61 * 2 bits.
    words = (
        "5,376 tokens (87.5 %) stand in later windows. With 1 token of context they take 6.00 bits "
        "each, with 32 to 64 tokens 2.00. Had all of them been like the latter, the run would "
        "stand at 2.016 bits per token, not 2.125"
    )
    assert words in page.words
    labels = [a["aria-label"] for a in page.tags("path") if "bits/token" in a.get("aria-label", "")]
    assert labels.count("1 token: surprisal 6.00 bits/token, 84 tokens") == 1
    # The last place of all is no point of its own.
    assert labels.count("54 to 64 tokens: surprisal 2.00 bits/token, 924 tokens") == 1
    assert labels.count("32 to 64 tokens, a: 2.00 bits/token, 1,386 tokens") == 1
    assert labels.count("2 to 3 tokens, a: 4.00 bits/token, 84 tokens") == 1


@pytest.mark.parametrize(
    ("length", "context", "words"),
    [
        (400, 512, "Every document was read in one window"),
        (512, 64, "summary has no counts of it"),
    ],
)
def test_without_later_windows_words_say_why(length: int, context: int, words: str) -> None:
    made = Summary()
    # As of an older run: nothing is told of its windows.
    made.add(make("d", np.full(length, 2.0), "abcd" * length))
    page = Page(render(made, recipe={**SHORT, "context": context}))
    assert words in page.words
    assert "Position in the window" not in page.words.replace("Position in the window is not", "")


def test_windows_that_cost_nothing() -> None:
    made = Summary()
    score = make("d", np.full(512, 2.0), "abcd" * 512)
    score.windows = Recipe(**SHORT).windows(513, has_prefix=True)
    made.add(score)
    assert "2.00. The recipe's windows cost nothing here." in Page(render(made, recipe=SHORT)).words


def test_later_windows_that_overlap_far_have_no_tooth() -> None:
    recipe = Recipe(name="rolling", context=64, overlap=48)
    made = Summary()
    score = make("d", np.full(512, 2.0), "abcd" * 512)
    score.windows = recipe.windows(513, has_prefix=True)
    made.add(score)
    page = Page(render(made, recipe=asdict(recipe)))
    # 48 tokens are in the bin that begins with 46.
    assert "stand in later windows, each with a context of 46 tokens or more." in page.words


def test_few_tokens_at_an_end_say_nothing_of_windows() -> None:
    made = cut_run(64)
    recipe = Recipe(name="rolling", context=1024, overlap=1000)
    # 20 tokens after 1,000 of context, which no other token has.
    score = make("odd", np.full(1044, 2.0), "abcd" * 1044)
    score.windows = recipe.windows(1045, has_prefix=True)
    score.tokens.logprob[-20:] = -90.0
    made.add(score)
    page = Page(render(made, recipe={**SHORT, "context": 64}))
    assert "with 32 to 64 tokens 2.00. Had" in page.words


def test_contexts_that_were_cut_are_no_later_windows() -> None:
    recipe, made = Recipe(name="conditional", context=64), Summary()
    (window,) = recipe.windows(200, has_prefix=True, num_context=120)
    score = make("d", np.full(window.num_targets, 2.0), "abcd" * window.num_targets)
    score.windows = [window]
    made.add(score)
    assert "window" not in {
        a["id"] for a in Page(render(made, recipe=asdict(recipe))).tags("section")
    }
    # The same tokens of a recipe that has later windows.
    assert "window" in {a["id"] for a in Page(render(made, recipe=SHORT)).tags("section")}


def test_calibration_error_by_hand() -> None:
    made = Summary()
    score = make("d", np.full(40, 1.0), "abcd" * 40)
    score.tokens.top1_logprob[:] = np.log(0.75)
    score.tokens.rank[:] = [1] * 20 + [2] * 20
    made.add(score)
    assert "Expected calibration error: 25.0 %" in Page(render(made)).words


def test_hostile_text_stays_text() -> None:
    made = Summary()
    bits = np.full(60, 2.0)
    for n in range(2):
        made.add(make(f"{EVIL}{n}", bits, f"{EVIL}\"' & \x00\u202e" * 4, EVIL + "\"'" + str(n)))
    record = DocumentRecord(EVIL, source=EVIL, status=EVIL, error=EVIL)
    made.add(DocumentScore(0, record))
    evil: dict[str, Any] = dict.fromkeys(FACTS, EVIL)
    evil |= {"recipe": {"name": EVIL}, "engine": {EVIL: EVIL}, "tiers": [EVIL]}
    evil |= {"versions": {EVIL: EVIL}, "seconds": 1.0, "tokens": 1, "documents": 1, "bytes": 1}
    html = render(made, **evil)
    page = Page(html)
    assert not page.open
    assert not page.tags("img")
    assert len(page.scripts) == 2
    assert not any(name.startswith("on") for _, a in page.elements for name in a)
    assert "<img" not in html
    assert EVIL in page.words
    assert "\x00" not in html
    assert "\u202e" not in html


@pytest.mark.parametrize("facts", [{}, FACTS, dict.fromkeys(FACTS)])
def test_no_document_scored_is_a_page_too(facts: dict[str, Any]) -> None:
    failed = Summary()
    failed.add(DocumentScore(0, DocumentRecord("d", status="empty", error="nothing")))
    for counts, outliers in (
        (COUNTS.empty_table(), OUTLIERS.empty_table()),
        (failed.counts(), failed.outliers()),
    ):
        page = Page(render_report(counts, outliers, facts))
        assert "No document was scored." in page.words
        assert not re.search(r"\b(None|nan|NaN|inf|undefined|null)\b", page.words)


def test_nothing_undefined_is_visible(page: Page) -> None:
    assert not re.search(r"\b(None|nan|NaN|inf|undefined|null)\b", page.words)


def test_sums_that_are_not_finite_are_dashes() -> None:
    made = Summary()
    score = make("d", np.full(40, 1.0), "abcd" * 40)
    score.tokens.entropy[:] = np.nan
    score.record.sum_entropy = math.nan
    score.record.token_perplexity = math.inf
    score.record.min_k_plus_plus_20 = math.nan
    made.add(score)
    words = Page(render(made, seconds=math.nan)).words
    assert not re.search(r"\b(None|nan|NaN|inf|undefined|null)\b", words)
    assert "\u221e" in words


def test_documents_of_ids() -> None:
    made = Summary()
    for n in range(3):
        score = make(f"d{n}", np.full(40, 1.0 + n), "abcd" * 40)
        score.text = None
        score.record.num_bytes, score.record.bits_per_byte = 0, None
        made.add(score)
    words = Page(render(made)).words
    assert "no document with bytes was scored" in words
    assert "Bits per byte \u2013" in words
    assert "0 0 0 0" in words


def test_same_tables_same_page(html: str) -> None:
    assert render(make_run()) == html


def test_page_of_the_worst_corpus_is_small() -> None:
    evil = "<\x01&\u202e'\"" * 40
    rng, made = np.random.default_rng(0), Summary()
    for i in range(60):
        score = make(f"{i}{evil}", rng.exponential(3.0, 400), "<&>\n" * 400, f"{i % 40}{evil}")
        made.add(score)
    tables = [made.counts()]
    # What a summary of 1,000 sources in 20 languages may hold at most, of every length.
    num_rows = 1 << 16
    for language in range(4):
        keys = rng.integers(0, (1000, 5, 20, 5000), (num_rows // 4, 4))
        columns = {
            "panel": ["bits_per_byte"] * len(keys),
            "source": [f"{n}{evil}" for n in keys[:, 0].tolist()],
            "language": [f"{5 * language + n}{evil}" for n in keys[:, 1].tolist()],
            "length": pa.array(keys[:, 2], pa.int8()),
            "day": [""] * len(keys),
            "bin": pa.array(keys[:, 3], pa.int32()),
            "documents": rng.integers(1, 10**6, len(keys)),
            "bytes": rng.integers(1, 10**12, len(keys)),
        }
        for name in set(COUNTS.names) - set(columns):
            columns[name] = pa.array(np.zeros(len(keys)), COUNTS.field(name).type)
        tables.append(pa.table(columns).select(COUNTS.names).cast(COUNTS))
    counts = pa.concat_tables(tables)
    html = render_report(counts, made.outliers(), {**FACTS, "uri": f"runs/{evil}"}, OPERATIONS)
    print(f"{len(html.encode()):,} bytes")
    assert len(html.encode()) < 3_000_000
    # Nothing is lost of what is folded.
    data = json.loads(Page(html).scripts[0])
    for place, name in ((4, "documents"), (5, "bytes")):
        is_counted = pc.field("panel") == "bits_per_byte"
        wanted = pc.sum(counts.filter(is_counted)[name]).as_py()
        assert sum(sum(group[place]) for group in data["groups"]) == wanted


def test_small_sources_count_together_and_can_be_asked_for() -> None:
    made = Summary()
    rows = []
    for i in range(90):
        score = make(f"d{i}", np.full(40, 1.0 + i / 30), "abcd" * (40 + i), f"{EVIL}{i % 19}")
        score.record.language = f"l{min(i % 23, 10)}"
        made.add(score)
        record = score.record
        rows.append({n: getattr(record, n) for n in ("source", "language", "num_bytes")})
    explorer = Explorer.of(made.counts())
    assert [len(axis.names) for axis in explorer.axes] == [13, 9, 2]
    assert explorer.axes[0].names[-1] == "all other sources"
    scores = pa.Table.from_pylist(rows)
    assert scores.num_rows == 90
    for place, axis in enumerate(explorer.axes):
        for n, where in enumerate(axis.wheres):
            ((found,),) = duckdb.sql(f"SELECT count(*) FROM scores WHERE {where}").fetchall()
            assert found == sum(sum(group[4]) for group in explorer.groups if group[place] == n)


def test_operations_are_those_of_the_shards() -> None:
    made = make_run()
    html = render_report(made.counts(), made.outliers(), FACTS, OPERATIONS)
    words = Page(html).words
    assert "shard 0: 20,000 tokens/s, 40,000 tokens" in words
    assert "shard 1: 90.0 % of the time, 30,000 tokens" in words
    # 70,000 tokens in 5 s, of which the device was at work for 4.6.
    assert "NVIDIA H200 2 403 70,000 5.0 s 14,000 92.0 %" in words
    assert "scores 20 kB 0.29 summary 150 kB 2.14" in words
    assert "1 shard had to be done again: 2 retries" in words
    assert "shard device done at attempt time 0 NVIDIA H200 3 2.0 s" in words
    # No shard has a half.
    drawn = html[html.index("Tokens per second</h3>") : html.index("Device at work</h3>")]
    assert re.findall(r">([\d.]+)</text>", drawn) == ["0", "1"]


def test_one_shard_is_no_chart() -> None:
    made = make_run()
    html = render_report(made.counts(), made.outliers(), FACTS, OPERATIONS.slice(0, 1))
    words = Page(html).words
    assert "the run is one shard, whose numbers are below" in words
    assert "NVIDIA H200 1 201 40,000 2.0 s 20,000 95.0 %" in words
    assert "Device at work</h3>" not in html


def test_many_shards_share_bars() -> None:
    columns = {name: OPERATIONS[name].take([0] * 1000) for name in OPERATIONS.column_names}
    columns["shard"] = pa.array(range(1000), pa.int32())
    made = make_run()
    words = Page(render_report(made.counts(), made.outliers(), FACTS, pa.table(columns))).words
    assert "A bar stands for 21 shards that follow each other." in words
    assert "shards 0 to 20: 20,000 tokens/s, 840,000 tokens" in words
    assert "shards 987 to 999: 20,000 tokens/s" in words


def test_the_vocabulary_is_told_by_tokens_and_sources() -> None:
    ones = np.ones(5)
    a = Frequency(np.array([9.0, 1.0, 4.0, 4.0, 2.0]), ones, np.array([3, 7, 5, 3, 2]))
    b = Frequency(np.array([2.0, 0.0, 0.0, 0.0, 0.0]), ones, np.array([1, 0, 0, 1, 0]))
    table = tabulate({"a": a, EVIL: b}, ["  the", EVIL, "x", "x", ""])
    made = make_run()
    html = render_report(made.counts(), made.outliers(), FACTS, vocabulary=table)
    assert EVIL not in html
    words = Page(html).words
    # 4 observed of 11 expected, variance 2.
    assert "\u2423\u2423the: observed 4, expected 11.0" in words
    assert "\u2423\u2423the 4 11.0 0.36 -4.9" in words
    assert "x: observed 5, expected 4.0" in words
    o, e = np.array([3, 7, 5, 3, 2]) / 20, np.array([9, 1, 4, 4, 2]) / 20
    assert f"20 {(o * np.log2(o / e)).sum():.3f}" in words
    assert "Vocabulary" not in Page(render(made)).words
    alike = Frequency(np.array([1.0, 1.0, 3.0]), np.ones(3), np.array([2, 2, 1]))
    named = tabulate({"": alike}, ["x", "x", ""])
    words = Page(render_report(made.counts(), made.outliers(), FACTS, vocabulary=named)).words
    assert "x #0: observed 2" in words and "x #1: observed 2" in words and "#2: observed 1" in words


def test_ranks_that_did_not_come_have_their_place() -> None:
    made = Summary()
    score = make("d", np.full(40, 1.0), "abcd" * 40)
    score.tokens.rank[:] = [1] * 30 + [9] * 10
    made.add(score)
    words = Page(render(made)).words
    assert "1 75.0 % 75.0 % 30 2\u20133 0.0 % 0.0 % 0 4\u20137 0.0 % 0.0 % 0 8\u201315" in words


def test_medians_by_source_and_language() -> None:
    made = Summary()
    documents = make_mixed()
    for score in documents:
        made.add(score)
    html = render(made)
    labels = re.findall(
        r'class="cell s(\d)" aria-label="code, de: median ([\d.]+) [^"]*, (\d+) d', html
    )
    ((level, median, num),) = labels
    of_cell = [
        d.record.bits_per_byte
        for d in documents
        if (d.record.source, d.record.language) == ("code", "de")
    ]
    assert int(num) == len(of_cell)
    # To half a bin.
    assert float(median) == pytest.approx(float(np.median(of_cell)), abs=0.021)
    assert 0 <= int(level) <= 7


@pytest.mark.parametrize("name", PRESETS)
def test_recipes_have_words(name: str) -> None:
    recipe = PRESETS[name].resolve(2048)
    text = describe_recipe(vars(recipe))
    assert "?" not in text
    assert "None" not in text
    assert f"{recipe.context:,}" in text


def test_unknown_recipe_has_none() -> None:
    assert describe_recipe({"name": "of tomorrow"}) == ""
    assert describe_recipe({}) == ""


def test_numbers_as_text() -> None:
    assert wording.size(999) == "999 B"
    assert wording.size(999_999) == "1 MB"
    assert wording.size(23_400_000) == "23.4 MB"
    assert wording.duration(59.94) == "59.9 s"
    assert wording.duration(7200) == "2 h 0 min"
    assert wording.number(None, 2) == wording.number(math.nan, 2) == "\u2013"
    assert wording.number(1e12, 2) == "1.00e+12"
    assert wording.plural(1, "token") == "1 token"
    assert wording.show("a" * 10, 6) == "aaaa\u2026aa"
    assert wording.show("a\nb\x1b\u202e") == "a\u240ab\u241b[U+202E]"


def test_tables_of_many_shards() -> None:
    tables = [make_run().counts() for _ in range(2)]
    doubled = pa.concat_tables(tables)
    assert "80 documents" in Page(render_report(doubled, OUTLIERS.empty_table(), FACTS)).words
