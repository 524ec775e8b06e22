"""What is told apart where there are too many groups, and that nothing of it is lost."""

from __future__ import annotations

import io
import math
from collections import Counter, defaultdict
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from logitmill.engine.recipes import Window
from logitmill.engine.records import DocumentRecord, DocumentScore, TokenRecords
from logitmill.flows import summary
from logitmill.flows.counts import (
    ALL_LENGTHS,
    COUNTS,
    GROUP,
    KEYS,
    MAX_SHARD_ROWS,
    OTHER,
    SKETCH,
    SUMS,
    TOKEN_PANELS,
    merge_counts,
    round_off,
)
from logitmill.flows.histograms import count_documents, length_of
from logitmill.flows.summary import Summary

# Beyond the bound goes what cannot be told apart any less: the bins of one group.
ONE_GROUP = 1500


def make(rng: np.random.Generator, doc_id: str, num_tokens: int, **labels: str) -> DocumentScore:
    """A document of random tokens, three bytes each, in a window that begins within it."""
    tokens = TokenRecords.empty(num_tokens)
    tokens.logprob[:] = -rng.exponential(2.0, num_tokens)
    tokens.entropy[:] = rng.exponential(1.0, num_tokens)
    tokens.top1_logprob[:] = -rng.exponential(0.5, num_tokens)
    tokens.rank[:] = rng.geometric(0.2, num_tokens)
    record = DocumentRecord(
        doc_id,
        loglikelihood=float(tokens.logprob.sum(dtype=np.float64)),
        num_tokens_scored=num_tokens,
        num_bytes=3 * num_tokens,
        sum_entropy=float(tokens.entropy.sum(dtype=np.float64)),
        num_top1=int((tokens.rank == 1).sum()),
        nll_per_token=1.0,
        bits_per_byte=float(rng.lognormal(0.0, 0.3)),
        token_perplexity=float(np.exp(rng.uniform(1.0, 4.0))),
        min_k_plus_plus_20=float(rng.normal()),
        **labels,
    )
    return DocumentScore(0, record, tokens, windows=[Window(1, num_tokens + 1, 2)])


def summarize(scores: list[DocumentScore]) -> Summary:
    """The summary of one shard."""
    made = Summary()
    for score in scores:
        made.add(score)
    return made


def totals(counts: pa.Table, by: list[str]) -> dict[tuple[Any, ...], dict[str, Any]]:
    """Sums of the rows by some of their keys."""
    table = counts.group_by(by).aggregate([(name, "sum") for name in SUMS])
    return {
        tuple(row[key] for key in by): {name: row[f"{name}_sum"] for name in SUMS}
        for row in table.to_pylist()
    }


def assert_equal(found: dict[Any, dict[str, Any]], expected: dict[Any, dict[str, Any]]) -> None:
    assert found.keys() == expected.keys()
    for key, sums in expected.items():
        assert found[key] == pytest.approx(sums, rel=1e-12), key


def rows_of(counts: pa.Table) -> list[int]:
    """Numbers of rows of tokens, of sketches, and of histograms of documents."""
    panels = counts["panel"].to_pylist()
    tokens = sum(panel in TOKEN_PANELS for panel in panels)
    sketches = sum(panel.startswith(SKETCH) for panel in panels)
    return [tokens, sketches, len(panels) - tokens - sketches]


def many(seed: int, count: int) -> list[DocumentScore]:
    """Documents of few sources on many days, the first source's larger."""
    rng = np.random.default_rng(seed)
    days = [f"2026-{m:02d}-{d:02d}" for m in range(1, 13) for d in range(1, 29)]
    scores = []
    for i in range(count):
        source = int(rng.integers(4))
        num_tokens = int(rng.integers(1, 120)) * (4 if source == 0 else 1)
        day = days[0] if rng.random() < 0.3 else days[rng.integers(len(days))]
        scores.append(make(rng, str(i), num_tokens, source=f"s{source}", language="en", day=day))
    return scores


def test_what_fits_is_told_apart() -> None:
    counts = summarize(many(1, 40)).counts()
    assert max(rows_of(counts)) < MAX_SHARD_ROWS
    assert merge_counts([counts], counts.num_rows).equals(counts)
    assert ALL_LENGTHS not in counts.filter(pc.equal(counts["panel"], "length"))["length"]
    assert OTHER not in counts["day"].to_pylist()


@pytest.mark.parametrize("max_rows", [1500, 700, 400, 1])
def test_what_does_not_fit_is_counted_under_other_and_never_lost(max_rows: int) -> None:
    counts = summarize(many(2, 900)).counts()
    assert min(rows_of(counts)) > 1500
    small = merge_counts([counts], max_rows)
    assert small.schema == COUNTS
    assert all(n <= max_rows + ONE_GROUP for n in rows_of(small))
    # Bins are those they were: of a panel, and so of the lengths of documents.
    assert_equal(totals(small, ["panel", "bin"]), totals(counts, ["panel", "bin"]))
    keys = [tuple(row[name] for name in KEYS) for row in small.to_pylist()]
    assert keys == sorted(set(keys))
    assert merge_counts([counts], max_rows).equals(small)
    if max_rows > 1:
        assert merge_counts([small], max(rows_of(small))).equals(small)


def test_sources_stay_longest_then_days_and_the_largest_groups_whole() -> None:
    counts = summarize(many(3, 900)).counts()
    # Sketches hold a row for nearly every document, which no folding makes fewer.
    counts = counts.filter(pc.invert(pc.starts_with(counts["panel"], SKETCH)))
    small = merge_counts([counts], 1500)
    by_source = ["panel", "source", "language", "bin"]
    assert_equal(totals(small, by_source), totals(counts, by_source))
    assert {OTHER, "2026-01-01"} < set(small["day"].to_pylist())
    of_documents = pc.invert(pc.is_in(counts["panel"], pa.array(TOKEN_PANELS)))
    tokens = {
        group: sums["tokens"] for group, sums in totals(counts.filter(of_documents), GROUP).items()
    }
    largest = max(tokens, key=lambda group: tokens[group])
    before, after = (
        [row for row in table.to_pylist() if tuple(row[key] for key in GROUP) == largest]
        for table in (counts, small)
    )
    assert before == after


def test_the_largest_sources_are_told_apart_in_every_panel() -> None:
    """Also where some of their rows are kept before, for they are told apart by length."""
    rng = np.random.default_rng(5)
    scores = [
        make(rng, str(i), int(rng.integers(8, 400)), source=f"s{rng.integers(60):02d}")
        for i in range(900)
    ]
    tokens: Counter[str] = Counter()
    for score in scores:
        tokens[score.record.source] += score.record.num_tokens_scored
    largest = [source for source, _ in tokens.most_common()]
    counts = summarize(scores).counts()
    for max_rows in (500, 1500, 4000):
        small = merge_counts([counts], max_rows)
        for panel in TOKEN_PANELS:
            found = small.filter(pc.equal(small["panel"], panel))
            told = set(found.filter(pc.not_equal(found["source"], OTHER))["source"].to_pylist())
            assert told <= set(largest[: len(told)]), (panel, max_rows)


def test_sums_are_rounded_and_those_of_groups_of_weights_are_not() -> None:
    rng = np.random.default_rng(7)
    scores = many(7, 400)
    scores += [make(rng, f"long{i}", 9000, source="s0", language="en") for i in range(30)]
    exact = merge_counts([count_documents([score.record for score in scores])])
    rounded = summarize(scores).counts()
    before, after = (t.filter(pc.starts_with(t["panel"], SKETCH)) for t in (exact, rounded))
    assert after.drop_columns(["tokens", "bytes"]).equals(before.drop_columns(["tokens", "bytes"]))
    assert_equal(totals(after, ["panel", *GROUP]), totals(before, ["panel", *GROUP]))
    groups = defaultdict(list)
    for place, row in enumerate(before.select(["panel", *GROUP]).to_pylist()):
        groups[tuple(row.values())].append(place)
    for name in ("tokens", "bytes"):
        exactly, found = before[name].to_numpy(), after[name].to_numpy()
        assert found.min() >= 0
        apart = [
            np.abs(np.cumsum(found[of]) - np.cumsum(exactly[of])).max() / exactly[of].sum()
            for of in groups.values()
        ]
        assert 0.001 < max(apart) <= 0.01
    for name in ("nll", "value"):
        assert all((65536 * value).is_integer() for value in rounded[name].to_pylist())


def test_what_is_not_finite_is_no_number_of_bits_either() -> None:
    numbers = np.array([0.0, -0.1, 1 / 3, 5e-324, 1.7e308, math.inf, -math.inf, math.nan])
    found = round_off(numbers, 10)
    np.testing.assert_allclose(found, numbers, rtol=2.0**-10)
    assert found[2] == 683 / 2048


def test_a_shard_of_addresses_stays_small() -> None:
    rng = np.random.default_rng(4)
    scores = [
        make(rng, str(i), 6, source=f"https://example.org/{rng.integers(1 << 40):x}", day=day)
        for i in range(6000)
        for day in [f"2026-{i % 12 + 1:02d}-{i % 28 + 1:02d}"]
    ]
    counts = summarize(scores).counts()
    assert all(n <= MAX_SHARD_ROWS + ONE_GROUP for n in rows_of(counts))
    file = io.BytesIO()
    pq.write_table(counts, file, compression="zstd")
    assert file.tell() < 300_000
    status = counts.filter(pc.equal(counts["panel"], "status/ok"))
    assert sum(status["documents"].to_pylist()) == 6000
    assert sum(status["tokens"].to_pylist()) == 36_000
    assert OTHER in status["source"].to_pylist()


def test_when_documents_are_counted_changes_no_count(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = many(5, 60)
    whole = summarize(scores).counts()
    monkeypatch.setattr(summary, "_BATCH_DOCUMENTS", 7)
    monkeypatch.setattr(summary, "_WAITING_ROWS", 500)
    pieces = summarize(scores).counts()
    assert pieces.select([*KEYS, "documents", "tokens", "bytes", "hits"]).equals(
        whole.select([*KEYS, "documents", "tokens", "bytes", "hits"])
    )
    assert_equal(totals(pieces, KEYS), totals(whole, KEYS))


@pytest.mark.parametrize(
    ("num_bytes", "num_tokens", "length"),
    [(0, 0, 0), (1, 1, 0), (2, 1, 1), (1023, 9, 9), (1024, 9, 10), (0, 17, 4), (1 << 40, 1, 40)],
)
def test_length_is_the_octave_of_bytes_or_of_ids(
    num_bytes: int, num_tokens: int, length: int
) -> None:
    record = DocumentRecord("d", num_bytes=num_bytes, num_tokens_scored=num_tokens)
    assert length_of(record) == length


def test_documents_are_counted_by_length_and_day_and_tokens_by_day() -> None:
    rng = np.random.default_rng(6)
    # Of 30 bytes and of 120.
    scores = [make(rng, str(i), 10 << i % 2 * 2, day=f"2026-11-2{i % 3}") for i in range(12)]
    scores.append(DocumentScore(0, DocumentRecord("f", status="empty", day="2026-11-20")))
    rows = summarize(scores).counts().to_pylist()
    for panel in ("status/ok", "length"):
        counted = Counter(
            {(r["length"], r["day"]): r["documents"] for r in rows if r["panel"] == panel}
        )
        assert counted == {(n, f"2026-11-2{d}"): 2 for n in (4, 6) for d in range(3)}
    (failed,) = [r for r in rows if r["panel"] == "status/empty"]
    assert (failed["length"], failed["day"], failed["documents"]) == (0, "2026-11-20", 1)
    for panel in TOKEN_PANELS:
        of_panel = [r for r in rows if r["panel"] == panel]
        is_by_length = panel in ("token_nll", "entropy", "rank")
        assert {r["length"] for r in of_panel} == ({4, 6} if is_by_length else {ALL_LENGTHS})
        by_day = Counter[str]()
        for r in of_panel:
            by_day[r["day"]] += r["tokens"]
        assert by_day == {f"2026-11-2{d}": 100 for d in range(3)}
