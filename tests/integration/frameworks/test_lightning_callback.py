"""The callback under the real Lightning, on a tiny model."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
import torch
from torch import nn

pytest.importorskip("lightning")

from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, TensorDataset

from esper_client.integrations.lightning import MeshCallback
from esper_rpc.errors import ConfigError
from esper_rpc.proto.leyline.v1 import CommandOutcome
from esper_servers.kasmina import lifecycle

PATIENCE_SECONDS = 60.0
BATCHES = 6

# Lightning warns of much that is none of our doing.
pytestmark = pytest.mark.filterwarnings("default")


class Tiny(LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))

    def training_step(self, batch, _):
        x, y = batch
        return nn.functional.cross_entropy(self.net(x), y)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


class Scheduled(Tiny):
    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5)]


class TwoOptimizers(Tiny):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, _):
        loss = super().training_step(batch, _)
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()
        return {"loss": loss}

    def configure_optimizers(self):
        return [torch.optim.SGD(self.net[0].parameters(), lr=0.1), torch.optim.SGD(self.net[2].parameters(), lr=0.2)]


class Silent(TwoOptimizers):
    def training_step(self, batch, _):
        super().training_step(batch, _)


class Conductor(Callback):
    """Gives orders before the batches they are for."""

    def __init__(self, mesh, orders=None):
        self.mesh, self.orders = mesh, orders

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if self.orders is not None:
            self.orders.give(self.mesh.session, trainer.global_step)


class Witness:
    """A session that notes what it is told."""

    def __init__(self):
        self.losses, self.samples, self.norms, self.epochs, self.closed = [], [], [], [], 0

    def step(self, loss, *, samples, gradient_norm):
        assert not loss.requires_grad
        self.losses.append(float(loss))
        self.samples.append(samples)
        self.norms.append(gradient_norm)
        return []

    def start_epoch(self, epoch):
        self.epochs.append(epoch)

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass

    def close(self):
        self.closed += 1


def loader(batches=BATCHES):
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(batches * 8, 6, generator=generator), torch.randint(0, 3, (batches * 8,), generator=generator)
    return DataLoader(TensorDataset(x, y), batch_size=8)


def trainer_of(tmp_path, callbacks, **options):
    options = {"max_epochs": 2, "accelerator": "cpu", "devices": 1, **options}
    return Trainer(
        callbacks=callbacks, logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=tmp_path, **options,
    )  # fmt: skip


@pytest.fixture
def witness(monkeypatch):
    seen = Witness()
    monkeypatch.setattr(
        "esper_client.integrations.lightning.attach", lambda *given, **_: setattr(seen, "given", given) or seen
    )
    return seen


def test_a_real_mesh_steers_a_fit(tmp_path, real_address):
    mesh = MeshCallback(mesh=real_address, step_budget_ms=50)

    class UntilApplied(Callback):
        deadline = time.monotonic() + PATIENCE_SECONDS

        def on_train_batch_end(self, trainer, *_):
            done = [o for o in mesh.session.outcomes if o.result == CommandOutcome.RESULT_APPLIED]
            assert time.monotonic() < self.deadline, dict(mesh.session.reasons)
            trainer.should_stop = bool(done)

    trainer_of(tmp_path, [mesh, UntilApplied()], max_epochs=-1, enable_checkpointing=False).fit(Tiny(), loader())
    assert mesh.session.policy_version
    assert not mesh.session.reasons["internal_error"]


@pytest.mark.parametrize("module", [Tiny, Scheduled])
def test_a_fit_that_goes_on_from_a_checkpoint_ends_bit_for_bit_like_one_that_was_not_broken_off(
    tmp_path, address, make_orders, differences, module
):
    orders = {2: "GERMINATE", 4: "START_TRAINING", 8: "START_GRAFTING"}

    def fit(callbacks, **options):
        mesh = MeshCallback(mesh=address, step_budget_ms=2)
        model = module()
        trainer = trainer_of(tmp_path, [mesh, *callbacks(mesh)], max_epochs=4)
        trainer.fit(model, loader(), **options)
        # Held by either in other ways: the run's own counters of commands are not part of a checkpoint.
        return model.state_dict(), trainer.optimizers[0].state_dict(), mesh.session.state_dict(), mesh

    keep = ModelCheckpoint(dirpath=tmp_path, filename="{epoch}", save_top_k=-1)
    *whole, mesh = fit(lambda mesh: [Conductor(mesh, make_orders(orders)), keep])
    assert next(iter(mesh.session.host.seeds.values())).stage == lifecycle.BLENDING
    *resumed, _ = fit(lambda _: [], ckpt_path=tmp_path / "epoch=1.ckpt")
    assert whole[2]["global_step"] == 4 * BATCHES
    assert not differences(whole, resumed)


def test_a_kept_seed_is_restored_with_its_group_in_the_optimizer(tmp_path, address, make_orders, differences):
    orders = {
        1: "GERMINATE", 2: "START_TRAINING", 4: "START_GRAFTING", 26: "STABILIZE", 27: "EVALUATE", 28: "FOSSILIZE"
    }  # fmt: skip

    def fit(callbacks, **options):
        mesh = MeshCallback(mesh=address, step_budget_ms=2)
        model = Tiny()
        trainer = trainer_of(tmp_path, [mesh, *callbacks(mesh)], max_epochs=8)
        trainer.fit(model, loader(), **options)
        return model.state_dict(), trainer.optimizers[0].state_dict(), mesh.session.state_dict(), mesh

    keep = ModelCheckpoint(dirpath=tmp_path, filename="{epoch}", save_top_k=-1)
    *whole, mesh = fit(lambda mesh: [Conductor(mesh, make_orders(orders)), keep])
    assert next(iter(mesh.session.host.seeds.values())).stage == lifecycle.FOSSILIZED
    assert len(whole[1]["param_groups"]) == 2
    *resumed, restored = fit(lambda _: [], ckpt_path=tmp_path / "epoch=5.ckpt")
    assert not differences(whole, resumed)
    x = torch.randn(4, 6)
    assert torch.equal(mesh.session.export().net(x), restored.session.export().net(x))


def test_it_steps_with_the_mean_loss_once_the_optimizer_has_stepped(tmp_path, witness):
    class Losses(Callback):
        def __init__(self):
            self.seen, self.norms = [], []

        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            squares = [float(each.grad.square().sum()) for each in pl_module.parameters()]
            self.norms.append(sum(squares) ** 0.5)

        def on_train_batch_end(self, trainer, pl_module, outputs, *_):
            self.seen.append(float(outputs["loss"]) * trainer.accumulate_grad_batches)

    losses = Losses()
    # Four batches an epoch beyond the accumulated three: the last step of an epoch is made of one.
    # The norm is told as it was before it is clipped.
    trainer = trainer_of(tmp_path, [MeshCallback(), losses], accumulate_grad_batches=3, gradient_clip_val=1e-3)
    trainer.fit(Tiny(), loader(4))
    assert len(losses.seen) == 8
    parts = [losses.seen[:3], losses.seen[3:4], losses.seen[4:7], losses.seen[7:]]
    assert witness.losses == pytest.approx([sum(part) / len(part) for part in parts])
    assert len(witness.losses) == trainer.global_step
    assert witness.norms == pytest.approx(losses.norms)
    assert min(witness.norms) > 1e-3
    assert witness.samples == [24, 8, 24, 8]
    assert witness.epochs == [0, 1]
    assert witness.closed


def test_with_several_optimizers_one_is_chosen_and_a_batch_is_one_step(tmp_path, witness):
    model = TwoOptimizers()
    trainer_of(tmp_path, [MeshCallback(optimizer_index=1)], max_epochs=1).fit(model, loader())
    assert witness.given[1].param_groups[0]["lr"] == 0.2
    assert len(witness.losses) == BATCHES
    # Of the one that was chosen, the last gradients are still there.
    assert witness.norms[-1] == pytest.approx(
        sum(float(each.grad.square().sum()) for each in model.net[2].parameters()) ** 0.5
    )


def test_an_optimizer_that_is_not_there_is_an_error(tmp_path, witness):
    with pytest.raises(ConfigError, match="There is no optimizer 3; the model has 1"):
        trainer_of(tmp_path, [MeshCallback(optimizer_index=3)]).fit(Tiny(), loader())


def test_without_a_loss_there_is_one_warning_and_no_step(tmp_path, witness):
    with pytest.warns(UserWarning, match="returns no loss") as warned:
        trainer_of(tmp_path, [MeshCallback()], max_epochs=1).fit(Silent(), loader())
    assert len([each for each in warned if "returns no loss" in str(each.message)]) == 1
    assert witness.losses == []


def test_the_session_is_closed_when_the_fit_raises(tmp_path, witness):
    class Breaks(Callback):
        def on_train_batch_end(self, *_):
            raise RuntimeError("out of disk")

    with pytest.raises(RuntimeError, match="out of disk"):
        trainer_of(tmp_path, [MeshCallback(), Breaks()]).fit(Tiny(), loader())
    assert witness.closed


def test_without_a_mesh_there_is_one_warning_and_the_fit_ends(tmp_path, monkeypatch):
    monkeypatch.setenv("ESPER_HOME", str(tmp_path))
    trainer = trainer_of(tmp_path, [MeshCallback()])
    with pytest.warns(UserWarning, match="No mesh found") as warned:
        trainer.fit(Tiny(), loader())
    assert trainer.global_step == 2 * BATCHES
    assert len([each for each in warned if "No mesh found" in str(each.message)]) == 1


def test_the_mesh_changes_nothing_when_it_says_nothing(tmp_path, address, differences):
    def fit(callbacks):
        seed_everything(3, verbose=False)
        model = Tiny()
        trainer_of(tmp_path, callbacks, enable_checkpointing=False).fit(model, loader())
        return model.state_dict()

    assert not differences(fit([]), fit([MeshCallback(mesh=address, step_budget_ms=2)]))


def test_sites_stand_inside_a_compiled_module(tmp_path, address, make_orders):
    mesh = MeshCallback(mesh=address, step_budget_ms=2)
    orders = make_orders({1: "GERMINATE", 3: "START_TRAINING"})
    model = torch.compile(Tiny(), backend="eager")
    trainer_of(tmp_path, [mesh, Conductor(mesh, orders)]).fit(model, loader())
    slot = next(iter(mesh.session.host.seeds.values()))
    assert slot.stage == lifecycle.TRAINING
    assert slot.updates > 0


def test_evaluating_a_checkpoint_with_seeds_in_a_model_without_them_is_told(tmp_path, address, make_orders):
    mesh = MeshCallback(mesh=address, step_budget_ms=2)
    keep = ModelCheckpoint(dirpath=tmp_path, filename="last")
    trainer_of(tmp_path, [mesh, keep]).fit(Tiny(), loader())

    class Evaluated(Tiny):
        def validation_step(self, batch, _):
            pass

    with pytest.warns(UserWarning, match="lacks the seeds"):
        trainer_of(tmp_path, [MeshCallback(mesh=address)]).validate(
            Evaluated(), loader(), ckpt_path=tmp_path / "last.ckpt", verbose=False
        )


def test_a_missing_extra_is_named():
    script = (
        "import sys; sys.modules['lightning'] = None\n"
        "try:\n    import esper_client.integrations.lightning\n"
        "except Exception as error:\n    print(type(error).__name__, error)"
    )
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert said.startswith("ConfigError")
    assert "pip install 'esper-rpc[lightning]'" in said
