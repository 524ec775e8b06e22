"""Publishes a run: its files become rows of a catalog's tables, by one commit a table.

A table has all of a run or nothing, since its files come in one snapshot, and has it once: whoever
commits has read a table without the run, and the catalog takes a commit only if the table is still
what was read. A process that dies leaves files that nothing names, never rows.
"""

from __future__ import annotations

import datetime
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import pyarrow as pa

from ..folder import Folder, StoreError
from ..run import Run, not_complete
from ..store import find_receipts
from .files import Files, OnProgress
from .settings import BESIDE, open_catalog, scrub
from .tables import PARTITION, PARTS, TABLES, Origin, make_table

if TYPE_CHECKING:
    from pyiceberg.catalog import Catalog
    from pyiceberg.manifest import DataFile
    from pyiceberg.table import Table, Transaction
    from pyiceberg.table.update.snapshot import UpdateSnapshot

NAMESPACE = "logitmill"
_ATTEMPTS, _LONGEST_WAIT = 20, 5.0
# How the files end in which Iceberg has a table's state.
_METADATA = ".metadata.json"

_T = TypeVar("_T")


@dataclass(frozen=True)
class Published:
    """What became of a run in a catalog."""

    origin: Origin
    added: dict[str, int]
    """Files that came into each table; 0 where the run was there already."""


def publish_run(
    run: Run,
    *,
    catalog: str = BESIDE,
    namespace: str = NAMESPACE,
    corpus: str | None = None,
    date: str | datetime.date | None = None,
    on_progress: OnProgress = lambda name, done, total: None,
) -> Published:
    """Make a complete run part of the tables of a catalog; does nothing where it is one.

    Token and document parts stay where they are, and have to: the tables name them. The table
    `runs` comes last, so that a run which is in it is in all of them.

    Args:
        run: a complete run.
        catalog: a name in pyiceberg's settings (`PYICEBERG_CATALOG__NAME__URI`, ~/.pyiceberg.yaml),
            or `beside`: SQLite in the folder `tables` beside the run.
        namespace: what the tables are in.
        corpus: what the corpus is called; default its URI with `*` for dates.
        date: of the run, default the day (UTC) on which it was complete.
        on_progress: told how far it is.

    Raises:
        ValueError: for a run that is not complete, a catalog that cannot be opened, or a table of
            other columns or partitions than the run's.
        RuntimeError: if others commit so often that it finds no gap.
    """
    if run.manifest is None:
        raise StoreError(f"run: {run.uri!r} is {not_complete(run.uri, run.plan)}")
    origin = Origin.of(run, corpus, date)
    opened = open_catalog(catalog, root_of(run.folder))
    num_shards = len(run.plan["corpus"]["shards"])
    receipts = list(find_receipts(run.folder, num_shards).values())
    if len(receipts) < num_shards:
        raise StoreError(
            f"run: {run.uri!r} has a manifest, but {num_shards - len(receipts)} of its "
            f"{num_shards} shards are not what their receipts say; score it again to mend it"
        )
    added = {}
    with _plain_errors(opened):
        for name in TABLES:
            if name in PARTS and name not in run.tiers:
                continue
            rows = None if name in PARTS else origin.add_to(make_table(name, run, receipts))
            files = Files(run, name, origin, rows)
            added[name] = _publish(opened, (namespace, name), files, origin, on_progress)
    return Published(origin, added)


def withdraw_run(
    run_key: str, *, catalog: str = BESIDE, root: Folder, namespace: str = NAMESPACE
) -> dict[str, int]:
    """Take a run out of all tables, for one that is to be moved or removed; its parts stay.

    Args:
        run_key: of the run, which need not exist any more.
        catalog: as of `publish_run`.
        root: the folder that the run is or was in.
        namespace: what the tables are in.

    Returns:
        Files that went out of each table.
    """
    from pyiceberg.exceptions import NoSuchTableError

    opened = open_catalog(catalog, root, make=False)
    gone = {}
    with _plain_errors(opened):
        # Readers believe `runs`, so it goes first.
        for name in reversed(TABLES):

            def remove(name: str = name) -> int:
                table = _hold_still(opened.load_table((namespace, name)))
                files = list(_files_of(table, run_key))
                if files:
                    with table.transaction() as change, _snapshot(change, run_key).overwrite() as s:
                        for file in files:
                            s.delete_data_file(file)
                return len(files)

            with suppress(NoSuchTableError):
                gone[name] = _retry(remove, name)
    return gone


def find_published(*, catalog: str = BESIDE, root: Folder, namespace: str = NAMESPACE) -> list[str]:
    """Keys of the runs in the tables of a catalog, sorted; arguments as of `withdraw_run`."""
    from pyiceberg.exceptions import NoSuchTableError

    opened = open_catalog(catalog, root, make=False)
    with _plain_errors(opened), suppress(NoSuchTableError):
        rows = opened.load_table((namespace, "runs")).scan(selected_fields=("run_key",)).to_arrow()
        return sorted(rows["run_key"].to_pylist())
    return []


def root_of(folder: Folder) -> Folder:
    """The folder that a run's folder is in."""
    return Folder(folder.address("").rstrip("/").rpartition("/")[0], folder.options)


def _publish(
    catalog: Catalog, identifier: tuple[str, str], files: Files, origin: Origin, tell: OnProgress
) -> int:
    """Files that came into the table; 0 if the run is in it."""
    name = identifier[1]
    table = _retry(lambda: _prepare_table(catalog, identifier, files.schema()), name)
    if _holds(table, origin.run_key):
        return 0
    # Once: to read thousands of footers takes longer than others take to commit.
    described = files.describe(table, tell)
    if not described:
        return 0

    def append() -> int:
        table = _hold_still(catalog.load_table(identifier))
        if _holds(table, origin.run_key):
            return 0
        with table.transaction() as change, _snapshot(change, origin.run_key).fast_append() as new:
            for file in described:
                new.append_data_file(file)
        return len(described)

    added = _retry(append, name)
    if not added:
        files.discard()
    return added


def _prepare_table(catalog: Catalog, identifier: tuple[str, str], schema: pa.Schema) -> Table:
    """The table, made if need be, with at least these columns."""
    from pyiceberg.exceptions import NoSuchTableError, TableAlreadyExistsError, ValidationError

    try:
        table = catalog.load_table(identifier)
    except NoSuchTableError:
        try:
            catalog.create_namespace_if_not_exists(identifier[0])
        except Exception:  # that of the database, where another process makes it as well
            if not catalog.namespace_exists(identifier[0]):
                raise
        with suppress(TableAlreadyExistsError):
            catalog.create_table(identifier, **_new_table(identifier[1]))
        table = catalog.load_table(identifier)
    found = tuple(field.name for field in table.spec().fields)
    if found != PARTITION:
        raise StoreError(
            f"catalog: {'.'.join(identifier)} is partitioned by {', '.join(found) or 'nothing'}, "
            f"not by {', '.join(PARTITION)}; name another namespace"
        )
    try:
        with table.transaction() as change, change.update_schema() as columns:
            columns.union_by_name(schema)
    except ValidationError as error:
        raise StoreError(f"catalog: {'.'.join(identifier)} has other columns: {error}") from None
    return table


def _new_table(name: str) -> dict[str, Any]:
    """A table of the columns of `PARTITION` alone, partitioned by them."""
    from pyiceberg.partitioning import PartitionField, PartitionSpec
    from pyiceberg.schema import Schema
    from pyiceberg.table import TableProperties
    from pyiceberg.transforms import IdentityTransform
    from pyiceberg.types import DateType, NestedField, StringType

    kinds = {"date": DateType()}
    schema = Schema(
        *(
            NestedField(at, name, kinds.get(name, StringType()), required=False)
            for at, name in enumerate(PARTITION, 1)
        )
    )
    partition = PartitionSpec(
        *(
            PartitionField(at, 999 + at, IdentityTransform(), name)
            for at, name in enumerate(PARTITION, 1)
        )
    )
    # Parts know their columns by name alone. Later columns come in by themselves.
    properties = {TableProperties.DEFAULT_NAME_MAPPING: schema.name_mapping.model_dump_json()}
    if name == "tokens":
        # Nobody looks for a token by what all tokens of a file are between.
        properties[TableProperties.DEFAULT_WRITE_METRICS_MODE] = "none"
        properties[f"{TableProperties.METRICS_MODE_COLUMN_CONF_PREFIX}.doc_id"] = "truncate(16)"
    return {"schema": schema, "partition_spec": partition, "properties": properties}


def _files_of(table: Table, run_key: str) -> Iterator[DataFile]:
    """A run's files in a table. Its partitions say which they are, so few manifests are read."""
    from pyiceberg.expressions import EqualTo

    of_run = EqualTo("run_key", run_key)  # type: ignore[call-arg, arg-type]
    return (task.file for task in table.scan(row_filter=of_run).plan_files())


def _holds(table: Table, run_key: str) -> bool:
    return next(_files_of(table, run_key), None) is not None


def _hold_still(table: Table) -> Table:
    """The table, with transactions that fail where another one came first.

    pyiceberg would put them on top of what is there by then, which may be the same run. The setting
    is of this object alone: a commit sends what it changes, and this is no change of the table.
    """
    from pyiceberg.table import TableProperties

    properties = {**table.metadata.properties, TableProperties.COMMIT_NUM_RETRIES: "0"}
    table.metadata = table.metadata.model_copy(update={"properties": properties})
    return table


def _snapshot(change: Transaction, run_key: str) -> UpdateSnapshot:
    return change.update_snapshot(snapshot_properties={"logitmill.run-key": run_key})


def _retry(action: Callable[[], _T], name: str) -> _T:
    """Its result, once nobody else's commit comes between."""
    from pyiceberg.exceptions import CommitFailedException, CommitStateUnknownException

    for attempt in range(_ATTEMPTS):
        try:
            return action()
        # One that may have come about has, or will find the table changed by the next.
        except (CommitFailedException, CommitStateUnknownException):
            time.sleep(random.uniform(0, min(_LONGEST_WAIT, 0.05 * 2**attempt)))
    raise RuntimeError(
        f"catalog: others have changed the table {name} {_ATTEMPTS} times before this could; "
        "publish again"
    )


@contextmanager
def _plain_errors(catalog: Catalog) -> Iterator[None]:
    """One line instead of an exception of a driver or a client, whose text shows addresses."""
    try:
        yield
    except (ValueError, RuntimeError):
        raise
    except Exception as error:
        name, said = catalog.name, scrub(error, catalog.properties)
        if name == BESIDE and isinstance(error, FileNotFoundError) and _METADATA in said:
            said += (
                "; its tables name their files by full path and were moved: move them back, or "
                "remove the folder tables and publish again"
            )
        raise OSError(f"catalog: {name!r} did not do as asked: {said}") from None
