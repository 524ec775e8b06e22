"""Makes the name `logitmill` known to lm-evaluation-harness. Imports nothing that is not there yet.

The harness looks for models in the entry points `lm_eval.models` from the release after 0.4.13 on;
up to that one it knows its own models alone. There `register` is an entry point `torch.backends`,
which torch calls at the end of its own import: by then the command `lm_eval` has begun, and it has
not looked for its model yet. In any other process the call finds no harness and does nothing.
"""

from __future__ import annotations

import sys

NAME = "logitmill"
_CLASS = "logitmill.flows.harness:LogitmillLM"


def register() -> None:
    """Name the model's class to the harness, where that has been imported."""
    if "lm_eval" not in sys.modules:
        return
    # Its own models have to be there first: it reads them only while it knows none.
    import lm_eval.models  # noqa: F401
    from lm_eval.api.registry import model_registry

    if NAME not in model_registry:
        model_registry.register(NAME, target=_CLASS)
