from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from esper_client import MeshAddress
from esper_rpc.config import load
from esper_rpc.errors import ConfigError
from esper_servers.kasmina.limits import LocalLimits
from esper_servers.trainer import attach

TRAINING = """
import sys, torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
import esper_client
from esper_client.discovery import MeshAddress
from pathlib import Path

torch.set_num_threads(1)
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
x = torch.randn(64, 4)
loader = DataLoader(TensorDataset(x, (x.sum(1) > 0).long()), 16, num_workers=2, multiprocessing_context="fork")
mesh = MeshAddress(tamiyo=sys.argv[1], urza="127.0.0.1:1", identity_dir=Path(sys.argv[2]))
with esper_client.attach(model, optimizer, mesh=mesh, step_budget_ms=50) as session:
    for epoch in range(20):
        session.start_epoch(epoch)
        for x, y in loader:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            session.step(loss, samples=len(x))
    print("answered", sum(session.reasons[r] for r in ("nominal", "command", "conservative_mode")), "of", session.global_step)
"""


def test_twenty_epochs_with_two_forked_loader_workers_under_a_live_session(mesh, tmp_path):
    mesh.identity("trainer"), mesh.identity("tamiyo")
    with subprocess.Popen(
        [sys.executable, "-m", "esper_servers.cli", "serve", "tamiyo", "--home", mesh.directory, "--urza", "127.0.0.1:1"],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as tamiyo:  # fmt: skip
        try:
            address = tamiyo.stdout.readline().rsplit('"', 2)[1]
            trained = subprocess.run(
                [sys.executable, "-c", TRAINING, address, mesh.identity_dir("trainer")],
                capture_output=True, text=True, timeout=150,
            )  # fmt: skip
        finally:
            tamiyo.terminate()
    assert trained.returncode == 0, trained.stderr[-2000:]
    _, answered, _, steps = trained.stdout.split()[-4:]
    assert int(steps) == 80
    assert int(answered) > 40


def test_a_setting_out_of_range_stops_the_service_and_names_itself(mesh):
    mesh.identity("tamiyo")
    (mesh.directory / "esper.toml").write_text("[risk]\nhook_latency_ms = 0\n")
    result = subprocess.run(
        [sys.executable, "-m", "esper_servers.cli", "serve", "tamiyo", "--home", mesh.directory, "--urza", "127.0.0.1:1"],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert result.returncode != 0
    assert "hook_latency_ms = 0" in result.stderr
    assert "1 to 60000" in result.stderr


def small_model():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


def attached(mesh, environ=None, **options):
    address = MeshAddress(tamiyo="127.0.0.1:1", urza="127.0.0.1:1", identity_dir=mesh.identity_dir("trainer"))
    environ = {"ESPER_HOME": str(mesh.directory), **(environ or {})}
    return attach(*small_model(), environ=environ, mesh=address, **options)


def test_attach_reads_its_settings_from_the_file_the_environment_and_its_arguments(mesh):
    mesh.identity("trainer")
    (mesh.directory / "esper.toml").write_text("[session]\nstep_budget_ms = 7\n[breaker]\nfailures = 9\n")
    with attached(mesh, {"ESPER_BREAKER_FAILURES": "11"}) as session:
        config = session.config
        assert (config.step_budget_ms, config.breaker.failures, config.breaker.successes) == (7, 11, 1)
    with attached(mesh, step_budget_ms=9) as session:
        assert session.config.step_budget_ms == 9


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[session]\nstep_budget_ms = 1\n", r"\[session\] step_budget_ms = 1.*2 to 1000"),
        ("[session]\nstep_bugdet_ms = 5\n", r"\[session\] has no setting 'step_bugdet_ms'"),
        ("[limits]\nlearning_rate_multiplier = [2, 3]\n", r"\[limits\] learning_rate_multiplier = 2, 3"),
        ("[limits]\nlearning_rate_multiplier = [2]\n", "must have 2 values"),
        ("[limits]\nlive_seeds = 'many'\n", r"\[limits\] live_seeds = 'many' is not a int"),
    ],
)
def test_a_bad_setting_stops_attach_before_training_starts(mesh, text, message):
    mesh.identity("trainer")
    (mesh.directory / "esper.toml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        attached(mesh)


def test_a_keyring_in_the_environment_wins_over_the_file(mesh):
    keyring = mesh.keyring("trainer")
    (mesh.identity_dir("trainer") / "keyring.json").unlink()
    with attached(mesh, {"ESPER_LEYLINE_SECRET": keyring.to_json().decode()}) as session:
        assert session.step(0.5) == []


@pytest.mark.parametrize("content", ["root", "other role", "nonsense"])
def test_what_is_not_the_keyring_of_the_role_is_refused_and_never_quoted(mesh, content):
    mesh.identity("trainer")
    root = (mesh.directory / "keys" / "root.json").read_text()
    secret = {"root": root, "other role": mesh.keyring("tamiyo").to_json().decode(), "nonsense": "{hunter2"}[content]
    with pytest.raises(ConfigError, match="ESPER_LEYLINE_SECRET") as caught:
        attached(mesh, {"ESPER_LEYLINE_SECRET": secret})
    assert not any(part in str(caught.value) for part in ("hunter2", root.split('"')[-2]))


def test_a_pair_is_read_from_the_file_and_from_the_environment(tmp_path):
    path = tmp_path / "esper.toml"
    path.write_text("[limits]\nlearning_rate_multiplier = [0.5, 1.5]\n")
    assert load(LocalLimits, "limits", path=path, environ={}).learning_rate_multiplier == (0.5, 1.5)
    environ = {"ESPER_LIMITS_LEARNING_RATE_MULTIPLIER": "0.25,1"}
    assert load(LocalLimits, "limits", path=path, environ=environ).learning_rate_multiplier == (0.25, 1.0)
