"""`logitmill publish`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from ..progress import counted
from .mistakes import or_exit
from .options import ENDPOINT_HELP
from .terminal import show_counts

if TYPE_CHECKING:
    from ..folder import Folder

_MOST_KEYS = 5


def publish(
    run: Annotated[
        str,
        typer.Argument(
            help="URI of a run, or of a folder of runs: all of them. With --withdraw also the URI "
            "that a run had which is gone."
        ),
    ],
    catalog: Annotated[
        str,
        typer.Option(
            help="A catalog of pyiceberg's settings, or beside: SQLite in the folder tables "
            "beside the runs."
        ),
    ] = "beside",
    namespace: Annotated[str, typer.Option(help="What the tables are in.")] = "logitmill",
    corpus: Annotated[
        str | None,
        typer.Option(help="What to call the corpus; default its URI with * for dates."),
    ] = None,
    date: Annotated[
        str | None,
        typer.Option(help="Of the run, as 2026-11-23; default the day it was complete (UTC)."),
    ] = None,
    withdraw: Annotated[
        bool, typer.Option("--withdraw", help="Take the runs out of the tables; files stay.")
    ] = False,
    endpoint_url: Annotated[str | None, typer.Option(help=ENDPOINT_HELP)] = None,
) -> None:
    """Make complete runs tables of an Apache Iceberg catalog: scores, tokens, counts, shards, runs.

    Each table gets all of a run in one commit, or nothing, and `runs` comes last. A run that is
    there already stays as it is, so that this can be repeated, after a kill as well. Parts are not
    copied: the tables name them where they lie, and need them there. Withdraw a run before you move
    or remove it; one that is gone is withdrawn by the URI that it had.

    A catalog NAME is set up as for pyiceberg, in ~/.pyiceberg.yaml or the environment:
    `PYICEBERG_CATALOG__NAME__URI`, as `postgresql+psycopg://...` or the `https://...` of a REST
    catalog, and `PYICEBERG_CATALOG__NAME__WAREHOUSE`, as `s3://bucket/tables`. What opens the
    storage is in the environment too (`AWS_ACCESS_KEY_ID`, ...).

    Examples:

    `logitmill publish runs`

    `logitmill publish s3://scores/6f3a09c2d41b77e0 --catalog lake --corpus web`

    `logitmill publish runs/6f3a09c2d41b77e0 --withdraw`
    """
    or_exit(lambda: _publish(run, catalog, namespace, corpus, date, withdraw, endpoint_url))


def _publish(
    uri: str,
    catalog: str,
    namespace: str,
    corpus: str | None,
    date: str | None,
    withdraw: bool,
    endpoint_url: str | None,
) -> None:
    for name, value in (("--corpus", corpus), ("--date", date)):
        if withdraw and value is not None:
            raise ValueError(f"{name}: {value!r} does not go with --withdraw; leave it out")

    from ..catalog import check_catalog, publish_run, root_of
    from ..folder import Folder, endpoint_options
    from ..run import find_runs, no_run, open_run
    from ..store import MANIFEST

    options = endpoint_options(uri, endpoint_url)
    place = Folder(uri, options, field="run")
    found = find_runs(place)
    if not found and not withdraw:
        raise no_run(place)
    if not found:
        check_catalog(catalog, root_of(place))
        _withdraw_gone(place, catalog, namespace)
        return
    whole = [folder for folder in found if folder.size(MANIFEST) is not None]
    if len(found) == 1:
        whole = found  # What is wrong with it is said by name.
    check_catalog(catalog, root_of(found[0]))
    for folder in whole:
        opened = open_run(folder.uri, partial=withdraw, storage_options=options)
        if withdraw:
            if not _withdraw(folder, opened.plan["run_key"], catalog, namespace):
                typer.echo(f"{folder.uri}  was not there")
        else:
            with show_counts() as on_progress:
                published = publish_run(
                    opened,
                    catalog=catalog,
                    namespace=namespace,
                    corpus=corpus,
                    date=date,
                    on_progress=on_progress,
                )
            what = _name_files(published.added)
            typer.echo(f"{folder.uri}  {f'published: {what}' if what else 'is there already'}")
    if len(whole) < len(found):
        typer.echo(f"left out: {counted(len(found) - len(whole), 'run')} not complete yet")


def _withdraw(folder: Folder, key: str, catalog: str, namespace: str) -> bool:
    """Whether there was something to take out, which is said."""
    from ..catalog import root_of, withdraw_run

    gone = withdraw_run(key, catalog=catalog, root=root_of(folder), namespace=namespace)
    what = _name_files(gone)
    if what:
        typer.echo(f"{folder.uri}  withdrawn: {what}")
    return bool(what)


def _withdraw_gone(place: Folder, catalog: str, namespace: str) -> None:
    """Withdraw a run that is where it was no more, by its key; ValueError if no table has it."""
    from ..catalog import BESIDE, find_published, root_of

    if catalog == BESIDE and "tables" in place.folders():
        # The folder of runs itself, which are all gone.
        keys = find_published(catalog=catalog, root=place, namespace=namespace)
        raise ValueError(
            f"run: there is no run in {place.uri!r} any more; withdraw each by the URI that it "
            f"had, {place.uri}/KEY; {_name_keys(keys)}"
        )
    key = place.uri.rpartition("/")[2]
    if not _withdraw(place, key, catalog, namespace):
        keys = find_published(catalog=catalog, root=root_of(place), namespace=namespace)
        raise ValueError(
            f"run: there is no run in {place.uri!r}, nor one of key {key!r} in the tables of "
            f"{catalog!r}; give RUNS/KEY, the URI that it had; {_name_keys(keys)}"
        )


def _name_keys(keys: Sequence[str]) -> str:
    some = ", ".join(keys[:_MOST_KEYS]) + (", ..." if len(keys) > _MOST_KEYS else "")
    return f"keys there: {some}" if keys else "the tables hold no run"


def _name_files(changed: Mapping[str, int]) -> str:
    files = {name: number for name, number in changed.items() if number}
    return ", ".join(f"{name} {counted(number, 'file')}" for name, number in files.items())
