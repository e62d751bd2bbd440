"""Rendering metrics for Prometheus outside the processes that count them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from threading import Thread
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, ProcessCollector, start_http_server
from prometheus_client.metrics_core import Metric
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead
from prometheus_client.registry import Collector

from esper_rpc.errors import ConfigError

from . import shared_files

LOOPBACK = "127.0.0.1"


class MetricsEndpoint:
    """Serves `/metrics` on loopback for processes that write theirs to a directory.

    `processes` names the processes that live at the time of asking, for their memory and CPU time.
    """

    def __init__(self, directory: Path, processes: Callable[[], Mapping[str, int]], *, port: int = 0) -> None:
        self._directory = directory
        self._processes = processes
        self._port = port
        self.address = ""
        self._server: WSGIServer | None = None
        self._thread: Thread | None = None

    def start(self) -> None:
        """Serve; what ended processes left in the directory is cleared."""
        self._clear()
        registry = CollectorRegistry()
        registry.register(_Live(self.registry))
        try:
            self._server, self._thread = start_http_server(self._port, addr=LOOPBACK, registry=registry)
        except OSError as error:
            raise ConfigError(f"Metrics cannot be served at {LOOPBACK}:{self._port}: {error.strerror}.") from error
        self.address = f"{LOOPBACK}:{self._server.server_port}"

    def stop(self) -> None:
        """End."""
        if self._server is None or self._thread is None:
            return
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
        self._server = self._thread = None

    def registry(self) -> CollectorRegistry:
        """Collect everything that is counted at present."""
        self._forget_ended()
        registry = CollectorRegistry()
        MultiProcessCollector(registry, path=str(self._directory))  # type: ignore[no-untyped-call]
        for name, pid in self._processes().items():
            ProcessCollector(namespace=f"esper_{name}", pid=lambda pid=pid: pid, registry=registry)  # type: ignore[misc]
        return registry

    def forget(self, pid: int) -> None:
        """Drop the gauges of a process that ended; its counters stay."""
        mark_process_dead(pid, path=str(self._directory))  # type: ignore[no-untyped-call]
        shared_files.trim(self._directory, pid)

    def _forget_ended(self) -> None:
        """Not every process is one of those that are named here."""
        for file in self._directory.glob("gauge_live*_*.db"):
            pid = int(file.stem.rpartition("_")[2])
            if not _is_running(pid):
                self.forget(pid)

    def _clear(self) -> None:
        self._directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        for file in self._directory.glob("*.db"):
            file.unlink()


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


class _Live(Collector):
    """Collects anew at every request, because processes come and go."""

    def __init__(self, registry: Callable[[], CollectorRegistry]) -> None:
        self._registry = registry

    def collect(self) -> Iterable[Metric]:
        """Yield what is counted at present."""
        return self._registry().collect()
