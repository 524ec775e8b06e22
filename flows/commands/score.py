"""`logitmill score`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from ..progress import TALLY
from .dry_run import say_estimate, say_placement
from .mistakes import or_exit, to_bytes
from .options import (
    ENDPOINT_HELP,
    ENGINE,
    INPUT,
    RECIPE,
    RUN,
    BatchTokens,
    Device,
    DeviceMemory,
    Dtype,
    Fp8Head,
    Limit,
    Quantization,
    Residency,
    StoredDtype,
    TextColumn,
    Tier,
    TrustRemoteCode,
    number,
)
from .outline import say_plan, say_result
from .terminal import hush_prefect, import_all, show_own_lines

if TYPE_CHECKING:
    from ..request import Request


def score(
    model: Annotated[str, typer.Argument(help="Model folder, its URI or Hub id.")],
    corpus: Annotated[str, typer.Argument(help="File, folder, glob, URI or datasets:NAME.")],
    out: Annotated[
        str, typer.Option(help="Folder for runs: a path, s3://bucket/folder, any fsspec URI.")
    ] = "runs",
    keep: Annotated[
        list[Tier] | None,
        typer.Option(
            help="Also keep a record a token (tokens), the likeliest tokens of every row (topk), "
            "draws from its distribution (sampled), what layers on the way would have said (lens), "
            "the states that logits are made of (hidden), or all log-probabilities (logits). May "
            "be given several times."
        ),
    ] = None,
    top_k: Annotated[
        int | None,
        number("tokens", "20", help="With --keep topk: so many of a row, up to 256; default 20."),
    ] = None,
    num_draws: Annotated[
        int | None,
        number("draws", "12", help="With --keep sampled: so many of a row; default 12."),
    ] = None,
    draw_seed: Annotated[
        int | None,
        number("seed", "0", help="With --keep sampled: another one gives other draws; default 0."),
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option(
            metavar="<layers>",
            help="With --keep lens: these, from 0, or from the end, as in 0,8,-1; default all.",
        ),
    ] = None,
    vocabulary: Annotated[
        bool,
        typer.Option(
            "--vocabulary",
            help="Also add up how often every token was expected and how often it was there, by "
            "source; `logitmill vocabulary RUN` shows it.",
        ),
    ] = False,
    recipe: Annotated[
        str,
        typer.Option(
            help="rolling, disjoint, strided, llamacpp, truncated or conditional, with an "
            "optional context: rolling-1024.",
            rich_help_panel=RECIPE,
        ),
    ] = "rolling",
    context: Annotated[
        int | None,
        number(
            "tokens",
            "1024",
            help="Longest window in tokens; default the model's.",
            rich_help_panel=RECIPE,
        ),
    ] = None,
    overlap: Annotated[
        int | None,
        number(
            "tokens",
            "512",
            help="Context tokens before a later window's first target (rolling).",
            rich_help_panel=RECIPE,
        ),
    ] = None,
    stride: Annotated[
        int | None,
        number("tokens", "512", help="Tokens between windows (strided).", rich_help_panel=RECIPE),
    ] = None,
    prefix: Annotated[
        str | None,
        typer.Option(
            help="Token in front of a document: auto (BOS, else EOS), bos, eos, none, tokenizer "
            "or an id.",
            rich_help_panel=RECIPE,
        ),
    ] = None,
    text_column: TextColumn = "text",
    messages_column: Annotated[
        str | None, typer.Option(help="Score chat messages instead.", rich_help_panel=INPUT)
    ] = None,
    ids_column: Annotated[
        str | None, typer.Option(help="Score token ids instead.", rich_help_panel=INPUT)
    ] = None,
    context_column: Annotated[
        str | None,
        typer.Option(help="Read but not scored (conditional).", rich_help_panel=INPUT),
    ] = None,
    id_column: Annotated[
        str | None, typer.Option(help="Column of unique document ids.", rich_help_panel=INPUT)
    ] = None,
    source_column: Annotated[
        str | None, typer.Option(help="Column that summaries go by.", rich_help_panel=INPUT)
    ] = None,
    language_column: Annotated[
        str | None, typer.Option(help="Column that summaries go by.", rich_help_panel=INPUT)
    ] = None,
    day_column: Annotated[
        str | None,
        typer.Option(
            help="Column of dates that summaries go by; default: a date in the input's path.",
            rich_help_panel=INPUT,
        ),
    ] = None,
    format: Annotated[
        str | None,
        typer.Option(
            help="parquet, jsonl, csv, tsv or text; default by suffix.", rich_help_panel=INPUT
        ),
    ] = None,
    subset: Annotated[
        str | None, typer.Option(help="Configuration of a dataset.", rich_help_panel=INPUT)
    ] = None,
    split: Annotated[
        str, typer.Option(help="Split of a dataset.", rich_help_panel=INPUT)
    ] = "train",
    limit: Limit = None,
    endpoint_url: Annotated[
        str | None,
        typer.Option(help=ENDPOINT_HELP, rich_help_panel=INPUT),
    ] = None,
    shard_mb: Annotated[
        float,
        number("MB", "8", kind=float, help="Megabytes of corpus a shard.", rich_help_panel=ENGINE),
    ] = 8.0,
    device: Device = None,
    dtype: Dtype = None,
    quantization: Quantization = None,
    fp8_head: Fp8Head = False,
    batch_tokens: BatchTokens = None,
    device_memory: DeviceMemory = None,
    residency: Residency = None,
    logits_memory_mb: Annotated[
        int | None,
        number(
            "MB",
            "256",
            help="Megabytes that logits may take at a time; default 256 on a CPU, 2048 on a GPU.",
            rich_help_panel=ENGINE,
        ),
    ] = None,
    logits_dtype: Annotated[
        StoredDtype, typer.Option(help="How logits are stored.", rich_help_panel=ENGINE)
    ] = StoredDtype.float32,
    max_logits_gb: Annotated[
        float,
        number(
            "GB",
            "10",
            kind=float,
            help="Refuse to keep more logits or hidden states than this.",
            rich_help_panel=ENGINE,
        ),
    ] = 10.0,
    trust_remote_code: TrustRemoteCode = False,
    workers: Annotated[
        str | None,
        typer.Option(
            help="Where shards are scored: gpus (a process for each GPU of this machine), a number "
            "of processes, or the address of a Dask scheduler (tcp://host:8786); default this "
            "process. All but the default need logitmill[dask].",
            rich_help_panel=RUN,
        ),
    ] = None,
    deadline: Annotated[
        float,
        number(
            "seconds",
            "900",
            kind=float,
            help="With --workers: one that gets nowhere for so long is taken for hung and killed, "
            "and its shard is done again.",
            rich_help_panel=RUN,
        ),
    ] = 900.0,
    only_new: Annotated[
        bool,
        typer.Option(
            "--only-new",
            help="Leave out files that complete runs of the same settings in --out have scored; "
            "content tells, not the name.",
            rich_help_panel=RUN,
        ),
    ] = False,
    catalog: Annotated[
        str | None,
        typer.Option(
            help="Make the complete run part of the Iceberg tables of this catalog, as "
            "`logitmill publish` does: a name of pyiceberg's settings, or beside.",
            rich_help_panel=RUN,
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Show plan, sizes and time, from a sample of the corpus, and score nothing.",
            rich_help_panel=RUN,
        ),
    ] = False,
    price_per_gb_month: Annotated[
        float | None,
        number(
            "money",
            "0.023",
            kind=float,
            help="With --dry-run: what a GB of storage costs a month; shows what the run's will.",
            rich_help_panel=RUN,
        ),
    ] = None,
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

    Before a large one, what it will take: `... --dry-run --price-per-gb-month 0.023`. While it
    runs, from any machine: `logitmill follow s3://scores`.

    All GPUs of this machine: `logitmill score ./model s3://corpora/web --out s3://scores --workers
    gpus`

    GPUs of several machines, by a Dask cluster; more may join while it runs:

    `dask scheduler --port 8786`, on one machine; then on each, for each of its GPUs:

    `CUDA_VISIBLE_DEVICES=0 dask worker tcp://HOST:8786 --nthreads 2 --memory-limit 0
    --no-dashboard`

    `logitmill score ./model s3://corpora/web --out s3://scores --workers tcp://HOST:8786`

    Every night, what is new: `logitmill score ./model s3://corpora/web --out s3://scores
    --only-new`
    """
    TALLY.reset()

    def run() -> None:
        if price_per_gb_month is not None and not dry_run:
            raise ValueError(
                f"price_per_gb_month: {price_per_gb_month:g} is for --dry-run; add that, or leave "
                "it out"
            )
        shard_bytes = to_bytes("shard_bytes", shard_mb)
        logits_memory = to_bytes("logits_memory", logits_memory_mb)
        memory = to_bytes("device_memory", device_memory)
        max_logits_bytes = to_bytes("max_logits_bytes", max_logits_gb, least=0)
        hush_prefect()
        if not dry_run:
            from ..server import start_server

            # First, since it takes longest: it comes up while this process imports and loads.
            start_server()
        from ...engine.pipeline import EngineSettings
        from ...engine.recipes import find_recipe
        from ..corpus import CorpusSpec
        from ..request import NothingNew, Request, check_settings

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
                day_column=day_column,
                format=format,
                limit=limit,
                shard_bytes=shard_bytes,
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
                logits_memory=logits_memory,
                device_memory=memory,
                residency=residency,
                trust_remote_code=trust_remote_code,
            ),
            top_k=top_k,
            num_draws=num_draws,
            draw_seed=draw_seed,
            layers=_read_layers(layers),
            vocabulary=vocabulary,
            logits_dtype=logits_dtype.value,
            max_logits_bytes=max_logits_bytes,
            endpoint_url=endpoint_url,
            workers=workers,
            deadline=deadline,
            only_new=only_new,
            catalog=catalog,
        )
        # A mistake in settings is told here: the rest takes seconds to import.
        check_settings(request)
        if not dry_run:
            import_all()
        show_own_lines()
        try:
            if dry_run:
                _forecast(request, price_per_gb_month)
            else:
                _score(request)
        except NothingNew as found:
            typer.echo(str(found))
        except ValueError as error:
            if str(error).startswith("model: ") and _are_swapped(model, corpus, endpoint_url):
                raise ValueError(
                    f"model: {model!r} is no model, but {corpus!r} is one; the model comes first"
                ) from None
            raise

    or_exit(run)


def _read_layers(text: str | None) -> list[int] | None:
    try:
        return None if text is None else [int(layer) for layer in text.split(",")]
    except ValueError:
        raise ValueError(
            f"layers: {text!r} are not whole numbers with commas between them; give 0,8,-1"
        ) from None


def _are_swapped(model: str, corpus: str, endpoint_url: str | None) -> bool:
    """Whether the corpus is a model's folder and the model is none."""
    from ..folder import Folder, endpoint_options

    def is_model(uri: str) -> bool:
        place = Folder(uri, endpoint_options(uri, endpoint_url))
        return place.size("config.json") is not None

    try:
        return is_model(corpus) and not is_model(model)
    except (ValueError, OSError):
        return False


def _score(request: Request) -> None:
    from ..request import prepare
    from ..score import score_corpus

    prepared = prepare(request)
    say_plan(prepared)
    say_result(score_corpus.run_prepared(prepared), prepared.job.folder.options)


def _forecast(request: Request, price: float | None) -> None:
    from ..estimate import without_traces
    from ..request import prepare

    with without_traces(request.out):
        prepared = prepare(request)
        say_plan(prepared)
        say_placement(prepared)
        say_estimate(prepared, price)
