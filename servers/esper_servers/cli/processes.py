"""Services as child processes: started in order, watched, restarted, drained."""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import IO, Self

from esper_rpc.envelope.keys import SECRET_VARIABLE
from esper_rpc.errors import ConfigError, Unavailable
from esper_rpc.telemetry.exposition import MetricsEndpoint
from esper_rpc.telemetry.shared_files import DIRECTORY_VARIABLE

from .authority_thread import AuthorityThread
from .home import Home
from .log_files import rotate

START_SECONDS = 60.0
DRAIN_SECONDS = 8.0
FREE_PORT = "127.0.0.1:0"
MOST_LOG_BYTES = 64 * 2**20
_LOG_LINES_SHOWN = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class ServicePlan:
    """A service to run, and the address it wants."""

    name: str
    address: str = FREE_PORT
    needs: tuple[str, ...] = ()
    """Services whose address it is told."""


SERVICES = (ServicePlan(name="urza"), ServicePlan(name="tamiyo", needs=("urza",)))


@dataclass(slots=True)
class ServiceProcess:
    """One running service."""

    plan: ServicePlan
    process: subprocess.Popen[bytes]
    address: str = ""
    started_at: float = field(default_factory=time.monotonic)


class Supervisor:
    """Runs the services of a mesh on this machine; a context manager that drains them."""

    def __init__(
        self,
        home: Home,
        environ: Mapping[str, str],
        plans: Sequence[ServicePlan] = SERVICES,
        *,
        enrolment_address: str = FREE_PORT,
        weatherlight_address: str = FREE_PORT,
        metrics_port: int = 0,
    ) -> None:
        self.home = home
        self._environ = {**child_environ(home, environ), DIRECTORY_VARIABLE: str(home.metrics_dir)}
        self._metrics = MetricsEndpoint(home.metrics_dir, self._pids, port=metrics_port)
        self._plans = plans
        self._authority = AuthorityThread(
            home, environ, address=weatherlight_address, enrolment_address=enrolment_address
        )
        self.services: dict[str, ServiceProcess] = {}

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def addresses(self) -> dict[str, str]:
        """Where each service listens."""
        services = {name: service.address for name, service in self.services.items()}
        return services | self._authority.addresses | {"metrics": self._metrics.address}

    def start(self) -> None:
        """Start every service in order, wait until it serves, and write mesh.toml."""
        self._metrics.start()
        self._authority.start()
        for plan in self._plans:
            self.services[plan.name] = self._start(plan)
        self.home.write_mesh(self.addresses)

    def restart(self, name: str) -> None:
        """Start a service that ended again, at the address it had: its peers know no other."""
        plan = self.services[name].plan
        address = self.services[name].address or plan.address
        self.services[name].started_at = time.monotonic()  # That it is tried counts, also when it does not serve.
        end(self.services[name].process)
        self._metrics.forget(self.services[name].process.pid)
        self.services[name] = self._start(ServicePlan(name=plan.name, address=address, needs=plan.needs))

    def rotate_logs(self) -> None:
        """Bound the logs of the services; to be called again and again. Raises OSError where there is no room."""
        for name in self.services:
            rotate(self.home.log_file(name), MOST_LOG_BYTES)

    def ended(self) -> list[str]:
        """Name the services whose process is gone."""
        return [name for name, service in self.services.items() if service.process.poll() is not None]

    def seconds_since_start(self, name: str) -> float:
        """How long ago a service was started, or was to be."""
        return time.monotonic() - self.services[name].started_at

    def stop(self) -> None:
        """Drain every service, the last started first; what does not end in time is killed."""
        for service in reversed(self.services.values()):
            end(service.process)
        self._authority.stop()
        self._metrics.stop()

    def _pids(self) -> dict[str, int]:
        running = {name: service.process for name, service in self.services.items()}
        return {"up": os.getpid(), **{name: process.pid for name, process in running.items() if process.poll() is None}}

    def _start(self, plan: ServicePlan) -> ServiceProcess:
        command = [*cli_command(), "serve", plan.name, "--home", str(self.home.directory), "--address", plan.address]
        command += ["--weatherlight", self._authority.addresses["weatherlight"], "--supervised"]
        for need in plan.needs:
            command += [f"--{need}", self.services[need].address]
        log_file = self.home.log_file(plan.name)
        log_file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with log_file.open("ab") as log:
            # Nothing is written to their standard input: it closes when this process ends, however it does.
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=dict(self._environ),
                start_new_session=True,
            )
        service = ServiceProcess(plan=plan, process=process)
        try:
            service.address = self._wait_until_serving(service)
        except BaseException:
            end(process)
            raise
        return service

    def _wait_until_serving(self, service: ServiceProcess) -> str:
        assert service.process.stdout is not None
        for line in lines_until(service.process.stdout, START_SECONDS):
            event = parse_event(line)
            if event.get("event") == "serving":
                return str(event["address"])
        name = service.plan.name
        if service.process.poll() is None and not _exits_soon(service.process):
            raise Unavailable(f"{name} does not serve after {START_SECONDS:g} s; see {self.home.log_file(name)}.")
        raise ConfigError(f"{name} ended before it served. Its last words:\n{self._last_words(name)}")

    def _last_words(self, name: str) -> str:
        lines = self.home.log_file(name).read_text(errors="replace").splitlines()
        return "\n".join(lines[-_LOG_LINES_SHOWN:])


def cli_command() -> list[str]:
    """The command that runs `esper` with this interpreter."""
    return [sys.executable, "-m", "esper_servers.cli"]


def child_environ(home: Home, environ: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of a process of the mesh: threads that do not spin, gRPC that survives forks."""
    defaults = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "GRPC_ENABLE_FORK_SUPPORT": "0"}
    # A keyring in the environment is of one role; children read their own from the home.
    inherited = {name: value for name, value in environ.items() if name != SECRET_VARIABLE}
    return {**defaults, **inherited, "ESPER_HOME": str(home.directory)}


def lines_until(stream: IO[bytes], seconds: float, clock: Callable[[], float] = time.monotonic) -> Iterable[bytes]:
    """Yield the lines of a pipe until it ends or the time is up."""
    deadline = clock() + seconds
    buffer = b""
    with selectors.DefaultSelector() as selector:
        selector.register(stream, selectors.EVENT_READ)
        while (left := deadline - clock()) > 0:
            if not selector.select(left):
                return
            chunk = os.read(stream.fileno(), 65536)
            if not chunk:
                return
            *lines, buffer = (buffer + chunk).split(b"\n")
            yield from lines


def parse_event(line: bytes) -> dict[str, object]:
    """Read one JSON line; anything else is an empty event."""
    try:
        event = json.loads(line)
    except ValueError:
        return {}
    return event if isinstance(event, dict) else {}


def end(process: subprocess.Popen[bytes], seconds: float = DRAIN_SECONDS) -> None:
    """Ask a process to drain, and kill it when it does not."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGCONT)
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            stream.close()


def _exits_soon(process: subprocess.Popen[bytes]) -> bool:
    try:
        process.wait(1.0)
    except subprocess.TimeoutExpired:
        return False
    return True
