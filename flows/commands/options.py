"""Options that more than one command takes, and what they may be."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any

import typer


class Tier(StrEnum):
    """What to keep besides document scores."""

    tokens = "tokens"
    topk = "topk"
    sampled = "sampled"
    lens = "lens"
    hidden = "hidden"
    logits = "logits"


class Kept(StrEnum):
    """What `bench` can measure besides records."""

    sampled = "sampled"
    vocabulary = "vocabulary"
    hidden = "hidden"
    logits = "logits"


class StoredDtype(StrEnum):
    """Dtypes that log-probabilities are stored in."""

    float32 = "float32"
    float16 = "float16"


ENDPOINT_HELP = "S3 server to use where it is not Amazon's."
QUANTIZATION_HELP = (
    "What linears are multiplied as: none, fp8, fp8_block, int8, int4, int4_fp8, "
    "int4_fp8_exact; default as the checkpoint is stored."
)
_FP8_HEAD_HELP = "Multiply the head in fp8 too: faster, less exact."
INPUT, RECIPE, ENGINE = "What is read", "How it is scored", "How it is computed"
RUN = "How it is run"


def number(unit: str, example: str, *, kind: type[int] | type[float] = int, **option: Any) -> Any:
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
Limit = Annotated[
    int | None,
    number("documents", "1000", help="At most so many documents.", rich_help_panel=INPUT),
]
TextColumn = Annotated[
    str, typer.Option(help="Column of a table that is scored.", rich_help_panel=INPUT)
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1.", rich_help_panel=ENGINE)]
Dtype = Annotated[
    str | None,
    typer.Option(
        help="float32, bfloat16, float16; default float32 on a CPU, else the checkpoint's.",
        rich_help_panel=ENGINE,
    ),
]
Quantization = Annotated[str | None, typer.Option(help=QUANTIZATION_HELP, rich_help_panel=ENGINE)]
Fp8Head = Annotated[bool, typer.Option("--fp8-head", help=_FP8_HEAD_HELP, rich_help_panel=ENGINE)]
DeviceMemory = Annotated[
    float | None,
    number(
        "GB",
        "24",
        kind=float,
        help="GB of the GPU that weights and batches may take; default what is free. Layers that "
        "do not fit are streamed from host memory, or from disk.",
        rich_help_panel=ENGINE,
    ),
]
Residency = Annotated[
    str | None,
    typer.Option(
        help="Where layers live: device, or host or disk to stream all of them from there; "
        "default device for as many as fit. The disk is LOGITMILL_SCRATCH's.",
        rich_help_panel=ENGINE,
    ),
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Run the Python code that the model's folder brings. It can do all that you can: only "
        "for authors you trust.",
        rich_help_panel=ENGINE,
    ),
]
BatchTokens = Annotated[
    int | None,
    number("tokens", "8192", help="Tokens of a packed batch.", rich_help_panel=ENGINE),
]
