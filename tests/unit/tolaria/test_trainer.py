from __future__ import annotations

import copy
import math
import threading

import pytest
import torch
from prometheus_client import REGISTRY
from torch import nn

from esper_client.halt import HaltSwitch
from esper_rpc.errors import DataLoss, FailedPrecondition, NotFound
from esper_rpc.proto.leyline.v1 import SeedLifecycleStage
from esper_rpc.proto.tolaria.v1 import Checkpoint
from esper_servers.optim.controller import UnifiedLRController
from esper_servers.tolaria.aggregation.batches import BatchAggregator
from esper_servers.tolaria.aggregation.layer_norms import NAME as LAYER_NORM
from esper_servers.tolaria.aggregation.layer_norms import SeedGradients
from esper_servers.tolaria.aggregation.weights import SeedLoss
from esper_servers.tolaria.checkpoints.keeper import RolledBack
from esper_servers.tolaria.emergency.escalation import FAST, FULL, EmergencyConfig
from esper_servers.tolaria.emergency.levels import CONSERVATIVE, ELEVATED, HALT, NONE, NOTICE
from esper_servers.tolaria.metrics.profiling import StepProfiler
from esper_servers.tolaria.metrics.step_metrics import StepMetrics, TolariaConfig
from esper_servers.tolaria.train_step import TrainStep
from esper_servers.tolaria.trainer import Trainer

PATIENCE_SECONDS = 30
SHADOWING = SeedLifecycleStage.SEED_LIFECYCLE_STAGE_SHADOWING


class Session:
    """What a trainer needs of a session, where a mesh never answers anything."""

    def __init__(self, halt):
        self.halt, self.global_step, self.epoch = halt, 0, 0
        self.apply_ms = self.finalize_ms = 0.0
        self.told, self.calls = [], []

    def begin_step(self, loss, **what):
        self.global_step += 1
        self.told.append((loss, what))
        self.calls.append("begin")

    def finish_step(self):
        self.calls.append("finish")
        return []

    def start_epoch(self, epoch):
        self.epoch = epoch


class Keeper:
    """Keeps one state of a model and its optimizer, in memory and, as it says, on the disk."""

    def __init__(self, model, optimizer):
        self.parts, self.kept, self.rollbacks = (model, optimizer), None, []
        self.is_late, self.broken = False, {}

    def checkpoints(self):
        return [Checkpoint(name="c")] if self.kept else []

    def create_checkpoint(self, _reason):
        self.kept = [copy.deepcopy(part.state_dict()) for part in self.parts]
        return Checkpoint(name="c")

    def rollback(self, _checkpoint, tier, reason):
        self.rollbacks.append((tier, reason))
        if self.kept is None:
            raise NotFound("There is no checkpoint.")
        if tier in self.broken:
            raise self.broken[tier]
        for part, state in zip(self.parts, self.kept, strict=True):
            part.load_state_dict(copy.deepcopy(state))
        return RolledBack(Checkpoint(name="c"), tier, 0.1, self.is_late)


class Loop:
    """A training loop of a user, with a trainer or without."""

    def __init__(self, ward=None):
        torch.manual_seed(0)
        self.model = nn.Linear(4, 2)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        self.x, self.y = torch.randn(8, 4), torch.randint(0, 2, (8,))
        self.keeper = Keeper(self.model, self.optimizer)
        self.scale = 1.0
        self.ward, self.trainer = ward, None
        if ward is not None:
            self.session = Session(ward.halt)
            self.trainer = Trainer(
                session=self.session, optimizer=self.optimizer, emergencies=ward.emergencies, mode=ward.mode,
                checkpoints=self.keeper,
            )  # fmt: skip

    def step(self, count=1):
        for _ in range(count):
            self.optimizer.zero_grad()
            loss = nn.functional.cross_entropy(self.model(self.x), self.y)
            loss.backward()
            self.optimizer.step()
            if self.trainer is not None:
                self.trainer.step(loss * self.scale, samples=8, gradient_norm=1.0)

    def weights(self):
        return {name: value.clone() for name, value in self.model.state_dict().items()}


@pytest.fixture
def loop(ward):
    return Loop(ward)


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


def test_a_run_with_the_trainer_has_the_same_bits_as_one_without(loop):
    plain = Loop()
    plain.step(30)
    loop.step(30)
    loop.trainer.end_epoch(accuracy=0.5)
    assert same(plain.weights(), loop.weights())


def test_a_step_tells_the_session_what_was_measured(loop):
    loop.step(3)
    loss, what = loop.session.told[-1]
    assert (what["samples"], what["gradient_norm"]) == (8, 1.0)
    assert what["metrics"]["optimizer_lr"] == 0.1
    assert what["metrics"]["loss_delta"] < 0
    assert isinstance(loss, float)


def test_in_conservative_mode_a_step_tells_no_more_than_it_must(loop, ward):
    ward.mode.enter("emergency")
    loop.step()
    assert loop.session.told[-1][1]["metrics"] == {}


def test_a_run_that_is_halted_in_a_step_changes_no_parameter_until_it_is_released(loop, ward):
    loop.step(2)
    before, changes = loop.weights(), []
    loop.trainer.on_halt(lambda is_halted, reason: changes.append((is_halted, reason)))
    standing = threading.Event()
    ward.halt.meanwhile(standing.set)
    # In the backward pass of a step, before its update.
    loop.model.weight.register_post_accumulate_grad_hook(lambda _: ward.emergencies.alarm(HALT, "stop"))
    thread = threading.Thread(target=loop.step)
    thread.start()
    assert standing.wait(PATIENCE_SECONDS)
    assert loop.trainer.is_halted
    assert same(before, loop.weights())
    assert len(loop.session.told) == 2
    loop.trainer.release("well")
    thread.join(PATIENCE_SECONDS)
    assert not thread.is_alive()
    assert not same(before, loop.weights())
    assert changes == [(True, "stop"), (False, "well")]


def test_work_is_done_for_others_while_the_training_stands_still(loop, ward):
    done = threading.Event()
    ward.halt.meanwhile(done.set)
    ward.emergencies.alarm(HALT, "stop")
    thread = threading.Thread(target=loop.step)
    thread.start()
    assert done.wait(PATIENCE_SECONDS)
    loop.trainer.release("well")
    thread.join(PATIENCE_SECONDS)


def test_holding_has_an_end_if_it_is_wanted(ward):
    switch = HaltSwitch()
    assert switch.hold(0)
    switch.engage("stop")
    assert not switch.hold(0.01)


def test_a_loss_that_explodes_returns_the_run_to_its_checkpoint_and_makes_it_conservative(loop, ward):
    loop.step(12)
    kept = loop.weights()
    loop.keeper.create_checkpoint("")
    loop.scale = 1000.0
    loop.step()
    assert loop.keeper.rollbacks == [(FAST, "loss_exploded")]
    assert same(kept, loop.weights())
    assert (ward.emergencies.level, ward.mode.is_active, loop.trainer.is_halted) == (CONSERVATIVE, True, False)


def test_a_fast_rollback_that_cannot_be_done_becomes_a_full_one(loop, ward):
    loop.keeper.create_checkpoint("")
    loop.keeper.broken = {FAST: DataLoss("torn")}
    loop.scale = math.nan
    loop.step()
    assert loop.keeper.rollbacks == [(FAST, "loss_not_finite"), (FULL, "rollback_failed")]
    assert ward.emergencies.level == CONSERVATIVE


@pytest.mark.parametrize(("is_late", "broken"), [(True, [FAST]), (False, [FAST, FULL])], ids=["late", "fails"])
def test_a_full_rollback_that_fails_or_is_late_halts_the_run(loop, ward, is_late, broken):
    loop.keeper.create_checkpoint("")
    loop.keeper.broken = dict.fromkeys(broken, DataLoss("torn"))
    loop.keeper.is_late = is_late
    loop.scale = math.nan
    thread = threading.Thread(target=loop.step)
    halted = threading.Event()
    loop.trainer.on_halt(lambda *_: halted.set())
    thread.start()
    assert halted.wait(PATIENCE_SECONDS)
    assert ward.emergencies.level == HALT
    loop.trainer.release("seen")
    thread.join(PATIENCE_SECONDS)


def test_epochs_that_fail_in_a_row_halt_the_run(make_ward):
    ward = make_ward(config=EmergencyConfig(failed_epochs=2))
    loop = Loop(ward)
    loop.trainer.end_epoch(failed=True)
    assert ward.emergencies.level == NONE
    thread = threading.Thread(target=loop.trainer.end_epoch, kwargs={"failed": True})
    halted = threading.Event()
    loop.trainer.on_halt(lambda *_: halted.set())
    thread.start()
    assert halted.wait(PATIENCE_SECONDS)
    assert ward.halt.reason == "epochs_failed"
    loop.trainer.release("seen")
    thread.join(PATIENCE_SECONDS)


def test_before_the_first_checkpoint_there_is_nothing_to_return_to_and_the_run_goes_on(loop, ward):
    loop.scale = math.nan
    loop.step()
    assert ward.emergencies.level == CONSERVATIVE


def test_an_epoch_with_a_loss_that_is_no_number_has_failed(loop):
    loop.scale = math.nan
    loop.step()
    loop.trainer.end_epoch()
    assert loop.trainer.guard.breaker.consecutive_failures == 1
    assert loop.session.epoch == 1


def test_an_accuracy_that_collapses_rolls_back_from_disk(loop, ward):
    loop.keeper.create_checkpoint("")
    loop.trainer.end_epoch(accuracy=0.9)
    loop.trainer.end_epoch(accuracy=0.1)
    assert loop.keeper.rollbacks == [(FULL, "accuracy_collapsed")]
    assert ward.emergencies.level == ELEVATED


def test_good_epochs_end_what_the_trainer_raised_by_itself(loop, ward):
    loop.scale = math.nan
    loop.keeper.create_checkpoint("")
    loop.step()
    loop.trainer.end_epoch()
    loop.scale = 1.0
    for _ in range(3):
        assert ward.emergencies.level == CONSERVATIVE
        loop.step()
        loop.trainer.end_epoch()
    assert (ward.emergencies.level, ward.emergencies.in_force[0].reason) == (NOTICE, "calm")


def test_good_epochs_do_not_end_what_an_operator_raised(loop, ward):
    ward.signal(CONSERVATIVE)
    for _ in range(5):
        loop.trainer.end_epoch()
    assert ward.emergencies.level == CONSERVATIVE


def test_a_seed_host_that_takes_too_long_is_told_once_in_fifty_steps(loop, told):
    loop.session.apply_ms = 6.0
    loop.step(51)
    late = [attributes for name, attributes in told if name == "tolaria.kasmina_timeout"]
    assert [found["step_index"] for found in late] == ["1", "51"]
    assert (late[0]["budget_ms"], late[0]["spent_ms"], late[0]["priority"]) == ("5.0", "6.0", "NORMAL")


@pytest.mark.parametrize(("level", "each_step"), [(NOTICE, False), (ELEVATED, True), (CONSERVATIVE, False)])
def test_an_elevated_run_reads_its_devices_in_every_step(loop, ward, monkeypatch, level, each_step):
    asked, collect = [], loop.trainer.metrics.collect

    def watched(loss, *, read_devices, **options):
        asked.append(read_devices)
        return collect(loss, read_devices=read_devices, **options)

    monkeypatch.setattr(loop.trainer.metrics, "collect", watched)
    ward.emergencies.alarm(level, "why")
    loop.step(2)
    assert asked == [each_step] * 2


def test_a_fault_of_ours_does_not_reach_the_loop(loop, monkeypatch):
    monkeypatch.setattr(loop.trainer.metrics, "collect", lambda *_, **__: 1 / 0)
    loop.step(2)
    assert len(loop.session.told) == 2


class Watched(Session):
    """A session that looks at the model when it is asked and when the step ends."""

    def __init__(self, halt, model):
        super().__init__(halt)
        self.model, self.seen = model, []

    def look(self):
        self.seen.append((self.model.weight.detach().clone(), self.model.weight.grad is not None))

    def begin_step(self, loss, **what):
        super().begin_step(loss, **what)
        self.look()

    def finish_step(self):
        self.look()
        return super().finish_step()


def cross_entropy(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


@pytest.fixture
def make_trainer(ward):
    """Make a trainer of a loop whose session looks at the model; options go to the trainer."""

    def make(**options):
        loop = Loop(ward)
        loop.session = Watched(ward.halt, loop.model)
        step = TrainStep(loop.model, loop.optimizer, cross_entropy)
        loop.trainer = Trainer(
            session=loop.session, optimizer=loop.optimizer, emergencies=ward.emergencies, mode=ward.mode,
            **{"train_step": step, **options},
        )  # fmt: skip
        return loop

    return make


def test_the_mesh_is_asked_before_backward_and_finished_after_the_update(make_trainer):
    loop = make_trainer()
    start = loop.model.weight.detach().clone()
    result = loop.trainer.train((loop.x, loop.y), samples=8)
    (at_begin, had_gradient), (at_end, _) = loop.session.seen
    assert loop.session.calls == ["begin", "finish"]
    assert torch.equal(at_begin, start)
    assert not had_gradient
    assert not torch.equal(at_end, start)
    loss, what = loop.session.told[0]
    assert (loss, what["samples"], what["gradient_norm"]) == (result.loss, 8, None)
    loop.trainer.train((loop.x, loop.y))
    assert loop.session.told[1][1]["gradient_norm"] == result.gradient_norm


def test_a_run_that_the_trainer_trains_has_the_same_bits_as_one_without(make_trainer):
    plain, loop = Loop(), make_trainer()
    step = TrainStep(plain.model, plain.optimizer, cross_entropy)
    for _ in range(20):
        step((plain.x, plain.y))
        loop.trainer.train((loop.x, loop.y))
    assert same(plain.weights(), loop.weights())


def test_the_norm_of_a_step_is_told_once(loop):
    trainer, session = loop.trainer, loop.session
    trainer.begin_step(1.0)
    trainer.finish_step(gradient_norm=3.0)
    trainer.step(1.0)
    trainer.step(1.0)
    trainer.begin_step(1.0, gradient_norm=2.0)
    assert [what["gradient_norm"] for _, what in session.told] == [None, 3.0, None, 2.0]


def test_a_step_that_was_begun_twice_is_finished_first_and_one_that_was_not_is_not(loop):
    assert loop.trainer.finish_step() == []
    loop.trainer.begin_step(1.0)
    loop.trainer.begin_step(1.0)
    assert loop.session.calls == ["begin", "finish", "begin"]


def test_what_an_epoch_was_worth_is_told_with_the_steps_after_it(loop):
    loop.step()
    loop.trainer.end_epoch(accuracy=0.75)
    loop.step()
    assert [what["metrics"].get("accuracy") for _, what in loop.session.told] == [None, 0.75]


def test_losses_of_seeds_are_put_together_and_their_conflicts_told(loop):
    weight = loop.model.weight
    for _ in range(2):
        seeds = {"seed-a": SeedLoss(loss=-weight.sum(), stage=SHADOWING, samples=8)}
        done = loop.trainer.backward(weight.sum(), seeds, [weight], samples=8)
        assert done.conflicts == ("seed-a",)
        loop.trainer.step(1.0, gradient_norm=done.norm)
    # Projected on the gradient of the model, which it opposes wholly, nothing of the seed's is left.
    assert torch.allclose(weight.grad, torch.ones_like(weight))
    assert loop.session.told[-1][1]["metrics"]["grad_conflict_rate"] == 1.0


def test_conflicts_of_batches_are_told(make_trainer):
    loop = make_trainer()
    batches = BatchAggregator()
    loop.trainer.train_step = TrainStep(loop.model, loop.optimizer, lambda m, b: b * m.weight.sum(), batches=batches)
    loop.trainer.train(torch.tensor(1.0), torch.tensor(-1.0))
    loop.trainer.step(1.0)
    assert loop.session.told[-1][1]["metrics"]["grad_conflict_rate"] == 1.0


def test_without_a_train_step_the_message_says_where_one_goes(loop):
    with pytest.raises(FailedPrecondition, match="train_step"):
        loop.trainer.train((loop.x, loop.y))


class Seeds:
    def growing(self):
        return [
            SeedGradients("seed-0", "TRAINING", [("up.weight", torch.full((4,), 2.0)), ("down.bias", torch.ones(9))])
        ]


@pytest.fixture
def shown(monkeypatch):
    found = []

    def record(packets):
        found.extend((p.name, dict(p.attributes), p.value) for packet in packets for p in packet.metrics)

    monkeypatch.setattr("esper_servers.tolaria.telemetry.record_packets", record)
    return found


@pytest.mark.parametrize(("top", "layers"), [(0, []), (1, ["up"]), (3, ["up", "down"])])
def test_the_largest_gradients_of_seeds_are_shown_where_that_is_wanted(make_trainer, shown, ward, top, layers):
    config = TolariaConfig(seed_layer_norms=top)
    loop = make_trainer(seeds=Seeds(), metrics=StepMetrics(config=config))
    loop.trainer.train((loop.x, loop.y))
    norms = [(attributes, value) for name, attributes, value in shown if name == LAYER_NORM]
    assert [attributes for attributes, _ in norms] == [
        {"seed_id": "seed-0", "stage": "TRAINING", "layer": layer} for layer in layers
    ]
    assert [value for _, value in norms] == [4.0, 3.0][: len(layers)]
    assert ("tolaria.seeds.active", {}, 1.0) in shown
    ward.mode.enter("test")
    shown.clear()
    for _ in range(20):
        loop.trainer.train((loop.x, loop.y))
    assert not [name for name, _, _ in shown if name == LAYER_NORM]
    assert ("tolaria.seeds.active", {}, 1.0) in shown


def test_steps_and_epochs_are_shown_by_the_names_of_the_design_and_one_step_in_ten_in_conservative_mode(
    make_trainer, shown, ward
):
    loop = make_trainer(seeds=Seeds())
    for _ in range(10):
        loop.trainer.train((loop.x, loop.y))
    loop.trainer.end_epoch(accuracy=0.75)
    names = [name for name, _, _ in shown]
    counts = {name: names.count(f"tolaria.{name}") for name in ("training.loss", "training.latency_ms", "seeds.active")}
    # The first step has none before it.
    assert counts == {"training.loss": 10, "training.latency_ms": 9, "seeds.active": 10}
    assert ("tolaria.training.loss", {}, loop.session.told[-1][0]) in shown
    assert ("tolaria.training.accuracy", {}, 0.75) in shown
    assert names.count("tolaria.epoch_hook.latency_ms") == 1
    ward.mode.enter("test")
    shown.clear()
    for _ in range(20):
        loop.trainer.train((loop.x, loop.y))
    names = [name for name, _, _ in shown]
    assert (names.count("tolaria.training.loss"), names.count("tolaria.seeds.active")) == (2, 2)


def test_steps_are_traced_when_it_was_asked_for(make_trainer, tmp_path):
    loop = make_trainer(profiler=StepProfiler(tmp_path))
    loop.trainer.train((loop.x, loop.y))
    path = loop.trainer.profiler.request(steps=2)
    for is_there in (False, False, True):
        loop.trainer.train((loop.x, loop.y))
        assert path.exists() is is_there


def test_the_family_of_the_optimizer_and_how_rates_stand_are_told(make_trainer, shown, told):
    model = nn.Linear(2, 1)
    rates = UnifiedLRController(torch.optim.SGD(model.parameters(), lr=0.1))
    loop = make_trainer(learning_rates=rates.gauges)
    assert rates.scale(0.5)
    loop.trainer.step(1.0)
    assert [attributes["reason"] for name, attributes in told if name == "optimizer_family"][-1] == "sgd"
    found = {name: value for name, _, value in shown if name.startswith("tolaria.lr_controller.")}
    assert found == {
        "tolaria.lr_controller.rate": 0.05, "tolaria.lr_controller.multiplier": 0.5,
        "tolaria.lr_controller.violations": 0.0, "tolaria.lr_controller.breaker_state": 1.0,
    }  # fmt: skip


def test_how_long_an_epoch_took_is_observed(make_trainer, clock):
    loop = make_trainer(clock=clock)
    before = REGISTRY.get_sample_value("esper_epoch_duration_seconds_sum")
    for seconds in (100, 23):
        clock.advance(seconds)
        loop.trainer.end_epoch()
    assert REGISTRY.get_sample_value("esper_epoch_duration_seconds_sum") - before == 123
