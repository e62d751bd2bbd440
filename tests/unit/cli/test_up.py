"""How long a service that ended waits for its next start."""

from __future__ import annotations

import io
import threading
from types import SimpleNamespace

import pytest
from rich.console import Console

from esper_rpc.errors import Unavailable
from esper_servers.cli import up
from esper_servers.cli.home import Home
from esper_servers.cli.processes import ServicePlan, ServiceProcess, Supervisor


class Stop(threading.Event):
    """Ends the watch after some rounds, and notes how long it was waited for; no time passes."""

    def __init__(self, rounds):
        super().__init__()
        self.rounds, self.waits = rounds, []

    def wait(self, timeout=None):
        if timeout == up._WATCH_SECONDS:
            self.rounds -= 1
        else:
            self.waits.append(timeout)
        return self.rounds < 0


@pytest.fixture
def supervisor(tmp_path, monkeypatch):
    """Its one service has ended, and can be started never again."""
    supervisor = Supervisor(Home(tmp_path), {})
    gone = SimpleNamespace(poll=lambda: -9, returncode=-9, pid=1, stdin=None, stdout=None)
    supervisor.services["tamiyo"] = ServiceProcess(plan=ServicePlan(name="tamiyo"), process=gone)
    monkeypatch.setattr(Home, "renew_leaves", lambda _home: [])

    def start(_plan):
        raise Unavailable("it does not serve")

    monkeypatch.setattr(supervisor, "_start", start)
    return supervisor


def test_a_service_that_ran_for_long_is_started_again_at_once_and_then_rests_between_attempts(supervisor):
    supervisor.services["tamiyo"].started_at -= up._STEADY_SECONDS
    stop, said = Stop(3), io.StringIO()
    up._watch(supervisor, stop, Console(file=said))
    assert stop.waits == [0.0, up._BACKOFF_SECONDS, up._BACKOFF_SECONDS]
    assert said.getvalue().count("tamiyo does not start: it does not serve") == 3


def test_a_service_that_ends_soon_after_its_start_rests_first(supervisor):
    stop = Stop(1)
    up._watch(supervisor, stop, Console(file=io.StringIO()))
    assert stop.waits == [up._BACKOFF_SECONDS]
