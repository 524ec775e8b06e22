"""DuckDB with the views of this folder, over a folder of runs or over the tables of a catalog.

`runs.sql` makes tables of a folder of runs; `scored.sql` says which of them are asked; each other
file is a question, and begins with it. Views read what is there when they are asked.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from ..catalog import PARTITION, open_catalog
from ..catalog.tables import PARTS
from ..folder import Folder, StoreError, endpoint_options, one_line
from ..store import MANIFEST

if TYPE_CHECKING:
    import duckdb
    from pyiceberg.catalog import Catalog

_FOLDER = Path(__file__).parent
_TABLES, _SCORED = "runs.sql", "scored.sql"
_ROOT = "getvariable('root')"
# What the views of a folder of runs have as well.
_OF_CATALOG = ("runs", "shards", "counts", "scores")


def find_questions() -> dict[str, str]:
    """The views that answer a question, by name, each with its question."""
    found = {}
    for path in _files():
        comment = [line[3:] for line in path.read_text().splitlines() if line.startswith("-- ")]
        found[path.stem] = " ".join(comment).split("? ")[0] + "?"
    return found


def make_sql(root: str) -> str:
    """Statements for any DuckDB (1.3 or newer) that make the views over the runs below `root`."""
    place = Folder(root).address("").rstrip("/").removeprefix("file://")
    return "\n".join(
        path.read_text().replace(_ROOT, _quote(place))
        for path in (_FOLDER / _TABLES, _FOLDER / _SCORED, *_files())
    )


def connect(
    root: str,
    *,
    catalog: str | None = None,
    namespace: str = "logitmill",
    storage_options: Mapping[str, Any] | None = None,
) -> duckdb.DuckDBPyConnection:
    """A DuckDB in memory that has the views: `connect("runs").sql("FROM worst_sources")`.

    Args:
        root: a folder of runs, on any fsspec URI. Those that are complete count.
        catalog: read the tables that runs of `root` were published in instead, as they are now:
            the name of a catalog in pyiceberg's settings, or `beside`.
        namespace: what these tables are in.
        storage_options: what fsspec opens `root` with.

    Raises:
        ValueError: if there is no run, or nothing published.
    """
    folder = Folder(root, storage_options, field="run")
    db = _open(":memory:")
    if not folder.is_local:
        db.register_filesystem(folder.filesystem)
    if catalog is None:
        _make(db, folder, make_sql(root))
    else:
        _add_tables(db, open_catalog(catalog, folder), namespace)
        for path in (_FOLDER / _SCORED, *_files()):
            db.execute(path.read_text())
    return db


def write_database(root: str, path: str, *, endpoint_url: str | None = None) -> None:
    """A DuckDB file that holds the views and no data, for dashboards that open such files.

    Where `root` is on S3, who opens the file needs DuckDB's extension httpfs.

    Raises:
        ValueError: if there is no run, or the file is there and no database.
    """
    folder = Folder(root, endpoint_options(root, endpoint_url), field="run")
    db = _open(path)
    try:
        if not folder.is_local:
            db.register_filesystem(folder.filesystem)
        _make(db, folder, make_sql(root))
    finally:
        db.close()


def _open(path: str) -> duckdb.DuckDBPyConnection:
    if find_spec("duckdb") is None:
        raise StoreError("database: views need duckdb: pip install 'logitmill[queries]'")
    import duckdb

    try:
        return duckdb.connect(path)
    except duckdb.Error as error:
        raise StoreError(f"database: {path!r} cannot be opened: {one_line(error)}") from None


def _make(db: duckdb.DuckDBPyConnection, folder: Folder, sql: str) -> None:
    whole = any(folder.below(name).size(MANIFEST) is not None for name in folder.folders())
    if not whole:
        raise StoreError(
            f"run: there is no complete run in {folder.uri!r}; give the folder that runs are in"
        )
    db.execute(sql)


def _add_tables(db: duckdb.DuckDBPyConnection, catalog: Catalog, namespace: str) -> None:
    """Views of the data files of a catalog's tables, which DuckDB reads by itself as they are."""
    from pyiceberg.exceptions import NoSuchTableError

    for name in _OF_CATALOG:
        try:
            table = catalog.load_table((namespace, name))
        except NoSuchTableError:
            raise StoreError(
                f"catalog: {catalog.name!r} has no table {namespace}.{name}; publish a run first"
            ) from None
        rows = []
        for task in table.scan().plan_files():
            if task.delete_files:
                raise StoreError(
                    f"catalog: rows of {namespace}.{name} were deleted one by one, which only "
                    "readers of Iceberg know; rewrite its data files"
                )
            values = [task.file.partition[at] for at in range(len(PARTITION))]
            rows.append([_place(task.file.file_path), *values])
        if not rows:
            raise StoreError(f"catalog: {namespace}.{name} holds no run; publish one first")
        db.execute(
            f"CREATE TABLE files_of_{name} (path VARCHAR, model VARCHAR, corpus VARCHAR, "
            "days INTEGER, run_key VARCHAR)"
        )
        db.executemany(f"INSERT INTO files_of_{name} VALUES (?, ?, ?, ?, ?)", rows)
        paths = ", ".join(_quote(row[0]) for row in rows)
        within = () if name in PARTS else PARTITION
        # A run that is not in `runs` yet is not in all tables.
        known = "" if name == "runs" else "WHERE f.run_key IN (SELECT run_key FROM runs)"
        with _gone_files(name):
            db.execute(
                f"CREATE VIEW {name} AS SELECT f.model, f.corpus, "
                f"DATE '1970-01-01' + f.days AS date, f.run_key, "
                f"t.* EXCLUDE ({', '.join(['filename', *within])}) "
                f"FROM read_parquet([{paths}], union_by_name = true, filename = true) AS t "
                f"JOIN files_of_{name} AS f ON t.filename = f.path {known}"
            )


@contextmanager
def _gone_files(name: str) -> Iterator[None]:
    """StoreError for a data file that is where the table has it no more."""
    import duckdb

    try:
        yield
    except duckdb.IOException as error:
        said = str(error).splitlines()[0]
        if "No files found" not in said:
            raise
        raise StoreError(
            f"catalog: a file of {name} is gone ({said}); withdraw its run by the URI that it had, "
            "or put it back"
        ) from None


def _files() -> list[Path]:
    return sorted(p for p in _FOLDER.glob("*.sql") if p.name not in (_TABLES, _SCORED))


def _place(uri: str) -> str:
    """A data file as DuckDB names it."""
    return unquote(urlsplit(uri).path) if uri.startswith("file:") else uri


def _quote(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"
