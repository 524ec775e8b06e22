"""File systems by URI: opened, asked what a file is, and their errors said in one line.

No message of this module holds a credential: neither what the options of a file system say nor
what a URL carries in it. Callers put the field and the URI in front.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import fsspec
from fsspec.core import url_to_fs

_HUSHED = "***"
_SECRETS = (
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AZURE_CLIENT_SECRET",
    "AZURE_STORAGE_ACCOUNT_KEY",
    "AZURE_STORAGE_CONNECTION_STRING",
    "AZURE_STORAGE_SAS_TOKEN",
    "HF_TOKEN",
    "PREFECT_API_AUTH_STRING",
    "PREFECT_API_KEY",
)
# Packages whose exceptions are about reaching files.
_CLIENTS = {
    "botocore",
    "aiobotocore",
    "aiohttp",
    "fsspec",
    "s3fs",
    "gcsfs",
    "adlfs",
    "azure",
    "google",
    "requests",
    "httpx",
    "huggingface_hub",
    "paramiko",
    "zipfile",
    "tarfile",
}


_KEYS = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
_LOGIN = f"{_KEYS}, AWS_PROFILE, or key and secret of s3 in ~/.config/fsspec/conf.json"
# What helps against exceptions of S3's clients, by their names.
_REMEDIES = {
    **dict.fromkeys(
        ("NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError"),
        f"set {_LOGIN}",
    ),
    "ProfileNotFound": f"check AWS_PROFILE, or set {_KEYS}",
    **dict.fromkeys(
        ("EndpointConnectionError", "ConnectTimeoutError", "SSLError", "ProxyConnectionError"),
        "check endpoint_url or AWS_ENDPOINT_URL, which names a server that is not Amazon's",
    ),
}
_REFUSED = f"check what the credentials may do there: {_LOGIN}"


class SchemeError(ValueError):
    """No file system can be had for a URI's scheme."""


@dataclass(frozen=True)
class Stat:
    """What a file system says of a file without reading it."""

    size: int | None
    """Bytes; None where the server does not say."""
    etag: str | None
    """The object's ETag; None where the file system has none (local, memory)."""
    stamp: str
    """When it was last written, as the file system says it; "" where it does not."""


def connect(uri: str, options: Mapping[str, Any]) -> tuple[Any, str]:
    """The file system of a URI, and what it calls the place.

    Raises:
        SchemeError: if it is not known, or its package is not installed.
        Exception: what the file system raises.
    """
    scheme = uri.split(":")[0]
    try:
        fs, path = url_to_fs(uri, **options)
    except ImportError as error:
        package = getattr(error.__cause__, "name", None) or error.name or "its package"
        package = package.split(".")[0]
        raise SchemeError(
            f"{scheme}:// needs a package that is not installed: pip install {package}"
        ) from None
    except ValueError as error:
        if not str(error).startswith("Protocol not known"):
            raise
        near = nearest(scheme, fsspec.available_protocols())
        raise SchemeError(f"no file system is known for {scheme}://.{near}") from None
    # A listing may be cached from before the files were written.
    fs.invalidate_cache()
    return fs, path


def protocols(fs: Any) -> tuple[str, ...]:
    """The schemes of a file system."""
    return fs.protocol if isinstance(fs.protocol, tuple) else (fs.protocol,)


def stat_of(info: Mapping[str, Any]) -> Stat:
    """From what `fs.info` and listings say of a file."""
    etag = next((value for key, value in info.items() if key.lower() == "etag" and value), None)
    stamp = next((info[key] for key in ("mtime", "LastModified", "created") if info.get(key)), "")
    return Stat(
        size=info.get("size"),
        etag=str(etag).strip('"') if etag else None,
        stamp=str(stamp),
    )


def redact(text: str) -> str:
    """`text` without the user:password and the ?query=... of the URLs in it, and signatures."""
    text = re.sub(r"://[^/@\s]+@", f"://{_HUSHED}@", text)
    text = re.sub(r"\b(Signature|Credential|Security-Token)=[^\s&,'\"]+", rf"\1={_HUSHED}", text)
    return re.sub(r"(https?://[^\s'\"?]*)\?[^\s'\"]+", rf"\1?{_HUSHED}", text)


def hush(text: str, options: Mapping[str, Any] | None = None) -> str:
    """`text` without anything from `options`, a URL's credentials or those that are set up.

    A server may send back what it was sent, and what is refused is shown to people.
    """
    text = redact(text)
    known = [os.environ.get(name, "") for name in _SECRETS]
    known += [value for settings in fsspec.config.conf.values() for value in _strings(settings)]
    # Short ones are those of a server for trying things, and would shred the message.
    secrets = {*_strings(options or {}), *(value for value in known if len(value) >= 8)}
    for secret in sorted(secrets, key=len, reverse=True):
        text = text.replace(secret, _HUSHED)
    return text


def scrub(error: BaseException, options: Mapping[str, Any]) -> str:
    """One line for an error of a library, without anything from `options` or a URL."""
    text = hush(" ".join(str(error).split()), options)
    return (f"{type(error).__name__}: {text}" if text else type(error).__name__) + remedy(error)


def remedy(error: BaseException) -> str:
    """ "; what to set" where S3 was not reached or lets nobody in, otherwise ""."""
    works = _REMEDIES.get(type(error).__name__, "") if _is_of_s3(error) else ""
    # s3fs has a client's error for the cause of what it makes of it.
    if isinstance(error, PermissionError) and _is_of_s3(error.__cause__):
        works = _REFUSED
    return f"; {works}" if works else ""


def _is_of_s3(error: BaseException | None) -> bool:
    """Whether S3's client raised an error: others have some of the same names."""
    return type(error).__module__.split(".")[0] == "botocore"


def is_io(error: BaseException) -> bool:
    """Whether an error is about reaching files; a fault of our own keeps its traceback."""
    package = type(error).__module__.split(".")[0]
    return isinstance(error, (OSError, ImportError)) or package in _CLIENTS


def nearest(name: str, names: Sequence[str]) -> str:
    """ " Did you mean 'x'?" where one of `names` is close to `name`, otherwise ""."""
    close = difflib.get_close_matches(name, names, n=2, cutoff=0.6)
    return f" Did you mean {' or '.join(map(repr, close))}?" if close else ""


def _strings(value: Any) -> Iterator[str]:
    """The texts in nested options that may be secrets; shorter ones would shred the message."""
    if isinstance(value, Mapping):
        for inner in value.values():
            yield from _strings(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _strings(inner)
    elif isinstance(value, (str, bytes)) and len(value) >= 4:
        yield value.decode(errors="replace") if isinstance(value, bytes) else value
