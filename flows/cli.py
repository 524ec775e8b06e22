"""The `logitmill` command. Imports what is heavy only once it is needed."""

from __future__ import annotations

import os
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from .commands.ask import ask
from .commands.bench import bench
from .commands.compare import compare
from .commands.filter import filter
from .commands.follow import follow
from .commands.inspect import inspect
from .commands.mistakes import say_error
from .commands.publish import publish
from .commands.report import report
from .commands.score import score
from .commands.vocabulary import vocabulary


class _PlainFlags:
    """Of a command whose help shows no type of a flag, which takes no value."""

    def get_params(self, ctx: Any) -> list[Any]:
        found = super().get_params(ctx)  # type: ignore[misc]
        for param in found:
            if getattr(param, "is_flag", False):
                param.metavar = ""
        return found


class _Command(_PlainFlags, TyperCommand):
    pass


class _Group(_PlainFlags, TyperGroup):
    pass


app = typer.Typer(
    name="logitmill",
    cls=_Group,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="""
Run a causal language model over a corpus and keep what it thought of every token.

**Start here:** `logitmill score MODEL CORPUS --out runs`

MODEL is a folder in Hugging Face layout, its URI or a Hub id. CORPUS is a file, a folder, a
glob on any fsspec URI (Parquet, JSON lines, CSV, text, code) or a Hugging Face dataset
(`datasets:NAME`).
""",
)

for command in (score, follow, report, compare, filter, vocabulary, publish, ask, inspect, bench):
    app.command(cls=_Command)(command)

# Of the click that typer brings with it, whichever that is.
_UsageError: Any = typer.BadParameter.__bases__[0]


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"logitmill {version('logitmill')}")
        raise typer.Exit


@app.callback()
def _command(
    version: Annotated[
        bool,
        typer.Option(
            "--version", is_eager=True, callback=_show_version, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    pass


def main() -> None:
    """Entry point of the `logitmill` command."""
    os.environ.setdefault("DO_NOT_TRACK", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    try:
        sys.exit(app(prog_name="logitmill", standalone_mode=False))
    except _UsageError as error:
        if not error.format_message():
            # No arguments at all: the help has been shown.
            sys.exit(2)
        where = f" (see {error.ctx.command_path} --help)" if error.ctx else ""
        # What pydantic, which some versions of typer check choices with, calls any mistake.
        say_error(f"{error.format_message().replace('Value error, ', '', 1)}{where}")
        sys.exit(2)
    except typer.Abort:
        sys.exit(130)


if __name__ == "__main__":
    main()
