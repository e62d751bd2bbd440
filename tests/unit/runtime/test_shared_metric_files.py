from __future__ import annotations

import os
import resource
import subprocess
import sys

from prometheus_client import CollectorRegistry
from prometheus_client.multiprocess import MultiProcessCollector

from esper_rpc.telemetry import shared_files
from esper_rpc.telemetry.exposition import MetricsEndpoint
from esper_rpc.telemetry.shared_files import DIRECTORY_VARIABLE, FILE_BYTES, KINDS

COUNT = """
import os
from esper_rpc.telemetry.metrics import DECISIONS
DECISIONS.labels("command", "nominal").inc()
print(os.getpid())
"""


def count(directory):
    environ = {**os.environ, DIRECTORY_VARIABLE: str(directory)}
    return int(subprocess.run([sys.executable, "-c", COUNT], env=environ, stdout=subprocess.PIPE, check=True).stdout)


def counted(directory):
    registry = CollectorRegistry()
    MultiProcessCollector(registry, path=str(directory))
    return registry.get_sample_value("esper_decisions_total", {"kind": "command", "reason": "nominal"})


def test_metrics_have_their_room_before_they_are_counted(tmp_path):
    pid = count(tmp_path)
    files = [tmp_path / f"{kind}_{pid}.db" for kind in KINDS]
    assert all(file.stat().st_blocks * 512 >= FILE_BYTES for file in files)
    assert set(tmp_path.iterdir()) == set(files)
    assert counted(tmp_path) == 1


def test_a_process_without_room_counts_for_itself_and_leaves_no_file(tmp_path, capfd):
    environ = {DIRECTORY_VARIABLE: str(tmp_path)}
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_BYTES - 1, before[1]))
    try:
        shared_files.reserve(environ)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert environ == {}
    assert not list(tmp_path.iterdir())
    assert str(tmp_path) in capfd.readouterr().err


def test_the_gauges_of_a_process_that_ended_are_shown_no_more_and_its_counts_stay(tmp_path):
    pid = count(tmp_path)
    files = [f"gauge_livemostrecent_{each}.db" for each in (pid, os.getpid())]
    (tmp_path / files[1]).write_bytes((tmp_path / files[0]).read_bytes())
    registry = MetricsEndpoint(tmp_path, dict).registry()
    assert [file.name for file in tmp_path.glob("gauge_live*")] == [files[1]]
    assert registry.get_sample_value("esper_decisions_total", {"kind": "command", "reason": "nominal"}) == 1


def test_an_ended_process_keeps_its_counts_and_gives_back_its_room(tmp_path):
    pids = [count(tmp_path) for _ in range(2)]
    for pid in pids:
        MetricsEndpoint(tmp_path, dict).forget(pid)
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) < FILE_BYTES / 10
    assert counted(tmp_path) == 2
