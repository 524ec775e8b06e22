"""Runs as tables of an Apache Iceberg catalog: what dashboards and SQL engines read."""

from .publication import Published, find_published, publish_run, root_of, withdraw_run
from .settings import BESIDE, check_catalog, open_catalog
from .tables import PARTITION, TABLES

__all__ = [
    "BESIDE",
    "PARTITION",
    "TABLES",
    "Published",
    "check_catalog",
    "find_published",
    "open_catalog",
    "publish_run",
    "root_of",
    "withdraw_run",
]
