"""A Ray cluster of several nodes, each of them processes of this machine with an address and one processor of its own.

    with ray_nodes.cluster(tmp_path) as nodes:     # RAY_ADDRESS is set in here, and put back after
        node = nodes.add()                         # beside the head, which is there from the start
        node.kill()                                # as a machine is lost: with every process on it

Their output is in the directory given. What is handed to the other node goes through a home that both see.
"""

import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from unittest import mock

from dcgan import cluster_session

# So that nothing outlives the head; see cluster_session.py.
RECONNECT = {"RAY_gcs_rpc_server_reconnect_timeout_s": "20"}
STARTUP = 180  # seconds; ten on an idle machine
# `ray start`, ended with all that it started by the end of its input: tests that are killed leave none behind.
START = """
import os, signal, sys, threading
from ray.scripts.scripts import main
threading.Thread(target=lambda: (sys.stdin.read(), os.killpg(0, signal.SIGKILL)), daemon=True).start()
main()
"""
COMMAND = [sys.executable, "-c", START, "start", "--block", "--num-cpus=1", f"--object-store-memory={2**27}"]


def _environment(path: str) -> dict[str, str]:
    """That of a node on a machine of its own: without what a local Ray in this process has been set to."""
    kept = {name: value for name, value in os.environ.items() if name not in cluster_session.LOCAL}
    return {**kept, **RECONNECT, **({"PYTHONPATH": path} if path else {})}


class Node:
    """A node that runs until it is killed."""

    def __init__(self, log: Path, *arguments: str, path: str = "") -> None:
        with log.open("w") as output:
            self.process = subprocess.Popen(
                [*COMMAND, *arguments],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                start_new_session=True,
                env=_environment(path),
            )
        deadline = time.monotonic() + STARTUP
        while "Ray runtime started" not in log.read_text():
            if time.monotonic() > deadline or self.process.poll() is not None:
                self.kill()
                raise AssertionError(f"the node does not start:\n{log.read_text()[-2000:]}")
            time.sleep(0.1)

    def kill(self) -> None:
        assert self.process.stdin is not None
        if not self.process.stdin.closed:  # not twice: the number may be another process's by then
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.communicate()


class Nodes:
    """The nodes of a cluster; the first is its head."""

    def __init__(self, directory: Path, sockets: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.2", 0))
            self.address = f"127.0.0.2:{free.getsockname()[1]}"
        self._directory, self.all = directory, list[Node]()
        port = self.address.partition(":")[2]
        self._start("--head", f"--port={port}", f"--temp-dir={sockets}", "--include-dashboard=false")

    def add(self, path: str = "") -> Node:
        """path: its PYTHONPATH."""
        return self._start(f"--address={self.address}", path=path)

    def _start(self, *arguments: str, path: str = "") -> Node:
        number = len(self.all)
        place, log = f"--node-ip-address=127.0.0.{number + 2}", self._directory / f"node-{number}.log"
        try:
            node = Node(log, place, *arguments, path=path)
        except AssertionError:  # `ray start` gives up after 30 s, which can't be set and a busy machine may exceed
            node = Node(log, place, *arguments, path=path)
        self.all.append(node)
        return node


@contextmanager
def cluster(directory: Path) -> Iterator[Nodes]:
    """A cluster of a head alone."""
    # For good: a process goes on with the first token that it used, whatever its environment says later.
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    environment = {"RAY_USAGE_STATS_ENABLED": "0", **RECONNECT}
    # Not in `directory`, whose name may be too long for the Unix sockets below it.
    with mock.patch.dict(os.environ, environment), tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as sockets:
        nodes = Nodes(directory, sockets)
        os.environ["RAY_ADDRESS"] = nodes.address
        try:
            yield nodes
        finally:
            for node in reversed(nodes.all):
                node.kill()
