from __future__ import annotations

import pytest
import torch

from esper_rpc.errors import ConfigError
from esper_rpc.proto.leyline.v1 import CommandOutcome
from esper_rpc.testing import FakeClock
from esper_servers.blueprints.out_of_memory import is_out_of_memory
from esper_servers.kasmina import lifecycle
from esper_servers.kasmina.host_memory import used_share
from esper_servers.kasmina.memory import MemoryConfig, MemoryGovernor, reader_for

MIB = 2**20


class Watched:
    """A governor on a memory that a test fills."""

    def __init__(self, **config):
        self.clock, self.share, self.cleanups, self.told = FakeClock(), 0.5, 0, []
        self.governor = MemoryGovernor(
            config=MemoryConfig(**config), read=lambda: self.share, clean_up=self.clean_up, expire=lambda: 3,
            clock=self.clock, tell=self.tell,
        )  # fmt: skip

    def clean_up(self):
        self.cleanups += 1
        return 7

    def tell(self, name, level, *, reason, **details):
        self.told.append((name, reason))

    def look(self, *shares):
        for share in shares:
            self.share = share
            assert self.governor.look()
            self.clock.advance(1.0)


def test_memory_is_looked_at_once_in_a_while():
    watched = Watched(look_seconds=2.0)
    looks = []
    for _ in range(5):
        looks.append(watched.governor.look())
        watched.clock.advance(1.0)
    assert looks == [True, False, True, False, True]


def test_short_memory_is_told_once_and_again_when_it_was_enough_in_between():
    watched = Watched()
    watched.look(0.5, 0.85, 0.89, 0.86, 0.8, 0.87)
    assert watched.told == [("memory_pressure", "memory_short")] * 2
    assert watched.cleanups == 0


def test_an_emergency_empties_the_caches_once_until_the_memory_is_no_longer_short():
    watched = Watched()
    watched.look(0.91, 0.95, 0.88, 0.92)
    assert watched.cleanups == 1
    watched.look(0.5, 0.9)
    assert watched.cleanups == 2
    assert [told for told in watched.told if told[0] == "emergency_cleanup"] == [
        ("emergency_cleanup", "memory_emergency")
    ] * 2


def test_five_looks_in_an_emergency_stop_the_planting_until_the_breaker_has_rested():
    watched = Watched()
    watched.look(0.95, 0.95, 0.95, 0.95)
    assert watched.governor.admits()
    watched.look(0.95)
    assert not watched.governor.admits()
    assert watched.told[-1] == ("breaker_open", "memory_bounds")
    watched.clock.advance(57)
    watched.look(0.5)
    assert not watched.governor.admits()
    watched.look(0.5, 0.5, 0.5, 0.5)
    assert watched.told[-1] == ("breaker_closed", "memory_bounds")
    assert watched.governor.admits()


def test_allocations_that_failed_count_although_the_memory_looks_free_afterwards():
    watched = Watched()
    for _ in range(5):
        watched.governor.ran_out()
        watched.look(0.3, 0.3)
    assert not watched.governor.admits()
    assert watched.cleanups == 5


def test_garbage_is_collected_each_hundred_epochs_and_what_expired_is_let_go_of_in_each():
    watched = Watched()
    for epoch in range(250):
        watched.governor.end_epoch(epoch)
    assert watched.told == [("epoch_gc", "epochs_passed")] * 2


def test_a_memory_that_nobody_can_read_is_left_alone():
    watched = Watched()
    watched.look(None, None)
    assert watched.told == []
    assert [point.name for point in watched.governor.metrics()] == ["kasmina.breaker.state"]


def test_a_warning_above_the_emergency_is_refused():
    with pytest.raises(ConfigError, match="warn_share"):
        MemoryConfig(warn_share=0.95, emergency_share=0.9)


def test_full_memory_empties_the_caches_of_a_host_and_then_keeps_seeds_out(make_rig):
    share = [0.95]
    rig = make_rig(options={"read_memory": lambda: share[0]})
    rig.library.request("residual_mlp")
    rig.train()
    assert len(rig.library._kernels) == 0
    for _ in range(5):
        rig.clock.advance(1.0)
        rig.train()
    outcome = rig.do("GERMINATE", blueprint="residual_mlp")
    assert (outcome.result, outcome.reason) == (CommandOutcome.RESULT_REJECTED, "memory_bounds")
    assert rig.slot.stage == lifecycle.DORMANT
    share[0] = 0.5
    rig.clock.advance(60)
    assert rig.do("GERMINATE", blueprint="residual_mlp").result == CommandOutcome.RESULT_APPLIED


def test_an_emergency_takes_out_what_a_seed_left_and_spares_those_that_grow(rig):
    rig.grow(lifecycle.TRAINING)
    left = rig.host.seeds[rig.seed_ids[0]]
    left.site.hold(torch.nn.Linear(8, 8))
    assert rig.host.emergency_cleanup() >= 1
    assert left.site.seed is None
    assert rig.slot.site.seed is not None


def test_kernels_that_expired_are_let_go_of_at_the_end_of_an_epoch(rig):
    rig.library._kernels._clock = rig.clock
    rig.library.request("residual_mlp")
    rig.library._kernels.put("old", "kernel")
    rig.clock.advance(1e9)
    rig.host.update_epoch(1)
    assert len(rig.library._kernels) == 0


def test_memory_and_breakers_are_in_the_packet_of_a_step_once_a_second(make_rig):
    rig = make_rig(options={"read_memory": lambda: 0.25})
    names = [[point.name for point in rig.host.finalize_step(step)[-1].metrics] for step in (1, 2)]
    assert "kasmina.memory.share" in names[0]
    assert names[0].count("kasmina.breaker.state") == 2
    assert names[1] == ["kasmina.seeds.active"]


def write(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(content)


@pytest.fixture
def system(tmp_path):
    proc, cgroup = tmp_path / "proc", tmp_path / "cgroup"
    write(proc, meminfo="MemTotal: 1000 kB\nMemFree: 1 kB\nMemAvailable: 400 kB\n")
    return proc, cgroup


def test_without_a_limit_the_machine_counts(system):
    assert used_share(*system) == pytest.approx(0.6)


@pytest.mark.parametrize("place", ["pods/one", ""], ids=["at its path", "at the root of a container"])
def test_a_limited_control_group_counts_without_files_that_were_read(system, place):
    proc, cgroup = system
    write(proc / "self", cgroup="0::/pods/one\n")
    write(
        cgroup / place, memory__max=str(100 * MIB), memory__current=str(90 * MIB),
        memory__stat=f"anon 1\ninactive_file {10 * MIB}\n",
    )  # fmt: skip
    assert used_share(*system) == pytest.approx(0.8)


def test_the_first_version_of_control_groups_is_read_too(system):
    proc, cgroup = system
    write(proc / "self", cgroup="5:devices:/x\n4:memory:/job\n0::/\n")
    write(
        cgroup / "memory" / "job", memory__limit_in_bytes=str(100 * MIB), memory__usage_in_bytes=str(70 * MIB),
        memory__stat="cache 1\ntotal_inactive_file 0\n",
    )  # fmt: skip
    assert used_share(*system) == pytest.approx(0.7)


@pytest.mark.parametrize("limit", ["max", str(2**63 - 4096)])
def test_a_group_without_a_limit_does_not_count(system, limit):
    proc, cgroup = system
    write(proc / "self", cgroup="0::/\n")
    write(cgroup, memory__max=limit, memory__current="1", memory__stat="inactive_file 0\n")
    assert used_share(*system) == pytest.approx(0.6)


def test_where_the_system_tells_nothing_nothing_is_known(tmp_path):
    assert used_share(tmp_path, tmp_path) is None
    write(tmp_path, meminfo="nonsense")
    assert used_share(tmp_path, tmp_path) is None


def test_the_reader_of_a_cpu_model_reads_the_machine():
    share = reader_for(torch.device("cpu"))()
    assert share is None or share >= 0


def test_the_reader_of_a_cuda_model_counts_what_torch_keeps_as_free(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10, 100))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 70)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 40)
    assert reader_for(torch.device("cuda", 0))() == pytest.approx(0.6)

    def fail(device):
        raise RuntimeError("no driver")

    monkeypatch.setattr(torch.cuda, "mem_get_info", fail)
    assert reader_for(torch.device("cuda", 0))() is None


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (MemoryError(), True),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes"), True),
        (RuntimeError("shapes differ"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_an_error_that_says_that_memory_ran_out_is_known(error, expected):
    assert is_out_of_memory(error) == expected
