"""The panel of operations: how fast shards were scored, where, and what they left."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pyarrow as pa
from markupsafe import Markup

from ..summary import STATUS
from . import charts
from .panel import Behind, Cells, Chart, Material, Panel
from .totals import Totals, ratio
from .wording import MAX_LABEL, duration, number, percent, plural, show, size

_MAX_BARS, _MAX_RETRIED = 48, 20
_TIER, _ALL_TIERS = "bytes_", "bytes_written"


def operations_panel(material: Material) -> Panel | None:
    """Speed and share of the device by shard, bytes by tier, failures by reason."""
    table = material.operations
    if table is None or not table.num_rows:
        return None
    about = (
        "How the run went, by its shards: tokens a second while the engine had a shard, the share "
        "of that time that the device was at work, what was written, and what had to be done again."
    )
    # A single bar says no more than the table below.
    drawn = (
        []
        if table.num_rows == 1
        else [
            _chart(table, "Tokens per second", "tokens", "tokens per second"),
            _chart(table, "Device at work", "device_seconds", "share of the time"),
        ]
    )
    notes = []
    if table.num_rows > _MAX_BARS:
        per_bar = plural(-(-table.num_rows // _MAX_BARS), "shard")
        notes.append(f"A bar stands for {per_bar} that follow each other.")
    attempts = table["attempt"].drop_null().to_pylist()
    if attempts:
        notes.append(_count_retries(attempts, table.num_rows))
    tables = [("By device", _devices(table)), ("Written", _written(table))]
    if any(attempt > 1 for attempt in attempts):
        tables.append(("Retried shards", _retried(table)))
    failed = _failures(material.totals)
    if failed:
        tables.append(("Not scored, by reason", failed))
    empty = "Nothing to draw: the run is one shard, whose numbers are below."
    return Panel("operations", "Operations", about, drawn, notes, tables, empty=empty)


def _chart(table: pa.Table, title: str, column: str, unit: str) -> Chart:
    """A column's sum a second, in bars of shards that follow each other."""
    per_bar = -(-table.num_rows // _MAX_BARS)
    is_share = column == "device_seconds"
    rows, numbers = [], []
    behind: dict[str, Behind] = {}
    shards = table["shard"].to_pylist()
    for start in range(0, table.num_rows, per_bar):
        part = table.slice(start, per_bar)
        value = _ratio(part, column)
        if value is None:
            continue
        shown = percent(value) if is_share else number(value, 0)
        first, last = shards[start], shards[start + part.num_rows - 1]
        span = f"shard {first:,}" if first == last else f"shards {first:,} to {last:,}"
        num_tokens = sum(part["tokens"].to_pylist())
        text = f"{span}: {shown} {'of the time' if is_share else 'tokens/s'}, "
        text += plural(num_tokens, "token")
        rows.append(
            {
                "start": first,
                "stop": last + 1,
                "series": "",
                "order": 0,
                "value": value,
                "label": text,
            }
        )
        numbers.append((span, shown, f"{num_tokens:,}"))
        behind[text] = (_in_shards(first, last),)
    svg = charts.draw_histogram(
        rows, [""], x_title="shard", y_title=unit, y_format="%" if is_share else "~s", x_step=1
    )
    return Chart(title, Markup(svg), Cells(("shards", unit, "tokens"), numbers), behind=behind)


def _in_shards(first: int, last: int) -> str:
    return (
        "SELECT doc_id, status, bits_per_byte, num_tokens_scored\nFROM {scores}\n"
        "WHERE CAST(regexp_extract(filename, 'part-(\\d+)', 1) AS INT) "
        f"BETWEEN {first} AND {last}\nLIMIT 20"
    )


def _ratio(part: pa.Table, column: str) -> float | None:
    """The sum of a column a second, at most 1 for seconds of the device; None if nobody knows."""
    seconds, sums = math.fsum(part["seconds"].to_pylist()), math.fsum(part[column].to_pylist())
    value = ratio(sums, seconds)
    if value is None or not math.isfinite(value):
        return None
    return min(value, 1.0) if column == "device_seconds" else value


def _devices(table: pa.Table) -> Cells:
    devices = table["device"].to_pylist()
    rows = []
    for device in dict.fromkeys(devices):
        part = table.filter(pa.array([d == device for d in devices]))
        rows.append(
            (
                show(device, MAX_LABEL),
                f"{part.num_rows:,}",
                f"{sum(part['documents'].to_pylist()):,}",
                f"{sum(part['tokens'].to_pylist()):,}",
                duration(math.fsum(part["seconds"].to_pylist())),
                number(_ratio(part, "tokens"), 0),
                percent(_ratio(part, "device_seconds")),
            )
        )
    columns = ("device", "shards", "documents", "tokens", "time", "tokens/s", "device at work")
    return Cells(columns, rows[:20])


def _written(table: pa.Table) -> Cells:
    names = [n for n in table.column_names if n.startswith(_TIER) and n != _ALL_TIERS]
    num_tokens = sum(table["tokens"].to_pylist())
    sums = {name.removeprefix(_TIER): sum(table[name].to_pylist()) for name in names}
    rows: Sequence[Sequence[str]] = [
        (tier, size(total), number(ratio(total, num_tokens), 2)) for tier, total in sums.items()
    ]
    return Cells(("what", "size", "bytes per token"), rows)


def _count_retries(attempts: Sequence[int], num_shards: int) -> str:
    """How many shards were done again, of those whose receipts say it."""
    retried = [attempt for attempt in attempts if attempt > 1]
    known = ""
    if len(attempts) < num_shards:
        known = f" The receipts of {plural(num_shards - len(attempts), 'shard')} do not say."
    if not retried:
        return f"No shard had to be done again.{known}"
    retries = sum(retried) - len(retried)
    word = "retry" if retries == 1 else "retries"
    return (
        f"{plural(len(retried), 'shard')} had to be done again: {retries:,} {word}, of tasks that "
        f"failed or were lost with their worker.{known}"
    )


def _retried(table: pa.Table) -> Cells:
    """The shards of most attempts."""
    columns = ("shard", "attempt", "device", "seconds")
    rows = [row for row in table.select(columns).to_pylist() if (row["attempt"] or 1) > 1]
    rows.sort(key=lambda row: (-row["attempt"], row["shard"]))
    cells = [
        (
            f"{row['shard']:,}",
            show(row["device"], MAX_LABEL),
            f"{row['attempt']:,}",
            duration(row["seconds"]),
        )
        for row in rows[:_MAX_RETRIED]
    ]
    return Cells(("shard", "device", "done at attempt", "time"), cells, 2)


def _failures(totals: Totals) -> Cells | None:
    failed = totals.failed()
    rows = [(show(status), f"{num:,}") for status, num in failed.items() if num]
    return Cells((STATUS.rstrip("/"), "documents"), rows) if rows else None
