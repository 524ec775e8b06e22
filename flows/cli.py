"""The `logitmill` command. Imports what is heavy only once it is needed."""

from __future__ import annotations

import logging
import math
import os
import re
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, overload

import typer

from .progress import TALLY, counted

if TYPE_CHECKING:
    from ..engine.pipeline import ModelFacts
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

MODEL is a folder in Hugging Face layout, its URI or a Hub id. CORPUS is a file, a folder, a
glob on any fsspec URI (Parquet, JSON lines, CSV, text, code) or a Hugging Face dataset
(`datasets:NAME`).
""",
)


class Tier(StrEnum):
    """What to keep besides document scores."""

    tokens = "tokens"
    logits = "logits"


class Kept(StrEnum):
    """What `bench` can keep besides records."""

    logits = "logits"


class StoredDtype(StrEnum):
    """Dtypes that log-probabilities are stored in."""

    float32 = "float32"
    float16 = "float16"


# Of the click that typer brings with it, whichever that is.
_UsageError: Any = typer.BadParameter.__bases__[0]

_ENDPOINT_HELP = "S3 server to use where it is not Amazon's."
_QUANTIZATION_HELP = (
    "What linears are multiplied as: none, fp8, fp8_block, int8, int4, int4_fp8, "
    "int4_fp8_exact; default as the checkpoint is stored."
)
_FP8_HEAD_HELP = "Multiply the head in fp8 too: faster, less exact."
_FAILED_SHOWN = 3
_INPUT, _RECIPE, _ENGINE = "What is read", "How it is scored", "How it is computed"


def _number(unit: str, example: str, *, kind: type[int] | type[float] = int, **option: Any) -> Any:
    """An option that takes a number of a unit, and names it where it is given something else."""

    def parse(text: str) -> float:
        try:
            return kind(text)
        except ValueError:
            what = "whole number" if kind is int else "number"
            raise typer.BadParameter(
                f"{text!r} is not a {what} of {unit}; give {example}"
            ) from None

    return typer.Option(parser=parse, metavar=f"<{unit}>", **option)


# Options that more than one command takes.
_Limit = Annotated[
    int | None,
    _number("documents", "1000", help="At most so many documents.", rich_help_panel=_INPUT),
]
_TextColumn = Annotated[
    str, typer.Option(help="Column of a table that is scored.", rich_help_panel=_INPUT)
]
_Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1.", rich_help_panel=_ENGINE)]
_Dtype = Annotated[
    str | None,
    typer.Option(
        help="float32, bfloat16, float16; default float32 on a CPU, else the checkpoint's.",
        rich_help_panel=_ENGINE,
    ),
]
_Quantization = Annotated[
    str | None, typer.Option(help=_QUANTIZATION_HELP, rich_help_panel=_ENGINE)
]
_Fp8Head = Annotated[bool, typer.Option("--fp8-head", help=_FP8_HEAD_HELP, rich_help_panel=_ENGINE)]
_DeviceMemory = Annotated[
    float | None,
    _number(
        "GB",
        "24",
        kind=float,
        help="GB of the GPU that weights and batches may take; default what is free. Layers that "
        "do not fit are streamed from host memory, or from disk.",
        rich_help_panel=_ENGINE,
    ),
]
_Residency = Annotated[
    str | None,
    typer.Option(
        help="Where layers live: device, or host or disk to stream all of them from there; "
        "default device for as many as fit. The disk is LOGITMILL_SCRATCH's.",
        rich_help_panel=_ENGINE,
    ),
]
_TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Run the Python code that the model's folder brings. It can do all that you can: only "
        "for authors you trust.",
        rich_help_panel=_ENGINE,
    ),
]
_BatchTokens = Annotated[
    int | None,
    _number("tokens", "8192", help="Tokens of a packed batch.", rich_help_panel=_ENGINE),
]


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


@app.command()
def score(
    model: Annotated[str, typer.Argument(help="Model folder, its URI or Hub id.")],
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
        _number(
            "tokens",
            "1024",
            help="Longest window in tokens; default the model's.",
            rich_help_panel=_RECIPE,
        ),
    ] = None,
    overlap: Annotated[
        int | None,
        _number(
            "tokens",
            "512",
            help="Context tokens before a later window's first target (rolling).",
            rich_help_panel=_RECIPE,
        ),
    ] = None,
    stride: Annotated[
        int | None,
        _number("tokens", "512", help="Tokens between windows (strided).", rich_help_panel=_RECIPE),
    ] = None,
    prefix: Annotated[
        str | None,
        typer.Option(
            help="Token in front of a document: auto (BOS, else EOS), bos, eos, none, tokenizer "
            "or an id.",
            rich_help_panel=_RECIPE,
        ),
    ] = None,
    text_column: _TextColumn = "text",
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
        typer.Option(
            help="parquet, jsonl, csv, tsv or text; default by suffix.", rich_help_panel=_INPUT
        ),
    ] = None,
    subset: Annotated[
        str | None, typer.Option(help="Configuration of a dataset.", rich_help_panel=_INPUT)
    ] = None,
    split: Annotated[
        str, typer.Option(help="Split of a dataset.", rich_help_panel=_INPUT)
    ] = "train",
    limit: _Limit = None,
    endpoint_url: Annotated[
        str | None,
        typer.Option(help=_ENDPOINT_HELP, rich_help_panel=_INPUT),
    ] = None,
    shard_mb: Annotated[
        float,
        _number(
            "MB", "8", kind=float, help="Megabytes of corpus a shard.", rich_help_panel=_ENGINE
        ),
    ] = 8.0,
    device: _Device = None,
    dtype: _Dtype = None,
    quantization: _Quantization = None,
    fp8_head: _Fp8Head = False,
    batch_tokens: _BatchTokens = None,
    device_memory: _DeviceMemory = None,
    residency: _Residency = None,
    logits_memory_mb: Annotated[
        int | None,
        _number(
            "MB",
            "256",
            help="Megabytes that logits may take at a time; default 256 on a CPU, 2048 on a GPU.",
            rich_help_panel=_ENGINE,
        ),
    ] = None,
    logits_dtype: Annotated[
        StoredDtype, typer.Option(help="How logits are stored.", rich_help_panel=_ENGINE)
    ] = StoredDtype.float32,
    max_logits_gb: Annotated[
        float,
        _number(
            "GB",
            "10",
            kind=float,
            help="Refuse to keep more logits than this.",
            rich_help_panel=_ENGINE,
        ),
    ] = 10.0,
    trust_remote_code: _TrustRemoteCode = False,
) -> None:
    """Score a corpus; run the same command again to resume or to find it done.

    Where `PREFECT_API_URL` is set, that server orchestrates; otherwise one is started for the run.
    Credentials for storage come from the environment (`AWS_ACCESS_KEY_ID`, ...). Models from object
    storage are kept in the folder `LOGITMILL_CACHE`, by default ~/.cache/logitmill.

    The exit status is 2 for a mistake, 1 for a failure or if no document could be scored, 130 after
    Ctrl-C, 143 after SIGTERM.

    Examples:

    `logitmill score infra/demo/model 'engine/*.py' --out runs`

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
                shard_bytes=_to_bytes("shard_bytes", shard_mb),
            ),
            out=out,
            recipe=find_recipe(
                recipe, context=context, overlap=overlap, stride=stride, prefix=prefix
            ),
            tiers=("scores", *(tier.value for tier in keep or ())),
            engine=EngineSettings(
                device=device,
                dtype=dtype,
                quantization=quantization,
                fp8_head=fp8_head,
                max_batch_tokens=batch_tokens,
                logits_memory=_to_bytes("logits_memory", logits_memory_mb),
                device_memory=_to_bytes("device_memory", device_memory),
                residency=residency,
                trust_remote_code=trust_remote_code,
            ),
            logits_dtype=logits_dtype.value,
            max_logits_bytes=_to_bytes("max_logits_bytes", max_logits_gb, least=0),
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
    target: Annotated[
        str, typer.Argument(help="A run's URI, or a model folder, its URI or Hub id.")
    ],
    doc: Annotated[str | None, typer.Option(help="Show this document of a run.")] = None,
    endpoint_url: Annotated[str | None, typer.Option(help=_ENDPOINT_HELP)] = None,
    device: _Device = None,
    dtype: _Dtype = None,
    quantization: _Quantization = None,
    fp8_head: _Fp8Head = False,
    batch_tokens: _BatchTokens = None,
    device_memory: _DeviceMemory = None,
    residency: _Residency = None,
    trust_remote_code: _TrustRemoteCode = False,
) -> None:
    """Show what a run holds, or how a model is stored and would be run.

    Of a model, configs and the headers of its files are read and checked, and no weights; how it is
    computed can be said as for `score`. Of a URI no more than that is fetched, of a Hub id all
    files. Of what runs through transformers less can be told; the last line says what was not
    checked. Where there is no GPU, `--device-memory 24` asks for one of 24 GB in this machine.

    Examples:

    `logitmill inspect runs`

    `logitmill inspect runs/6f3a09c2d41b77e0 --doc json/decoder.py`

    `logitmill inspect Qwen/Qwen3-0.6B --quantization fp8`
    """
    _or_exit(
        lambda: _inspect(
            target,
            doc,
            endpoint_url,
            {
                "device": device,
                "dtype": dtype,
                "quantization": quantization,
                "fp8_head": fp8_head,
                "max_batch_tokens": batch_tokens,
                "device_memory": _to_bytes("device_memory", device_memory),
                "residency": residency,
                "trust_remote_code": trust_remote_code,
            },
        )
    )


@app.command()
def bench(
    target: Annotated[
        str | None,
        typer.Argument(
            help="A workload (--list shows them), or a model folder or Hub id.",
            metavar="WORKLOAD|MODEL",
        ),
    ] = None,
    corpus: Annotated[
        str | None,
        typer.Argument(help="Texts to measure a model on: file, folder, glob, URI."),
    ] = None,
    show_list: Annotated[
        bool, typer.Option("--list", help="Show the workloads and do nothing else.")
    ] = False,
    top_k: Annotated[
        list[int] | None,
        _number(
            "candidates",
            "20",
            help="Also measure keeping so many candidates a token. May be given twice.",
        ),
    ] = None,
    keep: Annotated[
        Kept | None, typer.Option(help="Also measure bringing all logits to host memory.")
    ] = None,
    peer: Annotated[
        list[str] | None,
        typer.Option(
            help="Also run transformers (the usual loop), vllm or lmdeploy on the same work. May "
            "be given twice."
        ),
    ] = None,
    fidelity: Annotated[
        bool,
        typer.Option(
            "--fidelity",
            help="Instead of speed, measure how far each format is from the float32 model: KL, "
            "same top, probability of the true token.",
        ),
    ] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Add the record to this file of JSON lines.")
    ] = None,
    repeat: Annotated[int, _number("runs", "3", help="Runs of each pass; the fastest counts.")] = 3,
    limit: _Limit = None,
    text_column: _TextColumn = "text",
    recipe: Annotated[
        str, typer.Option(help="As for score; for texts.", rich_help_panel=_RECIPE)
    ] = "rolling",
    device: _Device = None,
    dtype: _Dtype = None,
    quantization: Annotated[
        list[str] | None,
        typer.Option(
            help=f"{_QUANTIZATION_HELP} May be given several times, with +head for an fp8 head "
            "(fp8+head): each is measured in turn, after the first with records alone.",
            rich_help_panel=_ENGINE,
        ),
    ] = None,
    fp8_head: _Fp8Head = False,
    batch_tokens: _BatchTokens = None,
    device_memory: _DeviceMemory = None,
    residency: _Residency = None,
    from_disk: Annotated[
        bool,
        typer.Option(
            "--from-disk",
            help="Load a workload's weights from a checkpoint, which is written to the temporary "
            "folder first if it is not there yet.",
            rich_help_panel=_ENGINE,
        ),
    ] = False,
) -> None:
    """Measure tokens a second, loading left out, and how far that is from what the device can do.

    A workload has a model's shape, random weights and random tokens, and needs no download.

    Examples:

    `logitmill bench llama8b-mixed --quantization fp8 --quantization none --top-k 20`

    `logitmill bench infra/demo/model 'engine/*.py' --limit 40 --peer transformers`

    `logitmill bench infra/demo/model 'engine/*.py' --limit 40 --fidelity`
    """

    def run() -> None:
        if show_list:
            from .workloads import WORKLOADS

            for name, workload in WORKLOADS.items():
                typer.echo(f"{name:16} {workload.text}")
            return
        if target is None:
            raise ValueError("WORKLOAD|MODEL: missing; --list shows the workloads")
        from ..engine.pipeline import EngineSettings
        from .bench import (
            FORMATS,
            Request,
            make_cases,
            measure,
            measure_fidelity,
            show,
            show_fidelity,
        )

        settings = EngineSettings(
            device=device,
            dtype=dtype,
            fp8_head=fp8_head,
            max_batch_tokens=batch_tokens,
            device_memory=_to_bytes("device_memory", device_memory),
            residency=residency,
        )
        request = Request(
            target=target,
            corpus=corpus,
            cases=make_cases(quantization or (FORMATS if fidelity else ()), settings),
            recipe=recipe,
            text_column=text_column,
            top_k=tuple(top_k or ()),
            keep_logits=keep is not None,
            peers=tuple(peer or ()),
            repeat=repeat,
            limit=limit,
            from_disk=from_disk,
        )
        command = _typed(without="--json")
        if fidelity:
            compared = measure_fidelity(
                request, command=command, on_row=lambda name: typer.echo(name, err=True)
            )
            show_fidelity(compared)
            if json_file is not None:
                compared.append(json_file)
            return
        for i, record in enumerate(measure(request, command=command)):
            typer.echo("" if i else None, nl=bool(i))
            show(record)
            if json_file is not None:
                record.append(json_file)

    _or_exit(run)


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
        _say_error(f"{error.format_message().replace('Value error, ', '', 1)}{where}")
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
    from ..engine import fallback, mirror

    for runs in ("flow_runs", "task_runs"):
        logging.getLogger(f"prefect.{runs}").addHandler(_OwnLines(logging.INFO))
    # A model is fetched before there is a run, and loaded without a thought of it.
    for module in (mirror, fallback):
        module.log.addHandler(_OwnLines(logging.INFO))


class _OwnLines(logging.Handler):
    """Shows, of what flow and task runs log, the lines of this package that the plan did not."""

    def emit(self, record: logging.LogRecord) -> None:
        root = Path(__file__).parents[1]
        is_own = Path(record.pathname).parent in (root / "flows", root / "engine")
        if is_own and not getattr(record, "in_plan", False):
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
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        action()
    except ValueError as error:
        _say_error(_name_options(str(error)))
        raise typer.Exit(2) from None
    except (RuntimeError, OSError) as error:
        _say_error(str(error))
        raise typer.Exit(1) from None
    except KeyboardInterrupt as stop:
        typer.echo("stopped; run the same command again to do the rest", err=True)
        raise typer.Exit(143 if isinstance(stop, _Terminated) else 130) from None
    finally:
        signal.signal(signal.SIGTERM, before)


class _Terminated(KeyboardInterrupt):
    """SIGTERM, which is how schedulers end what has had its time."""


def _terminate(number: int, frame: Any) -> None:
    raise _Terminated


def _typed(*, without: str) -> str:
    """The command as it was typed, but for one option and its value."""
    arguments = sys.argv[1:]
    if without in arguments:
        at = arguments.index(without)
        del arguments[at : at + 2]
    return shlex.join(["logitmill", *arguments])


def _say_error(message: str) -> None:
    typer.secho(f"error: {' '.join(message.split())}", err=True, fg=typer.colors.RED)


# What fields of settings are called in the command, where that is not `--field`.
_CALLED = {
    "uri": "CORPUS",
    "corpus": "CORPUS",
    "model": "MODEL",
    "tiers": "--keep",
    "shard_bytes": "--shard-mb",
    "max_batch_tokens": "--batch-tokens",
    "device_memory": "--device-memory",
    "logits_memory": "--logits-memory-mb",
    "max_logits_bytes": "--max-logits-gb",
    "storage_options": "environment variables",
}
_WORDS = (
    *("out", "recipe", "context", "overlap", "stride", "prefix", "format", "subset", "split"),
    *("limit", "device", "dtype", "quantization", "uri", "model", "tiers"),
    *("corpus", "peer", "repeat", "keep"),
)
_COMPOUNDS = (
    *("text_column", "messages_column", "ids_column", "context_column", "id_column"),
    *("source_column", "language_column", "endpoint_url", "logits_dtype", "fp8_head"),
    *("trust_remote_code", "shard_bytes", "max_batch_tokens", "logits_memory"),
    *("device_memory", "residency"),
    *("max_logits_bytes", "storage_options", "top_k", "from_disk"),
)
# A word is a field where it leads the message, stands alone in brackets or before a value; a
# compound is one anywhere.
_FIELD = re.compile(
    r"^({0})(?=[:=])|(?<=\()({0})(?=\))|(?<![\w./-])({0})(?==)|\b({1})\b(?:=True)?".format(
        "|".join(_WORDS), "|".join(_COMPOUNDS)
    )
)


def _name_options(message: str) -> str:
    """An error's message with the command's own names for fields; what is quoted stays."""

    def name(match: re.Match[str]) -> str:
        field = next(filter(None, match.groups()))
        return _CALLED.get(field) or "--" + field.replace("_", "-")

    size, unit = _UNITS.get(message.partition(":")[0], (1, "bytes"))

    def measure(match: re.Match[str]) -> str:
        return f"{int(match[1].replace(',', '')) / size:,.6g} {unit}" if size > 1 else match[0]

    def say(part: str) -> str:
        return _FIELD.sub(name, re.sub(r"\b(\d[\d,]*) bytes\b", measure, part))

    parts = re.split(r"('[^']*')", message)
    return "".join(part if i % 2 else say(part) for i, part in enumerate(parts))


# What one of an option's units is in bytes, by the field that the option sets.
_UNITS = {
    "shard_bytes": (10**6, "MB"),
    "logits_memory": (1 << 20, "MB"),
    "device_memory": (10**9, "GB"),
    "max_logits_bytes": (10**9, "GB"),
}


@overload
def _to_bytes(field: str, amount: float, *, least: int = 1) -> int: ...
@overload
def _to_bytes(field: str, amount: None) -> None: ...
def _to_bytes(field: str, amount: float | None, *, least: int = 1) -> int | None:
    """An option's amount in bytes; ValueError, in the option's own unit, below `least` bytes."""
    if amount is None:
        return None
    size, unit = _UNITS[field]
    if not least <= amount * size < math.inf:
        works = "a number above 0" if least else "0 or more"
        raise ValueError(f"{field}: {amount:g} {unit} is no size; give {works}")
    return int(amount * size)


def _say_way(facts: ModelFacts) -> str:
    return "native decoder" if facts.reason is None else f"through transformers: {facts.reason}"


def _say_plan(prepared: Prepared) -> None:
    request, plan, facts, job = prepared.request, prepared.plan, prepared.facts, prepared.job
    documents = (
        f"{counted(plan.num_documents, 'document')}, " if plan.num_documents is not None else ""
    )
    recipe = job.recipe
    typer.echo(
        f"corpus  {job.corpus.uri}: {documents}{plan.num_bytes / 1e6:,.1f} MB, "
        f"{counted(len(plan.shards), 'shard')}"
    )
    typer.echo(
        f"model   {request.model}: {facts.architecture}, {_say_way(facts)}, {facts.dtype} on "
        f"{facts.device}"
    )
    typer.echo(f"linears {facts.quantization}")
    typer.echo(
        f"recipe  {recipe.name}, context {recipe.context}, prefix {recipe.prefix} ({recipe.hash})"
    )
    if prepared.logits_bytes is not None:
        typer.echo(f"logits  about {prepared.logits_bytes / 1e9:,.2f} GB, {job.logits_dtype}")
    typer.echo(f"run     {job.folder.uri}")
    for line in (prepared.other, prepared.doubt):
        if line is not None:
            typer.echo(f"note    {line}")


def _say_result(uri: str, storage_options: Mapping[str, Any]) -> None:
    from .run import open_run

    run = open_run(uri, storage_options=storage_options)
    _show_outliers(run)
    _show_totals(run)
    seconds = time.monotonic() - TALLY.started
    if TALLY.documents:
        first = f", first score after {TALLY.first_score:.1f} s" if TALLY.first_score else ""
        typer.echo(f"scored now: {counted(TALLY.documents, 'document')} in {seconds:.1f} s{first}")
    else:
        typer.echo("scored now: nothing, the run was complete")
    typer.echo(f"run:    {uri}")
    typer.echo(f"report: {run.report_path}")
    counts = run.manifest
    assert counts is not None
    if counts["documents"] and counts["failed"] == counts["documents"]:
        raise RuntimeError(f"none of {counted(counts['documents'], 'document')} could be scored")


def _show_totals(run: Run) -> None:
    m = run.manifest
    assert m is not None
    line = ", ".join(counted(m[name + "s"], name) for name in ("document", "token", "byte"))
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
        line = f"{bits:.4f} bits/byte, token perplexity {ppl:.3f} (token-weighted)"
        if m["recipe"]["weighting"] == "document":
            scored = run.table("scores", ["token_perplexity"]).column(0).drop_null()
            line += f", {math.fsum(scored.to_pylist()) / len(scored):.3f} (mean of documents)"
        typer.echo(line)


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


def _inspect(
    target: str, doc: str | None, endpoint_url: str | None, settings: Mapping[str, Any]
) -> None:
    from .folder import Folder, StoreError, endpoint_options
    from .run import find_runs, open_run

    options = endpoint_options(target, endpoint_url)
    try:
        runs = find_runs(Folder(target, options))
    except StoreError:
        runs = []  # Not a place at all, as `org/name` is none.
    given = [name for name, value in settings.items() if value]
    if given and (runs or doc is not None):
        raise ValueError(f"{given[0]}: {target!r} is a run, not a model; leave it out")
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
        _show_model(target, options, settings)


def _show_model(
    target: str, storage_options: Mapping[str, Any], settings: Mapping[str, Any]
) -> None:
    import torch

    from ..engine.checkpoint import find_model, read_config
    from ..engine.fallback import can_check_tensors
    from ..engine.intake import check_vocabulary, doubt_vocabulary
    from ..engine.pipeline import (
        AbsentGpu,
        EngineSettings,
        inspect_model,
        inspect_placement,
    )
    from ..engine.tokenization import Tokenizer

    folder = find_model(target, storage_options=storage_options, headers_only=True)
    # Whether a model would fit a GPU is mostly asked where there is none.
    is_absent = (
        settings["device_memory"] is not None
        and settings["device"] is None
        and not torch.cuda.is_available()
    )
    engine = AbsentGpu(**settings) if is_absent else EngineSettings(**settings)
    facts = inspect_model(folder, engine)
    tokenizer = Tokenizer.load(folder, trust_remote_code=engine.trust_remote_code)
    doubt = None
    if tokenizer is not None:
        check_vocabulary(tokenizer, facts.vocab_size)
        doubt = doubt_vocabulary(tokenizer, facts.vocab_size, read_config(folder))
    shown = vars(facts) | {
        "reason": _say_way(facts),
        "tokenizer": tokenizer or "none: token ids can be scored, texts cannot",
    }
    if is_absent:
        size = f"{settings['device_memory'] / 1e9:,.6g} GB"
        shown["device"] = f"cuda: a Hopper GPU of {size} in this machine, which has none"
    for name, value in shown.items():
        typer.echo(f"{'runs' if name == 'reason' else name:14} {value}")
    if doubt is not None:
        typer.echo(f"{'note':14} {doubt}")
    # Last, as it takes longest, and a model that does not fit is still what it is.
    typer.echo(f"{'placement':14} {inspect_placement(folder, engine)}")
    if facts.reason is not None:
        unchecked = "values of weights, memory, and that no token sees later ones"
        if not can_check_tensors():
            unchecked += "; tensors' names and shapes (pip install accelerate)"
        typer.echo(f"{'not checked':14} {unchecked}")


def _show_run(run: Run) -> None:
    from .store import find_receipts

    # The first runs did not say, and knew nothing else.
    linears = run.plan.get("quantization", "unquantized")
    typer.echo(
        f"{run.uri}\nmodel   {run.plan['model']['name']}\n"
        f"linears {linears}\ncorpus  {run.plan['uri']}\n"
        f"recipe  {run.plan['recipe']['name']} ({run.plan['recipe_hash']})\n"
        f"tiers   {', '.join(run.tiers)}"
    )
    if run.manifest is None:
        num_shards = len(run.plan["corpus"]["shards"])
        num_done = len(find_receipts(run.folder, num_shards))
        root = run.uri.rpartition("/")[0] or "."
        command = ["logitmill", "score", run.plan["model"]["name"], run.plan["uri"], "--out", root]
        typer.echo(
            f"not complete: {num_done:,} of {counted(num_shards, 'shard')} done; "
            f"{shlex.join(command)}, with the options it was begun with, does the rest"
        )
    else:
        _show_totals(run)


if __name__ == "__main__":
    main()
