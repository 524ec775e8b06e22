#!/usr/bin/env python3
"""Renders README.md of this folder: template.md with tables of the records beside it.

python infra/benchmarks/render.py
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from string import Template
from typing import TypeVar

from logitmill.flows.bench.fidelity import Fidelity, load_fidelities
from logitmill.flows.bench.record import Pass, Record, load_records, say_rate, say_versions
from logitmill.flows.workloads import WORKLOADS

HERE = Path(__file__).resolve().parent
PAGE = HERE / "README.md"
R = TypeVar("R", Record, Fidelity)


def main() -> None:
    """Write the page."""
    PAGE.write_text(render())


def render() -> str:
    """The page as it should stand."""
    records = latest(load_records(HERE / "h200.jsonl"))
    stored = latest(load_records(HERE / "stored.jsonl"))
    compared = load_fidelities(HERE / "fidelity.jsonl")
    return Template((HERE / "template.md").read_text()).substitute(
        speed="\n\n".join(describe_workload(group) for group in by_workload(records)),
        start=tabulate_starts(records),
        ceilings=tabulate_ceilings(records),
        stored=tabulate_stored(stored),
        conditions=tabulate_conditions([*records, *stored]),
        fidelity="\n\n".join(describe_fidelity(found) for found in latest(compared)),
    )


def latest(records: Iterable[R]) -> list[R]:
    """The last of each command and case: what was measured again stands once."""
    return list({(r.command, getattr(r, "case", "")): r for r in records}.values())


def by_workload(records: Sequence[Record]) -> list[list[Record]]:
    """Records of each workload, in the order that workloads are listed in."""
    groups = [[r for r in records if r.subject == name] for name in WORKLOADS]
    return [group for group in groups if group]


def describe_workload(records: Sequence[Record]) -> str:
    """A heading, a table for all documents and one for each smaller number, the breakdown."""
    first = records[0]
    blocks = [f"### {first.subject}", f"{first.text}. Batches of {first.batch_tokens:,} tokens."]
    ordered = sorted(records, key=lambda record: -record.documents)
    for documents, group in groupby(ordered, key=lambda record: record.documents):
        same = list(group)
        said = f"{documents:,} documents, {same[0].tokens:,} tokens:"
        blocks += [said, tabulate_passes(same)]
    whole = [r for r in records if r.documents == ordered[0].documents and r.busy is not None]
    if whole:
        blocks += [
            "Where the time of records goes, microseconds a token: measured, and in brackets the "
            "least that the ceilings allow.",
            tabulate_parts(whole),
        ]
    return "\n\n".join(blocks)


def tabulate_passes(records: Sequence[Record]) -> str:
    """A row for each pass of each record."""
    return table(
        ["format", "what", "tokens/s", "roofline", "share", "TFLOP/s", "peak over weights"],
        [
            [
                name_case(record) if p.roofline_share else p.unit,
                p.name,
                f"**{p.tokens_per_second:,.0f}**",
                f"{p.tokens_per_second / p.roofline_share:,.0f}" if p.roofline_share else "",
                f"{p.roofline_share:.1%}" if p.roofline_share else "",
                f"{p.tflops:,.0f}" if p.tflops else "",
                _gigabytes(p.peak_bytes),
            ]
            for record, p in _passes(records)
        ],
    )


def tabulate_parts(records: Sequence[Record]) -> str:
    """A column for each record, a row for each part."""
    names = dict.fromkeys(name for record in records for name in record.parts)
    rows = []
    for name in names:
        cells = []
        for record in records:
            part = record.parts.get(name)
            least = f" ({part.least:.3f})" if part and part.least is not None else ""
            measured = f"{part.measured:.3f}" if part and part.measured is not None else ""
            cells.append(measured + least)
        rows.append([name, *cells])
    rows.append(["GPU busy", *(f"{record.busy:.1%}" for record in records)])
    return table(["", *(name_case(record) for record in records)], rows)


def tabulate_starts(records: Sequence[Record]) -> str:
    """How soon the first batch was done, loading from disk apart from weights made in place."""
    return table(
        ["workload", "format", "weights", "which are", "imported", "loaded", "first batch done"],
        [
            [
                record.subject,
                name_case(record),
                _gigabytes(record.weights_bytes),
                "read from disk" if "--from-disk" in record.command else "made at random",
                *(f"{record.start[moment]:.1f} s" for moment in record.start),
            ]
            for record in records
            # Beside a peer the checkpoint may have been written while it was waited for.
            if record.start and "--peer" not in record.command
        ],
    )


def tabulate_stored(records: Sequence[Record]) -> str:
    """A row for each way from storage to storage, beside the engine alone on the same texts."""
    rows = []
    for record in records:
        alone, *others = record.passes
        for p in others:
            workers = int(p.name.rpartition(", ")[2].split()[0]) if "worker" in p.name else 1
            rows.append(
                [
                    f"{record.subject}, {record.text.split()[-2]} shards",
                    p.name,
                    f"**{p.tokens_per_second:,.0f}**",
                    f"{workers * alone.tokens_per_second:,.0f}",
                    f"{p.tokens_per_second / workers / alone.tokens_per_second:.1%}",
                    f"{p.busy:.1%}" if p.busy is not None else "",
                    f"{p.seconds:.1f} s",
                ]
            )
    titles = ["texts", "from where to where", "tokens/s", "the engine alone", "share", "GPU busy"]
    return table([*titles, "in"], rows)


def tabulate_ceilings(records: Sequence[Record]) -> str:
    """Each ceiling once a model's shape, as it was last measured."""
    found = {}
    for record in records:
        for name, (rate, text) in record.ceilings.items():
            found[(record.subject.partition("-")[0], name, text)] = say_rate(name, rate)
    return table(
        ["shape", "ceiling", "of what", "rate"], [[*key, rate] for key, rate in found.items()]
    )


def tabulate_conditions(records: Sequence[Record]) -> str:
    """Commands with the device, the software and the day of each."""
    runs = {}
    for record in records:
        software = say_versions(record.versions)
        runs[(f"`{record.command}`", record.device, software, record.date)] = None
    return table(["command", "device", "software", "date"], [list(run) for run in runs])


def describe_fidelity(fidelity: Fidelity) -> str:
    """The table, and its conditions in a line."""
    titles = [title for title, _ in fidelity.rows[0].cells()]
    rows = [[value for _, value in row.cells()] for row in fidelity.rows]
    conditions = (
        f"{fidelity.text}; {fidelity.tokens:,} tokens scored; perplexity of the float32 model "
        f"{fidelity.perplexity:.4f}. `{fidelity.command}`; {fidelity.device}; "
        f"{say_versions(fidelity.versions)}; {fidelity.date}."
    )
    return f"{table(titles, rows)}\n\n{conditions}"


def name_case(record: Record) -> str:
    """What the linears are multiplied as, in a word or two, and how many layers are streamed."""
    case = record.passes[0].unit if record.case in ("stored", "none") else record.case
    if "streamed" not in record.placement:
        return case
    resident, _, reason = record.placement.partition(", ")
    resident = f"{case}, {resident.replace(' layers', '')}"
    budget = reason.partition(": all would take ")[2].partition(" of ")[2]
    return f"{resident} within {budget}" if budget else resident


def table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _passes(records: Sequence[Record]) -> list[tuple[Record, Pass]]:
    return [(record, p) for record in records for p in record.passes]


def _gigabytes(size: int | None) -> str:
    return f"{size / 1e9:.1f} GB" if size is not None else ""


if __name__ == "__main__":
    main()
