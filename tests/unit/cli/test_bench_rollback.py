from __future__ import annotations

from esper_servers.cli.bench.rollback import RollbackBench

MEASURED = {"take", "fast", "copy", "save", "write", "torch_save", "full", "read", "torch_load"}


def test_checkpoints_and_rollbacks_are_measured_beside_plain_copies(tmp_path):
    found = RollbackBench(2, tmp_path).run(1)
    assert found["parameters"] == 2 * (1024 * 1024 + 1024)
    # Weights and two moments, in float32, and what else there is.
    assert found["state_mb"] >= round(found["parameters"] * 12 / 2**20, 1)
    assert set(found) - MEASURED == {"parameters", "state_mb", "over_floor", "rss_mb", "machine"}
    for name in MEASURED:
        assert found[name]["p50_ms"] > 0
        assert found[name]["ms_per_mb"] > 0
