"""What is known of a run, in words: its recipe, its facts, the command that gives it again."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping
from typing import Any

from ..corpus import CorpusSpec
from .wording import MAX_LABEL, show

_RECIPES = {
    "rolling": "Every token is scored exactly once, in windows of at most {context} tokens. A "
    "later window reads {overlap} tokens before the first one it scores; a short last window is "
    "filled up on its left (the rule of lm-evaluation-harness).",
    "disjoint": "Windows of {context} tokens side by side. The first token of each is not "
    "scored and a tail shorter than a window is left out (the rule of the GPTQ and AWQ papers).",
    "strided": "Windows of at most {context} tokens that start {stride} tokens apart; each scores "
    "the tokens that no window before it has scored (the rule of Hugging Face's guide).",
    "llamacpp": "Windows of {context} tokens side by side, the second half of each scored (the "
    "rule of llama-perplexity).",
    "truncated": "The first {context} tokens of every document, the rest left out (the rule of "
    "Hugging Face's evaluate).",
    "conditional": "A text given its context: the context is read and not scored, and cut from the "
    "left where both are longer than {context} tokens.",
}

_PREFIXES = {
    "auto": "its beginning-of-text token, or the end-of-text token if it has none",
    "bos": "its beginning-of-text token",
    "eos": "its end-of-text token",
    "none": "no token",
    "tokenizer": "what its tokenizer puts there by itself",
}

_FACTS = {
    "run_key": "Run key",
    "uri": "Run",
    "created": "Created",
    "model": "Model",
    "model_digest": "Model digest",
    "corpus": "Corpus",
    "recipe": "Recipe",
    "recipe_hash": "Recipe hash",
    "engine": "Engine",
    "device": "Device",
    "tiers": "Tiers kept",
    "top_k": "Likeliest tokens kept",
    "num_draws": "Draws kept",
    "draw_seed": "Seed of draws",
    "layers": "Layers read",
    "logits_dtype": "Log-probabilities kept in",
    "vocabulary": "Vocabulary added up",
    "reading": "Documents made of",
    "shard_bytes": "Bytes of a shard",
    "versions": "Versions",
    "documents": "Documents",
    "tokens": "Tokens",
    "bytes": "Bytes",
    "seconds": "Seconds of scoring",
}


# What goes with the tiers that were kept.
_KEPT = ("top_k", "num_draws", "draw_seed", "layers", "logits_dtype")


def describe_recipe(recipe: Mapping[str, Any]) -> str:
    """A recipe in words, empty if it is none that this version knows."""
    words = _RECIPES.get(recipe.get("name") or "")
    if words is None:
        return ""
    known = {key: plain(recipe.get(key)) or "?" for key in ("context", "overlap", "stride")}
    text = words.format(**known).replace(" 1 tokens", " 1 token")
    prefix = recipe.get("prefix")
    if prefix is not None:
        named = _PREFIXES.get(str(prefix), f"the token {prefix}")
        text += f" Before a document's first token the model sees {named}."
    if recipe.get("concatenate"):
        text += " The corpus is read as one stream, documents joined by a blank line."
    return text


def list_facts(facts: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Everything that is known of the run: (name, [(part, value)]), parts of a plain value ''."""
    names = [*_FACTS, *sorted(set(facts) - set(_FACTS))]
    if _is_stream(facts):
        names.remove("shard_bytes")
    flat = ((_FACTS.get(name, show(name, MAX_LABEL)), _flatten(facts.get(name))) for name in names)
    return [(name, parts) for name, parts in flat if parts]


def _is_stream(facts: Mapping[str, Any]) -> bool:
    """Whether the corpus is one stream, which is one shard whatever size is asked for."""
    return bool((facts.get("recipe") or {}).get("concatenate"))


def _flatten(value: Any, path: str = "") -> list[tuple[str, str]]:
    if isinstance(value, Mapping):
        return [
            part
            for key, inner in value.items()
            for part in _flatten(inner, f"{path}.{key}" if path else str(key))
        ]
    text = plain(value)
    return [(show(path, MAX_LABEL), text)] if text else []


def plain(value: Any) -> str:
    """A fact as text, empty where there is nothing to say."""
    match value:
        case None:
            return ""
        case bool():
            return "yes" if value else "no"
        case int():
            return f"{value:,}"
        case float():
            return f"{value:,.6g}" if math.isfinite(value) else ""
        case list() | tuple() | set():
            return ", ".join(filter(None, map(plain, value)))
    return show(str(value))


def repeat_command(facts: Mapping[str, Any]) -> str | None:
    """The command that gives this run's scores again, None if there is none."""
    model, corpus, recipe = facts.get("model"), facts.get("corpus"), facts.get("recipe") or {}
    # A revision is named in Python alone.
    if not (model and corpus) or "revision" in (facts.get("reading") or {}):
        return None
    words = ["logitmill", "score", str(model), str(corpus)]
    if facts.get("uri"):
        words += ["--out", str(facts["uri"]).rstrip("/").rpartition("/")[0]]
    if recipe.get("name"):
        words += ["--recipe", str(recipe["name"])]
    # The others' settings have no meaning for a recipe, and are refused.
    meant = {"overlap": "rolling", "stride": "strided"}
    for setting in ("context", "overlap", "stride", "prefix"):
        if recipe.get(setting) is not None and meant.get(setting) in (None, recipe.get("name")):
            words += [f"--{setting}", str(recipe[setting])]
    for tier in facts.get("tiers") or ():
        # Document scores are always kept.
        words += ["--keep", str(tier)] if tier != "scores" else []
    return show(shlex.join([*words, *_list_settings(facts)]), 4000)


def _list_settings(facts: Mapping[str, Any]) -> list[str]:
    """Options for what is not as it is by default, and for the dtype, which goes by the device."""
    given = {
        name: value for name, value in (facts.get("reading") or {}).items() if name != "source"
    }
    given |= {name: facts.get(name) for name in _KEPT}
    if not _is_stream(facts) and facts.get("shard_bytes") not in (None, CorpusSpec.shard_bytes):
        given["shard_mb"] = f"{facts['shard_bytes'] / 1e6:.12g}"
    engine = facts.get("engine") or {}
    given["dtype"] = engine.get("dtype")
    # A format that was asked for is the one that others were made.
    made = {run for stored, run in (engine.get("linears") or {}).items() if run != stored}
    given["quantization"] = made.pop() if len(made) == 1 else None
    words = []
    for name, value in given.items():
        words += [f"--{name.replace('_', '-')}", str(value)] if value is not None else []
    flags = {"--fp8-head": engine.get("fp8_head"), "--vocabulary": facts.get("vocabulary")}
    return [*words, *(flag for flag, is_set in flags.items() if is_set)]
