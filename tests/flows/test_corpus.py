"""What a corpus gives: which documents, in which order, by which plan; what bad input gets."""

from __future__ import annotations

import bz2
import gzip
import io
import itertools
import json
import logging
import os
import random
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import s3fs
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from logitmill.engine.records import Document
from logitmill.flows.corpus import CorpusSpec, NothingLeft, Plan, hub, plan_corpus, read_shard
from logitmill.flows.corpus import ids as ids_module
from logitmill.flows.corpus.ids import find_twin
from logitmill.flows.corpus.locations import Location


def documents(spec: CorpusSpec, plan: Plan | None = None) -> list[Document]:
    plan = plan or plan_corpus(spec)
    assert [shard.index for shard in plan.shards] == list(range(len(plan.shards)))
    return [document for shard in plan.shards for document in read_shard(spec, shard)]


def read(uri: Any, **settings: Any) -> list[Document]:
    return documents(CorpusSpec(uri=str(uri), **settings))


def refusal(uri: Any, **settings: Any) -> str:
    """The message of the ValueError that planning raises: one line, no chain of library errors."""
    with pytest.raises(ValueError, match=r"\A[^\n]+\Z") as raised:
        plan_corpus(CorpusSpec(uri=str(uri), **settings))
    assert raised.value.__cause__ is None
    assert raised.value.__suppress_context__ or raised.value.__context__ is None
    return str(raised.value)


def texts(found: list[Document]) -> list[str | None]:
    return [document.text for document in found]


def ids(found: list[Document]) -> list[str]:
    return [document.doc_id for document in found]


def write_lines(path: Path, rows: list[Any]) -> Path:
    path.write_bytes(b"".join(json.dumps(row).encode() + b"\n" for row in rows))
    return path


def write_parquet(path: Path, columns: Any, row_group_size: int | None = None) -> Path:
    table = columns if isinstance(columns, pa.Table) else pa.table(columns)
    pq.write_table(table, path, row_group_size=row_group_size)
    return path


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A folder of text files, some to be left out."""
    root = tmp_path / "stories"
    for name, content in {
        "b.txt": "bee",
        "a.py": "print('a')\r\n",
        "deep/er/c.md": "sea",
        "deep/d": "no suffix",
        "other/e.c": "int e;",
        ".hidden": "x",
        "deep/.git/config": "x",
        "deep/__pycache__/c.pyc": "x",
        "_SUCCESS": "",
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content.encode())
    return root


# ---- text files


def test_folder_gives_a_document_a_file_in_order_of_path(tree: Path) -> None:
    found = read(tree)
    assert ids(found) == ["a.py", "b.txt", "deep/d", "deep/er/c.md", "other/e.c"]
    assert texts(found) == ["print('a')\r\n", "bee", "no suffix", "sea", "int e;"]
    assert [document.source for document in found] == [
        "stories",
        "stories",
        "deep",
        "deep",
        "other",
    ]
    assert {document.status for document in found} == {"ok"}


def test_glob_names_files_from_its_fixed_part_on(tree: Path) -> None:
    assert ids(read(f"{tree}/**/*.md")) == ["deep/er/c.md"]
    assert ids(read(f"{tree}/deep/*")) == ["d"]
    assert read(f"{tree}/deep/*")[0].source == "deep"
    assert ids(read(f"{tree}/[ab].*")) == ["a.py", "b.txt"]
    assert ids(read(f"{tree}/.h*")) == [".hidden"], "what a glob spells out is not left out"


def test_single_file_is_named_by_itself(tree: Path) -> None:
    (document,) = read(tree / "b.txt")
    assert (document.doc_id, document.text, document.source) == ("b.txt", "bee", "b")
    assert read(f"file://{tree}/b.txt") == [document]
    assert read(tree / "b.txt", source="mine")[0].source == "mine"


def test_path_with_wildcards_in_its_name_is_a_path_if_it_exists(tmp_path: Path) -> None:
    folder = tmp_path / "data[1]"
    folder.mkdir()
    (folder / "x.txt").write_text("x")
    assert ids(read(folder)) == ["x.txt"]


def test_links_count_as_what_they_lead_to(tree: Path) -> None:
    (tree / "link.txt").symlink_to(tree / "b.txt")
    (tree / "broken.txt").symlink_to(tree / "nowhere")
    found = {document.doc_id: document.text for document in read(tree)}
    assert found["link.txt"] == "bee"
    assert "broken.txt" not in found


@pytest.mark.parametrize(
    "content",
    [
        b"a\r\nb\rc\n",
        b"\xef\xbb\xbfmarked",
        b" \n\t ",
        "é\u2028\0".encode(),
        b"x" * 10_000_000,
    ],
    ids=["newlines", "byte order mark", "only whitespace", "separators", "10 MB on one line"],
)
def test_bytes_in_are_bytes_scored(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.txt").write_bytes(content)
    (document,) = read(tmp_path / "x.txt")
    assert document.text is not None
    assert (document.text.encode(), document.status) == (content, "ok")


@pytest.mark.parametrize(
    ("suffix", "compress"),
    [(".gz", gzip.compress), (".zst", zstandard.compress), (".bz2", bz2.compress)],
)
def test_compressed_files_are_read_to_the_end(
    tmp_path: Path, suffix: str, compress: Callable[[bytes], bytes]
) -> None:
    line = json.dumps({"text": "hé\r\n"}).encode() + b"\n"
    (tmp_path / f"a.py{suffix}").write_bytes(compress(b"first\r\n") + compress(b"second"))
    (tmp_path / f"b.jsonl{suffix}").write_bytes(compress(line * 2) + compress(line))
    found = read(tmp_path)
    assert texts(found) == ["first\r\nsecond", *["hé\r\n"] * 3], "both frames of each file"
    assert ids(found) == [
        f"a.py{suffix}",
        *(f"b.jsonl{suffix}#{i * len(line)}" for i in range(3)),
    ]
    assert found[1].source == "b"


@pytest.mark.parametrize(
    ("suffix", "compress"), [(".gz", gzip.compress), (".zst", zstandard.compress)]
)
def test_cut_off_compression_is_said_in_a_row(
    tmp_path: Path, suffix: str, compress: Callable[[bytes], bytes]
) -> None:
    noise = random.Random(0).randbytes(3_000_000).hex()
    lines = "".join(
        json.dumps({"text": noise[i : i + 2000]}) + "\n" for i in range(0, 6_000_000, 2000)
    )
    whole = compress(lines.encode())
    (tmp_path / f"x.jsonl{suffix}").write_bytes(whole[: len(whole) * 3 // 4])
    whole = compress(noise.encode())
    (tmp_path / f"x.txt{suffix}").write_bytes(whole[: len(whole) // 2])
    *good, broken, text = read(tmp_path)
    assert 1000 < len(good) < 3000
    assert {document.status for document in good} == {"ok"}
    for document in (broken, text):
        assert (document.status, document.text) == ("invalid_value", None)
        assert "cannot be decompressed" in (document.error or "")
    assert text.doc_id == f"x.txt{suffix}"


def test_unreadable_text_files_are_rows_that_say_so(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"")
    (tmp_path / "b.txt").write_bytes(b"ab\xffcd")
    (tmp_path / "c.txt").write_bytes(b"fine")
    empty, broken, fine = read(tmp_path)
    assert (empty.status, empty.text, empty.doc_id) == ("empty", None, "a.txt")
    assert "empty" in (empty.error or "")
    assert (broken.status, broken.text) == ("invalid_utf8", None)
    assert "byte 2 " in (broken.error or "")
    assert (fine.status, fine.error, fine.text) == ("ok", None, "fine")


def test_file_names_that_are_not_utf8_give_ids_that_are(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"n\xffme.txt")).write_text("x")
    spec = CorpusSpec(uri=str(tmp_path))
    plan = Plan.from_dict(json.loads(json.dumps(plan_corpus(spec).to_dict())))
    (document,) = documents(spec, plan)
    assert document.doc_id == "n\\udcffme.txt"
    assert document.text == "x"


# ---- JSON lines


def test_json_lines_are_named_by_offset(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(
        b'\xef\xbb\xbf{"text": "a"}\r\n\n  \n{"text": "\\u00e9\\n", "more": 1}\n{"text": " "}'
    )
    found = read(path)
    assert texts(found) == ["a", "é\n", " "]
    assert ids(found) == ["x.jsonl#0", "x.jsonl#22", "x.jsonl#54"]
    assert {document.source for document in found} == {"x"}


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    lines=st.lists(
        st.one_of(
            st.text(st.characters(exclude_categories=["Cs"]), max_size=40).map(
                lambda text: json.dumps({"text": text}, ensure_ascii=False).encode()
            ),
            st.sampled_from([b"", b"  ", b"not json", b"\xff", b'{"text": ' + b"1" * 300 + b"}"]),
        ),
        min_size=1,
        max_size=12,
    ),
    last_newline=st.booleans(),
    shard_bytes=st.integers(1, 700),
)
def test_every_line_is_in_exactly_one_range(
    tmp_path: Path, lines: list[bytes], last_newline: bool, shard_bytes: int
) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"text": "head"}\n' + b"\n".join(lines) + b"\n" * last_newline)
    whole = read(path, shard_bytes=1 << 30)
    assert len(whole) == 1 + sum(bool(line.strip()) for line in lines)
    assert read(path, shard_bytes=shard_bytes) == whole


def test_every_cut_of_a_small_file_gives_the_same_documents(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "x.jsonl", [{"text": "é" * n} for n in (1, 0, 7, 2)])
    whole = read(path)
    for shard_bytes in range(1, path.stat().st_size + 2):
        assert read(path, shard_bytes=shard_bytes) == whole
    plan = plan_corpus(CorpusSpec(uri=str(path), shard_bytes=10))
    assert [(p.start, p.stop) for s in plan.shards for p in s.pieces][:3] == [
        (0, 10),
        (10, 20),
        (20, 30),
    ]


def test_bad_lines_are_rows_that_say_so(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    lines = [
        (b'{"text": "good", "n": 0}', "ok", None),
        (b"[1, 2]", "invalid_value", "not an object but a value of type list"),
        (b'{"text": ', "invalid_value", "not JSON"),
        (b"[" * 200_000, "invalid_value", "not JSON"),
        (b'{"n": 1}', "invalid_value", "no column 'text'; there are: n"),
        (b'{"text": null}', "invalid_value", "column 'text' needs text, found null"),
        (b'{"text": 3}', "invalid_value", "column 'text' needs text, found a value of type int"),
        (b'{"text": ""}', "empty", "empty"),
        (b'{"text": "a\xff"}', "invalid_utf8", None),
        (b'{"text": "\xc3\xa9\\ud800"}', "invalid_utf8", "byte 2 of 'text'"),
        (b'{"text": "last"}', "ok", None),
    ]
    path.write_bytes(b"\n".join(line for line, _, _ in lines))
    found = read(path)
    assert [document.status for document in found] == [status for _, status, _ in lines]
    for document, (_, status, error) in zip(found, lines, strict=True):
        assert (document.error is None) == (status == "ok")
        assert error is None or error in (document.error or "")
    at = path.read_bytes().index(b"\xff")
    assert f"byte {at} of the file" in (found[8].error or "")
    assert ids(found)[1] == "x.jsonl#25"


# ---- CSV


def test_csv_rows_are_named_by_offset(tmp_path: Path) -> None:
    content = (
        b'\xef\xbb\xbftext,site,n\r\n\r\none,a,1\r\n"two, ""three""\nand\r\n",b,2\r\n\xc3\xa9,c,3'
    )
    (tmp_path / "x.csv").write_bytes(content)
    found = read(tmp_path / "x.csv", source_column="site")
    assert texts(found) == ["one", 'two, "three"\nand\r\n', "é"]
    assert ids(found) == [f"x.csv#{content.index(start)}" for start in (b"one", b'"two', b"\xc3")]
    assert [document.source for document in found] == ["a", "b", "c"]
    assert ids(read(tmp_path / "x.csv", id_column="n")) == ["1", "2", "3"]
    (tmp_path / "y.tsv.gz").write_bytes(gzip.compress(b"text\tn\na,b\t1\n"))
    assert texts(read(tmp_path / "y.tsv.gz")) == ["a,b"]
    assert texts(read(tmp_path / "y.tsv.gz", format="text")) == ["text\tn\na,b\t1\n"]


def test_every_cut_of_a_csv_file_gives_the_same_documents(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    rows = ["one", '"t\nw\no"', '"a"b', '""', "short,2,3", '"é\n\n"', "\xff"]
    path.write_bytes("".join(f"{row},n\n" for row in ["text", *rows]).encode("latin-1") + b'"open')
    whole = read(path)
    assert len(whole) == 8
    for shard_bytes in range(1, path.stat().st_size + 2):
        assert read(path, shard_bytes=shard_bytes) == whole
    for limit in (1, 4, 9):
        assert read(path, limit=limit, shard_bytes=5) == whole[:limit]
    assert len(plan_corpus(CorpusSpec(uri=str(path), shard_bytes=10)).shards) > 3


def test_bad_csv_rows_are_rows_that_say_so(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_bytes(
        b'text,n\n"a"b,1\nfew\nmany,2,3\n,4\na\xff,5\n' + b"x" * 10_000_000 + b',6\n"open,7\n'
    )
    found = read(path)
    assert [(document.status, document.error) for document in found] == [
        ("invalid_value", "the row is not CSV: ',' expected after '\"'"),
        ("invalid_value", "the row has 1 values, and the first row names 2"),
        ("invalid_value", "the row has 3 values, and the first row names 2"),
        ("empty", "nothing to score: the document is empty"),
        ("invalid_utf8", "byte 1 of 'text' is not UTF-8 (invalid start byte)"),
        ("ok", None),
        ("invalid_value", "the row is not CSV: unexpected end of data"),
    ]


def test_csv_mistakes(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("body;n\na;1\n")
    assert "text_column='text': no such column in 'x.csv'. There are: body;n." in refusal(path)
    assert "ids_column='n': lists needed" in refusal(path, ids_column="n")
    path.write_bytes("body,n\n".encode("utf-16"))
    assert "no such column in 'x.csv'" in refusal(path)
    path.write_text('"te"xt\na\n')
    assert "its first row, which names the columns, cannot be read" in refusal(path)
    path.write_text("")
    assert "holds no documents" in refusal(path)


def test_ten_megabytes_on_one_line(tmp_path: Path) -> None:
    path = write_lines(
        tmp_path / "x.jsonl", [{"text": "a"}, {"text": "b" * 10_000_000}, {"text": "c"}]
    )
    assert [len(text or "") for text in texts(read(path, shard_bytes=1 << 20))] == [
        1,
        10_000_000,
        1,
    ]


# ---- Parquet


def test_parquet_is_cut_at_row_groups(tmp_path: Path) -> None:
    rows = [f"{n:04d}" * 100 for n in range(100)]
    path = write_parquet(tmp_path / "x.parquet", {"text": rows}, row_group_size=10)
    spec = CorpusSpec(uri=str(path), shard_bytes=10_000)
    plan = plan_corpus(spec)
    cuts = [(piece.start, piece.stop) for shard in plan.shards for piece in shard.pieces]
    assert cuts == [(n, n + 10) for n in range(0, 100, 10)]
    assert [len(shard.pieces) for shard in plan.shards] == [2] * 5
    assert [shard.num_documents for shard in plan.shards] == [20] * 5
    found = documents(spec, plan)
    assert texts(found) == rows
    assert ids(found) == [f"x.parquet#{n}" for n in range(100)]


@pytest.mark.parametrize("row_group_size", [1, 7, 100])
def test_every_cut_of_a_parquet_file_gives_the_same_documents(
    tmp_path: Path, row_group_size: int
) -> None:
    rows = ["x" * (n % 13) + str(n) for n in range(200)]
    path = write_parquet(tmp_path / "x.parquet", {"text": rows}, row_group_size)
    whole = read(path)
    assert texts(whole) == rows
    for shard_bytes in (1, 50, 333, 1000, 1 << 30):
        assert read(path, shard_bytes=shard_bytes) == whole
    plan = plan_corpus(CorpusSpec(uri=str(path), shard_bytes=200))
    assert max(shard.num_documents or 0 for shard in plan.shards) < 60, "large row groups are cut"


def test_parquet_batches_read_only_needed_columns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_parquet(tmp_path / "x.parquet", {"text": ["a"], "lang": ["de"], "big": ["b"]})
    asked: list[list[str]] = []
    original = pq.ParquetFile.iter_batches

    def spy(self: Any, *args: Any, **kwargs: Any) -> Any:
        asked.append(kwargs["columns"])
        return original(self, *args, **kwargs)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", spy)
    (document,) = read(path, language_column="lang")
    assert document.language == "de"
    assert asked == [["text", "lang"]]


def test_no_thread_of_arrows_reads_a_parquet_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [f"text {n}" for n in range(300)]
    path = write_parquet(tmp_path / "x.parquet", {"text": rows, "id": rows}, row_group_size=50)
    readers: set[threading.Thread] = set()

    class Watched(io.FileIO):
        def readinto(self, buffer: Any) -> int | None:
            readers.add(threading.current_thread())
            return super().readinto(buffer)

    def watch(self: Location, name: str) -> io.BufferedReader:
        return io.BufferedReader(Watched(path))

    spec = CorpusSpec(uri=str(path), id_column="id")
    plan = plan_corpus(spec)
    monkeypatch.setattr(Location, "open", watch)
    assert texts(documents(spec, plan)) == rows
    # Python knows those that it has not started as dummies.
    assert readers and not any(isinstance(t, threading._DummyThread) for t in readers)


def test_bad_parquet_values_are_rows_that_say_so(tmp_path: Path) -> None:
    raw = pa.array([b"good", None, b"", b"ab\xff"], pa.binary())
    unchecked = pa.Array.from_buffers(pa.string(), 4, raw.buffers())
    for values in (raw, unchecked, unchecked.dictionary_encode(), raw.cast(pa.large_binary())):
        path = write_parquet(tmp_path / "x.parquet", {"text": values})
        found = read(path)
        assert [d.status for d in found] == ["ok", "invalid_value", "empty", "invalid_utf8"]
        assert "column 'text' needs text, found null" in (found[1].error or "")
        assert "byte 2 " in (found[3].error or "")


def test_garbled_row_group_costs_its_rows_only(tmp_path: Path) -> None:
    rows = [random.Random(n).randbytes(500).hex() for n in range(30)]
    path = tmp_path / "x.parquet"
    pq.write_table(
        pa.table({"text": rows}),
        path,
        row_group_size=10,
        use_dictionary=False,
        write_page_checksum=True,
    )
    column = pq.read_metadata(path).row_group(1).column(0)
    content = bytearray(path.read_bytes())
    middle = column.data_page_offset + column.total_compressed_size // 2
    content[middle : middle + 50] = bytes(50)
    path.write_bytes(content)
    found = read(path)
    assert ids(found) == [f"x.parquet#{n}" for n in range(30)]
    assert [d.status for d in found] == ["ok"] * 10 + ["invalid_value"] * 10 + ["ok"] * 10
    assert "row group 1 is garbled" in (found[10].error or "")
    assert texts(found)[20:] == rows[20:]


def test_garbled_page_costs_no_row_before_it(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    rows = [random.Random(n).randbytes(500).hex() for n in range(300)]
    pq.write_table(
        pa.table({"text": rows}),
        path,
        use_dictionary=False,
        write_page_checksum=True,
        data_page_size=20_000,
        write_batch_size=10,
    )
    column = pq.read_metadata(path).row_group(0).column(0)
    content = bytearray(path.read_bytes())
    late = column.data_page_offset + column.total_compressed_size * 9 // 10
    content[late : late + 50] = bytes(50)
    path.write_bytes(content)
    for shard_bytes in (1 << 30, 50_000):
        found = read(path, shard_bytes=shard_bytes)
        assert ids(found) == [f"x.parquet#{n}" for n in range(300)]
        assert texts(found)[:128] == rows[:128]
        assert [d.status for d in found[-20:]] == ["invalid_value"] * 20


# ---- columns


ROWS = [
    {"id": 7, "body": "one", "from": "web", "lang": "en", "before": "zero", "ids": [1, 2]},
    {"id": 8, "body": "two", "from": None, "lang": None, "before": "", "ids": [3]},
]


@pytest.fixture(params=["jsonl", "parquet", "dataset"])
def table(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[list[dict[str, Any]]], Path]:
    """Writes rows in one of the formats of tables."""

    def write(rows: list[dict[str, Any]]) -> Path:
        path = tmp_path / f"table.{request.param}"
        if request.param == "jsonl":
            return write_lines(path, rows)
        if request.param == "parquet":
            return write_parquet(path, pa.Table.from_pylist(rows))
        return save_dataset(path, rows)

    return write


def save_dataset(path: Path, rows: list[dict[str, Any]]) -> Path:
    import datasets

    datasets.disable_progress_bars()
    datasets.Dataset(pa.Table.from_pylist(rows)).save_to_disk(str(path))
    return path


def test_columns_make_documents(table: Callable[[list[dict[str, Any]]], Path]) -> None:
    found = read(
        table(ROWS),
        text_column="body",
        id_column="id",
        source_column="from",
        language_column="lang",
        context_column="before",
        source="unsaid",
    )
    assert found == [
        Document("7", text="one", context="zero", source="web", language="en"),
        Document("8", text="two", context="", source="unsaid"),
    ]


def test_ids_column(table: Callable[[list[dict[str, Any]]], Path]) -> None:
    path = table(
        [*ROWS, {**ROWS[0], "ids": []}, {**ROWS[0], "ids": None}, {**ROWS[0], "ids": [1, None]}]
    )
    *found, empty, null, hole = read(path, ids_column="ids")
    assert [np.asarray(document.input_ids).tolist() for document in found] == [[1, 2], [3]]
    assert all(np.asarray(document.input_ids).dtype == np.int64 for document in found)
    assert [document.text for document in found] == [None, None]
    assert [document.status for document in (empty, null, hole)] == [
        "empty",
        *["invalid_value"] * 2,
    ]
    assert "null" in (hole.error or "")


def test_messages_column(table: Callable[[list[dict[str, Any]]], Path]) -> None:
    chat = [{"role": "user", "content": "hi"}, {"role": "tool", "content": "x", "name": "f"}]
    path = table([{"chat": chat}, {"chat": []}, {"chat": None}, {"chat": [{"role": "user"}]}])
    good, empty, null, half = read(path, messages_column="chat")
    assert good.messages == chat, "keys that Arrow filled with nulls are not there"
    assert (good.text, good.status) == (None, "ok")
    assert (empty.status, null.status, half.status) == ("empty", *["invalid_value"] * 2)
    assert "chat[0]" in (half.error or "")
    assert "'content'" in (half.error or "")


@pytest.mark.parametrize("value", ["hi", {"role": "user"}, [3], [{"role": 1, "content": "x"}]])
def test_what_is_no_messages_is_a_row_that_says_so(tmp_path: Path, value: Any) -> None:
    (document,) = read(write_lines(tmp_path / "x.jsonl", [{"m": value}]), messages_column="m")
    assert (document.status, document.messages) == ("invalid_value", None)
    assert "'m" in (document.error or "")


@pytest.mark.parametrize("value", ["1 2", [1, "2"], [True], [1.0], [2**70]])
def test_what_is_no_ids_is_a_row_that_says_so(tmp_path: Path, value: Any) -> None:
    (document,) = read(write_lines(tmp_path / "x.jsonl", [{"i": value}]), ids_column="i")
    assert (document.status, document.input_ids) == ("invalid_value", None)
    assert "'i" in (document.error or "")


@pytest.mark.parametrize("value", [None, True, 1.5, ["x"], "\ud800"])
def test_a_row_without_usable_id_keeps_its_place_as_id(tmp_path: Path, value: Any) -> None:
    path = write_lines(tmp_path / "x.jsonl", [{"text": "a", "k": value}, {"text": "b", "k": "b1"}])
    nameless, named = read(path, id_column="k")
    assert nameless.doc_id == "x.jsonl#0"
    assert nameless.status == ("invalid_utf8" if isinstance(value, str) else "invalid_value")
    assert "'k'" in (nameless.error or "")
    assert named.doc_id == "b1"


def test_a_row_with_an_error_keeps_its_id_and_labels(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "x.jsonl", [{"text": None, "k": "n", "s": 5}])
    (document,) = read(path, id_column="k", source_column="s")
    assert (document.doc_id, document.source, document.status) == ("n", "5", "invalid_value")


# ---- the plan


def mixed(root: Path) -> Path:
    root.mkdir(parents=True)
    for n in range(20):
        (root / f"t{n:02d}.txt").write_text(f"text {n} " * n)
    write_lines(root / "l.jsonl", [{"text": f"line {n}"} for n in range(50)])
    write_parquet(root / "p.parquet", {"text": [f"row {n}" for n in range(50)]}, 5)
    (root / "z.jsonl.gz").write_bytes(gzip.compress(b'{"text": "zip"}\n' * 9))
    return root


def test_mixed_folder_and_plan_as_json(tmp_path: Path) -> None:
    spec = CorpusSpec(uri=str(mixed(tmp_path / "m")), shard_bytes=500)
    plan = plan_corpus(spec)
    stored = Plan.from_dict(json.loads(json.dumps(plan.to_dict())))
    assert stored == plan
    found = documents(spec, stored)
    assert len(found) == len(set(ids(found))) == 20 + 50 + 50 + 9
    assert found == read(spec.uri), "whatever the shards"
    assert len({(d.doc_id.split("#")[0]) for d in found}) == len(plan.inputs) == 23


def test_shards_hold_neighbours_up_to_their_size(tmp_path: Path) -> None:
    for name, size in {"_": 300, "a": 40, "b": 50, "c": 20, "d": 500, "e": 1, "f": 100}.items():
        (tmp_path / name).write_bytes(b"x" * size)
    plan = plan_corpus(CorpusSpec(uri=str(tmp_path), shard_bytes=101))
    shards = [[piece.uri for piece in shard.pieces] for shard in plan.shards]
    assert shards == [["_"], ["a", "b"], ["c"], ["d"], ["e", "f"]]
    assert [shard.num_bytes for shard in plan.shards] == [300, 90, 20, 500, 101]
    assert (plan.num_bytes, plan.num_documents) == (1011, 7)


def test_plan_does_not_depend_on_listing_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = mixed(tmp_path / "m")
    spec = CorpusSpec(uri=str(root), shard_bytes=300)
    plan = plan_corpus(spec)
    local = type(fsspec.filesystem("file"))
    original = local.find
    for seed in range(3):

        def shuffled(self: Any, *args: Any, seed: int = seed, **kwargs: Any) -> Any:
            listed = list(original(self, *args, **kwargs).items())
            random.Random(seed).shuffle(listed)
            return dict(listed)

        monkeypatch.setattr(local, "find", shuffled)
        assert plan_corpus(spec) == plan
        assert plan_corpus(spec).to_dict() == plan.to_dict()


def test_a_copy_elsewhere_has_the_same_fingerprint_and_plan(tmp_path: Path) -> None:
    one = mixed(tmp_path / "one" / "m")
    two = tmp_path / "two" / "m"
    shutil.copytree(one, two, copy_function=shutil.copyfile)
    here = plan_corpus(CorpusSpec(uri=str(one)))
    there = plan_corpus(CorpusSpec(uri=f"file://{two}", storage_options={"auto_mkdir": False}))
    assert here == there
    assert documents(CorpusSpec(uri=str(two)), here) == read(one), "read by the other's plan"
    memory = fsspec.filesystem("memory")
    memory.put(str(one), "/copied/m", recursive=True)
    assert plan_corpus(CorpusSpec(uri="memory://copied/m")).fingerprint == here.fingerprint
    memory.rm("/copied", recursive=True)


def test_fingerprint_is_of_what_decides_the_documents(tmp_path: Path) -> None:
    root = mixed(tmp_path / "m")
    spec = CorpusSpec(uri=str(root))
    before = plan_corpus(spec).fingerprint
    assert plan_corpus(replace(spec, shard_bytes=99)).fingerprint == before
    others = [
        replace(spec, limit=3),
        replace(spec, limit=4),
        replace(spec, source="s"),
        replace(spec, format="text"),
        replace(spec, uri=f"{root}/*.txt"),
        replace(spec, uri=f"{root}/p.parquet"),
    ]
    prints = [plan_corpus(other).fingerprint for other in others]
    (root / "t03.txt").write_text("text 3 text 3 TEXT 3 ")
    prints.append(plan_corpus(spec).fingerprint)
    (root / "t03.txt").rename(root / "u.txt")
    prints.append(plan_corpus(spec).fingerprint)
    shutil.move(root, tmp_path / "renamed")
    prints.append(plan_corpus(replace(spec, uri=str(tmp_path / "renamed"))).fingerprint)
    assert len({before, *prints}) == 1 + len(prints)


@pytest.mark.parametrize("limit", [1, 2, 10, 49, 50, 51, 100, 101, 119, 128, 129, 1000])
def test_limit_gives_the_first_documents(tmp_path: Path, limit: int) -> None:
    root = mixed(tmp_path / "m")
    whole = read(root)
    spec = CorpusSpec(uri=str(root), limit=limit, shard_bytes=200)
    plan = plan_corpus(spec)
    assert documents(spec, plan) == whole[:limit]
    assert plan.num_documents == min(limit, len(whole))
    full = plan_corpus(replace(spec, limit=None))
    assert len(plan.shards) < len(full.shards) or limit > 119


def test_limit_needs_only_the_inputs_that_it_reaches(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", [{"text": "a"}, {"text": "b"}])
    (tmp_path / "b.parquet").write_bytes(b"garbled")
    plan = plan_corpus(CorpusSpec(uri=str(tmp_path), limit=2))
    assert [input_.uri for input_ in plan.inputs] == ["a.jsonl"]


@pytest.mark.parametrize("scheme", ["file", "memory"])
def test_a_corpus_that_changed_is_refused(tmp_path: Path, scheme: str) -> None:
    root = f"{scheme}://{tmp_path}/changing"
    fs = fsspec.filesystem(scheme)
    fs.makedirs(root)
    fs.pipe(f"{root}/a.txt", b"one")
    fs.pipe(f"{root}/b.jsonl", b'{"text": "x"}\n')
    spec = CorpusSpec(uri=root)
    (shard,) = plan_corpus(spec).shards
    clock = itertools.count()

    def change(name: str, content: bytes) -> None:
        fs.pipe(f"{root}/{name}", content)
        if scheme == "file":
            os.utime(tmp_path / "changing" / name, (0, next(clock)))

    assert texts(list(read_shard(spec, shard))) == ["one", "x"]
    change("a.txt", b"one")
    assert texts(list(read_shard(spec, shard))) == ["one", "x"], "rewritten with the same content"
    for name, content in {"a.txt": b"two", "b.jsonl": b'{"text": "x"}\n\n'}.items():
        kept = fs.cat_file(f"{root}/{name}")
        change(name, content)
        with pytest.raises(ValueError, match=f"corpus changed.*{name}"):
            list(read_shard(spec, shard))
        change(name, kept)
    fs.rm(f"{root}/a.txt")
    with pytest.raises(ValueError, match="corpus changed"):
        list(read_shard(spec, shard))


def test_another_size_is_a_change_whatever_the_time(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one")
    spec = CorpusSpec(uri=str(path))
    plan = plan_corpus(spec)
    times = path.stat()
    path.write_text("one more")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(ValueError, match="corpus changed"):
        documents(spec, plan)


def test_shards_of_one_memory_file_can_be_read_at_once() -> None:
    fs = fsspec.filesystem("memory")
    lines = (b'{"text": "%01000d"}\n' % n for n in range(9000))
    fs.pipe("/at-once/x.jsonl", b"".join(lines))
    spec = CorpusSpec(uri="memory://at-once/x.jsonl", shard_bytes=3_200_000)
    streams = [read_shard(spec, shard) for shard in plan_corpus(spec).shards]
    assert len(streams) == 3
    firsts = [next(stream) for stream in streams]
    found = [
        document for first, rest in zip(firsts, streams, strict=True) for document in (first, *rest)
    ]
    assert [int(text or "") for text in texts(found)] == list(range(9000))
    fs.rm("/at-once", recursive=True)


# ---- Hugging Face datasets


def test_saved_dataset_with_splits(tmp_path: Path) -> None:
    import datasets

    datasets.disable_progress_bars()
    parts = {name: datasets.Dataset.from_dict({"text": [name] * 30}) for name in ("train", "test")}
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "saved"))
    spec = CorpusSpec(uri=str(tmp_path / "saved"), split="test", shard_bytes=12)
    plan = plan_corpus(spec)
    assert len(plan.shards) > 5
    found = documents(spec, plan)
    assert texts(found) == ["test"] * 30
    assert ids(found) == [f"saved#{n}" for n in range(30)]
    assert {document.source for document in found} == {"saved"}
    assert plan.fingerprint != plan_corpus(replace(spec, split="train")).fingerprint
    message = refusal(spec.uri, split="tset")
    assert "split='tset'" in message
    assert "train, test" in message
    assert "Did you mean 'test'?" in message
    assert "revision='main'" in refusal(spec.uri, revision="main")


def test_saved_dataset_that_changed_is_refused(tmp_path: Path) -> None:
    path = save_dataset(tmp_path / "d", [{"text": "a"}])
    spec = CorpusSpec(uri=str(path))
    (shard,) = plan_corpus(spec).shards
    shutil.copytree(path, tmp_path / "elsewhere" / "d")
    assert plan_corpus(CorpusSpec(uri=str(tmp_path / "elsewhere" / "d"))) == plan_corpus(spec)
    shutil.rmtree(path)
    save_dataset(path, [{"text": "b"}])
    with pytest.raises(ValueError, match="corpus changed"):
        list(read_shard(spec, shard))


def test_named_dataset_through_load_dataset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    datasets.disable_progress_bars()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "named").mkdir()
    write_parquet(tmp_path / "named" / "train.parquet", {"text": ["a", "b", "c"]})
    uri = f"datasets:{tmp_path}/named"
    assert ids(read(uri)) == ["named#0", "named#1", "named#2"]
    assert texts(read(uri, split="train[:2]")) == ["a", "b"]
    assert texts(read(uri, limit=1)) == ["a"]
    assert "split='tst'" in refusal(uri, split="tst")
    assert "subset='nosuch'" in refusal(uri, subset="nosuch")
    assert "format='text'" in refusal(uri, format="text")
    assert "text_column='txt'" in refusal(uri, text_column="txt")


def test_bare_name_is_a_dataset_unless_it_is_a_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "data").write_text("x")
    asked: list[Any] = []

    def load(*args: Any) -> Any:
        asked.append(args)
        raise FileNotFoundError("Dataset 'org/name' doesn't exist (token sesame)")

    monkeypatch.setattr(hub, "_load", load)
    message = refusal(
        "org/name", subset="s", revision="r", split="dev", storage_options={"token": "sesame"}
    )
    assert asked == [("org/name", "s", "dev", "r", "sesame")]
    assert "uri='org/name'" in message
    assert "no Hugging Face dataset" in message
    assert "sesame" not in message
    assert texts(read("here/data")) == ["x"]
    assert "Did you mean 'data'?" in refusal("here/dat")
    assert len(asked) == 1
    assert "datasets:org/name" in refusal("datasets:")


# ---- S3


@pytest.fixture(scope="module")
def s3() -> Iterator[dict[str, Any]]:
    """storage_options of an S3 server with a bucket "corpora"."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    options = {
        "endpoint_url": f"http://{host}:{port}",
        "key": "KEYKEYKEY",
        "secret": "SESAMESESAME",
    }
    fsspec.filesystem("s3", **options).mkdir("corpora")
    yield options
    server.stop()


def test_s3_gives_the_same_documents(tmp_path: Path, s3: dict[str, Any]) -> None:
    root = mixed(tmp_path / "m")
    fs = fsspec.filesystem("s3", **s3)
    fs.put(f"{root}/", "corpora/m/", recursive=True)
    fs.touch("corpora/m/.hidden")
    for uri in ("s3://corpora/m", "s3://corpora/m/*"):
        spec = CorpusSpec(uri=uri, storage_options=s3, shard_bytes=1000)
        plan = plan_corpus(spec)
        assert documents(spec, plan) == read(root)
        etags = {input_.uri: input_.etag for input_ in plan.inputs}
        assert etags["t01.txt"] == fs.info("corpora/m/t01.txt")["ETag"].strip('"')
        for shown in (repr(spec), repr(plan), json.dumps(plan.to_dict())):
            assert not any(value in shown for value in s3.values())
    # Written by somebody else, while our own client remembers its listings.
    other = fsspec.filesystem("s3", **s3, skip_instance_cache=True)
    fs.find("corpora/m")
    changed = other.cat_file("corpora/m/l.jsonl").replace(b"line 7", b"LINE 7")
    other.pipe("corpora/m/l.jsonl", changed)
    with pytest.raises(ValueError, match=r"corpus changed.*l\.jsonl"):
        documents(spec, plan)
    assert plan_corpus(spec).fingerprint != plan.fingerprint


def test_s3_mistakes_are_said_without_credentials(s3: dict[str, Any]) -> None:
    wrong = {
        **s3,
        "endpoint_url": "http://127.0.0.1:9/SESAMESESAME",
        "config_kwargs": {"retries": {"max_attempts": 0}},
    }
    messages = [
        refusal("s3://corpora/nosuch", storage_options=s3),
        refusal("s3://corpora/nosuch*", storage_options=s3),
        refusal("s3://nobucket/x", storage_options=s3),
        refusal("s3://corpora/x", storage_options=wrong),
    ]
    for message in messages:
        assert "uri='s3://" in message
        assert not any(value in message for value in s3.values())
    assert "cannot be opened" in messages[3]


# ---- mistakes, found before work starts


def test_nothing_there(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    message = refusal(f"{tree}/*.tex")
    assert "matches nothing" in message
    assert str(tree) in message
    assert "a.py" in message
    assert "Did you mean 'stories'?" in refusal(tree.parent / "storis" / "deep")
    assert "Did you mean 'stories'?" in refusal(f"{tree.parent}/storis/*.txt")
    assert "no such file or folder" in refusal(tree / "c.txt")
    assert "is a file" in refusal(tree / "b.txt" / "c")
    assert "only folders" in refusal(f"{tree}/dee*")
    (tree / "empty").mkdir()
    (tree / "empty" / ".keep").touch()
    assert "holds no files" in refusal(tree / "empty")
    os.mkfifo(tree / "pipe")
    assert "neither a file nor a folder" in refusal(tree / "pipe")
    (tree / "empty" / "x.jsonl").touch()
    assert "holds no documents" in refusal(tree / "empty")


def test_missing_columns(table: Callable[[list[dict[str, Any]]], Path]) -> None:
    path = table(ROWS)
    message = refusal(path, text_column="bodi")
    assert "text_column='bodi'" in message
    assert "Did you mean 'body'?" in message
    assert "id, body, from, lang, before, ids" in message
    for setting in ("id", "source", "language", "context"):
        message = refusal(path, text_column="body", **{f"{setting}_column": "nosuch"})
        assert f"{setting}_column='nosuch'" in message
    for setting in ("ids", "messages"):
        assert f"{setting}_column='nosuch'" in refusal(path, **{f"{setting}_column": "nosuch"})


def test_columns_of_the_wrong_type(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "x.parquet", {"text": ["a"], "n": [1.5], "ids": [[1]]})
    assert "text_column='ids': text needed" in refusal(path, text_column="ids")
    assert "'x.parquet' holds double" in refusal(path, text_column="n")
    assert "ids_column='text'" in refusal(path, ids_column="text")
    assert "messages_column='ids'" in refusal(path, messages_column="ids")
    assert "id_column='n'" in refusal(path, id_column="n")


def test_columns_of_text_files(tree: Path) -> None:
    message = refusal(tree, id_column="url")
    assert "id_column='url'" in message
    assert "only text files" in message


@pytest.mark.parametrize("keep", [0, 3, 50, -1])
def test_truncated_parquet(tmp_path: Path, keep: int) -> None:
    good = write_parquet(tmp_path / "good.parquet", {"text": ["a"]})
    (tmp_path / "cut.parquet").write_bytes(good.read_bytes()[:keep])
    message = refusal(tmp_path)
    assert "'cut.parquet'" in message
    assert "not a whole Parquet file" in message


def test_json_that_is_not_lines(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(json.dumps([{"text": "a"}], indent=1))
    message = refusal(path)
    assert "'x.json'" in message
    assert "JSON object" in message
    assert texts(read(path, format="text")) == [path.read_text()]
    (tmp_path / "y.jsonl.gz").write_bytes(b"garbage")
    assert "cannot be decompressed" in refusal(tmp_path / "y.jsonl.gz")


def test_format_goes_before_suffix(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "x.log", [{"text": "a"}])
    assert texts(read(path)) == ['{"text": "a"}\n']
    assert texts(read(path, format="jsonl")) == ["a"]
    assert "'x.log'" in refusal(path, format="parquet")
    (tmp_path / "x.parquet.gz").touch()
    assert "'x.parquet.gz'" in refusal(tmp_path / "x.parquet.gz")


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"limit": 0}, "limit=0"),
        ({"limit": -1}, "limit=-1"),
        ({"shard_bytes": 0}, "shard_bytes=0"),
        ({"format": "parqet"}, "format='parqet' is unknown. Did you mean 'parquet'?"),
        ({"messages_column": "m", "ids_column": "i"}, "messages_column='m' and ids_column='i'"),
        ({"messages_column": "m", "text_column": "t"}, "text_column='t' and messages_column='m'"),
        ({"ids_column": "i", "context_column": "c"}, "context_column='c'"),
        ({"id_column": ""}, "id_column=''"),
        ({"split": "test"}, "split='test'"),
        ({"subset": "s"}, "subset='s'"),
        ({"revision": "r"}, "revision='r'"),
        ({"uri": ""}, "uri=''"),
        ({"uri": "nosuch://x"}, "nosuch://"),
        ({"uri": "ftp://me:sesame@host/x"}, "uri='ftp://***@host/x' holds a password"),
    ],
)
def test_settings_that_cannot_be(tree: Path, wrong: dict[str, Any], said: str) -> None:
    message = refusal(**{"uri": str(tree), **wrong})
    assert said in message
    assert "sesame" not in message


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    fsspec.register_implementation(
        "needy", "no_such_package.fs.NeedyFileSystem", errtxt="Install it", clobber=True
    )
    message = refusal("needy://bucket/x")
    assert "needy://" in message
    assert "pip install no_such_package" in message


def test_library_errors_are_one_line_without_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing(type(fsspec.filesystem("memory"))):  # type: ignore[misc]
        protocol = "failing"

        def info(self, path: str, **kwargs: Any) -> Any:
            raise PermissionError(f"denied for SESAME at https://me:pw@host/x?sig=abc\n{path}")

    fsspec.register_implementation("failing", Failing, clobber=True)
    message = refusal("failing://x", storage_options={"client": {"secret": "SESAME"}})
    assert "PermissionError: denied for ***" in message
    for secret in ("SESAME", "pw", "abc"):
        assert secret not in message


def test_unreachable_file_is_a_passing_error_not_a_bad_document(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = CorpusSpec(uri=str(tree))
    plan = plan_corpus(spec)

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise ConnectionResetError("reset by peer")

    for method, where in (("open", r"file 'a\.py' cannot be read"), ("info", "cannot be opened")):
        monkeypatch.setattr(type(fsspec.filesystem("file")), method, fail)
        with pytest.raises(OSError, match=f"{where}.*reset by peer"):
            documents(spec, plan)


# ---- duplicate ids


def test_duplicate_ids_name_value_and_places(
    table: Callable[[list[dict[str, Any]]], Path],
) -> None:
    rows = [{"text": str(n), "key": n if n != 90 else 40} for n in range(100)]
    path = table(rows)
    message = refusal(path, id_column="key")
    assert "id_column='key'" in message
    assert "'40' stands twice" in message
    if path.suffix == ".jsonl":
        lines = path.read_bytes().splitlines(keepends=True)
        places = [sum(map(len, lines[:n])) for n in (40, 90)]
    else:
        places = [40, 90]
    assert all(f"{path.name}#{place}" in message for place in places)
    assert len(read(path, id_column="key", limit=90)) == 90, "only what is read must differ"


def test_duplicate_ids_across_files(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", [{"text": "a", "k": "x"}, {"text": "b", "k": None}])
    write_parquet(tmp_path / "b.parquet", {"text": ["c", "d"], "k": ["y", "x"]})
    message = refusal(tmp_path, id_column="k")
    assert "a.jsonl#0" in message
    assert "b.parquet#1" in message


def test_equal_hashes_are_not_equal_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"text": "a", "k": k} for k in "xyz"])
    monkeypatch.setattr(ids_module, "_hash", lambda doc_id: 1)
    assert ids(read(path, id_column="k")) == ["x", "y", "z"]


def test_more_ids_than_memory_holds_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ids_module, "_HELD", 64)
    real, sizes = ids_module._twice, []

    def twice(hashes: np.ndarray) -> np.ndarray:
        sizes.append(len(hashes))
        return real(hashes)

    monkeypatch.setattr(ids_module, "_twice", twice)
    for count in (63, 64, 65, 5_000):
        sizes.clear()
        many = [(f"id {n}", f"place {n}") for n in range(count)]
        assert find_twin(lambda many=many: many) is None
        assert sum(sizes) == count and max(sizes) < 64
        twin = [*many, ("id 7", "the end")]
        assert find_twin(lambda twin=twin: twin) == ("id 7", "place 7", "the end")


def test_one_of_many_equal_hashes_is_a_twin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ids_module, "_SUSPECTS", 2)
    monkeypatch.setattr(ids_module, "_hash", lambda doc_id: int(doc_id) // 2)
    many = [(str(n), f"place {n}") for n in range(20)]
    assert find_twin(lambda: many) is None
    assert find_twin(lambda: [*many, ("17", "the end")]) == ("17", "place 17", "the end")


# ---- large corpora


def test_no_more_is_fetched_than_is_read(
    s3: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    line = (json.dumps({"text": "word " * 2_000}) + "\n").encode()
    fs = s3fs.S3FileSystem(**s3)
    fs.pipe_file("corpora/large/a.jsonl", line * 2_500)
    fetched: list[int] = []
    real = s3fs.S3FileSystem._call_s3

    async def note(self: Any, method: str, *args: Any, **settings: Any) -> Any:
        answer = await real(self, method, *args, **settings)
        fetched.extend([answer["ContentLength"]] if method == "get_object" else [])
        return answer

    monkeypatch.setattr(s3fs.S3FileSystem, "_call_s3", note)
    spec = CorpusSpec(uri="s3://corpora/large", storage_options=s3)
    plan = plan_corpus(spec)
    assert 0 < sum(fetched) < 4 << 20 < plan.inputs[0].size // 4
    fetched.clear()
    assert sum(1 for _ in read_shard(spec, plan.shards[1])) > 800
    assert sum(fetched) < plan.shards[1].num_bytes + (4 << 20)


def test_files_are_looked_into_side_by_side(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for n in range(4):
        write_parquet(tmp_path / f"{n}.parquet", {"text": ["a"]})
    together, real = threading.Barrier(4), Location.open

    def open_together(self: Location, *args: Any) -> Any:
        together.wait(timeout=10)
        return real(self, *args)

    monkeypatch.setattr(Location, "open", open_together)
    assert plan_corpus(CorpusSpec(uri=str(tmp_path))).num_documents == 4


def test_what_is_left_out_is_not_looked_into(tmp_path: Path) -> None:
    write_parquet(tmp_path / "new.parquet", {"text": ["a"]})
    (tmp_path / "old.parquet").write_bytes(b"no Parquet")
    assert "not a whole Parquet file" in refusal(tmp_path)
    plan = plan_corpus(CorpusSpec(uri=str(tmp_path)), lambda input_: input_.uri == "old.parquet")
    assert [input_.uri for input_ in plan.inputs] == ["new.parquet"]
    with pytest.raises(NothingLeft):
        plan_corpus(CorpusSpec(uri=str(tmp_path)), lambda input_: True)
