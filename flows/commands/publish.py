"""`logitmill publish`."""

from __future__ import annotations

from typing import Annotated

import typer

from ..progress import counted
from .mistakes import or_exit
from .options import ENDPOINT_HELP
from .terminal import show_counts


def publish(
    run: Annotated[str, typer.Argument(help="URI of a run, or of a folder of runs: all of them.")],
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
    or remove it.

    A catalog NAME is set up as for pyiceberg, in ~/.pyiceberg.yaml or the environment:
    `PYICEBERG_CATALOG__NAME__URI`, as `postgresql+psycopg://...` or the `https://...` of a REST
    catalog, and `PYICEBERG_CATALOG__NAME__WAREHOUSE`, as `s3://bucket/tables`. What opens the
    storage is in the environment too (`AWS_ACCESS_KEY_ID`, ...).

    Examples:

    `logitmill publish runs`

    `logitmill publish s3://scores/6f3a09c2d41b77e0 --catalog lake --corpus web`
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
    from ..catalog import check_catalog, publish_run, root_of, withdraw_run
    from ..folder import Folder, StoreError, endpoint_options
    from ..run import find_runs, open_run
    from ..store import MANIFEST

    for name, value in (("corpus", corpus), ("date", date)):
        if withdraw and value is not None:
            raise ValueError(f"{name}: {value!r} does not go with --withdraw; leave it out")
    options = endpoint_options(uri, endpoint_url)
    found = find_runs(Folder(uri, options))
    if not found:
        raise StoreError(f"run: there is no run in {uri!r}")
    whole = [folder for folder in found if folder.size(MANIFEST) is not None]
    if len(found) == 1:
        whole = found  # What is wrong with it is said by name.
    check_catalog(catalog, root_of(found[0]))
    for folder in whole:
        opened = open_run(folder.uri, partial=withdraw, storage_options=options)
        if withdraw:
            root = root_of(folder)
            key = opened.plan["run_key"]
            changed = withdraw_run(key, catalog=catalog, root=root, namespace=namespace)
            said, done = "withdrawn", "was not there"
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
            changed, said, done = published.added, "published", "is there already"
        files = {name: number for name, number in changed.items() if number}
        what = ", ".join(f"{name} {counted(number, 'file')}" for name, number in files.items())
        typer.echo(f"{folder.uri}  {f'{said}: {what}' if files else done}")
    if len(whole) < len(found):
        typer.echo(f"left out: {counted(len(found) - len(whole), 'run')} not complete yet")
