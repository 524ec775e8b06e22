"""The command that a report shows for a run is the command that makes it."""

from __future__ import annotations

import copy
import shlex
from dataclasses import fields
from typing import Any

from logitmill.flows import Run
from logitmill.flows.cli import app
from logitmill.flows.corpus import CorpusSpec
from logitmill.flows.publish import report_facts
from logitmill.flows.report.provenance import list_facts, repeat_command
from typer.main import get_command


def test_the_command_of_a_run_asks_for_its_settings(finished: Run) -> None:
    run = copy.copy(finished)
    run.plan = {
        **finished.plan,
        "tiers": ["scores", "topk", "sampled", "logits"],
        "engine": {"dtype": "bfloat16", "fp8_head": True, "linears": {"none": "fp8"}},
        "reading": {"ids_column": "ids", "limit": 7, "source": "web"},
        "shard_bytes": 20_000,
        "top_k": 3,
        "num_draws": 5,
        "draw_seed": 0,
        "logits_dtype": "float16",
    }
    command = repeat_command(report_facts(run.uri, run.plan, []))
    assert command is not None
    program, name, *arguments = shlex.split(command)
    asked = get_command(app).commands[name].make_context(name, arguments).params  # type: ignore[attr-defined]
    assert program == "logitmill"
    expected = {
        "model": run.plan["model"]["name"],
        "corpus": run.plan["uri"],
        "keep": ["topk", "sampled", "logits"],
        "top_k": 3,
        "num_draws": 5,
        "draw_seed": 0,
        "logits_dtype": "float16",
        "dtype": "bfloat16",
        "quantization": "fp8",
        "fp8_head": True,
        "ids_column": "ids",
        "limit": 7,
        "shard_mb": 0.02,
    }
    assert {name: asked[name] for name in expected} == expected
    assert report_facts(run.uri, finished.plan, [])["top_k"] is None


def test_what_no_option_says_is_not_in_the_command() -> None:
    stream: dict[str, Any] = {"name": "strided", "concatenate": True}
    facts = {"model": "m", "corpus": "c", "recipe": stream, "shard_bytes": 1 << 60}
    assert repeat_command(facts) == "logitmill score m c --recipe strided"
    assert "Bytes of a shard" not in dict(list_facts(facts))
    assert "Bytes of a shard" in dict(list_facts({**facts, "recipe": {"name": "strided"}}))
    options = {o for p in get_command(app).commands["score"].params for o in p.opts}  # type: ignore[attr-defined]
    none = {"uri", "storage_options", "shard_bytes", "source"}
    for field in fields(CorpusSpec):
        if field.name not in none:
            command = repeat_command({**facts, "reading": {field.name: "x"}})
            said = command is not None and f"--{field.name.replace('_', '-')} x" in command
            assert said == (f"--{field.name.replace('_', '-')}" in options), field.name
