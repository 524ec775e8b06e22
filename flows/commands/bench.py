"""`logitmill bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .mistakes import or_exit, to_bytes
from .options import (
    ENDPOINT_HELP,
    ENGINE,
    QUANTIZATION_HELP,
    RECIPE,
    BatchTokens,
    Device,
    DeviceMemory,
    Dtype,
    Fp8Head,
    Kept,
    Limit,
    Residency,
    TextColumn,
    number,
)
from .terminal import hush_prefect, typed


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
        number(
            "candidates",
            "20",
            help="Also measure keeping so many candidates a token. May be given twice.",
        ),
    ] = None,
    keep: Annotated[
        list[Kept] | None,
        typer.Option(
            help="Also measure bringing all logits or hidden states to host memory, drawing "
            "tokens, or counting the vocabulary. May be given several times."
        ),
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
    store: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FOLDER|URI",
            help="Also measure scoring texts from this folder to parts in it, in this process, as "
            "`score` does. What is written there is removed again. May be given twice.",
        ),
    ] = None,
    workers: Annotated[
        list[int] | None,
        number(
            "processes",
            "1",
            help="With --store: also by so many processes of this machine, each with a GPU. May be "
            "given several times.",
        ),
    ] = None,
    shards: Annotated[
        int,
        number(
            "shards", "4", help="With --store: score the documents so many times, a shard each."
        ),
    ] = 4,
    endpoint_url: Annotated[str | None, typer.Option(help=ENDPOINT_HELP)] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Add the record to this file of JSON lines.")
    ] = None,
    repeat: Annotated[int, number("runs", "3", help="Runs of each pass; the fastest counts.")] = 3,
    limit: Limit = None,
    text_column: TextColumn = "text",
    recipe: Annotated[
        str, typer.Option(help="As for score; for texts.", rich_help_panel=RECIPE)
    ] = "rolling",
    device: Device = None,
    dtype: Dtype = None,
    quantization: Annotated[
        list[str] | None,
        typer.Option(
            help=f"{QUANTIZATION_HELP} May be given several times, with +head for an fp8 head "
            "(fp8+head): each is measured in turn, after the first with records alone.",
            rich_help_panel=ENGINE,
        ),
    ] = None,
    fp8_head: Fp8Head = False,
    batch_tokens: BatchTokens = None,
    device_memory: DeviceMemory = None,
    residency: Residency = None,
    from_disk: Annotated[
        bool,
        typer.Option(
            "--from-disk",
            help="Load a workload's weights from a checkpoint, which is written to the temporary "
            "folder first if it is not there yet.",
            rich_help_panel=ENGINE,
        ),
    ] = False,
) -> None:
    """Measure tokens a second, loading left out, and how far that is from what the device can do.

    A workload has a model's shape, random weights and random tokens, and needs no download.

    Examples:

    `logitmill bench llama8b-mixed --quantization fp8 --quantization none --top-k 20`

    `logitmill bench infra/demo/model 'engine/*.py' --limit 40 --peer transformers`

    `logitmill bench infra/demo/model 'engine/*.py' --limit 40 --fidelity`

    From texts in storage to parts in storage, by this process, by one worker and by two:

    `logitmill bench llama8b-mixed --quantization fp8 --store runs --workers 1 --workers 2`
    """

    def run() -> None:
        if show_list:
            from ..workloads import WORKLOADS

            for name, workload in WORKLOADS.items():
                typer.echo(f"{name:16} {workload.text}")
            return
        if target is None:
            raise ValueError("WORKLOAD|MODEL: missing; --list shows the workloads")
        from ...engine.pipeline import EngineSettings
        from ..bench import (
            FORMATS,
            Request,
            make_cases,
            measure,
            measure_fidelity,
            show,
            show_fidelity,
        )

        if store:
            hush_prefect()
        settings = EngineSettings(
            device=device,
            dtype=dtype,
            fp8_head=fp8_head,
            max_batch_tokens=batch_tokens,
            device_memory=to_bytes("device_memory", device_memory),
            residency=residency,
        )
        request = Request(
            target=target,
            corpus=corpus,
            cases=make_cases(quantization or (FORMATS if fidelity else ()), settings),
            recipe=recipe,
            text_column=text_column,
            top_k=tuple(top_k or ()),
            keep=tuple(kept.value for kept in keep or ()),
            peers=tuple(peer or ()),
            repeat=repeat,
            limit=limit,
            from_disk=from_disk,
            stores=tuple(store or ()),
            shards=shards,
            processes=tuple(workers or ()),
            endpoint_url=endpoint_url,
        )
        command = typed(without="--json")
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

    or_exit(run)
