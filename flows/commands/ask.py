"""`logitmill ask`."""

from __future__ import annotations

import shlex
import sys
from typing import Annotated

import typer

from .mistakes import or_exit
from .options import ENDPOINT_HELP


def ask(
    runs: Annotated[str, typer.Argument(help="URI of a folder of runs.")],
    question: Annotated[
        str | None,
        typer.Argument(help="A question's name, or SQL over the views; default lists them."),
    ] = None,
    limit: Annotated[int, typer.Option(help="Rows to show.")] = 20,
    csv: Annotated[bool, typer.Option("--csv", help="All rows, as CSV.")] = False,
    catalog: Annotated[
        str | None,
        typer.Option(help="Ask the tables that runs were published in: beside, or its name."),
    ] = None,
    namespace: Annotated[
        str, typer.Option(help="With --catalog: what the tables are in.")
    ] = "logitmill",
    sql: Annotated[
        bool, typer.Option("--sql", help="Print the views' own SQL, for any DuckDB.")
    ] = False,
    database: Annotated[
        str | None,
        typer.Option(help="Write a DuckDB file with the views and no data, for dashboards."),
    ] = None,
    endpoint_url: Annotated[str | None, typer.Option(help=ENDPOINT_HELP)] = None,
) -> None:
    """Answer a data team's questions from the complete runs in a folder, by DuckDB.

    The views are over the tables `runs`, `shards`, `counts` and `scores`. Where a model scored the
    same corpus in the same way twice, the later run counts.

    Examples:

    `logitmill ask runs`

    `logitmill ask runs worst_sources`

    `logitmill ask s3://scores/runs keep_the_middle --csv > middle.csv`

    `logitmill ask runs "SELECT doc_id, bits_per_byte FROM scores WHERE bits_per_byte > 3"`

    `logitmill ask runs --sql | duckdb -init /dev/stdin`
    """

    def answer() -> None:
        for name, value in (("sql", sql), ("database", database)):
            if value and (question is not None or catalog is not None):
                raise ValueError(f"{name}: it goes with no question and no catalog; leave them out")

        from ..folder import endpoint_options
        from ..views import connect, find_questions, make_sql, write_database

        if sql:
            typer.echo(make_sql(runs), nl=False)
        elif database is not None:
            write_database(runs, database, endpoint_url=endpoint_url)
            typer.echo(database)
        elif question is None:
            for name, asked in find_questions().items():
                typer.echo(f"{name:22} {asked}")
            typer.echo(f"ask one: {shlex.join(['logitmill', 'ask', runs, name])}")
        else:
            options = endpoint_options(runs, endpoint_url)
            db = connect(runs, catalog=catalog, namespace=namespace, storage_options=options)
            _answer(db, question, None if csv else limit)

    or_exit(answer)


def _answer(db, question: str, limit: int | None) -> None:  # type: ignore[no-untyped-def]
    import duckdb

    from ..views import find_questions

    is_sql = " " in question.strip()
    if not is_sql:
        views = [row[0] for row in db.execute("SELECT view_name FROM duckdb_views()").fetchall()]
        if question not in views:
            known = ", ".join(find_questions())
            raise ValueError(f"question: {question!r} is not one of {known}, nor SQL")
    try:
        if limit is None:
            db.execute(
                f"COPY ({question if is_sql else f'FROM {question}'}) TO '/dev/stdout' "
                "(FORMAT csv, HEADER)"
            )
        else:
            found = db.sql(question if is_sql else f"FROM {question}")
            shown = found.limit(limit)
            shown.show(max_rows=limit, max_width=0 if sys.stdout.isatty() else 10_000)
            if len(found.limit(limit + 1)) > limit:
                typer.echo(f"the first {limit} rows; --limit shows more, --csv all of them")
    except duckdb.Error as error:
        raise ValueError(f"question: {' '.join(str(error).split())}") from None
