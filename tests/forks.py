"""Processes that are forked from one that has imported what takes seconds."""

from __future__ import annotations

import multiprocessing

# One process for all tests: whoever forks first has it import for those that come later too.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "logitmill.engine.loading",
        "logitmill.flows.cli",
        "logitmill.flows.report",
        "logitmill.flows.run",
        "logitmill.flows.score",
        "transformers.models.auto.configuration_auto",
        "transformers.models.auto.tokenization_auto",
    ]
)
