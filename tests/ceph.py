"""A real S3 server, Ceph's gateway, from Debian's packages and without a trace in the system.

One monitor, one OSD and one gateway run on loopback in a temporary folder, as the user that calls.
A watchdog kills the daemons when the process that started them ends, however it ends.

    python tests/ceph.py        # a server until Ctrl-C: prints its endpoint and its keys
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path

from debian import libraries, unpack

_PACKAGES = ("ceph-mon", "ceph-osd", "radosgw")
# What the three need to run; the rest of what they ask for manages disks and starts services.
_NEEDED = r"lib|ceph-(base|common|mon|osd)$|radosgw$"
_START_SECONDS = 120

_CONF = """\
[global]
fsid = {fsid}
mon host = [v2:127.0.0.1:{mon_ports[0]},v1:127.0.0.1:{mon_ports[1]}]
auth cluster required = none
auth service required = none
auth client required = none
ms mon client mode = crc
ms bind ipv6 = false
public addr = 127.0.0.1
cluster addr = 127.0.0.1
run dir = {folder}
log file = {folder}/$name.log
admin socket = {socket}
crash dir = {folder}
plugin dir = {lib}/ceph
erasure code dir = {lib}/ceph/erasure-code
osd class dir = {lib}/rados-classes
compression dir = {lib}/ceph/compressor
keyring = {folder}/keyring
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 8
osd pool default pg autoscale mode = off
mon allow pool size one = true
mon data avail warn = 1
mon data avail crit = 0
mon pg warn min per osd = 0
osd crush chooseleaf type = 0

[mon]
mon data = {folder}/mon

[osd]
osd data = {folder}/osd
osd journal = {folder}/osd/journal
osd objectstore = {store}
memstore device bytes = 4294967296
bluestore block size = 8589934592
osd memory target = 939524096

[client.rgw.a]
rgw frontends = beast endpoint=127.0.0.1:{port}
rgw data = {folder}
"""


def install() -> Path:
    """Where Ceph's packages are unpacked; fetched if they are not there.

    Raises:
        NoPackageError: where they cannot be had.
    """
    return unpack("ceph", _PACKAGES, _NEEDED)


class Ceph:
    """An S3 server on loopback that can be killed and started again."""

    key, secret = "key-of-the-gateway", "s3cr3t-of-the-gateway"

    def __init__(self, folder: Path, *, lasting: bool = False) -> None:
        """Make the cluster's settings in `folder`, new or empty; `start` has it run.

        Args:
            lasting: whether what it holds outlives its daemons: on disk, otherwise in memory.

        Raises:
            NoPackageError: where Ceph cannot be had.
        """
        root = install()
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._lasting = folder, lasting
        *mon_ports, self.port = _free_ports(3)
        self.endpoint = f"http://127.0.0.1:{self.port}"
        self._lib = next((root / "usr" / "lib").glob("*-linux-gnu"))
        self._bin = root / "usr" / "bin"
        found = (*libraries(root), self._lib / "ceph")
        self._env = {**os.environ, "LD_LIBRARY_PATH": ":".join(map(str, found))}
        # The path of a socket has a hundred bytes, which those of tests exceed.
        self._sockets = tempfile.mkdtemp(prefix="ceph-")
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        self._watchdog: subprocess.Popen[bytes] | None = None
        self._fsid, self._osd_uuid = str(uuid.uuid4()), str(uuid.uuid4())
        self._mon_ports = mon_ports
        (folder / "ceph.conf").write_text(
            _CONF.format(
                fsid=self._fsid,
                mon_ports=mon_ports,
                folder=folder,
                socket=f"{self._sockets}/$name.$pid.asok",
                lib=self._lib,
                store="bluestore" if lasting else "memstore",
                port=self.port,
            )
        )

    @property
    def options(self) -> dict[str, str]:
        """What s3fs is opened with."""
        return {"key": self.key, "secret": self.secret, "endpoint_url": self.endpoint}

    def start(self) -> None:
        """Have every daemon run that does not, and return once the server answers.

        Killed ones start again on what they held, which is all of it if the server is lasting, and
        nothing that works if the OSD was killed and it is not.
        """
        if self._watchdog is None:
            # Its input ends with this process, and it takes its group along.
            self._watchdog = subprocess.Popen(
                ["sh", "-c", "cat; kill -9 0"], stdin=subprocess.PIPE, process_group=0
            )
        first = not (self._folder / "mon").exists()
        if first:
            self._make_monitor()
        self._spawn("mon", "ceph-mon", "-i", "a")
        if first:
            self._make_osd()
        self._spawn("osd", "ceph-osd", "-i", "0")
        self._spawn("gateway", "radosgw", "-n", "client.rgw.a")
        if first:
            self._tool(
                "radosgw-admin",
                "user",
                "create",
                "--uid=tests",
                "--display-name=tests",
                f"--access-key={self.key}",
                f"--secret-key={self.secret}",
            )
        self._wait()

    def kill(self, *names: str) -> None:
        """SIGKILL the daemons of these names (mon, osd, gateway), all of them if none is given."""
        for name in names or tuple(self._daemons):
            daemon = self._daemons.pop(name)
            daemon.kill()
            daemon.wait()

    def stop(self) -> None:
        """Kill all of it, for good."""
        if self._watchdog is not None:
            assert self._watchdog.stdin is not None
            self._watchdog.stdin.close()
            self._watchdog.wait()
            self.kill()
            self._watchdog = None
        shutil.rmtree(self._sockets, ignore_errors=True)
        shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> Ceph:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def _make_monitor(self) -> None:
        address = f"[v2:127.0.0.1:{self._mon_ports[0]},v1:127.0.0.1:{self._mon_ports[1]}]"
        (self._folder / "keyring").touch()
        self._tool("monmaptool", "--create", "--fsid", self._fsid, "--addv", "a", address,
                   str(self._folder / "monmap"))  # fmt: skip
        self._tool("ceph-mon", "--mkfs", "-i", "a", "--monmap", str(self._folder / "monmap"))

    def _make_osd(self) -> None:
        (self._folder / "osd").mkdir()
        self._ask({"prefix": "osd new", "uuid": self._osd_uuid})
        where = ["host=localhost", "root=default"]
        self._ask({"prefix": "osd crush add", "id": 0, "weight": 1.0, "args": where})
        self._tool("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", self._osd_uuid)

    def _ask(self, command: Mapping[str, object]) -> None:
        """A command for the monitor, in a process whose libraries are Ceph's."""
        self._run([sys.executable, __file__, "ask", self._conf, json.dumps(command)])

    def _tool(self, name: str, *arguments: str) -> None:
        self._run([str(self._bin / name), "-c", self._conf, *arguments])

    def _run(self, command: Sequence[str]) -> None:
        done = subprocess.run(
            command, env=self._env, capture_output=True, text=True, timeout=_START_SECONDS
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()[-500:]}")

    def _spawn(self, name: str, program: str, *arguments: str) -> None:
        if name in self._daemons:
            return
        assert self._watchdog is not None
        with (self._folder / f"{name}.out").open("ab") as out:
            self._daemons[name] = subprocess.Popen(
                [self._bin / program, "-c", self._conf, "-f", *arguments],
                env=self._env,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                process_group=self._watchdog.pid,
            )

    def _wait(self) -> None:
        deadline = time.monotonic() + _START_SECONDS
        while time.monotonic() < deadline:
            for name, daemon in self._daemons.items():
                if daemon.poll() is not None:
                    said = (self._folder / f"{name}.out").read_text().strip()[-500:]
                    raise RuntimeError(f"Ceph's {name} ended: {said}")
            try:
                with urllib.request.urlopen(self.endpoint, timeout=5):
                    return
            except urllib.error.HTTPError:
                pass
            except OSError:
                pass
            time.sleep(0.1)
        raise RuntimeError(f"Ceph did not answer within {_START_SECONDS} s")

    @property
    def _conf(self) -> str:
        return str(self._folder / "ceph.conf")


def _free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def _ask_monitor(conf: str, command: str) -> None:
    """What `ceph COMMAND` does, without its Python packages. Raises OSError."""
    rados = ctypes.CDLL("librados.so.2")
    cluster, out, said = ctypes.c_void_p(), ctypes.c_char_p(), ctypes.c_char_p()
    _check(rados.rados_create(ctypes.byref(cluster), b"admin"))
    _check(rados.rados_conf_read_file(cluster, conf.encode()))
    _check(rados.rados_connect(cluster))
    commands = (ctypes.c_char_p * 1)(command.encode())
    sizes = ctypes.c_size_t(), ctypes.c_size_t()
    code = rados.rados_mon_command(
        *(cluster, commands, ctypes.c_size_t(1), b"", ctypes.c_size_t(0)),
        *(ctypes.byref(out), ctypes.byref(sizes[0]), ctypes.byref(said), ctypes.byref(sizes[1])),
    )
    _check(code, (said.value or b"").decode())


def _check(code: int, said: str = "") -> None:
    if code < 0:
        raise OSError(-code, said or os.strerror(-code))


if __name__ == "__main__":
    if sys.argv[1:2] == ["ask"]:
        _ask_monitor(*sys.argv[2:])
    else:
        with Ceph(Path(tempfile.mkdtemp(prefix="logitmill-ceph-"))) as server:
            print(f"export AWS_ACCESS_KEY_ID={server.key} AWS_SECRET_ACCESS_KEY={server.secret}")
            print(f"endpoint: {server.endpoint}", flush=True)
            signal.sigwait({signal.SIGINT, signal.SIGTERM})
