"""S3 servers of the tests: a real one that the processes of a session share, one that fails.

Knows nothing of what is stored.
"""

from __future__ import annotations

import fcntl
import http.client
import io
import json
import random
import re
import socket
import struct
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, Literal
from urllib.parse import urlsplit

from ceph import Ceph


@dataclass(frozen=True)
class S3Server:
    """Where a server answers, and the keys of its one user."""

    endpoint: str
    key: str
    secret: str

    @property
    def options(self) -> dict[str, str]:
        """What s3fs is opened with."""
        return {"key": self.key, "secret": self.secret, "endpoint_url": self.endpoint}

    def make_bucket(self, name: str) -> None:
        """The bucket is there afterwards, and was before if another process made it."""
        import s3fs

        fs = s3fs.S3FileSystem(**self.options)
        if not fs.exists(name):
            fs.mkdir(name)


@contextmanager
def share_server(folder: Path) -> Iterator[S3Server]:
    """The one server of all processes that name the same `folder`.

    Who comes first starts it, and ends it once the others are done; each holds a lock that goes
    with its process.

    Raises:
        NoPackageError: where Ceph cannot be had.
    """
    about = folder / "s3.json"
    with (folder / "s3.lock").open("w") as lock, (folder / "s3.users").open("w") as users:
        fcntl.flock(lock, fcntl.LOCK_EX)
        fcntl.flock(users, fcntl.LOCK_SH)
        ours = None
        if not about.exists():
            ours = Ceph(Path(mkdtemp(prefix="logitmill-ceph-")))
            ours.start()
            server = S3Server(ours.endpoint, ours.key, ours.secret)
            about.write_text(json.dumps(asdict(server)))
        fcntl.flock(lock, fcntl.LOCK_UN)
        try:
            yield S3Server(**json.loads(about.read_text()))
        finally:
            if ours is not None:
                fcntl.flock(users, fcntl.LOCK_EX)
                about.unlink()
                ours.stop()


Fault = Literal["500", "slow down", "denied", "skew", "silence", "reset", "late reset", "truncated",
                "dribble"]  # fmt: skip

_ERRORS: dict[str, tuple[int, str, str]] = {
    "500": (500, "InternalError", "We encountered an internal error. Please try again."),
    "slow down": (503, "SlowDown", "Please reduce your request rate."),
    "denied": (403, "AccessDenied", "Access Denied"),
    "skew": (
        403,
        "RequestTimeTooSkewed",
        "The difference between the request time and the current time is too large.",
    ),
}
_PASSED_ON = ("connection", "expect", "keep-alive", "transfer-encoding")


@dataclass
class _Rule:
    fault: Fault
    pattern: re.Pattern[str]
    left: int
    share: float


class FaultyProxy:
    """Passes requests on to an S3 server, and treats some of them badly.

    Faults: an answer of `500`, `slow down` (503), `denied` or `skew` (403), each with what the
    client sent of its credentials in it; `silence`; a `reset` before the request is passed on, a
    `late reset` after; a `truncated` body; a body that comes as a `dribble`.
    """

    def __init__(self, upstream: str) -> None:
        self._upstream = urlsplit(upstream)
        self._rules: list[_Rule] = []
        self._lock = threading.Lock()
        self._random = random.Random(0)
        self._closing = threading.Event()
        self.counts: Counter[str] = Counter()
        """How often each fault was done."""
        self.requests: list[str] = []
        """"METHOD /bucket/key?query" of all requests."""
        proxy = self

        class Handler(_Handler):
            faulty = proxy

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def inject(
        self, fault: Fault, *, when: str = "", times: int = 1_000_000, share: float = 1.0
    ) -> None:
        """Do it to a `share` of the next requests that the pattern `when` is found in."""
        with self._lock:
            self._rules.append(_Rule(fault, re.compile(when), times, share))

    def heal(self) -> None:
        """No faults any more."""
        with self._lock:
            self._rules.clear()

    def close(self) -> None:
        self._closing.set()
        self._server.shutdown()
        self._server.server_close()

    def __enter__(self) -> FaultyProxy:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def choose(self, request: str) -> Fault | None:
        """What befalls a request."""
        with self._lock:
            self.requests.append(request)
            for rule in self._rules:
                if rule.left and rule.pattern.search(request) and self._happens(rule):
                    rule.left -= 1
                    self.counts[rule.fault] += 1
                    return rule.fault
        return None

    def _happens(self, rule: _Rule) -> bool:
        return rule.share == 1 or self._random.random() < rule.share

    def pass_on(
        self, method: str, path: str, headers: dict[str, str], body: bytes
    ) -> tuple[http.client.HTTPResponse, bytes]:
        """The server's answer, and its body."""
        connection = http.client.HTTPConnection(
            self._upstream.hostname or "", self._upstream.port, timeout=60
        )
        try:
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            return response, response.read()
        finally:
            connection.close()

    def be_silent(self) -> None:
        self._closing.wait(600)

    def linger(self) -> bool:
        """Wait for a moment; whether there is reason to go on."""
        return not self._closing.wait(0.005)


class _Handler(BaseHTTPRequestHandler):
    faulty: FaultyProxy
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        body = self._body()
        fault = self.faulty.choose(f"{self.command} {self.path}")
        if fault == "silence":
            self.faulty.be_silent()
            self.close_connection = True
        elif fault == "reset":
            self._reset()
        elif fault in _ERRORS:
            self._refuse(*_ERRORS[fault])
        else:
            self._answer(fault, body)

    do_PUT = do_POST = do_HEAD = do_DELETE = do_GET

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _answer(self, fault: Fault | None, body: bytes) -> None:
        headers = {k: v for k, v in self.headers.items() if k.lower() not in _PASSED_ON}
        response, data = self.faulty.pass_on(self.command, self.path, headers, body)
        if fault == "late reset":
            self._reset()
            return
        self.send_response_only(response.status, response.reason)
        for name, value in response.getheaders():
            if name.lower() not in (*_PASSED_ON, "content-length"):
                self.send_header(name, value)
        length = len(data) if self.command != "HEAD" else response.headers["Content-Length"] or 0
        self.send_header("Content-Length", str(length))
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault == "truncated":
            self.wfile.write(data[: len(data) // 2])
            self.close_connection = True
        elif fault == "dribble":
            step = max(1, len(data) // 50)
            for start in range(0, len(data), step):
                self.wfile.write(data[start : start + step])
                if not self.faulty.linger():
                    return
        else:
            self.wfile.write(data)

    def _refuse(self, status: int, code: str, message: str) -> None:
        """As Amazon does: with what the client sent of its credentials."""
        sent = self.headers.get("Authorization", "")
        token = self.headers.get("X-Amz-Security-Token", "")
        data = (
            f'<?xml version="1.0" encoding="UTF-8"?><Error><Code>{code}</Code><Message>{message} '
            f"{sent} {token}</Message><AWSAccessKeyId>{sent}</AWSAccessKeyId>"
            f"<Token-0>{token}</Token-0></Error>"
        ).encode()
        self.send_response_only(status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _reset(self) -> None:
        linger = struct.pack("ii", 1, 0)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        # Both files hold the socket open, and the server flushes one of them.
        self.rfile.close()
        self.wfile.close()
        self.wfile = io.BytesIO()
        self.connection.close()
        self.close_connection = True

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body
