"""Arithmetic over documents: models, recipes, scores. Knows nothing of Prefect, Parquet or S3."""

from .pipeline import Pipeline, pipeline
from .recipes import PRESETS, Recipe, find_recipe
from .records import Document, DocumentRecord, DocumentScore, TokenRecords

__all__ = [
    "PRESETS",
    "Document",
    "DocumentRecord",
    "DocumentScore",
    "Pipeline",
    "Recipe",
    "TokenRecords",
    "find_recipe",
    "pipeline",
]
