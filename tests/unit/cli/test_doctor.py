from __future__ import annotations

import pytest

from esper_servers.cli.doctor import Patient, seeds_stay_long_enough
from esper_servers.cli.home import Home


@pytest.mark.parametrize(("settings", "problems"), [
    ("", 0),
    ("[prior]\nshadow_steps = 200", 1),
    ("[prior]\nshadow_steps = 500\nprobation_steps = 500", 2),
    ("[prior]\nshadow_steps = 500\n[seed_gates]\nstage_patience = 501", 0),
    ("[prior]\nshadow_steps = 500\n[seed_gates]\nstage_patience = 0", 0),
    ("[prior]\nshadow_steps = -1", 0),
])  # fmt: skip
def test_a_trainer_that_loses_patience_before_tamiyo_moves_on_is_found(tmp_path, settings, problems):
    (tmp_path / "esper.toml").write_text(settings)
    found = list(seeds_stay_long_enough(Patient(Home(tmp_path), {})))
    assert len(found) == problems
    assert all("stage_patience" in finding.fix for finding in found)
