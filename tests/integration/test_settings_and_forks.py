from __future__ import annotations

import os
import subprocess
import sys

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
    print("answered", session.reasons["nominal"] + session.reasons["command"], "of", session.global_step)
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
    (mesh.directory / "esper.toml").write_text("[gates]\nhook_latency_ms = 0\n")
    result = subprocess.run(
        [sys.executable, "-m", "esper_servers.cli", "serve", "tamiyo", "--home", mesh.directory, "--urza", "127.0.0.1:1"],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert result.returncode != 0
    assert "hook_latency_ms = 0" in result.stderr
    assert "1 to 60000" in result.stderr
