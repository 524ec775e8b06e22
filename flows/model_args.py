"""What `lm_eval --model_args` may say, checked before a model is loaded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

KINDS: dict[str, tuple[type, str]] = {
    **dict.fromkeys(
        ("revision", "tokenizer", "device", "quantization", "residency"), (str, "text")
    ),
    **dict.fromkeys(
        ("max_length", "prefix_token_id", "max_batch_tokens", "logits_memory", "device_memory"),
        (int, "a whole number"),
    ),
    **dict.fromkeys(
        ("add_bos_token", "fp8_head", "trust_remote_code", "enable_thinking"),
        (bool, "True or False"),
    ),
    "chat_template_args": (dict, "a dictionary, as {'enable_thinking': False}"),
}
"""What arguments must be, by name, and what that is called. The engine checks what others are."""


def check_arguments(
    pretrained: str, given: Mapping[str, Any], unknown: Mapping[str, Any], known: Iterable[str]
) -> None:
    """Hold arguments to `KINDS`.

    Args:
        given: those of `KINDS`, None for one that is left out.
        unknown: what else was said.
        known: names of all arguments but `pretrained`.

    Raises:
        ValueError: naming the first that cannot be, and what works.
    """
    if unknown:
        raise ValueError(
            f"model_args: {', '.join(unknown)} is not known; logitmill takes pretrained, "
            f"{', '.join(known)}"
        )
    if not pretrained:
        raise ValueError("pretrained: missing; give a model folder, its URI or a Hub id")
    for name, value in given.items():
        kind, what = KINDS[name]
        if value is not None and type(value) is not kind:
            # The harness's command makes numbers of what looks like one, whatever is meant.
            quoted = "; lm_eval reads digits as a number, so name it in Python, as text"
            is_number = kind is str and type(value) in (int, float)
            raise ValueError(f"{name}: {value!r} is not {what}{quoted if is_number else ''}")
