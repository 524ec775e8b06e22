"""The command that a report shows for a run is the command that makes it."""

from __future__ import annotations

import copy
import shlex

from logitmill.flows import Run
from logitmill.flows.cli import app
from logitmill.flows.publish import report_facts
from logitmill.flows.report.provenance import repeat_command
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
