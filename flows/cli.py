"""The `logitmill` command. Imports what is heavy only once it is needed."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .progress import TALLY

if TYPE_CHECKING:
    from .request import Prepared
    from .run import Run

app = typer.Typer(
    name="logitmill",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="""
Run a causal language model over a corpus and keep what it thought of every token.

**Start here:** `logitmill score MODEL CORPUS --out runs`

MODEL is a folder in Hugging Face layout or a Hub id. CORPUS is a file, a folder, a glob on any
fsspec URI (Parquet, JSON lines, text, code) or a Hugging Face dataset (`datasets:NAME`).
""",
)


class Tier(StrEnum):
    """What to keep besides document scores."""

    tokens = "tokens"
    logits = "logits"


class StoredDtype(StrEnum):
    """Dtypes that log-probabilities are stored in."""

    float32 = "float32"
    float16 = "float16"


# Of the click that typer brings with it, whichever that is.
_UsageError: Any = typer.BadParameter.__bases__[0]

_ENDPOINT_HELP = "S3 server to use where it is not Amazon's."
_FAILED_SHOWN = 3
_INPUT, _RECIPE, _ENGINE = "What is read", "How it is scored", "How it is computed"


@app.command()
def score(
    model: Annotated[str, typer.Argument(help="Model folder or Hub id.")],
    corpus: Annotated[str, typer.Argument(help="File, folder, glob, URI or datasets:NAME.")],
    out: Annotated[
        str, typer.Option(help="Folder for runs: a path, s3://bucket/folder, any fsspec URI.")
    ] = "runs",
    keep: Annotated[
        list[Tier] | None,
        typer.Option(help="Also keep a record a token, or the logits. May be given twice."),
    ] = None,
    recipe: Annotated[
        str,
        typer.Option(
            help="rolling, disjoint, strided, llamacpp, truncated or conditional, with an "
            "optional context: rolling-1024.",
            rich_help_panel=_RECIPE,
        ),
    ] = "rolling",
    context: Annotated[
        int | None,
        typer.Option(
            help="Longest window in tokens; default the model's.", rich_help_panel=_RECIPE
        ),
    ] = None,
    overlap: Annotated[
        int | None,
        typer.Option(
            help="Context tokens before a later window's first target (rolling).",
            rich_help_panel=_RECIPE,
        ),
    ] = None,
    stride: Annotated[
        int | None,
        typer.Option(help="Tokens between windows (strided).", rich_help_panel=_RECIPE),
    ] = None,
    prefix: Annotated[
        str | None,
        typer.Option(
            help="Token in front of a document: auto (BOS, else EOS), bos, eos, none, tokenizer "
            "or an id.",
            rich_help_panel=_RECIPE,
        ),
    ] = None,
    text_column: Annotated[
        str, typer.Option(help="Column of a table that is scored.", rich_help_panel=_INPUT)
    ] = "text",
    messages_column: Annotated[
        str | None, typer.Option(help="Score chat messages instead.", rich_help_panel=_INPUT)
    ] = None,
    ids_column: Annotated[
        str | None, typer.Option(help="Score token ids instead.", rich_help_panel=_INPUT)
    ] = None,
    context_column: Annotated[
        str | None,
        typer.Option(help="Read but not scored (conditional).", rich_help_panel=_INPUT),
    ] = None,
    id_column: Annotated[
        str | None, typer.Option(help="Column of unique document ids.", rich_help_panel=_INPUT)
    ] = None,
    source_column: Annotated[
        str | None, typer.Option(help="Column that summaries go by.", rich_help_panel=_INPUT)
    ] = None,
    language_column: Annotated[
        str | None, typer.Option(help="Column that summaries go by.", rich_help_panel=_INPUT)
    ] = None,
    format: Annotated[
        str | None,
        typer.Option(help="parquet, jsonl or text; default by suffix.", rich_help_panel=_INPUT),
    ] = None,
    subset: Annotated[
        str | None, typer.Option(help="Configuration of a dataset.", rich_help_panel=_INPUT)
    ] = None,
    split: Annotated[
        str, typer.Option(help="Split of a dataset.", rich_help_panel=_INPUT)
    ] = "train",
    limit: Annotated[
        int | None, typer.Option(help="At most so many documents.", rich_help_panel=_INPUT)
    ] = None,
    endpoint_url: Annotated[
        str | None,
        typer.Option(help=_ENDPOINT_HELP, rich_help_panel=_INPUT),
    ] = None,
    shard_mb: Annotated[
        float, typer.Option(help="Megabytes of corpus a shard.", rich_help_panel=_ENGINE)
    ] = 8.0,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1.", rich_help_panel=_ENGINE)
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="float32, bfloat16, float16; default float32 on a CPU, else the checkpoint's.",
            rich_help_panel=_ENGINE,
        ),
    ] = None,
    batch_tokens: Annotated[
        int | None, typer.Option(help="Tokens of a packed batch.", rich_help_panel=_ENGINE)
    ] = None,
    logits_memory_mb: Annotated[
        int, typer.Option(help="Megabytes that logits may take.", rich_help_panel=_ENGINE)
    ] = 256,
    logits_dtype: Annotated[
        StoredDtype, typer.Option(help="How logits are stored.", rich_help_panel=_ENGINE)
    ] = StoredDtype.float32,
    max_logits_gb: Annotated[
        float,
        typer.Option(help="Refuse to keep more logits than this.", rich_help_panel=_ENGINE),
    ] = 10.0,
    trust_remote_code: Annotated[
        bool,
        typer.Option("--trust-remote-code", help="Run the model's code.", rich_help_panel=_ENGINE),
    ] = False,
) -> None:
    """Score a corpus; run the same command again to resume or to find it done.

    Where `PREFECT_API_URL` is set, that server orchestrates; otherwise one is started for the run.
    Credentials for storage come from the environment (`AWS_ACCESS_KEY_ID`, ...).

    Examples:

    `logitmill score infra/demo/model 'docs/**/*.md' --out runs`

    `logitmill score Qwen/Qwen3-0.6B corpus.parquet --text-column body --keep tokens --limit 1000`

    `logitmill score ./model s3://corpora/web --out s3://scores --endpoint-url http://minio:9000`
    """
    TALLY.reset()

    def run() -> None:
        from .server import start_server

        _hush_prefect()
        # First, since it takes longest: it comes up while this process imports and loads.
        start_server()
        _import_all()
        _show_own_lines()
        from ..engine.pipeline import EngineSettings
        from ..engine.recipes import find_recipe
        from .corpus import CorpusSpec
        from .request import Request, prepare
        from .score import score_corpus

        request = Request(
            model=model,
            corpus=CorpusSpec(
                uri=corpus,
                subset=subset,
                split=split,
                text_column=text_column,
                messages_column=messages_column,
                ids_column=ids_column,
                context_column=context_column,
                id_column=id_column,
                source_column=source_column,
                language_column=language_column,
                format=format,
                limit=limit,
                shard_bytes=int(shard_mb * 1e6),
            ),
            out=out,
            recipe=find_recipe(
                recipe, context=context, overlap=overlap, stride=stride, prefix=prefix
            ),
            tiers=("scores", *(tier.value for tier in keep or ())),
            engine=EngineSettings(
                device=device,
                dtype=dtype,
                max_batch_tokens=batch_tokens,
                logits_memory=logits_memory_mb << 20,
                trust_remote_code=trust_remote_code,
            ),
            logits_dtype=logits_dtype.value,
            max_logits_bytes=int(max_logits_gb * 1e9),
            endpoint_url=endpoint_url,
        )
        prepared = prepare(request)
        _say_plan(prepared)
        _say_result(score_corpus.run_prepared(prepared), prepared.job.folder.options)

    _or_exit(run)


@app.command()
def report(
    run: Annotated[str, typer.Argument(help="URI of a run, or of a folder that holds one.")],
    out: Annotated[
        str | None, typer.Option(help="Local file to write; default the run's report.html.")
    ] = None,
    endpoint_url: Annotated[str | None, typer.Option(help=_ENDPOINT_HELP)] = None,
) -> None:
    """Make a run's report.html anew from its summary tables.

    Examples:

    `logitmill report runs/6f3a09c2d41b77e0`

    `logitmill report s3://scores/6f3a09c2d41b77e0 --out report.html`
    """

    def make() -> None:
        from .folder import endpoint_options
        from .publish import rewrite_report
        from .run import open_run

        opened = open_run(run, storage_options=endpoint_options(run, endpoint_url))
        typer.echo(rewrite_report(opened, out))

    _or_exit(make)


@app.command()
def inspect(
    target: Annotated[str, typer.Argument(help="A run's URI, or a model folder or Hub id.")],
    doc: Annotated[str | None, typer.Option(help="Show this document of a run.")] = None,
    endpoint_url: Annotated[str | None, typer.Option(help=_ENDPOINT_HELP)] = None,
) -> None:
    """Show what a run holds, or how a model would be run.

    Examples:

    `logitmill inspect runs`

    `logitmill inspect runs/6f3a09c2d41b77e0 --doc json/decoder.py`

    `logitmill inspect Qwen/Qwen3-0.6B`
    """
    _or_exit(lambda: _inspect(target, doc, endpoint_url))


@app.command()
def bench(
    model: Annotated[str, typer.Argument(help="Model folder or Hub id.")],
    corpus: Annotated[str, typer.Argument(help="Texts to measure on: file, folder, glob, URI.")],
    peer: Annotated[
        bool, typer.Option("--peer", help="Also run the usual transformers loop beside it.")
    ] = False,
    limit: Annotated[int | None, typer.Option(help="At most so many documents.")] = None,
    recipe: Annotated[str, typer.Option(help="As for score.")] = "rolling",
    text_column: Annotated[str, typer.Option(help="Column of a table that is scored.")] = "text",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, float16.")] = None,
    batch_tokens: Annotated[int | None, typer.Option(help="Tokens of a packed batch.")] = None,
    repeat: Annotated[int, typer.Option(help="Runs of each; the fastest counts.")] = 3,
) -> None:
    """Measure scored tokens a second, loading left out, and how far the peer's sum is off.

    Example:

    `logitmill bench infra/demo/model '/usr/lib/python3.11/*.py' --limit 40 --peer`
    """

    def run() -> None:
        from ..engine.pipeline import EngineSettings
        from .bench import measure, print_measurements
        from .corpus import CorpusSpec

        settings = EngineSettings(device=device, dtype=dtype, max_batch_tokens=batch_tokens)
        spec = CorpusSpec(uri=corpus, text_column=text_column, limit=limit)
        print_measurements(
            measure(model, spec, settings=settings, recipe=recipe, peer=peer, repeat=repeat)
        )

    _or_exit(run)


def main() -> None:
    """Entry point of the `logitmill` command."""
    os.environ.setdefault("DO_NOT_TRACK", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    try:
        sys.exit(app(prog_name="logitmill", standalone_mode=False))
    except _UsageError as error:
        where = f" (see {error.ctx.command_path} --help)" if error.ctx else ""
        _say_error(f"{error.format_message()}{where}")
        sys.exit(2)
    except typer.Abort:
        sys.exit(130)


def _hush_prefect() -> None:
    """Leave the terminal to this command: what Prefect itself has to say goes to the server.

    A mistake is one line here, not that line below Prefect's traceback of it.
    """
    for handler in ("CONSOLE", "DEBUG"):
        os.environ.setdefault(f"PREFECT_LOGGING_HANDLERS_{handler}_LEVEL", "CRITICAL")


def _show_own_lines() -> None:
    """Show what this package's flow and tasks log. Once Prefect has set up its own handlers."""
    for runs in ("flow_runs", "task_runs"):
        logging.getLogger(f"prefect.{runs}").addHandler(_OwnLines(logging.INFO))


class _OwnLines(logging.Handler):
    """Shows, of what flow and task runs log, the lines that this package wrote."""

    def emit(self, record: logging.LogRecord) -> None:
        if Path(record.pathname).parent == Path(__file__).parent:
            typer.echo(record.getMessage(), err=True)


def _import_all() -> None:
    """Import the engine in one thread and the orchestrator in this one, side by side."""

    def import_engine() -> None:
        from transformers import AutoConfig, AutoTokenizer  # noqa: F401

        from ..engine import pipeline  # noqa: F401

    thread = threading.Thread(target=import_engine)
    thread.start()
    import prefect.artifacts
    import prefect.flow_engine
    import prefect.task_engine
    import prefect.task_runners  # noqa: F401

    # What imports both comes after both: transformers cannot be imported by two threads at once.
    thread.join()


def _or_exit(action: Callable[[], None]) -> None:
    """Do it; a mistake ends the command with status 2, a failure with 1, and a line on stderr."""
    try:
        action()
    except ValueError as error:
        _say_error(str(error))
        raise typer.Exit(2) from None
    except (RuntimeError, OSError) as error:
        _say_error(str(error))
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        typer.echo("stopped; run the same command again to do the rest", err=True)
        raise typer.Exit(130) from None


def _say_error(message: str) -> None:
    typer.secho(f"error: {' '.join(message.split())}", err=True, fg=typer.colors.RED)


def _say_plan(prepared: Prepared) -> None:
    request, plan, facts, job = prepared.request, prepared.plan, prepared.facts, prepared.job
    documents = f"{plan.num_documents:,} documents, " if plan.num_documents is not None else ""
    recipe = job.recipe
    typer.echo(
        f"corpus  {job.corpus.uri}: {documents}{plan.num_bytes / 1e6:,.1f} MB, "
        f"{len(plan.shards)} shard{'s' if len(plan.shards) != 1 else ''}"
    )
    way = "native decoder" if facts.native else "through transformers"
    typer.echo(
        f"model   {request.model}: {facts.architecture}, {way}, {facts.dtype} on {facts.device}"
    )
    typer.echo(
        f"recipe  {recipe.name}, context {recipe.context}, prefix {recipe.prefix} ({recipe.hash})"
    )
    if prepared.logits_bytes is not None:
        typer.echo(f"logits  about {prepared.logits_bytes / 1e9:,.2f} GB, {job.logits_dtype}")
    typer.echo(f"run     {job.folder.uri}")


def _say_result(uri: str, storage_options: Mapping[str, Any]) -> None:
    from .run import open_run

    run = open_run(uri, storage_options=storage_options)
    _show_outliers(run)
    _show_totals(run)
    seconds = time.monotonic() - TALLY.started
    if TALLY.documents:
        first = f", first score after {TALLY.first_score:.1f} s" if TALLY.first_score else ""
        typer.echo(f"scored now: {TALLY.documents:,} documents in {seconds:.1f} s{first}")
    else:
        typer.echo("scored now: nothing, the run was complete")
    typer.echo(f"run:    {uri}")
    typer.echo(f"report: {run.report_path}")


def _show_totals(run: Run) -> None:
    import math

    m = run.manifest
    assert m is not None
    line = f"{m['documents']:,} documents, {m['tokens']:,} tokens, {m['bytes']:,} bytes"
    if m["failed"]:
        line += f"; {m['failed']:,} could not be scored:"
    typer.echo(line)
    failed = [r for r in run.summary("outliers").to_pylist() if r["kind"] == "failed"]
    for row in failed[:_FAILED_SHOWN]:
        typer.echo(f"  {row['doc_id']}: {row['status']}, {row['error']}")
    if m["failed"] > _FAILED_SHOWN:
        typer.echo("  ... (columns status and error of the scores say why)")
    if m["bytes"] and m["tokens"]:
        bits = -m["loglikelihood"] / math.log(2) / m["bytes"]
        ppl = math.exp(-m["loglikelihood"] / m["tokens"])
        typer.echo(f"{bits:.4f} bits/byte, token perplexity {ppl:.3f} (token-weighted)")


def _show_outliers(run: Run, count: int = 5) -> None:
    from rich.console import Console
    from rich.table import Table

    rows = run.summary("outliers").to_pylist()
    table = Table(box=None, header_style="bold")
    for name, justify in (
        ("", "left"),
        ("document", "left"),
        ("bits/byte", "right"),
        ("token ppl", "right"),
        ("bytes", "right"),
    ):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for kind, label in (("lowest", "least surprising"), ("highest", "most surprising")):
        for i, row in enumerate([r for r in rows if r["kind"] == kind][:count]):
            bits = f"{row['bits_per_byte']:.3f}" if row["bits_per_byte"] is not None else "-"
            table.add_row(
                label if not i else "",
                row["doc_id"],
                bits,
                f"{row['token_perplexity']:.2f}",
                f"{row['num_bytes']:,}",
            )
    Console(file=sys.stdout).print(table)


def _inspect(target: str, doc: str | None, endpoint_url: str | None) -> None:
    from .folder import Folder, StoreError, endpoint_options
    from .run import find_runs, open_run

    options = endpoint_options(target, endpoint_url)
    try:
        runs = find_runs(Folder(target, options))
    except StoreError:
        runs = []  # Not a place at all, as `org/name` is none.
    if doc is not None:
        run = open_run(target, partial=True, storage_options=options)
        try:
            record = run.document(doc)
        except KeyError as error:
            raise ValueError(error.args[0]) from None
        record.pop("tokens", None)
        for name, value in record.items():
            typer.echo(f"{name:20} {value}")
    elif runs:
        for i, folder in enumerate(runs):
            typer.echo("" if i else None, nl=bool(i))
            _show_run(open_run(folder.uri, partial=True, storage_options=options))
    else:
        from ..engine.checkpoint import find_model
        from ..engine.pipeline import EngineSettings, inspect_model

        facts = inspect_model(find_model(target), EngineSettings())
        for name, value in vars(facts).items():
            typer.echo(f"{name:14} {value}")


def _show_run(run: Run) -> None:
    typer.echo(
        f"{run.uri}\nmodel   {run.plan['model']['name']}\ncorpus  {run.plan['uri']}\n"
        f"recipe  {run.plan['recipe']['name']} ({run.plan['recipe_hash']})\n"
        f"tiers   {', '.join(run.tiers)}"
    )
    if run.manifest is None:
        typer.echo("not complete: run the same command again to resume it")
    else:
        _show_totals(run)


if __name__ == "__main__":
    main()
