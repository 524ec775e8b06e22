"""How a command ends: a mistake, a failure or a signal is one line and an exit status."""

from __future__ import annotations

import math
import os
import re
import select
import signal
import sys
from collections.abc import Callable
from typing import Any, overload

import typer


def or_exit(action: Callable[[], None]) -> None:
    """Do it; a mistake ends the command with status 2, a failure with 1, and a line on stderr."""
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        action()
    except typer.Exit:
        raise  # A RuntimeError to click.
    except ValueError as error:
        say_error(name_options(str(error)))
        raise typer.Exit(2) from None
    except (RuntimeError, OSError) as error:
        if isinstance(error, BrokenPipeError) and _is_unread():
            raise typer.Exit(141) from None
        say_error(name_options(str(error)))
        raise typer.Exit(1) from None
    except KeyboardInterrupt as stop:
        typer.echo("stopped; run the same command again to do the rest", err=True)
        raise typer.Exit(143 if isinstance(stop, _Terminated) else 130) from None
    finally:
        signal.signal(signal.SIGTERM, before)


def _is_unread() -> bool:
    """Whether nobody reads standard output any more, as behind `| head`; nothing goes there then.

    The status is what a shell says of a command that such a pipe has ended.
    """
    number = sys.stdout.fileno()
    ends = select.poll()
    ends.register(number, 0)
    if not any(event & select.POLLERR for _, event in ends.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), number)
    return True


class _Terminated(KeyboardInterrupt):
    """SIGTERM, which is how schedulers end what has had its time."""


def _terminate(number: int, frame: Any) -> None:
    raise _Terminated


def say_error(message: str) -> None:
    """One line on stderr."""
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
    *("corpus", "peer", "repeat", "keep", "workers", "deadline", "sample", "seed", "doc", "level"),
    *("base", "html", "from", "to", "score", "by", "weight"),
    *("layers", "catalog", "namespace", "date", "database", "sql", "source", "count"),
)
_COMPOUNDS = (
    *("text_column", "messages_column", "ids_column", "context_column", "id_column"),
    *("source_column", "language_column", "day_column", "endpoint_url", "logits_dtype"),
    "fp8_head",
    *("trust_remote_code", "shard_bytes", "max_batch_tokens", "logits_memory"),
    *("device_memory", "residency"),
    *("max_logits_bytes", "storage_options", "top_k", "num_draws", "draw_seed", "from_disk"),
    *("only_new", "price_per_gb_month"),
)
# A word is a field where it leads the message, stands alone in brackets or before a value; a
# compound is one anywhere.
_FIELD = re.compile(
    r"^({0})(?=[:=])|(?<=\()({0})(?=\))|(?<![\w./-])({0})(?==)|\b({1})\b(?:=True)?".format(
        "|".join(_WORDS), "|".join(_COMPOUNDS)
    )
)


def name_options(message: str) -> str:
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


def need_page_name(field: str, uri: str | None) -> None:
    """ValueError if an option that names a page names none; None is no option."""
    if uri is not None and not uri.endswith(".html"):
        raise ValueError(f"{field}: {uri!r} is no page's name; give one that ends in .html")


# What one of an option's units is in bytes, by the field that the option sets.
_UNITS = {
    "shard_bytes": (10**6, "MB"),
    "logits_memory": (1 << 20, "MB"),
    "device_memory": (10**9, "GB"),
    "max_logits_bytes": (10**9, "GB"),
}


@overload
def to_bytes(field: str, amount: float, *, least: int = 1) -> int: ...
@overload
def to_bytes(field: str, amount: None) -> None: ...
def to_bytes(field: str, amount: float | None, *, least: int = 1) -> int | None:
    """An option's amount in bytes; ValueError, in the option's own unit, below `least` bytes."""
    if amount is None:
        return None
    size, unit = _UNITS[field]
    if not least <= amount * size < math.inf:
        works = "a number above 0" if least else "0 or more"
        raise ValueError(f"{field}: {amount:g} {unit} is no size; give {works}")
    return int(amount * size)
