"""`logitmill inspect`."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..progress import counted
from .mistakes import need_page_name, or_exit, say_error, to_bytes
from .options import (
    ENDPOINT_HELP,
    BatchTokens,
    Device,
    DeviceMemory,
    Dtype,
    Fp8Head,
    Quantization,
    Residency,
    TrustRemoteCode,
    number,
)
from .terminal import show_bytes
from .words import describe_way, show_totals

if TYPE_CHECKING:
    from ..run import Run

# Tokens that are shown at once unless it is said otherwise.
_MOST, _MOST_IN_PAGE = 2_000, 10_000


def inspect(
    target: Annotated[
        str, typer.Argument(help="A run's URI, or a model folder, its URI or Hub id.")
    ],
    doc: Annotated[
        str | None, typer.Option(help="Show this document of a run, token by token if kept.")
    ] = None,
    html: Annotated[
        str | None,
        typer.Option(help="With --doc: write it as a page instead, on any fsspec URI."),
    ] = None,
    first: Annotated[
        str | None,
        typer.Option("--from", help="With --doc: begin at this token, or byte as in 4096b."),
    ] = None,
    last: Annotated[
        str | None,
        typer.Option(
            "--to",
            help="With --doc: end before this token or byte; default 2,000 tokens on, 10,000 in a "
            "page.",
        ),
    ] = None,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify",
            help="Check a run, complete or not, against its receipts, and score a few of its "
            "documents again.",
        ),
    ] = False,
    sample: Annotated[
        int | None,
        number("documents", "8", help="With --verify: score so many again; default 8, 0 for none."),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(help="With --verify: a number that decides which these are; default 0."),
    ] = None,
    endpoint_url: Annotated[str | None, typer.Option(help=ENDPOINT_HELP)] = None,
    device: Device = None,
    dtype: Dtype = None,
    quantization: Quantization = None,
    fp8_head: Fp8Head = False,
    batch_tokens: BatchTokens = None,
    device_memory: DeviceMemory = None,
    residency: Residency = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Show what a run holds, or how a model is stored and would be run.

    Of a model, configs and the headers of its files are read and checked, and no weights; how it is
    computed can be said as for `score`. Of a URI no more than that is fetched, of a Hub id all
    files. Of what runs through transformers less can be told; the last line says what was not
    checked. Where there is no GPU, `--device-memory 24` asks for one of 24 GB in this machine.

    `--doc` shows a document of a run that kept `tokens`, `topk`, `sampled` or `logits`: its text,
    coloured by surprisal, with the borders of its windows and its most surprising tokens; where
    colours are not wanted (`NO_COLOR`, a pipe) a line a token, and its record after them. A page
    (`--html`) shows what the model expected in each token's place too. Text is read from the corpus
    again; where that is gone or has changed, token ids are spelled by the model's tokenizer.

    `--verify` reads every part of a run and holds size, sha256, rows and sums to the receipts,
    summaries and manifest to the shards, and the folder to what they name. Documents from all over
    the run are scored again, with the model, corpus and settings of its plan (`--device` and the
    like say where), and compared bit for bit; where device or software are others, within a
    tolerance that is said. The exit status is 0 if all holds, else 1, with a line a finding.

    Examples:

    `logitmill inspect runs`

    `logitmill inspect runs/6f3a09c2d41b77e0 --doc json/decoder.py`

    `logitmill inspect runs --doc json/decoder.py --from 2000 --html decoder.html`

    `logitmill inspect s3://scores/6f3a09c2d41b77e0 --verify --sample 100`

    `logitmill inspect Qwen/Qwen3-0.6B --quantization fp8`
    """

    def show() -> None:
        settings = {
            "device": device,
            "dtype": dtype,
            "quantization": quantization,
            "fp8_head": fp8_head,
            "max_batch_tokens": batch_tokens,
            "device_memory": to_bytes("device_memory", device_memory),
            "residency": residency,
            "trust_remote_code": trust_remote_code,
        }
        for name, value in (("sample", sample), ("seed", seed)):
            if value is not None and not verify:
                raise ValueError(f"{name}: {value} goes with --verify; add that, or leave it out")
        for name, text in (("html", html), ("from", first), ("to", last)):
            if text is not None and doc is None:
                raise ValueError(
                    f"{name}: {text!r} goes with --doc; name a document, or leave it out"
                )
        if verify and doc is not None:
            raise ValueError(f"doc: {doc!r} does not go with --verify; leave one of them out")
        if verify:
            chosen = {"sample": sample, "seed": seed}
            _verify(target, endpoint_url, settings, chosen)
        elif doc is not None:
            _refuse(settings, target)
            _show_document(target, doc, endpoint_url, html, (first, last))
        else:
            _inspect(target, endpoint_url, settings)

    or_exit(show)


def _inspect(target: str, endpoint_url: str | None, settings: Mapping[str, Any]) -> None:
    from ..folder import Folder, StoreError, endpoint_options
    from ..run import find_runs, open_run

    options = endpoint_options(target, endpoint_url)
    try:
        runs = find_runs(Folder(target, options, field="target"))
    except StoreError:
        runs = []  # Not a place at all, as `org/name` is none.
    if runs:
        _refuse(settings, target)
        for i, folder in enumerate(runs):
            typer.echo("" if i else None, nl=bool(i))
            _show_run(open_run(folder.uri, partial=True, storage_options=options))
    else:
        _show_model(target, options, settings)


def _refuse(settings: Mapping[str, Any], target: str) -> None:
    """ValueError for settings that say how a model is computed, where there is a run."""
    given = [name for name, value in settings.items() if value]
    if given:
        raise ValueError(f"{given[0]}: {target!r} is a run, not a model; leave it out")


def _show_document(
    target: str,
    doc: str,
    endpoint_url: str | None,
    html: str | None,
    ends: tuple[str | None, str | None],
) -> None:
    need_page_name("html", html)

    from ..folder import endpoint_options, open_page

    page = open_page(html, "html", endpoint_url) if html is not None else None

    from rich.console import Console

    from ..document import NoTokens, Stretch, open_document, render_page
    from ..document.terminal import print_document
    from ..run import open_run

    stretch = Stretch.between(*ends, most=_MOST_IN_PAGE if html is not None else _MOST)
    run = open_run(target, partial=True, storage_options=endpoint_options(target, endpoint_url))
    console = Console(file=sys.stdout, highlight=False)
    try:
        view = open_document(run, doc, stretch, endpoint_url=endpoint_url)
    except KeyError as error:
        raise ValueError(error.args[0]) from None
    except NoTokens as missing:
        if page is not None:
            raise
        _show_record(run.document(doc))
        typer.echo(f"{missing}", err=True)
        return
    if page is not None:
        folder, name = page
        folder.write(name, render_page(view).encode())
        typer.echo(html)
        return
    print_document(view, console)
    if not console.is_terminal or console.no_color:
        typer.echo()
        _show_record(view.record)


def _show_record(record: Mapping[str, Any]) -> None:
    for name, value in record.items():
        # Beside its row stand the arrays of its tokens.
        if not isinstance(value, Mapping):
            typer.echo(f"{name:20} {value}")


def _verify(
    target: str,
    endpoint_url: str | None,
    settings: Mapping[str, Any],
    chosen: Mapping[str, int | None],
) -> None:
    """Check a run; status 1 and a line a finding if something does not hold."""
    from ...engine.pipeline import EngineSettings
    from ..folder import endpoint_options
    from ..run import open_run
    from ..verify import verify_run

    run = open_run(target, partial=True, storage_options=endpoint_options(target, endpoint_url))
    for name in ("dtype", "quantization", "fp8_head"):
        if settings[name]:
            raise ValueError(f"{name}: {settings[name]!r} is the plan's to say; leave it out")
    typer.echo(f"run     {run.uri}" + ("" if run.manifest else ", not complete"))
    lines: list[str] = []
    with show_bytes("reading", "scoring again") as on_progress:
        found = verify_run(
            run,
            engine=EngineSettings(**settings),
            endpoint_url=endpoint_url,
            on_line=lines.append,
            on_progress=on_progress,
            **{name: value for name, value in chosen.items() if value is not None},
        )
    for line in lines:
        typer.echo(f"        {line}")
    for finding in found:
        say_error(str(finding))
    if found:
        raise RuntimeError(f"{counted(len(found), 'finding')}; {run.uri} is not what it should be")
    typer.echo("        all holds")


def _show_model(
    target: str, storage_options: Mapping[str, Any], settings: Mapping[str, Any]
) -> None:
    import torch

    from ...engine.checkpoint import find_model, read_config
    from ...engine.fallback import can_check_tensors
    from ...engine.intake import check_vocabulary, doubt_vocabulary
    from ...engine.pipeline import (
        AbsentGpu,
        EngineSettings,
        inspect_model,
        inspect_placement,
    )
    from ...engine.tokenization import Tokenizer

    if Path(target).is_dir() and not Path(target, "config.json").is_file():
        raise ValueError(f"target: {target!r} is neither a run's folder nor a model's; {_seek()}")
    try:
        folder = find_model(target, storage_options=storage_options, headers_only=True)
    except ValueError as error:
        raise ValueError(f"{error}; and no run is there; {_seek()}") from None
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
        "reason": describe_way(facts),
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


def _seek() -> str:
    """What was looked for where there is nothing to show."""
    from ..store import PLAN

    return (
        f"a run has a {PLAN}, in the folder or one below it, and `logitmill score MODEL CORPUS "
        "--out FOLDER` makes one; a model has a config.json"
    )


def _show_run(run: Run) -> None:
    from ..run import not_complete
    from ..store import find_receipts

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
        receipts = find_receipts(run.folder, num_shards).values()
        num_retried = sum((receipt.attempt or 1) > 1 for receipt in receipts)
        retried = f", {num_retried:,} of them after a retry" if num_retried else ""
        so_far = f": {len(receipts):,} of {counted(num_shards, 'shard')} done{retried}"
        typer.echo(not_complete(run.uri, run.plan, so_far))
    else:
        show_totals(run)
