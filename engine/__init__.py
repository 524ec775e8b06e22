"""Arithmetic over documents: models, recipes, scores. Knows nothing of Prefect, Parquet or S3."""

from .frequencies import Frequencies, Frequency
from .pipeline import EngineSettings, Pipeline, pipeline
from .recipes import PRESETS, Recipe, find_recipe
from .records import Document, DocumentRecord, DocumentScore, TokenRecords

__all__ = [
    "PRESETS",
    "Document",
    "DocumentRecord",
    "DocumentScore",
    "EngineSettings",
    "Frequencies",
    "Frequency",
    "Pipeline",
    "Recipe",
    "TokenRecords",
    "find_recipe",
    "pipeline",
]
