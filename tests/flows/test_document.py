"""A document token by token: its text, colours, borders, candidates, in a terminal and a page."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
import re
from collections.abc import Iterator
from dataclasses import asdict, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chromium import need_browser
from direct import score_directly
from flow_helpers import write_lines
from logitmill.engine.recipes import find_recipe
from logitmill.flows import Run, open_run, score_corpus
from logitmill.flows.corpus import CorpusSpec
from logitmill.flows.document import NoTokens, Stretch, View, open_document, render_page
from logitmill.flows.document.borders import find_borders
from logitmill.flows.document.candidates import find_candidates
from logitmill.flows.document.scale import Scale
from logitmill.flows.document.terminal import print_document
from logitmill.flows.document.text import NO_BYTES, PARTIAL, join_bytes
from rich.console import Console
from test_cli import in_process

EVIL = "</script><img src=x onerror=alert(1)>"
TEXTS = {
    "plain": "def add(a, b):\n\treturn a + b\n" * 12,
    EVIL: f"{EVIL} caf\u00e9 \u65e5\u672c\u8a9e \U0001f600 \x1b[31mred\u202e [bold]x[/bold]\n",
}


@pytest.fixture(scope="module")
def run(demo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Two documents in windows of 48 tokens that overlap, with their 12 likeliest tokens."""
    folder = tmp_path_factory.mktemp("documents")
    rows = [{"id": name, "text": text} for name, text in TEXTS.items()]
    rows.append({"id": "empty", "text": ""})
    uri = str(write_lines(folder / "lines.jsonl", rows))
    recipe = find_recipe("rolling", context=48, overlap=16)
    spec = CorpusSpec(uri=uri, id_column="id")
    options: dict[str, Any] = {"recipe": recipe, "tiers": ["tokens", "topk"], "top_k": 12}
    return open_run(score_corpus(str(demo_folder), spec, str(folder / "runs"), **options))


def planned(run: Run, **changes: Any) -> Run:
    """The run under another plan."""
    other = open_run(run.uri)
    other.plan |= changes
    return other


def without_corpus(run: Run) -> dict[str, Any]:
    return {"uri": f"{run.plan['uri']}.gone/lines.jsonl"}


# ---- text


def test_text_comes_from_the_corpus(run: Run, finished: Run, corpus: Path) -> None:
    for name, text in TEXTS.items():
        view = open_document(run, name)
        assert "".join(view.pieces).replace(PARTIAL, "") == text
        assert view.is_text and view.origin == f"text from the corpus {run.plan['uri']}"
    for doc_id in finished.table(columns=["doc_id"])["doc_id"].to_pylist():
        pieces = open_document(finished, doc_id).pieces
        assert "".join(pieces) == (corpus / doc_id).read_text()


def test_a_character_of_several_tokens_stands_at_the_last() -> None:
    parts = [b"a", b"\xe6\x97", b"\xa5", b"", b"\xff", "\u65e5\u672c".encode()]
    assert join_bytes(parts) == ["a", PARTIAL, "\u65e5", NO_BYTES, "\ufffd", "\u65e5\u672c"]


def test_without_the_corpus_ids_are_spelled_and_without_tokenizer_shown(
    run: Run, tmp_path: Path
) -> None:
    for name, text in TEXTS.items():
        view = open_document(planned(run, **without_corpus(run)), name)
        assert "".join(view.pieces).replace(PARTIAL, "") == text
        assert view.origin.startswith("token ids spelled by the tokenizer of ")
        assert ".gone" in view.origin and view.is_text
    bare = run.plan["model"] | {"name": str(tmp_path)}
    view = open_document(planned(run, model=bare, **without_corpus(run)), "plain")
    assert view.pieces == [str(i) for i in run.document("plain")["tokens"]["token_id"]]
    assert not view.is_text and view.origin.startswith("token ids: no text from the corpus (")
    assert f"no tokenizer ('{tmp_path}' has no tokenizer)" in view.origin
    # The text needs no tokenizer; its candidates go by their ids.
    view = open_document(planned(run, model=bare), "plain")
    assert "".join(view.pieces) == TEXTS["plain"] and view.names[5] == "5"


def test_a_corpus_that_changed_is_not_shown(run: Run) -> None:
    corpus = json.loads(json.dumps(run.plan["corpus"]))
    corpus["inputs"][0] |= {"etag": "another", "stamp": ""}
    view = open_document(planned(run, corpus=corpus), "plain")
    assert "corpus changed" in view.origin and view.origin.startswith("token ids spelled by")


def test_another_models_tokenizer_names_nothing(run: Run, word_model: Path) -> None:
    other = run.plan["model"] | {"name": str(word_model)}
    view = open_document(planned(run, model=other), "plain")
    assert "".join(view.pieces) == TEXTS["plain"]
    assert view.names[5] == "5"
    gone = planned(run, model=other, **without_corpus(run))
    assert "is not the one that made these tokens" in open_document(gone, "plain").origin


# ---- what is stored


def test_tokens_are_told_from_the_tiers_that_have_them(run: Run, finished: Run) -> None:
    of_tokens = open_document(run, "plain")
    of_topk = open_document(planned(run, tiers=["scores", "topk"]), "plain")
    assert of_topk.tokens["logprob"].tolist() == of_tokens.tokens["logprob"].tolist()
    assert of_topk.pieces == of_tokens.pieces
    rank = of_tokens.tokens["rank"]
    assert of_topk.tokens["rank"].tolist() == np.where(rank <= 12, rank, 0).tolist()

    doc_id = finished.table(columns=["doc_id"])["doc_id"][2].as_py()
    of_logits = open_document(planned(finished, tiers=["scores", "logits"]), doc_id)
    stored = finished.document(doc_id)["tokens"]
    for name in ("token_id", "byte_start", "byte_end", "rank"):
        assert of_logits.tokens[name].tolist() == stored[name].tolist(), name
    np.testing.assert_allclose(of_logits.tokens["logprob"], stored["logprob"], atol=1e-5)
    gone = planned(finished, tiers=["scores", "logits"], **without_corpus(finished))
    with pytest.raises(NoTokens, match=r"tier logits: it holds no token ids.*--keep tokens"):
        open_document(gone, doc_id)


def test_candidates_are_the_likeliest(run: Run, finished: Run) -> None:
    doc_id = finished.table(columns=["doc_id"])["doc_id"][1].as_py()
    rows = slice(30, 60)
    view = open_document(finished, doc_id, Stretch(rows.start, rows.stop))
    logprobs = finished.logprobs(doc_id)[rows].astype(np.float64)
    assert view.candidates is not None
    order = np.argsort(-logprobs, axis=1, kind="stable")[:, :10]
    assert view.candidates.ids.tolist() == order.tolist()
    np.testing.assert_allclose(
        view.candidates.tail, 1 - np.exp(np.take_along_axis(logprobs, order, 1)).sum(1), atol=1e-9
    )
    of_topk = open_document(run, "plain").candidates
    assert of_topk is not None and of_topk.ids.shape[1] == 10
    assert of_topk.ids.tolist() == run.document("plain")["topk"]["top_ids"][:, :10].tolist()
    of_tokens = open_document(planned(run, tiers=["scores", "tokens"]), "plain").candidates
    assert of_tokens is not None and of_tokens.ids[:, 0].tolist() == of_topk.ids[:, 0].tolist()


def test_all_others_have_the_mass_that_was_kept_of_them(run: Run) -> None:
    record = run.document("plain")
    # Far less than what is left when rounded probabilities are taken from 1.
    record["topk"] = {
        "top_ids": np.arange(12)[None],
        "top_logprobs": np.array([[-1e-4, *[-20.0] * 11]], np.float16),
        "log_tail_mass": np.array([-16.0], np.float32),
    }
    found = find_candidates(run, record, slice(0, 1))
    assert found is not None and found.ids.shape == found.logprobs.shape == (1, 10)
    assert found.tail[0] == pytest.approx(math.exp(-16) + 2 * math.exp(-20), rel=1e-6)


def test_a_rank_beyond_the_candidates_has_a_badge_and_one_that_is_unknown_none(run: Run) -> None:
    view = open_document(planned(run, tiers=["scores", "topk"]), "plain")
    beyond = view.tokens["rank"] == 0
    assert beyond.any()
    for i, token in enumerate(_Page(render_page(view)).tokens):
        assert (token.get("data-rank") == "beyond") == beyond[i]
    names = ("token_id", "byte_start", "byte_end", "logprob")
    unknown = replace(view, tokens={name: view.tokens[name] for name in names})
    html = render_page(unknown)
    assert not any("data-rank" in token for token in _Page(html).tokens)
    assert "beyond" not in html and 'id="badges"' not in html


def test_a_stretch_that_was_not_scored_is_named() -> None:
    starts = np.array([4, 8, 20])
    tokens = {"token_id": starts, "byte_start": starts, "byte_end": starts + 4}
    assert Stretch(2, 9, "bytes").rows(tokens) == slice(0, 2)
    for first, last in ((0, 3), (12, 20)):
        with pytest.raises(ValueError, match=rf"^from: no scored token is in bytes {first} to"):
            Stretch(first, last, "bytes").rows(tokens)


# ---- borders and colours


@pytest.mark.parametrize(
    ("recipe", "num_tokens", "starts"),
    [
        (find_recipe("rolling", context=10), 34, [0, 10, 20, 30]),
        (find_recipe("rolling", context=10, overlap=5), 34, [0, 10, 16, 22, 28]),
        (find_recipe("disjoint-8"), 27, [0, 7, 14]),
        (find_recipe("strided", context=8, stride=4), 15, [0, 7, 11]),
        (find_recipe("llamacpp-8"), 25, [0, 3, 6]),
        (find_recipe("truncated", context=8), 30, [0]),
    ],
)
def test_borders_are_where_windows_begin_to_score(
    recipe: Any, num_tokens: int, starts: list[int]
) -> None:
    num_prefix = int(recipe.name in ("rolling", "truncated"))
    windows = recipe.windows(num_tokens + num_prefix, has_prefix=bool(num_prefix))
    record = {
        "num_tokens": num_tokens,
        "num_tokens_scored": sum(window.num_targets for window in windows),
        "num_windows": len(windows),
    }
    found = find_borders({"recipe": asdict(recipe)}, record)
    assert found is not None and [border.token for border in found] == starts
    if recipe.overlap == 5:
        assert [border.num_read for border in found] == [1, 5, 5, 5, 5]
    assert find_borders({"recipe": asdict(recipe)}, record | {"num_windows": 99}) is None


def test_the_scale_is_of_the_documents_mean() -> None:
    rng = np.random.default_rng(3)
    bits = np.exp(rng.normal(0.5, 1.2, 4000))
    scale = Scale.of(bits)
    logs = np.log(1 + bits)
    low, high = max(0, logs.mean() - 2.5 * logs.std()), logs.mean() + 2.5 * logs.std()
    expected = np.clip(np.floor((logs - low) / (high - low) * 8), 0, 7)
    assert scale.levels(bits).tolist() == expected.tolist()
    assert set(expected) == set(range(8))
    np.testing.assert_allclose(scale.edges(), np.exp(low + (high - low) * np.arange(1, 8) / 8) - 1)
    beyond = np.array([0.0, 1e-9, 1e9, np.inf, np.nan])
    assert scale.levels(beyond).tolist() == [0, 0, 7, 7, 7]
    alike = Scale.of(np.full(9, 2.0))
    assert set(alike.levels(np.array([2.0, 2.0]))) == {4} and alike.edges() == []


def test_a_stretch_is_of_tokens_or_bytes(run: Run) -> None:
    tokens = run.document("plain")["tokens"]
    count = len(tokens["token_id"])
    for first, last, most, rows in (
        (None, None, 2000, (0, count)),
        ("5", None, 7, (5, 12)),
        ("5", "900", 7, (5, count)),
        ("0b", "1b", 7, (0, 1)),
    ):
        found = Stretch.between(first, last, most=most).rows(tokens)
        assert (found.start, found.stop) == rows
    view = open_document(run, "plain", Stretch.between("40b", "90b", most=9))
    text = "".join(view.pieces)
    start = int(tokens["byte_start"][view.rows.start])
    assert start <= 40 and start + len(text) >= 90 and text == TEXTS["plain"][start:][: len(text)]
    assert start + len(view.pieces[0]) > 40 and start + len(text) - len(view.pieces[-1]) < 90
    for first, last, message in (
        ("x", None, "from: 'x' is no place; give a token as in 5000, or a byte"),
        ("4", "9b", "to: '9b' is not of the unit of '4'"),
        (str(count), None, f"from: {count} is not within the {count} tokens"),
        ("9", "9", "to: 9 is not beyond 9"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            Stretch.between(first, last, most=9).rows(tokens)


# ---- in a terminal


def printed(view: View, **options: Any) -> str:
    console = Console(file=io.StringIO(), width=300, highlight=False, **options)
    print_document(view, console)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_a_terminal_shows_text_in_colours_and_nothing_that_commands_it(run: Run) -> None:
    said = printed(open_document(run, EVIL), force_terminal=True, color_system="truecolor")
    assert ";48;2;" in said
    plain = re.sub(r"\x1b\[[0-9;]*m|\u2502window \d\u2502|" + PARTIAL, "", said)
    assert "\x1b" not in plain and "\u202e" not in plain
    assert "\u241b[31mred" in plain and "[U+202E]" in plain
    assert "[bold]x[/bold]" in plain and "caf\u00e9" in plain
    record = run.document(EVIL)
    assert f"{record['bits_per_byte']:.3f} bits/byte" in plain
    worst = int(np.argmin(record["tokens"]["logprob"]))
    row = next(line for line in plain.splitlines() if line.split()[:1] == [str(worst)])
    bits = -record["tokens"]["logprob"][worst] / math.log(2)
    assert f"{bits:.2f}" in row.split() and f"{record['tokens']['rank'][worst]:,}" in row.split()
    assert "window 2" in re.sub(
        r"\x1b\[[0-9;]*m", "", printed(open_document(run, "plain"), force_terminal=True)
    )


def test_without_colours_a_line_a_token(run: Run) -> None:
    record = run.document("plain")
    tokens = record["tokens"]
    for options in ({}, {"force_terminal": True, "no_color": True}):
        said = printed(open_document(run, "plain"), **options)
        assert "\x1b[4" not in said
        lines = said.splitlines()
        first = next(i for i, line in enumerate(lines) if line.split()[:2] == ["place", "token"])
        rows = lines[first + 1 :]
        assert len(rows) == len(tokens["logprob"])
        for i, row in enumerate(rows):
            cells = row.split()
            assert cells[0] == str(i)
            assert cells[-4] == f"{max(0.0, -tokens['logprob'][i] / math.log(2)):.2f}"
            assert cells[-3] == f"{tokens['rank'][i]:,}"


def test_the_command(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = in_process(capsys, "inspect", run.uri, "--doc", "plain", "--to", "3")
    assert code == 0 and "loglikelihood" in out and "tokens 0 to 3 of" in out
    page = tmp_path / "page.html"
    code, out, _ = in_process(capsys, "inspect", run.uri, "--doc", EVIL, "--html", page)
    assert code == 0 and out.strip() == str(page) and "token perplexity" in page.read_text()
    code, out, err = in_process(capsys, "inspect", run.uri, "--doc", "empty")
    assert code == 0 and "status" in out and "'empty' has no scored tokens: empty" in err
    for arguments, message in (
        (("--doc", "nobody"), "doc_id: 'nobody' is not in the run"),
        (("--html", "x.html"), "html: 'x.html' goes with --doc"),
        (("--doc", "plain", "--from", "x"), "--from: 'x' is no place"),
        (("--doc", "plain", "--html", tmp_path / "no/x.html"), "in a folder that is not there"),
        (("--doc", "empty", "--html", page), "'empty' has no scored tokens: empty"),
        (("--doc", "plain", "--dtype", "float16"), "--dtype: "),
    ):
        code, _, err = in_process(capsys, "inspect", run.uri, *arguments)
        assert code == 2 and message in err and len(err.splitlines()) == 1, err


def test_a_run_of_scores_alone_says_what_to_keep(run: Run) -> None:
    with pytest.raises(NoTokens, match="score with --keep tokens to see tokens"):
        open_document(planned(run, tiers=["scores"]), "plain")


def test_a_lens_alone_tells_no_tokens(demo_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("import os")
    run = score_directly(demo_folder, tmp_path / "a.txt", tmp_path / "runs", tiers=["lens"])
    with pytest.raises(NoTokens, match="score with --keep tokens to see tokens"):
        open_document(run, "a.txt")


# ---- as a page


class _Page(HTMLParser):
    """What a page is made of: tags, and the spans of its tokens."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.tokens: list[dict[str, str | None]] = []
        self.data: dict[str, str] = {}
        self._script: str | None = None
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        found = dict(attrs)
        if tag == "span" and re.fullmatch("s[0-7]", found.get("class") or ""):
            self.tokens.append(found)
        self._script = (found.get("id") or found.get("type") or tag) if tag == "script" else None

    def handle_endtag(self, tag: str) -> None:
        self._script = None

    def handle_data(self, data: str) -> None:
        if self._script:
            self.data[self._script] = self.data.get(self._script, "") + data


def test_a_page_holds_every_token_and_no_text_breaks_out(run: Run) -> None:
    for name in TEXTS:
        view = open_document(run, name)
        html = render_page(view)
        page = _Page(html)
        tokens = run.document(name)["tokens"]
        assert "img" not in page.tags and page.tags.count("script") == 2
        assert not any("onerror" in tag for tag in page.tags)
        assert len(page.tokens) == len(tokens["logprob"])
        for i, token in enumerate(page.tokens):
            bits = max(0.0, -tokens["logprob"][i] / math.log(2))
            said = f"place {i:,}, {bits:.2f} bits, rank {tokens['rank'][i]:,}, "
            assert (token["title"] or "").startswith(said)
            assert ("data-rank" in token) == (tokens["rank"][i] >= 10)
        digest = base64.b64encode(hashlib.sha256(page.data["script"].encode()).digest()).decode()
        assert f"script-src 'sha256-{digest}'" in html
        expected = json.loads(page.data["expected"])
        topk = run.document(name)["topk"]
        for i, row in enumerate(expected["rows"]):
            _, own, _, *others = row
            assert own / 1000 == pytest.approx(max(0, -tokens["logprob"][i]), abs=6e-4)
            chances = [chance / 1000 for chance in others[1::2]]
            assert chances == pytest.approx(-topk["top_logprobs"][i, :10].astype(float), abs=6e-4)
    marks = [
        t["data-mark"]
        for t in _Page(render_page(open_document(run, "plain"))).tokens
        if "data-mark" in t
    ]
    assert marks == [f"window {i}" for i in range(1, run.document("plain")["num_windows"] + 1)]


def test_a_page_of_too_many_tokens_is_refused(run: Run) -> None:
    view = open_document(run, "plain")
    large = View(**{**vars(view), "rows": slice(0, 20_001)})
    with pytest.raises(ValueError, match=r"to: 20,001 tokens are more than the 20,000 .* --from"):
        render_page(large)


def test_text_that_was_not_scored_is_marked(run: Run) -> None:
    view = open_document(run, "plain")
    tokens = {name: np.delete(column, [0, 1, 20], 0) for name, column in view.tokens.items()}
    lengths = view.tokens["byte_end"] - view.tokens["byte_start"]
    cut = View(**{**vars(view), "tokens": tokens, "borders": None, "rows": slice(0, 30)})
    assert cut.gap(0) == lengths[0] + lengths[1] and cut.gap(18) == lengths[20]
    assert cut.gap(17) == 0


# ---- in a browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with need_browser() as opened:
        yield opened


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (360, "dark")])
def test_a_reader_moves_through_the_tokens(
    run: Run, browser: Any, tmp_path: Path, width: int, scheme: str
) -> None:
    file = tmp_path / "page.html"
    file.write_text(render_page(open_document(run, "plain")), encoding="utf-8")
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
    page = context.new_page()
    wrong: list[str] = []
    page.on("console", lambda message: wrong.append(message.text))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on(
        "request",
        lambda request: wrong.append(request.url) if request.url != file.as_uri() else None,
    )
    page.goto(file.as_uri())
    record = run.document("plain")
    tokens, topk = record["tokens"], record["topk"]

    def check(place: int) -> None:
        """The panel is that of a token: its candidates, their probabilities and bars."""
        lines = page.locator("#candidates li")
        shown = lines.locator(".p").all_inner_texts()
        p = np.exp(topk["top_logprobs"][place, :10].astype(float))
        for said, chance in zip(shown, p, strict=False):
            assert said == "< 0.1 %" or float(said.split()[0]) == pytest.approx(
                100 * chance, abs=0.2
            )
        own = page.locator("#candidates .own")
        assert own.count() == 1
        is_among = tokens["token_id"][place] in topk["top_ids"][place, :10]
        assert lines.count() == (11 if is_among else 12)
        widths = lines.first.locator(".share").evaluate(
            "e => [e.offsetWidth, e.parentElement.offsetWidth]"
        )
        assert 0 < widths[0] < widths[1]

    assert page.locator("#candidates").is_hidden()
    page.locator(".tokens").focus()
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    assert (
        page.locator(".readout")
        .inner_text()
        .endswith(page.locator(".tokens > span").nth(2).get_attribute("title"))
    )
    check(2)
    page.locator(".tokens > span").nth(6).hover()
    check(6)
    page.locator("h1").hover()
    check(2)

    worst = int(np.argmin(tokens["logprob"]))
    page.locator("#surprising tbody a").first.click()
    assert page.locator(".tokens .on").get_attribute("id") == f"token-{worst}"
    check(worst)

    ranked = page.locator("[data-rank]").first
    badge = "token => getComputedStyle(token, '::after').content"
    assert ranked.evaluate(badge) == f'"{ranked.get_attribute("data-rank")}"'
    page.get_by_label("Ranks from 10 on").uncheck()
    assert ranked.evaluate(badge) == "none"
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert wrong == []
    context.close()
