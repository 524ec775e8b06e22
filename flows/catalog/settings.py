"""Which catalog tables are published in: pyiceberg's own settings, or one beside the runs.

What opens a catalog and its storage comes from the environment or from pyiceberg's file of
settings. None of it is stored in a table or shown.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...engine.remote import hush
from ..folder import Folder, StoreError

if TYPE_CHECKING:
    from pyiceberg.catalog import Catalog
    from pyiceberg.io import FileIO

BESIDE = "beside"
"""The catalog that needs no setting: SQLite in the folder `tables` beside the runs."""

_ATTEMPTS = 5
_FILE_IO = "pyiceberg.io.fsspec.FsspecFileIO"
_SECRET_WORDS = ("secret", "token", "password", "credential", "access-key", "sas", "signer")


def check_catalog(name: str, root: Folder) -> None:
    """Check what can be without a connection: that the catalog is set up, and the package there.

    Raises:
        ValueError: naming what is missing.
    """
    _find_settings(name, root)


def open_catalog(name: str, root: Folder, *, make: bool = True) -> Catalog:
    """The catalog of this name in pyiceberg's settings, or the one `BESIDE` the runs in `root`.

    Files are opened through fsspec, as the runs' are, unless the settings name a `py-io-impl`.

    Args:
        make: whether the one beside is made where there is none.

    Raises:
        ValueError: if the name has no settings, or they open nothing.
    """
    properties = _find_settings(name, root)
    from pyiceberg.catalog import load_catalog

    if name == BESIDE:
        tables = Path(root.path("tables"))
        if not make and not tables.exists():
            raise StoreError(
                f"catalog: nothing is published beside the runs in {root.uri!r}; of a run that was "
                "moved give the URI that it had, of another catalog its name"
            )
        tables.mkdir(parents=True, exist_ok=True)
    for attempt in range(_ATTEMPTS):
        try:
            return load_catalog(name, **properties)
        except Exception as error:  # drivers and servers raise types of their own
            # Another process makes the tables of a new database at the same time.
            if "already exists" not in str(error) or attempt == _ATTEMPTS - 1:
                said = scrub(error, properties)
                raise StoreError(f"catalog: {name!r} cannot be opened: {said}") from None
            time.sleep(0.1)
    raise AssertionError("the last attempt returns or raises")


def open_files(folder: Folder) -> FileIO:
    """What pyiceberg opens the files of a run with: as the run itself is opened."""
    from pyiceberg.io import load_file_io

    return load_file_io({"py-io-impl": _FILE_IO, **_endpoint(folder)})


def scrub(error: BaseException, properties: Mapping[str, Any]) -> str:
    """What an error of a catalog says, in one line, without what opens it."""
    secrets = {
        key: str(value)
        for key, value in properties.items()
        if any(word in key for word in _SECRET_WORDS)
    }
    # SQLAlchemy adds the statement, with its values, and where to read about it.
    text = str(error).split("\n[SQL:")[0].split("\n(Background")[0]
    return hush(" ".join(text.split()), secrets) or type(error).__name__


def _find_settings(name: str, root: Folder) -> dict[str, Any]:
    if find_spec("pyiceberg") is None:
        raise StoreError("catalog: tables need pyiceberg: pip install 'logitmill[iceberg]'")
    from pyiceberg.utils.config import Config

    found: dict[str, Any] = dict(Config().get_catalog_config(name) or {})
    if not found and name == BESIDE:
        if not root.is_local:
            raise StoreError(
                f"catalog: {root.uri!r} is no place for SQLite, so there is none beside the runs; "
                f"name one that is set up for pyiceberg ({_how_to('lake')})"
            )
        tables = Path(os.path.abspath(root.path("tables")))
        found = {
            "type": "sql",
            "uri": f"sqlite:///{tables / 'catalog.db'}",
            "warehouse": tables.as_uri(),
        }
    elif not found:
        works = f"give its address ({_how_to(name)})"
        if root.is_local:
            works += f", or use {BESIDE!r}, which needs none"
        raise StoreError(f"catalog: {name!r} is not set up for pyiceberg; {works}")
    return {"py-io-impl": _FILE_IO, **_endpoint(root), **found}


def _how_to(name: str) -> str:
    return (
        f"PYICEBERG_CATALOG__{name.upper()}__URI=postgresql+psycopg://host/catalog and "
        "__WAREHOUSE, or in ~/.pyiceberg.yaml"
    )


def _endpoint(folder: Folder) -> dict[str, str]:
    """What pyiceberg calls the S3 server that the folder is on, where it is not Amazon's."""
    endpoint = folder.options.get("endpoint_url")
    return {"s3.endpoint": str(endpoint)} if endpoint else {}
