"""Measurements from start to end: load, score, take apart, compare; one format after another."""

from __future__ import annotations

import math
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from typing import Any

from ...engine.families import NotNative, find_family
from ...engine.pipeline import NO_STATES, EngineSettings
from ...kernels.logits import MAX_K
from ..versions import versions
from .breakdown import Breakdown
from .ceilings import Ceilings
from .loaded import (
    GET_LOGITS,
    HANDED_OVER,
    UNSHARED,
    Loaded,
    Scored,
    Timed,
    memory,
    release,
    time_best,
)
from .peers import PEERS, check_peers
from .record import Part, Pass, Record
from .start import process_age
from .subject import Subject, Window, find_subject

# Windows that warm a peer up.
_WARM = 8
# Seconds of a run that is not worth another one to see where its time goes.
_LONG = 60.0
# Behind the name of a quantization: the head is multiplied in fp8, too.
_HEAD = "+head"


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is measured, and how."""

    target: str
    """A name of `WORKLOADS`, or a model folder or Hub id."""
    corpus: str | None = None
    """Texts for a model: anything that `score` reads."""
    cases: tuple[EngineSettings, ...]
    """Measured in turn, at least one. What is asked for besides records (candidates, logits,
    peers) is measured with the first."""
    recipe: str = "rolling"
    """Of texts; a workload's documents are scored from their second token on."""
    text_column: str = "text"
    top_k: tuple[int, ...] = ()
    """Candidates kept a token: a pass each."""
    keep: tuple[str, ...] = ()
    """What else is measured, a pass or two each: `logits` and `hidden` states that reach host
    memory, `sampled` tokens, counts of the `vocabulary`."""
    peers: tuple[str, ...] = ()
    """Names of `PEERS`."""
    repeat: int = 3
    """Runs of each pass; the fastest counts."""
    limit: int | None = None
    """At most so many documents."""
    from_disk: bool = False
    """Whether a workload's weights are loaded from a checkpoint, written where it is missing."""
    stores: tuple[str, ...] = ()
    """Folders, on any file system, to score texts from and to: a pass each. Documents are texts
    then, all of them `shards` times."""
    shards: int = 4
    processes: tuple[int, ...] = ()
    """Also score by so many processes of this machine, one for each GPU: a pass a store each."""
    endpoint_url: str | None = None
    """Of the S3 server where it is not Amazon's."""

    def __post_init__(self) -> None:
        values = {"repeat": self.repeat, "limit": self.limit, "shards": self.shards}
        for name, value in (*values.items(), *(("workers", n) for n in self.processes)):
            if value is not None and value < 1:
                raise ValueError(f"{name}: {value} is not at least 1")
        if max(self.processes, default=0) > self.shards:
            raise ValueError(
                f"shards: {self.shards} leave some of {max(self.processes)} workers without one; "
                "give as many"
            )
        if self.processes and not self.stores:
            raise ValueError(
                f"workers: {self.processes[0]} score from storage to storage; add --store FOLDER"
            )


def make_cases(names: Sequence[str], settings: EngineSettings) -> tuple[EngineSettings, ...]:
    """`settings` once for each name: a quantization, `+head` after it for the head in fp8, too.

    Without names, `settings` as they are: what the checkpoint is stored as.
    """
    cases = []
    for name in names:
        quantization = name.removesuffix(_HEAD)
        fp8_head = settings.fp8_head or name != quantization
        cases.append(replace(settings, quantization=quantization, fp8_head=fp8_head))
    return tuple(cases) or (settings,)


def name_case(settings: EngineSettings) -> str:
    """What `make_cases` would make the settings from; "stored" for a checkpoint as it is."""
    return (settings.quantization or "stored") + (_HEAD if settings.fp8_head else "")


def measure(request: Request, *, command: str = "") -> Iterator[Record]:
    """Measure a subject in each case; `command` is what to type to do it again.

    Raises:
        ValueError: naming the field, its value and what would work, before anything is loaded.
    """
    check_peers(request.peers)
    if request.stores:
        from .stored import check_stores

        check_stores(request.stores, request.endpoint_url, request.processes)
    subject = find_subject(
        request.target,
        request.corpus,
        text_column=request.text_column,
        recipe=request.recipe,
        limit=request.limit,
        from_disk=request.from_disk,
        shared=bool(request.peers),
        times=request.shards if request.stores else None,
    )
    _check_passes(request, subject.config)
    for settings in request.cases:
        settings.resolve_scheme(subject.config)
    first, *others = request.cases
    yield _measure_case(subject, request, first, command, _Start())
    for settings in others:
        alone = replace(request, top_k=(), keep=(), peers=(), stores=(), processes=())
        yield _measure_case(subject, alone, settings, command, None)


def _check_passes(request: Request, config: Mapping[str, Any]) -> None:
    """ValueError for passes that a model of this config.json cannot run."""
    most = MAX_K
    try:
        most = min(most, find_family(config["architectures"][0]).spec(config).vocab_size)
    except NotNative:
        if "hidden" in request.keep:
            raise ValueError(f"keep: 'hidden' cannot be measured: {NO_STATES}") from None
    for k in request.top_k:
        if not 1 <= k <= most:
            raise ValueError(f"top_k: {k} is not an integer within 1 ... {most}")


class _Start:
    """Moments of this process, seconds from its start."""

    def __init__(self) -> None:
        self.moments: dict[str, float] = {}
        self.note("imported")

    def note(self, moment: str) -> None:
        """The first time that something happens; nothing where the system does not say."""
        age = process_age()
        if age is not None:
            self.moments.setdefault(moment, age)


def _measure_case(
    subject: Subject,
    request: Request,
    settings: EngineSettings,
    command: str,
    start: _Start | None,
) -> Record:
    """One record; `start` of the first in this process, which alone starts from nothing."""
    engine = Loaded(subject, settings)
    if start is not None:
        start.note("loaded")
    on_batch = None if start is None else lambda *_: start.note("first batch done")
    engine.score(engine.few, on_batch=on_batch)
    timed = {
        name: engine.time(run, request.repeat)
        for name, run in engine.runs(request.top_k, request.keep)
    }
    ceilings = engine.measure_ceilings(to_host="logits" in request.keep)
    is_long = next(iter(timed.values())).seconds > _LONG
    apart = None if is_long else engine.break_down()
    flops = sum(cost.flops for cost in engine.costs.values()) or None
    scored = next(iter(timed.values())).scored
    record = Record(
        command=command,
        date=date.today().isoformat(),
        device=engine.pipe.device_name,
        versions={**versions(), "Python": platform.python_version()},
        subject=subject.name,
        text=subject.text,
        case=name_case(settings),
        format=engine.format,
        documents=len(subject.documents),
        tokens=scored.tokens,
        batch_tokens=engine.batch_tokens,
        weights_bytes=engine.weights_bytes,
        placement=engine.pipe.placement,
        start=start.moments if start else {},
        passes=[
            _describe(
                name,
                engine.unit,
                run,
                scored.tokens,
                flops,
                _least(name, engine, ceilings) if ceilings and name != UNSHARED else None,
            )
            for name, run in timed.items()
        ],
        ceilings=ceilings.named() if ceilings else {},
        parts=_list_parts(engine, ceilings, apart, scored.tokens),
        busy=apart[0].busy if apart else None,
        notes=[
            *([] if ceilings else ["no roofline: the decoder does not know this family"]),
            *([] if apart else [f"no measured time of each part: {_why(is_long)}"]),
            *_say_options(timed, len(subject.documents)),
        ],
    )
    given = engine.windows if request.peers else []
    dtype, device = engine.pipe.dtype, engine.device
    # A peer is given the whole device, and so is the next case.
    del engine
    release(device)
    for store in request.stores:
        record.passes.extend(_measure_stored(subject, request, settings, store, record))
        release(device)
    for name in request.peers:
        peer = _measure_peer(
            name, subject, settings, request.repeat, dtype, given, scored.tokens, flops
        )
        record.passes.append(peer)
        release(device)
    return record


def _measure_stored(
    subject: Subject, request: Request, settings: EngineSettings, store: str, record: Record
) -> Iterator[Pass]:
    """From texts in a store to parts in it, in this process and by others."""
    from ..progress import counted
    from .stored import store_corpus, time_stored

    unit = record.passes[0].unit
    scheme = store.partition("://")[0] if "://" in store else "file"
    ways: list[int | None] = [None, *request.processes]
    with store_corpus(store, subject.documents, request.shards, request.endpoint_url) as corpus:
        for processes in ways:
            stored = time_stored(
                corpus,
                subject.folder(),
                subject.recipe,
                settings,
                processes=processes,
                repeat=request.repeat,
            )
            by = "" if processes is None else f", {counted(processes, 'worker')}"
            scored = Scored(record.tokens, stored.targets, stored.loglikelihood)
            timed = Timed(stored.seconds, scored, None)
            described = _describe(
                f"{scheme} to {scheme}{by}", unit, timed, record.tokens, None, None
            )
            yield replace(described, busy=stored.device_seconds / stored.seconds / (processes or 1))


def _say_options(timed: Mapping[str, Timed], count: int) -> list[str]:
    """Continuations a second, where contexts are shared."""
    if UNSHARED not in timed:
        return []
    fast, slow = (count / timed[name].seconds for name in ("records", UNSHARED))
    return [
        f"{fast:,.1f} options a second, {slow:,.1f} with nothing shared: {fast / slow:.2f} times"
    ]


def _why(is_long: bool) -> str:
    return "one run takes too long for another" if is_long else "that takes a GPU"


def _measure_peer(
    name: str,
    subject: Subject,
    settings: EngineSettings,
    repeat: int,
    dtype: str,
    windows: Sequence[Window],
    tokens: int,
    flops: float | None,
) -> Pass:
    device = settings.resolve_device()
    longest = max(len(window.ids) for window in windows)
    peer = PEERS[name](subject, settings, dtype, longest)
    peer.score(windows[:_WARM])
    targets = sum(len(window.ids) - window.num_context for window in windows)
    in_process = memory(device)
    timed = time_best(lambda: Scored(tokens, targets, peer.score(windows)), repeat, device)
    if not in_process:
        # It keeps its model in a process of its own.
        timed = Timed(timed.seconds, timed.scored, None)
    return _describe(peer.name, peer.dtype, timed, tokens, flops, None)


def _describe(
    name: str, unit: str, timed: Timed, tokens: int, flops: float | None, least: float | None
) -> Pass:
    scored = timed.scored
    bits = None
    if scored.loglikelihood is not None:
        bits = -scored.loglikelihood / scored.targets / math.log(2)
    return Pass(
        name=name,
        unit=unit,
        seconds=timed.seconds,
        tokens_per_second=tokens / timed.seconds,
        tflops=flops / timed.seconds / 1e12 if flops else None,
        roofline_share=least / timed.seconds if least else None,
        peak_bytes=timed.peak_bytes,
        bits_per_token=bits,
    )


def _least(name: str, engine: Loaded, ceilings: Ceilings) -> float:
    """The least time of a pass, seconds."""
    parts = ceilings.seconds(engine.costs)
    if name not in (HANDED_OVER, GET_LOGITS):
        # Candidates are found in the read that statistics take.
        return sum(parts.values())
    if name == GET_LOGITS:
        del parts["statistics"]
    num_logits = float(sum(len(w.ids) - 1 for w in engine.windows) * engine.pipe.vocab_size)
    narrowing = (4 + 2) * num_logits / ceilings.copy.rate
    leaving = 2 * num_logits / ceilings.to_host.rate if ceilings.to_host else 0.0
    # Copies to the host run beside the arithmetic.
    return max(sum(parts.values()) + narrowing, leaving)


def _list_parts(
    engine: Loaded, ceilings: Ceilings | None, apart: tuple[Breakdown, int] | None, tokens: int
) -> dict[str, Part]:
    """Microseconds a token of each part, the largest first."""
    seconds = ceilings.seconds(engine.costs) if ceilings else {}
    least = {name: 1e6 * part / tokens for name, part in seconds.items()}
    measured = {}
    if apart is not None:
        breakdown, few_tokens = apart
        measured = {name: 1e6 * part / few_tokens for name, part in breakdown.parts.items()}
    names = [*measured, *(name for name in least if name not in measured)]
    return {name: Part(measured.get(name), least.get(name)) for name in names}
