"""Programs from Debian's packages, without root and without a trace in the system.

What of a package and of what it depends on is not installed is fetched and unpacked below the
user's cache, once; its programs run there with the libraries that came with them.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

_FETCH_SECONDS = 90


class NoPackageError(Exception):
    """A package cannot be had here. The message is one line that says why."""


def unpack(name: str, packages: Sequence[str], needed: str) -> Path:
    """The folder in which packages are unpacked as they would be in `/`; fetched if need be.

    Args:
        name: of the folder in the cache.
        packages: what is wanted.
        needed: pattern of what to take of that and of its dependencies: much of what a package
            asks for starts services or adorns desktops.

    Raises:
        NoPackageError: without apt, the network or the packages.
    """
    for tool in ("apt-get", "dpkg"):
        if shutil.which(tool) is None:
            raise NoPackageError(f"{name} comes from Debian's packages, and there is no {tool}")
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "logitmill")
    cache = caches / name
    cache.mkdir(parents=True, exist_ok=True)
    release = re.sub(r"\W+", "-", _release())
    root = cache / release
    with (cache / f"{release}.lock").open("w") as lock:
        # One fetches, the others find it.
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not root.is_dir():
            with tempfile.TemporaryDirectory(dir=cache) as folder:
                _fetch(Path(folder), packages, re.compile(needed))
                Path(folder, "root").rename(root)
    return root


def libraries(root: Path) -> list[Path]:
    """Where the libraries of unpacked packages lie."""
    return [*root.glob("lib/*-linux-gnu"), *root.glob("usr/lib/*-linux-gnu")]


def _release() -> str:
    for line in Path("/etc/os-release").read_text().splitlines():
        if line.startswith("VERSION_CODENAME="):
            return line.partition("=")[2].strip('"')
    return "debian"


def _fetch(folder: Path, packages: Sequence[str], needed: re.Pattern[str]) -> None:
    """Fetch what is not installed of the packages and what they need, into `folder/root`."""
    apt = _Apt(folder)
    try:
        names = apt.missing(packages)
    except NoPackageError:
        apt.fetch_lists()
        names = apt.missing(packages)
    apt.download([name for name in names if needed.match(name)])
    root = folder / "root"
    root.mkdir()
    for package in sorted((folder / "packages").glob("*.deb")):
        subprocess.run(["dpkg", "-x", package, root], check=True)


class _Apt:
    """apt with folders of its own: neither root nor the system's state is needed or touched."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        for name in ("packages", "lists/partial", "cache/archives/partial"):
            (folder / name).mkdir(parents=True)
        self._options = ["-o", f"Dir::Cache={folder}/cache", "-o", "APT::Sandbox::User="]
        self._options += ["-o", "Debug::NoLocking=1", "-o", "Acquire::Retries=2"]
        self._options += ["-o", "Acquire::http::Timeout=20"]

    def fetch_lists(self) -> None:
        """Have lists of one's own where the system's are missing or old."""
        self._options += ["-o", f"Dir::State::Lists={self._folder}/lists"]
        self._run("update")

    def missing(self, packages: Sequence[str]) -> list[str]:
        """What of packages and their dependencies is not installed."""
        said = self._run("--simulate", "--no-install-recommends", "install", *packages)
        return re.findall(r"^Inst (\S+)", said, re.MULTILINE)

    def download(self, names: Sequence[str]) -> None:
        try:
            self._run("download", *names)
        except NoPackageError:
            # The lists name packages that have been replaced since.
            self.fetch_lists()
            self._run("download", *names)

    def _run(self, *arguments: str) -> str:
        try:
            done = subprocess.run(
                ["apt-get", "-q", *self._options, *arguments],
                cwd=self._folder / "packages",
                capture_output=True,
                text=True,
                timeout=_FETCH_SECONDS,
                env={**os.environ, "LC_ALL": "C"},
            )
        except subprocess.TimeoutExpired:
            raise NoPackageError(f"apt-get {arguments[0]} took over {_FETCH_SECONDS} s") from None
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if line.startswith("E:")]
            raise NoPackageError(f"apt-get {arguments[0]}: {(lines or ['failed'])[0]}")
        return done.stdout
