"""What a request of the harness for generated text asks for, by the rules of its `hf` backend."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm_eval.models.utils import (
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
)

from ..engine.samplers import Filter, Sampler, drawing, greedy, min_p, top_k, top_p

_FILTERS = {"top_k": top_k, "top_p": top_p, "min_p": min_p}
_KNOWN = ("until", "max_gen_toks", "do_sample", "temperature", "seed", *_FILTERS)


@dataclass(frozen=True)
class Wish:
    """How a text is to be generated, and where it ends."""

    sampler: Sampler
    max_tokens: int
    stop_texts: Sequence[str]

    @classmethod
    def read(cls, settings: Mapping[str, Any], eos: str | None) -> Wish:
        """Of a task's `generation_kwargs`.

        Raises:
            ValueError: for a setting that means nothing here.
        """
        found: dict[str, Any] = dict(normalize_gen_kwargs(dict(settings)))
        unknown = sorted(name for name in found if name not in _KNOWN)
        if unknown:
            raise ValueError(
                f"generation_kwargs: {', '.join(unknown)} is not known; logitmill takes "
                f"{', '.join(_KNOWN)}"
            )
        sampler: Sampler = greedy
        if found.get("do_sample"):
            filters: list[Filter] = [
                make(found[name]) for name, make in _FILTERS.items() if found.get(name)
            ]
            sampler = drawing(
                *filters,
                temperature=found.get("temperature") or 1.0,
                seed=int(found.get("seed") or 0),
            )
        stops = handle_stop_sequences(list(found["until"]), eos=eos)
        return cls(sampler, found["max_gen_toks"], [text for text in stops if text])

    def cut(self, text: str) -> str:
        """The text before the first place where it should have ended."""
        return postprocess_generated_text(text, list(self.stop_texts), None)


def read_stop_ids(folder: Path, eos: int | None) -> list[int]:
    """The tokens that end what a model folder's model generates, as transformers has it."""
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        stated = json.loads(path.read_text()).get("eos_token_id") if path.is_file() else None
        if stated is not None:
            return stated if isinstance(stated, list) else [stated]
    return [] if eos is None else [eos]
