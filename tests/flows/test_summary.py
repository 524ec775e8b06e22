"""Summaries against closed forms and a plain loop over tokens; merging, order and bytes."""

from __future__ import annotations

import io
import json
import math
import random
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from logitmill.engine import Pipeline, metrics
from logitmill.engine.recipes import Recipe, Window
from logitmill.engine.records import DocumentRecord, DocumentScore, TokenRecords
from logitmill.flows import counts as counts_module
from logitmill.flows import outliers as outliers_module
from logitmill.flows import publish
from logitmill.flows.folder import Folder, Part
from logitmill.flows.store import Receipt
from logitmill.flows.summary import (
    ALL_LENGTHS,
    COUNTS,
    KEYS,
    OUTLIERS,
    Summary,
    length_of,
    merge_counts,
    merge_outliers,
)

LN2 = math.log(2.0)


def make(
    doc_id: str,
    bits: Any,
    *,
    text: str | None = None,
    rank: Any = 1,
    entropy: Any = 0.0,
    top1: Any = 1.0,
    source: str = "",
    language: str = "",
    day: str = "",
) -> DocumentScore:
    """A scored document of tokens with these surprisals (bits); by default a token is 4 bytes."""
    bits = np.asarray(bits, np.float64)
    n = len(bits)
    tokens = TokenRecords.empty(n)
    tokens.token_id[:] = np.arange(n)
    tokens.logprob[:] = -bits * LN2
    tokens.rank[:] = rank
    tokens.entropy[:] = entropy
    tokens.top1_logprob[:] = np.log(top1)
    text = "abcd" * n if text is None else text
    edges = np.linspace(0, len(text.encode()), n + 1).astype(np.int64)
    tokens.byte_start[:], tokens.byte_end[:] = edges[:-1], edges[1:]
    total = float(tokens.logprob.sum(dtype=np.float64))
    record = DocumentRecord(
        doc_id,
        source=source,
        language=language,
        day=day,
        loglikelihood=total,
        num_tokens=n,
        num_tokens_scored=n,
        num_bytes=len(text.encode()),
        sum_entropy=float(tokens.entropy.sum(dtype=np.float64)),
        num_top1=int((tokens.rank == 1).sum()),
        nll_per_token=metrics.nll_per_token(total, n),
        token_perplexity=metrics.perplexity(total, n),
        bits_per_byte=metrics.bits(total, len(text.encode())),
        min_k_plus_plus_20=metrics.nll_per_token(total, n) - 2.0,
    )
    return DocumentScore(0, record, tokens, text)


def make_ids(doc_id: str, bits: Any) -> DocumentScore:
    """A scored document of token ids: no text, no bytes."""
    score = make(doc_id, bits)
    score.text = None
    score.record.num_bytes = 0
    score.record.bits_per_byte = None
    score.tokens.byte_start[:] = score.tokens.byte_end[:] = 0
    return score


def make_failed(doc_id: str, status: str = "empty") -> DocumentScore:
    """A document that was not scored."""
    return DocumentScore(0, DocumentRecord(doc_id, status=status, error=f"why {doc_id} is not"))


def make_random(rng: np.random.Generator, doc_id: str, num_tokens: int) -> DocumentScore:
    """A document of plausible tokens from one of 3 sources in 2 languages, scored in a window that
    begins within it."""
    score = make(
        doc_id,
        rng.exponential(3.0, num_tokens),
        rank=rng.integers(1, 5000, num_tokens),
        entropy=rng.exponential(2.0, num_tokens),
        top1=rng.uniform(0.01, 1.0, num_tokens),
        source="abc"[rng.integers(3)],
        language=("en", "")[rng.integers(2)],
        day=("", "2026-11-23")[rng.integers(2)],
    )
    score.windows = [Window(1, num_tokens + 1, 2)]
    return score


def summarize(scores: list[DocumentScore]) -> Summary:
    """The summary of one shard."""
    made = Summary()
    for score in scores:
        made.add(score)
    return made


def panel(counts: pa.Table, name: str) -> dict[int, dict[str, Any]]:
    """The rows of a panel by bin; one source and language."""
    rows = [row for row in counts.to_pylist() if row["panel"] == name]
    assert len({(row["source"], row["language"]) for row in rows}) <= 1
    return {row["bin"]: row for row in rows}


def kind(outliers: pa.Table, name: str) -> list[dict[str, Any]]:
    """The rows of a kind, in order."""
    return [row for row in outliers.to_pylist() if row["kind"] == name]


def as_bytes(table: pa.Table) -> bytes:
    """The table as a Parquet file."""
    sink = io.BytesIO()
    pq.write_table(table, sink)
    return sink.getvalue()


def test_counts_of_a_document_by_hand() -> None:
    bits = [0.0, 0.3, 2.0, 13.1]
    score = make(
        "d", bits, rank=[1, 2, 3, 1024], entropy=[1, 2, 3, 4], top1=[1.0, 0.52, 0.54, 0.049]
    )
    counts = summarize([score]).counts()
    assert counts.schema == COUNTS

    # 0, 0.3, 2 and 13.1 bits.
    rows = panel(counts, "token_nll")
    assert {b: row["tokens"] for b, row in rows.items()} == {0: 1, 1: 1, 8: 1, 52: 1}

    # Positions 0, 1, 2, 3 are 1, 2, 3, 4 counted from one: 0, 4, 6.3, 8 quarter octaves.
    rows = panel(counts, "position")
    assert {b: row["value"] for b, row in rows.items()} == {0: 1.0, 4: 2.0, 6: 3.0, 8: 4.0}
    assert all(row["tokens"] == 1 for row in rows.values())

    rows = panel(counts, "entropy")
    # 1, 2, 3, 4 nats are 1.44, 2.89, 4.33, 5.77 bits.
    assert {b: row["tokens"] for b, row in rows.items()} == {5: 1, 11: 1, 17: 1, 23: 1}
    assert rows[11]["nll"] == pytest.approx(0.3 * LN2, abs=1e-5)

    rows = panel(counts, "calibration")
    assert {b: (row["tokens"], row["hits"]) for b, row in rows.items()} == {
        0: (1, 0),
        10: (2, 0),
        19: (1, 1),
    }
    assert rows[10]["value"] == pytest.approx(1.06, abs=1e-5)

    rows = panel(counts, "rank")
    assert {b: row["tokens"] for b, row in rows.items()} == {0: 1, 1: 2, 10: 1}
    assert rows[1]["nll"] == pytest.approx(2.3 * LN2, abs=1e-5)

    (row,) = panel(counts, "status/ok").values()
    assert (row["documents"], row["tokens"], row["bytes"], row["hits"]) == (1, 4, 16, 1)
    assert (row["nll"], row["value"]) == (pytest.approx(15.4 * LN2, abs=1e-5), 10.0)

    # 15.4 bits over 16 bytes: 0.9625.
    ((b, row),) = panel(counts, "bits_per_byte").items()
    assert (b, row["documents"], row["bytes"]) == (48, 1, 16)

    # 16 bytes.
    ((b, row),) = panel(counts, "length").items()
    assert (b, row["length"], row["documents"], row["tokens"], row["bytes"]) == (4, 4, 1, 4, 16)
    assert row["nll"] == pytest.approx(15.4 * LN2, abs=1e-5)
    (row,) = panel(counts, "sketch/bits_per_byte").values()
    assert (row["length"], row["documents"], row["tokens"], row["bytes"]) == (4, 1, 4, 16)


def test_uniform_byte_model_is_8_bits_per_byte() -> None:
    text = "x" * 100
    score = make("d", np.full(100, 8.0), text=text, entropy=8 * LN2, top1=1 / 256)
    counts = summarize([score]).counts()
    (b,) = panel(counts, "bits_per_byte")
    assert b in (399, 400)
    (row,) = panel(counts, "status/ok").values()
    assert row["nll"] / row["bytes"] / LN2 == pytest.approx(8.0, rel=1e-6)
    for row in panel(counts, "position").values():
        assert row["nll"] == pytest.approx(row["value"], rel=1e-6)


def test_counts_equal_a_loop_over_tokens() -> None:
    rng = np.random.default_rng(1)
    scores = [make_random(rng, str(i), n) for i, n in enumerate([1, 2, 3, 17, 64, 1000, 4097])]
    expected: dict[tuple[Any, ...], np.ndarray] = defaultdict(lambda: np.zeros(4))
    for score in scores:
        record, t = score.record, score.tokens
        length = length_of(record) // 2 * 2
        any_length = (record.source, record.language, ALL_LENGTHS, record.day)
        of_length = (record.source, record.language, length, record.day)
        for p in range(len(t)):
            nll, top1 = -float(t.logprob[p]), math.exp(float(t.top1_logprob[p]))
            hit, entropy, rank = t.rank[p] == 1, float(t.entropy[p]), int(t.rank[p])
            position = math.floor(4 * math.log2(p + 1) + 1e-12)
            for name, group, b, sums in (
                ("token_nll", of_length, int(nll / LN2 / 0.25), (1, 0, 0, 0)),
                ("entropy", of_length, int(entropy / LN2 / 0.25), (1, nll, 0, 0)),
                ("position", any_length, position, (1, nll, entropy, 0)),
                ("window", any_length, position, (1, nll, entropy, 0)),
                ("calibration", any_length, min(19, int(20 * top1)), (1, 0, top1, hit)),
                ("rank", of_length, rank.bit_length() - 1, (1, nll, 0, 0)),
            ):
                expected[(name, *group, b)] += sums
    counts = summarize(scores).counts()
    rows = [r for r in counts.to_pylist() if r["panel"] in {key[0] for key in expected}]
    assert len(rows) == len(expected)
    for r in rows:
        found = (r["tokens"], r["nll"], r["value"], r["hits"])
        key = tuple(r[name] for name in KEYS)
        np.testing.assert_allclose(found, expected[key], rtol=1e-6, atol=1e-5)


RECIPES = (
    {"name": "rolling", "context": 10},
    {"name": "rolling", "context": 10, "overlap": 7},
    {"name": "strided", "context": 16, "stride": 5},
    {"name": "disjoint", "context": 8},
    {"name": "llamacpp", "context": 12},
    {"name": "truncated", "context": 20},
    {"name": "conditional", "context": 30},
)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: f"{r['name']}-{r.get('overlap', 1)}")
def test_tokens_of_later_windows_are_counted_by_what_was_read(recipe: dict[str, Any]) -> None:
    rng = np.random.default_rng(12)
    expected: dict[int, np.ndarray] = defaultdict(lambda: np.zeros(3))
    scores = []
    for length in (2, 11, 12, 33, 100, 257):
        windows = Recipe(**recipe).windows(length, has_prefix=True, num_context=length // 3)
        targets = [(w, t) for w in windows for t in range(w.first_target, w.stop + 1)]
        if not targets:
            continue
        score = make(
            str(length), rng.exponential(3.0, len(targets)), entropy=rng.random(len(targets))
        )
        score.windows = windows
        scores.append(score)
        for n, (window, target) in enumerate(targets):
            read = range(window.start, target)
            if 0 not in read:
                b = max(b for b in range(64) if 2 ** (b / 4) <= len(read) + 1e-9)
                expected[b] += (1, -score.tokens.logprob[n], score.tokens.entropy[n])
    found = panel(summarize(scores).counts(), "window")
    assert found.keys() == expected.keys()
    assert bool(found) == (recipe["name"] != "truncated")
    for b, row in found.items():
        sums = row["tokens"], row["nll"], row["value"]
        np.testing.assert_allclose(sums, expected[b], rtol=1e-6, atol=1e-5)
        assert (row["documents"], row["bytes"], row["hits"]) == (0, 0, 0)


def test_short_windows_are_a_saw_tooth_and_a_long_one_is_none(demo: Pipeline) -> None:
    context = 32
    text = Path(json.__file__).with_name("decoder.py").read_text()[:2800]
    (long,), (short,) = (demo.score([text], context=length) for length in (1024, context))
    n = long.record.num_tokens_scored
    assert (long.record.num_windows, short.record.num_windows) == (1, -(-n // context))
    assert not panel(summarize([long]).counts(), "window")
    # Windows side by side; the last one is filled up on its left.
    read = np.arange(n) % context + 1
    last = n - n // context * context
    read[n - last :] += context - last
    later = np.arange(n) >= context
    rows = panel(summarize([short]).counts(), "window")
    means = {}
    for octave in range(6):
        low = 1 << octave
        chosen = later & (read >= low) & (read < 2 * low)
        bins = [row for b, row in rows.items() if b // 4 == octave]
        assert sum(row["tokens"] for row in bins) == chosen.sum() > 0
        nll = -short.tokens.logprob[chosen].astype(np.float64)
        assert sum(row["nll"] for row in bins) == pytest.approx(nll.sum(), rel=1e-6)
        # The same tokens in one window, where they have all that stands before them.
        means[low] = nll.mean() + long.tokens.logprob[chosen].mean()
    # A tooth: nats too many after one token of context, and few after many.
    assert means[1] > 2.0
    assert abs(means[16]) < 0.3 * means[1]


def test_every_document_and_token_is_in_every_histogram_once() -> None:
    rng = np.random.default_rng(2)
    scores = [make_random(rng, str(i), int(n)) for i, n in enumerate(rng.integers(1, 300, 50))]
    failed = [make_failed(f"f{i}", ("empty", "invalid_utf8")[i % 2]) for i in range(7)]
    rows = summarize(scores + failed).counts().to_pylist()
    num_tokens = sum(len(score.tokens) for score in scores)
    total = {
        name: [
            sum(r[column] for r in rows if r["panel"] == name) for column in ("documents", "tokens")
        ]
        for name in {r["panel"] for r in rows}
    }
    assert total.pop("sketch/min_k_plus_plus_20") == [50, num_tokens]
    for name in ("bits_per_byte", "length", "sketch/bits_per_byte", "sketch/token_perplexity"):
        assert total.pop(name) == [50, num_tokens]
    assert total.pop("status/ok") == [50, num_tokens]
    assert total.pop("status/empty") == [4, 0]
    assert total.pop("status/invalid_utf8") == [3, 0]
    assert total == {
        name: [0, num_tokens]
        for name in ("token_nll", "entropy", "position", "window", "calibration", "rank")
    }


def test_rows_are_in_the_order_of_their_keys() -> None:
    rng = np.random.default_rng(3)
    counts = summarize([make_random(rng, str(i), 40) for i in range(30)]).counts()
    keys = [tuple(r[name] for name in KEYS) for r in counts.to_pylist()]
    assert keys == sorted(set(keys))


def test_documents_of_ids_have_no_bits_per_byte() -> None:
    made = summarize([make_ids("a", [1.0] * 20), make_ids("b", [3.0] * 20)])
    assert not panel(made.counts(), "bits_per_byte")
    lowest = kind(made.outliers(), "lowest")
    assert [row["doc_id"] for row in lowest] == ["a", "b"]
    assert lowest[0]["score"] == pytest.approx(LN2, rel=1e-4)
    assert lowest[0]["pieces"] == [str(i) for i in range(20)]


def test_extreme_values_stay_in_the_last_bins() -> None:
    score = make("d", [1e9, 4.0], text="ab", rank=[2**31 - 1, 1], top1=[1e-40, 1.0])
    score.tokens.entropy[0] = np.nan
    score.tokens.top1_logprob[1] = 1e-7
    counts = summarize([score]).counts()
    assert set(panel(counts, "token_nll")) == {16, 399}
    assert set(panel(counts, "bits_per_byte")) == {4999}
    assert set(panel(counts, "calibration")) == {0, 19}
    assert set(panel(counts, "rank")) == {0, 30}


def test_nothing_makes_empty_tables() -> None:
    made = Summary()
    assert made.counts().equals(COUNTS.empty_table())
    assert made.outliers().equals(OUTLIERS.empty_table())
    assert merge_counts([]).equals(COUNTS.empty_table())
    assert merge_outliers([]).equals(OUTLIERS.empty_table())


def test_outliers_are_the_ends_and_keep_few_tokens() -> None:
    order = np.random.default_rng(4).permutation(40)
    made = summarize([make(f"{i:02}", [1.0 + i / 10] * 400) for i in order])
    table = made.outliers()
    assert table.schema == OUTLIERS
    lowest, highest, sample = (kind(table, name) for name in ("lowest", "highest", "sample"))
    assert [row["doc_id"] for row in lowest] == [f"{i:02}" for i in range(10)]
    assert [row["doc_id"] for row in highest] == [f"{i:02}" for i in range(39, 29, -1)]
    hashed = sorted(range(40), key=lambda i: outliers_module._hash(f"{i:02}"))
    assert [row["doc_id"] for row in sample] == [f"{i:02}" for i in hashed[:3]]
    for rows, num_shown in ((lowest, 2), (highest, 2), (sample, 2)):
        for n, row in enumerate(rows):
            lengths = {
                row[name] and len(row[name]) for name in ("pieces", "logprob", "rank", "entropy")
            }
            assert lengths == ({80} if n < num_shown else {None})


def test_memorized_documents_are_those_of_most_min_k_plus_plus() -> None:
    order = np.random.default_rng(5).permutation(30)
    made = summarize([make(f"{i:02}", [1.0 + i / 10] * 40) for i in order])
    rows = kind(made.outliers(), "memorized")
    assert [row["doc_id"] for row in rows] == [f"{i:02}" for i in range(29, 19, -1)]
    assert rows[0]["score"] == pytest.approx(3.9 * LN2 - 2.0, rel=1e-4)
    score = make("d", [1.0] * 40)
    score.record.min_k_plus_plus_20 = None
    assert kind(summarize([score]).outliers(), "memorized") == []


def test_truncated_documents_are_chosen_by_chance() -> None:
    scores = [make(f"{i:02}", [1.0] * 40) for i in range(40)]
    for score in scores[:25]:
        score.record.truncated, score.record.num_windows = True, 7
    rows = kind(summarize(scores).outliers(), "truncated")
    hashed = sorted(range(25), key=lambda i: outliers_module._hash(f"{i:02}"))
    assert [row["doc_id"] for row in rows] == [f"{i:02}" for i in hashed[:10]]
    assert all(row["truncated"] and row["num_windows"] == 7 for row in rows)


def test_every_tenth_of_bits_per_byte_has_examples() -> None:
    # A token of b bits is 4 bytes: b / 4 bits/byte.
    bits = np.random.default_rng(6).uniform(0.1, 8.0, 300)
    scores = [make(f"{i:03}", [b] * 40) for i, b in enumerate(bits)]
    scores += [make("x" * 257, [400.0] * 40), make_ids("ids", [1.0] * 40), make_failed("f")]
    expected = set()
    for tenth in range(20):
        inside = [i for i, b in enumerate(bits) if int(b / 4 * 10) == tenth]
        hashed = sorted(inside, key=lambda i: outliers_module._hash(f"{i:03}"))
        expected |= {f"{i:03}" for i in hashed[:2]}
    assert len(expected) == 40
    rows = kind(summarize(scores).outliers(), "example")
    assert {row["doc_id"] for row in rows} == expected
    assert all(row["pieces"] is None for row in rows)
    tables = [summarize(scores[i::3]).outliers() for i in range(3)]
    assert {row["doc_id"] for row in kind(merge_outliers(tables), "example")} == expected


def test_short_documents_are_outliers_only_among_themselves() -> None:
    short = [make(f"short{i}", [0.1 + i] * 2) for i in range(3)]
    long = make("long", [1.0] * 100)
    assert [row["doc_id"] for row in kind(summarize([*short, long]).outliers(), "lowest")] == [
        "long"
    ]
    alone = summarize(short).outliers()
    assert [row["doc_id"] for row in kind(alone, "lowest")] == ["short0", "short1", "short2"]
    merged = merge_outliers([alone, summarize([long]).outliers()])
    assert [row["doc_id"] for row in kind(merged, "highest")] == ["long"]


def test_every_status_shows_among_the_failed() -> None:
    scores = [make_failed(f"e{i}") for i in range(30)] + [make_failed("u", "invalid_utf8")]
    failed = kind(summarize(scores).outliers(), "failed")
    assert len(failed) == 24
    assert [row["status"] for row in failed].count("invalid_utf8") == 1
    assert failed[0]["error"].startswith("why e")
    assert all(row["pieces"] is None and row["bits_per_byte"] is None for row in failed)


def test_pieces_are_the_text_of_the_tokens() -> None:
    text = "na\u00efve \u20ac\n" * 20
    score = make("d", [1.0] * 40, text=text)
    (row,) = kind(summarize([score]).outliers(), "lowest")
    utf8, t = text.encode(), score.tokens
    expected = [
        utf8[a:b].decode(errors="replace") for a, b in zip(t.byte_start, t.byte_end, strict=True)
    ]
    assert row["pieces"] == expected
    # A bit is 11.09 sixteenths of a nat.
    assert row["logprob"] == [-11 / 16] * 40


def test_a_piece_of_skipped_text_is_cut() -> None:
    (row,) = kind(summarize([make("d", [1.0], text="x" * 10_000)]).outliers(), "lowest")
    assert row["pieces"] == ["x" * 256 + "\u2026"]


def shards(seed: int, num_shards: int) -> list[Summary]:
    rng = np.random.default_rng(seed)
    return [
        summarize(
            [make_random(rng, f"{s}/{i}", int(rng.integers(1, 200))) for i in range(12)]
            + [make_failed(f"{s}/f{i}", "ab"[rng.integers(2)]) for i in range(4)]
        )
        for s in range(num_shards)
    ]


def test_merging_merged_counts_is_merging_all() -> None:
    tables = [shard.counts() for shard in shards(5, 7)]
    whole = merge_counts(tables)
    parts = merge_counts([merge_counts(tables[:3]), merge_counts([]), merge_counts(tables[3:])])
    assert parts.equals(whole)
    assert merge_counts(tables[::-1]).equals(whole)


def test_counts_merge_to_those_of_one_shard() -> None:
    rng = np.random.default_rng(6)
    scores = [make_random(rng, str(i), 50) for i in range(40)]
    whole = summarize(scores).counts()
    merged = merge_counts([summarize(scores[:11]).counts(), summarize(scores[11:]).counts()])
    assert merged.select([*KEYS, "documents", "hits"]).equals(
        whole.select([*KEYS, "documents", "hits"])
    )
    for column in ("nll", "value"):
        np.testing.assert_allclose(merged[column], whole[column], rtol=2e-6, atol=2e-5)
    # Within a sketch they are rounded, but not in sum.
    groups = [name for name in KEYS if name != "bin"]
    for column in ("tokens", "bytes"):
        a, b = (
            table.group_by(groups, use_threads=False).aggregate([(column, "sum")])
            for table in (merged, whole)
        )
        assert a.equals(b), column


def test_merging_merged_outliers_is_merging_all() -> None:
    tables = [shard.outliers() for shard in shards(7, 9)]
    whole = merge_outliers(tables)
    assert Counter(whole["kind"].to_pylist()) == {
        **dict.fromkeys(("lowest", "highest", "memorized"), 10),
        "sample": 3,
        "failed": 24,
        "example": whole["kind"].to_pylist().count("example"),
    }
    assert whole.equals(merge_outliers([merge_outliers(tables[:4]), merge_outliers(tables[4:])]))
    assert whole.equals(merge_outliers([whole]))


def test_outliers_merge_to_those_of_one_shard() -> None:
    rng = np.random.default_rng(8)
    scores = [make_random(rng, str(i), 50) for i in range(40)]
    merged = merge_outliers([summarize(scores[:9]).outliers(), summarize(scores[9:]).outliers()])
    assert merged.equals(summarize(scores).outliers())


def test_many_tables_are_added_in_the_order_of_few(monkeypatch: pytest.MonkeyPatch) -> None:
    made = shards(9, 10)
    counts, outliers = ([s.counts() for s in made], [s.outliers() for s in made])
    whole = as_bytes(merge_counts(counts)), as_bytes(merge_outliers(outliers))
    monkeypatch.setattr(counts_module, "_FOLD", 2)
    assert (as_bytes(merge_counts(iter(counts))), as_bytes(merge_outliers(iter(outliers)))) == whole


def test_equal_scores_give_equal_bytes() -> None:
    first, again = (
        [(as_bytes(s.counts()), as_bytes(s.outliers())) for s in shards(10, 2)] for _ in range(2)
    )
    assert first == again


def test_reading_the_tables_changes_nothing() -> None:
    rng = np.random.default_rng(11)
    scores = [make_random(rng, str(i), 30) for i in range(20)]
    read = Summary()
    for score in scores:
        read.add(score)
        read.counts(), read.outliers()
    assert read.counts().equals(summarize(scores).counts())
    assert read.outliers().equals(summarize(scores).outliers())


@pytest.mark.parametrize("num_bytes", [1, 30_000, 1 << 30])
def test_tables_of_many_shards_add_up_however_they_are_put_together(
    num_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publish, "_TABLE_BYTES", num_bytes)
    rng = np.random.default_rng(7)
    folder, receipts = Folder(str(tmp_path)), []
    tables: dict[str, list[pa.Table]] = {"counts": [], "outliers": []}
    for shard in range(150):
        made = summarize([make_random(rng, f"{shard}/{n}", 40) for n in range(3)])
        for name, table in (("counts", made.counts()), ("outliers", made.outliers())):
            tables[name].append(table)
            file = io.BytesIO()
            pq.write_table(table, file)
            folder.write(f"shards/{shard:05d}.{name}.parquet", file.getvalue())
        receipts.append(Receipt(shard, (), 3, 0, 120, 480, -1.0, 1.0, "none", {}))
    real = Folder.read

    def read_slowly(self: Folder, name: str) -> bytes | None:
        time.sleep(random.uniform(0, 0.01))
        return real(self, name)

    # They arrive in another order than they are added up in.
    monkeypatch.setattr(Folder, "read", read_slowly)
    for name, merge in publish.find_merges({}).items():
        read = list(publish.read_tables(folder, name, receipts))
        assert sum(len(table) for table in read) == sum(len(table) for table in tables[name])
        assert (len(read) == 150, len(read) == 1) == (num_bytes == 1, num_bytes == 1 << 30)
        assert merge(read).equals(merge(tables[name]))


def test_large_tables_are_not_fetched_far_ahead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, receipts, fetched = Folder(str(tmp_path)), [], []
    file = io.BytesIO()
    pq.write_table(summarize([]).counts(), file)
    for shard in range(20):
        name = f"shards/{shard:05d}.counts.parquet"
        folder.write(name, file.getvalue())
        receipts.append(Receipt(shard, (Part(name, 100, ""),), 0, 0, 0, 0, 0.0, 1.0, "none", {}))
    real = Folder.read

    def read(self: Folder, name: str) -> bytes | None:
        fetched.append(name)
        return real(self, name)

    monkeypatch.setattr(Folder, "read", read)
    monkeypatch.setattr(publish, "_TABLE_BYTES", 0)
    monkeypatch.setattr(publish, "_AHEAD_BYTES", 250)
    for i, _ in enumerate(publish.read_tables(folder, "counts", receipts)):
        # Those before, this one, and one more.
        assert len(fetched) <= i + 2
    assert len(fetched) == 20
