"""How far formats are from the float32 model, token by token, in llama.cpp's terms.

Legend: T scored tokens of a sequence, V vocabulary.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from ...engine.pipeline import DTYPES, Pipeline, inspect_model
from ..compare.divergences import Differences, compare_logits, join
from ..versions import versions
from .loaded import release
from .measure import Request, name_case
from .record import make_console, say_versions
from .subject import Window, find_subject, windows

FORMATS = ("fp8", "fp8_block", "int8", "int4", "int4_fp8", "int4_fp8_exact", "fp8+head")
"""Names of cases that are compared where nobody names others."""

Logits = Callable[[np.ndarray], torch.Tensor]
"""Token ids [n] -> logits [n, V]."""


@dataclass(frozen=True)
class Agreement:
    """Differences over all scored tokens."""

    mean_kl: float
    """Nats."""
    kl_999: float
    """The 99.9 % quantile, nats."""
    max_kl: float
    """Nats."""
    same_top: float
    """Share."""
    mean_delta_p: float
    """Of the true token's probability, which is at most 1."""
    rms_delta_p: float
    delta_perplexity: float
    """Token perplexity of the other less that of the base."""

    def cells(self) -> list[tuple[str, str]]:
        """(title, value) of columns, by llama.cpp's names."""
        return [
            ("mean KL", f"{self.mean_kl:.3g}"),
            ("99.9 % KL", f"{self.kl_999:.3g}"),
            ("max KL", f"{self.max_kl:.3g}"),
            ("same top", f"{self.same_top:.2%}"),
            ("mean Δp", f"{self.mean_delta_p:+.4%}"),
            ("RMS Δp", f"{self.rms_delta_p:.4%}"),
            ("Δ perplexity", f"{self.delta_perplexity:+.3g}"),
        ]


@dataclass(frozen=True)
class Row:
    """One way of computing."""

    name: str
    beside_float32: Agreement
    beside_bfloat16: Agreement | None
    """Beside this engine's bfloat16; None for that itself and for what is no format of it."""

    def cells(self) -> list[tuple[str, str]]:
        """(title, value) of columns."""
        beside = self.beside_bfloat16
        return [
            ("", self.name),
            *self.beside_float32.cells(),
            ("mean KL to bf16", f"{beside.mean_kl:.3g}" if beside else ""),
            ("same top as bf16", f"{beside.same_top:.2%}" if beside else ""),
        ]


@dataclass(frozen=True)
class Fidelity:
    """What a comparison found, and under which conditions."""

    command: str
    date: str
    device: str
    versions: dict[str, str]
    text: str
    """The subject in a line."""
    tokens: int
    """Scored."""
    perplexity: float
    """Of the float32 model, a token."""
    rows: list[Row]

    def append(self, path: Path) -> None:
        """Add it to a file of JSON lines."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.write(json.dumps(asdict(self)) + "\n")


def load_fidelities(path: Path) -> list[Fidelity]:
    """The comparisons of a file of JSON lines, in order."""
    return [_load(json.loads(line)) for line in path.read_text().splitlines()]


def _load(values: dict[str, Any]) -> Fidelity:
    rows = [
        Row(
            row["name"],
            Agreement(**row["beside_float32"]),
            Agreement(**row["beside_bfloat16"]) if row["beside_bfloat16"] else None,
        )
        for row in values["rows"]
    ]
    return Fidelity(**{**values, "rows": rows})


# ---- measuring -------------------------------------------------------------------------------


def measure_fidelity(
    request: Request, *, command: str = "", on_row: Callable[[str], object] | None = None
) -> Fidelity:
    """Compare transformers' bfloat16, and the engine in several formats, with float32.

    The float32 model is transformers'. The rows are transformers' bfloat16, the engine in float32
    and in bfloat16 and then the request's cases, their layers in bfloat16 where it names no dtype.
    Three models and the logits of one sequence are there at a time, whatever the number of rows.

    Args:
        request: a model that is not quantized, texts, cases; no peers or candidates.
        command: what to type to do it again.
        on_row: called with the name of each row before it is computed.

    Raises:
        ValueError: naming the field, its value and what would work.
    """
    unused = {"top_k": request.top_k, "keep": request.keep, "peer": request.peers}
    for name, value in unused.items():
        if value:
            raise ValueError(f"{name}: it is of speed, and this is of fidelity; leave out either")
    subject = find_subject(
        request.target,
        request.corpus,
        text_column=request.text_column,
        recipe=request.recipe,
        limit=request.limit,
        from_disk=request.from_disk,
        shared=True,
    )
    plain = replace(request.cases[0], quantization="none", fp8_head=False)
    narrow = replace(plain, dtype="bfloat16")
    formats = [replace(s, dtype=s.dtype or "bfloat16") for s in request.cases]
    stored = plain.resolve_scheme(subject.config).stored
    if stored.groups:
        raise ValueError(
            f"model: {request.target!r} is stored as {stored.method}, which leaves no float32 "
            "model to compare it with; use the checkpoint that it was made from"
        )
    folder, device = subject.folder(), plain.resolve_device()
    for settings in formats:
        inspect_model(folder, settings)

    float32 = _load_transformers(folder, "float32", device)
    bfloat16 = subject.load(narrow)
    given = list(windows(subject, bfloat16, subject.documents))

    def compare(name: str, logits: Logits, *bases: Logits) -> list[Differences]:
        if on_row is not None:
            on_row(name)
        return compare_windows(bases, logits, given, device)

    name = "transformers bfloat16"
    differences = compare(name, _load_transformers(folder, "bfloat16", device), float32)
    rows = [_make_row(name, differences)]
    perplexity = float(np.exp(differences[0].base_nll_T.mean()))
    release(device)
    exact = subject.load(replace(plain, dtype="float32"))
    rows.append(_make_row("float32", compare("float32", _as_logits(exact), float32)))
    del exact
    release(device)
    rows.append(_make_row("bfloat16", compare("bfloat16", _as_logits(bfloat16), float32)))
    for settings in formats:
        pipe = subject.load(settings)
        name = name_case(settings)
        found = compare(name, _as_logits(pipe), float32, _as_logits(bfloat16))
        rows.append(_make_row(name, found))
        del pipe
        release(device)
    return Fidelity(
        command=command,
        date=date.today().isoformat(),
        device=bfloat16.device_name,
        versions={**versions(), "Python": platform.python_version()},
        text=subject.text,
        tokens=len(differences[0].kl_T),
        perplexity=perplexity,
        rows=rows,
    )


def compare_windows(
    bases: Sequence[Logits], other: Logits, given: Iterable[Window], device: torch.device
) -> list[Differences]:
    """Differences of one way of computing from each base, at all targets of windows."""
    found: list[list[Differences]] = [[] for _ in bases]
    for window in given:
        ids = window.ids[:-1]
        # What stands before the first target's row predicts context.
        rows = slice(window.num_context - 1, len(ids))
        targets = torch.from_numpy(window.ids[window.num_context :].astype(np.int64))
        other_TV = other(ids)[rows]
        for base, own in zip(bases, found, strict=True):
            own.append(compare_logits(base(ids)[rows], other_TV, targets, device))
    return [join(own) for own in found]


def sum_up(differences: Differences) -> Agreement:
    """Means, quantiles and extremes over all tokens."""
    d = differences
    return Agreement(
        mean_kl=float(d.kl_T.mean()),
        kl_999=float(np.quantile(d.kl_T, 0.999)),
        max_kl=float(d.kl_T.max()),
        same_top=float(d.same_top_T.mean()),
        mean_delta_p=float(d.delta_p_T.mean()),
        rms_delta_p=float(np.sqrt(np.square(d.delta_p_T).mean())),
        delta_perplexity=float(np.exp(d.other_nll_T.mean()) - np.exp(d.base_nll_T.mean())),
    )


def _make_row(name: str, differences: Sequence[Differences]) -> Row:
    beside = [sum_up(found) for found in differences]
    return Row(name, beside[0], beside[1] if len(beside) > 1 else None)


def _as_logits(pipe: Pipeline) -> Logits:
    return lambda ids: cast(torch.Tensor, pipe.get_logits(ids))


def _load_transformers(folder: Path, dtype: str, device: torch.device) -> Logits:
    from transformers import AutoModelForCausalLM

    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[dtype])
    model = loaded.to(device).eval()

    @torch.inference_mode()
    def compute(ids: np.ndarray) -> torch.Tensor:
        given = torch.from_numpy(ids.astype(np.int64))[None].to(device)
        logits: torch.Tensor = model(input_ids=given, use_cache=False).logits
        return logits[0]

    return compute


# ---- showing ---------------------------------------------------------------------------------


def show_fidelity(fidelity: Fidelity) -> None:
    """Print it as a table."""
    from rich.table import Table

    table = Table(box=None, header_style="bold")
    for title, _ in fidelity.rows[0].cells():
        table.add_column(title, justify="right" if title else "left")
    for row in fidelity.rows:
        table.add_row(*(value for _, value in row.cells()))
    console = make_console()
    for line in (
        f"{fidelity.text}; {fidelity.tokens:,} tokens scored; perplexity of the float32 model "
        f"{fidelity.perplexity:.4f}",
        "beside transformers' float32; KL in nats, Δp of the true token:",
    ):
        console.print(line, soft_wrap=True, highlight=False)
    console.print()
    console.print(table)
    console.print(
        f"{fidelity.device}; {say_versions(fidelity.versions)}; {fidelity.date}",
        soft_wrap=True,
        highlight=False,
    )
