"""What Prefect's server and UI are told of the flow's parameters: choices, words, no secrets."""

from __future__ import annotations

import ast
import inspect
import textwrap
from itertools import pairwise

from prefect.utilities.callables import ParameterSchema

from ..engine.pipeline import DTYPES, EngineSettings
from ..engine.recipes import PRESETS, WEIGHTINGS, Recipe
from ..engine.weights import Quantization
from .corpus import CorpusSpec

_HIDDEN = "storage_options"
_CHOICES = {
    (EngineSettings, "dtype"): list(DTYPES),
    (EngineSettings, "quantization"): [str(kind) for kind in Quantization],
    (Recipe, "name"): list(PRESETS),
    (Recipe, "weighting"): list(WEIGHTINGS),
}


def complete_schema(schema: ParameterSchema) -> None:
    """Fill in what Prefect does not find in the types and docstring of `score_corpus`.

    What opens a corpus is taken out, and other fields than those left are refused: a server keeps
    the parameters of its runs and deployments, and shows them to everybody.
    """
    for cls in (CorpusSpec, EngineSettings, Recipe):
        definition = schema.definitions[cls.__name__]
        definition["additionalProperties"] = False
        definition["properties"].pop(_HIDDEN, None)
        for name, text in _describe_fields(cls).items():
            if name in definition["properties"]:
                definition["properties"][name]["description"] = text
    for (owner, name), choices in _CHOICES.items():
        field = schema.definitions[owner.__name__]["properties"][name]
        for kind in field.get("anyOf", [field]):
            if kind["type"] == "string":
                kind["enum"] = choices
    schema.properties["recipe"]["anyOf"] = [
        {"title": "preset", "type": "string", "enum": list(PRESETS)},
        {
            "title": "preset with its context",
            "type": "string",
            "pattern": f"^({'|'.join(PRESETS)})(-[0-9]+)?$",
        },
        {"$ref": "#/definitions/Recipe"},
    ]


def _describe_fields(cls: type) -> dict[str, str]:
    """The docstrings under a dataclass's fields."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(tree, ast.ClassDef)
    found = {}
    for field, text in pairwise(tree.body):
        match field, text:
            case (
                ast.AnnAssign(target=ast.Name(id=name)),
                ast.Expr(value=ast.Constant(value=str(words))),
            ):
                found[name] = inspect.cleandoc(words)
    return found
