from __future__ import annotations

import io
import os
import signal
import socket
import subprocess
import threading
import time

import pytest
import torch
from rich.console import Console
from torch import nn
from typer.testing import CliRunner

from esper_client import attach, find_mesh
from esper_rpc.proto.leyline.v1 import CommandOutcome
from esper_servers.cli.processes import cli_command, end

# Anything that takes this long hangs; no figure is asserted here.
PATIENCE_SECONDS = 90.0
BUDGET_MS = 50.0
SETTLED = "deadline_missed", "mesh_unreachable", "breaker_open"


@pytest.fixture(scope="module")
def home(seeded_home):
    """Of nothing that runs."""
    return seeded_home()


@pytest.fixture
def mesh(shared_mesh):
    return shared_mesh


class TinyTraining:
    """A few hundred steps of a tiny classifier under a session."""

    def __init__(self, mesh, run_id):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05)
        self.generator = torch.Generator().manual_seed(0)
        address = find_mesh({"ESPER_HOME": str(mesh.home.directory)})
        self.session = attach(self.model, self.optimizer, mesh=address, run_id=run_id, step_budget_ms=BUDGET_MS)
        self.outcomes = []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.session.close()

    @property
    def answered(self):
        return sum(count for reason, count in self.session.reasons.items() if reason not in SETTLED)

    def step(self):
        images = torch.randn(32, 8, generator=self.generator)
        labels = (images.sum(1).sign() + 1).long()
        loss = nn.functional.cross_entropy(self.model(images), labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.outcomes += self.session.step(loss.detach(), samples=32)

    def steps_until(self, condition):
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not condition():
            assert time.monotonic() < deadline, dict(self.session.reasons)
            self.step()

    def steps(self, count):
        for _ in range(count):
            self.step()


def _applied(training):
    return {o.operation for o in training.outcomes if o.result == CommandOutcome.RESULT_APPLIED}


def test_signed_decisions_of_a_real_mesh_are_applied_to_a_live_model(mesh):
    with TinyTraining(mesh, "applied") as training:
        training.steps_until(lambda: len(_applied(training)) >= 3)
        assert training.session.policy_version
        assert not [o for o in training.outcomes if o.result == CommandOutcome.RESULT_REJECTED]


def test_training_goes_on_when_tamiyo_is_killed_and_decisions_resume_when_it_is_back(mesh):
    with TinyTraining(mesh, "killed") as training:
        training.steps_until(lambda: training.answered >= 20)
        mesh.services["tamiyo"].process.kill()
        mesh.services["tamiyo"].process.wait()
        training.steps_until(lambda: not training.session.is_connected)
        before = training.answered
        training.steps(100)
        assert training.answered == before
        assert training.session.reasons["mesh_unreachable"] >= 100
        assert mesh.ended() == ["tamiyo"]
        mesh.restart("tamiyo")
        training.steps_until(lambda: training.answered >= before + 20)
        assert training.session.reasons["internal_error"] == 0


def test_training_goes_on_when_tamiyo_hangs_and_decisions_resume_when_it_wakes(mesh):
    with TinyTraining(mesh, "hung") as training:
        training.steps_until(lambda: training.answered >= 20)
        process = mesh.services["tamiyo"].process
        process.send_signal(signal.SIGSTOP)
        try:
            training.steps_until(lambda: training.session.guard.misses > 0)
            before = training.answered
            training.steps(100)
            assert training.answered == before
        finally:
            process.send_signal(signal.SIGCONT)
        training.steps_until(lambda: training.answered >= before + 20)
        assert training.session.reasons["internal_error"] == 0


def test_a_germinated_seed_lives_in_the_model(mesh):
    with TinyTraining(mesh, "germinated") as training:
        seeds = training.session.host.seeds.values()
        training.steps_until(lambda: any(slot.site.seed is not None for slot in seeds))
        assert _applied(training)


def test_up_starts_a_mesh_that_status_reaches_and_a_signal_drains_it(home, tmp_path):
    home.mesh_file.unlink(missing_ok=True)
    with (tmp_path / "up.log").open("wb") as log:
        process = subprocess.Popen(
            [*cli_command(), "up", "--home", str(home.directory)], stderr=log, stdout=log, start_new_session=True
        )
    try:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not home.mesh_file.exists():
            assert process.poll() is None, (tmp_path / "up.log").read_text()
            assert time.monotonic() < deadline
            os.sched_yield()
        from esper_servers.cli import app

        result = CliRunner().invoke(app, ["status", "--json"], obj={"ESPER_HOME": str(home.directory)})
        assert result.exit_code == 0, result.output
        assert result.stdout.count('"SERVING"') == 2
        listed = CliRunner().invoke(app, ["urza", "list", "--json"], obj={"ESPER_HOME": str(home.directory)})
        assert listed.stdout.count('"blueprint"') == 8
    finally:
        end(process, 20)
    assert process.returncode == 0
    assert CliRunner().invoke(app, ["status"], obj={"ESPER_HOME": str(home.directory)}).exit_code == 3


def until(condition):
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        os.sched_yield()


def listens(address):
    host, _, port = address.rpartition(":")
    with socket.socket() as probe:
        return probe.connect_ex((host, int(port))) == 0


def test_services_drain_when_the_process_that_supervises_them_is_killed(home):
    home.mesh_file.unlink(missing_ok=True)
    up = subprocess.Popen([*cli_command(), "up", "--home", str(home.directory)], stderr=subprocess.DEVNULL)
    until(home.mesh_file.exists)
    addresses = [home.address(service) for service in ("tamiyo", "urza")]
    assert all(map(listens, addresses))
    up.kill()
    up.wait()
    until(lambda: not any(map(listens, addresses)))


def test_a_service_that_cannot_start_again_is_tried_until_it_can(mesh):
    from esper_servers.cli import up

    stop, said = threading.Event(), io.StringIO()
    watching = threading.Thread(target=up._watch, args=(mesh, stop, Console(file=said)))
    watching.start()
    keyring = mesh.home.identity_dir("tamiyo") / "keyring.json"
    hidden = keyring.rename(keyring.with_suffix(".away"))
    mesh.services["tamiyo"].process.kill()
    until(lambda: "tamiyo does not start" in said.getvalue())
    hidden.rename(keyring)
    until(lambda: not mesh.ended())
    stop.set()
    watching.join()
    assert listens(mesh.addresses["tamiyo"])


def test_a_service_without_its_certificate_says_so_and_does_not_start(tmp_path):
    command = [*cli_command(), "serve", "urza", "--home", str(tmp_path)]
    finished = subprocess.run(command, capture_output=True, timeout=60, check=False)
    assert finished.returncode == 1
    assert b"cert.pem is missing" in finished.stderr
