"""An Iceberg REST catalog as its OpenAPI document says, as far as tables are made and changed.

What it keeps is in a catalog of pyiceberg's own; requests and answers are parsed and made here, on
the other side of the wire from the client that is tested.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from pyiceberg.catalog.rest import CreateTableRequest
from pyiceberg.catalog.sql import SqlCatalog
from pyiceberg.exceptions import (
    CommitFailedException,
    NamespaceAlreadyExistsError,
    NoSuchNamespaceError,
    NoSuchTableError,
    TableAlreadyExistsError,
)
from pyiceberg.table import CommitTableRequest, Table

_STATUS = {
    CommitFailedException: 409,
    NamespaceAlreadyExistsError: 409,
    TableAlreadyExistsError: 409,
    NoSuchNamespaceError: 404,
    NoSuchTableError: 404,
}
_OPTIONAL = dict.fromkeys(("location", "partition-spec", "write-order"))
_NAMESPACES = re.compile(r"/v1/namespaces$")
_NAMESPACE = re.compile(r"/v1/namespaces/(\w+)$")
_TABLES = re.compile(r"/v1/namespaces/(\w+)/tables$")
_TABLE = re.compile(r"/v1/namespaces/(\w+)/tables/(\w+)$")


@contextmanager
def serve(folder: Path, token: str) -> Iterator[str]:
    """Its address; who does not show `token` is turned away."""
    folder.mkdir(parents=True)
    kept = SqlCatalog("kept", uri=f"sqlite:///{folder}/kept.db", warehouse=folder.as_uri())

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._handle()

        do_HEAD = do_POST = do_GET

        def log_message(self, *_: Any) -> None:
            pass

        def _handle(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if self.headers.get("Authorization") != f"Bearer {token}":
                return self._say(401, _error(401, "NotAuthorizedException", "show the token"))
            try:
                status, answer = _answer(kept, self.command, self.path.partition("?")[0], body)
            except tuple(_STATUS) as error:
                status = _STATUS[type(error)]
                answer = _error(status, type(error).__name__, str(error))
            self._say(status, answer)

        def _say(self, status: int, answer: dict[str, Any] | None) -> None:
            data = b"" if answer is None else json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def _answer(
    kept: SqlCatalog, method: str, path: str, body: bytes
) -> tuple[int, dict[str, Any] | None]:
    if path == "/v1/config":
        return 200, {"defaults": {}, "overrides": {}}
    if _NAMESPACES.match(path) and method == "POST":
        asked = json.loads(body)
        kept.create_namespace(tuple(asked["namespace"]), asked.get("properties", {}))
        return 200, {"namespace": asked["namespace"], "properties": {}}
    if found := _NAMESPACE.match(path):
        properties = kept.load_namespace_properties(found[1])
        if method == "HEAD":
            return 204, None
        return 200, {"namespace": [found[1]], "properties": properties}
    if (found := _TABLES.match(path)) and method == "POST":
        request = CreateTableRequest.model_validate({**_OPTIONAL, **json.loads(body)})
        made = kept.create_table(
            (found[1], request.name),
            request.table_schema,
            partition_spec=request.partition_spec,
            properties=request.properties,
        )
        return 200, _describe(made)
    if found := _TABLE.match(path):
        table = kept.load_table((found[1], found[2]))
        if method == "HEAD":
            return 204, None
        if method == "POST":
            commit = CommitTableRequest.model_validate_json(body)
            kept.commit_table(table, commit.requirements, commit.updates)
            table = kept.load_table((found[1], found[2]))
        return 200, _describe(table)
    return 404, _error(404, "NoSuchEndpoint", f"{method} {path}")


def _describe(table: Table) -> dict[str, Any]:
    return {
        "metadata-location": table.metadata_location,
        "metadata": json.loads(table.metadata.model_dump_json()),
        "config": {},
    }


def _error(code: int, kind: str, message: str) -> dict[str, Any]:
    return {"error": {"code": code, "type": kind, "message": message}}
