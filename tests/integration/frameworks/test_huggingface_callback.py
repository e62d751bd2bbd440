"""The callback under the real Hugging Face Trainer, on a tiny language model."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time

import pytest
import torch

pytest.importorskip("transformers")

from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from esper_client.integrations.huggingface import SESSION_FILE, MeshCallback
from esper_rpc.errors import ConfigError
from esper_rpc.proto.leyline.v1 import CommandOutcome
from esper_servers.kasmina import lifecycle

PATIENCE_SECONDS = 60.0
BATCHES = 6

# The library warns of much that is none of our doing.
pytestmark = pytest.mark.filterwarnings("default")


class Words(torch.utils.data.Dataset):
    def __init__(self, size):
        generator = torch.Generator().manual_seed(1)
        self.tokens = torch.randint(0, 32, (size, 8), generator=generator)
        # Of unlike length, so that the micro-batches of a step weigh unlike.
        self.lengths = torch.randint(3, 8, (size,), generator=generator)

    def __len__(self):
        return len(self.tokens)

    def __getitem__(self, index):
        labels = self.tokens[index].clone()
        labels[self.lengths[index] :] = -100
        return {"input_ids": self.tokens[index], "labels": labels}


def tiny():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=16,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def trainer_of(tmp_path, callbacks, model=None, kind=Trainer, size=BATCHES * 4, **options):
    options = {"num_train_epochs": 2, "logging_steps": 1, "save_strategy": "no", **options}
    args = TrainingArguments(
        output_dir=str(tmp_path / "out"), per_device_train_batch_size=4, report_to=[], use_cpu=True, disable_tqdm=True,
        learning_rate=0.01, **options,
    )  # fmt: skip
    return kind(model=model or tiny(), args=args, train_dataset=Words(size), callbacks=callbacks)


class Conductor(TrainerCallback):
    def __init__(self, mesh, orders):
        self.mesh, self.orders = mesh, orders

    def on_step_begin(self, args, state, control, **_):
        self.orders.give(self.mesh.session, state.global_step)


class Witness:
    """A session that notes what it is told."""

    def __init__(self):
        self.losses, self.samples, self.norms, self.epochs, self.closed = [], [], [], [], 0

    def step(self, loss, *, samples, gradient_norm):
        self.losses.append(float(loss))
        self.samples.append(samples)
        self.norms.append(gradient_norm)
        return []

    def start_epoch(self, epoch):
        self.epochs.append(epoch)

    def close(self):
        self.closed += 1


@pytest.fixture
def witness(monkeypatch):
    seen = Witness()
    monkeypatch.setattr(
        "esper_client.integrations.huggingface.attach", lambda *given, **_: setattr(seen, "given", given) or seen
    )
    return seen


def test_a_real_mesh_steers_a_training(tmp_path, real_address):
    class UntilApplied(TrainerCallback):
        deadline = time.monotonic() + PATIENCE_SECONDS

        def on_step_end(self, args, state, control, **_):
            done = [o for o in mesh.session.outcomes if o.result == CommandOutcome.RESULT_APPLIED]
            assert time.monotonic() < self.deadline, dict(mesh.session.reasons)
            control.should_training_stop = bool(done)

    with MeshCallback(mesh=real_address, step_budget_ms=50) as mesh:
        trainer_of(tmp_path, [mesh, UntilApplied()], num_train_epochs=1000).train()
    assert mesh.session.policy_version
    assert not mesh.session.reasons["internal_error"]


@pytest.mark.parametrize("stage", [lifecycle.BLENDING, lifecycle.FOSSILIZED])
def test_a_training_that_goes_on_from_a_checkpoint_ends_bit_for_bit_like_one_that_was_not_broken_off(
    tmp_path, address, make_orders, differences, stage
):
    orders = {1: "GERMINATE", 2: "START_TRAINING", 6: "START_GRAFTING"}
    if stage == lifecycle.FOSSILIZED:
        orders |= {28: "STABILIZE", 29: "EVALUATE", 30: "FOSSILIZE"}
    last = 24 if stage == lifecycle.BLENDING else 42

    def train(callbacks, **resume):
        mesh = MeshCallback(mesh=address, step_budget_ms=2)
        trainer = trainer_of(tmp_path, [mesh, *callbacks(mesh)], max_steps=last, save_strategy="steps", save_steps=9)
        trainer.train(**resume)
        return trainer.model.state_dict(), trainer.optimizer.state_dict(), mesh.session.state_dict(), mesh

    *whole, mesh = train(lambda mesh: [Conductor(mesh, make_orders(orders))])
    assert next(iter(mesh.session.host.seeds.values())).stage == stage
    # A checkpoint amid an epoch, and found by its content wherever it lies.
    middle = tmp_path / "out" / f"checkpoint-{last // 9 * 9}"
    *resumed, restored = train(lambda _: [], resume_from_checkpoint=str(middle))
    assert not differences(whole, resumed)
    tokens = {"input_ids": Words(2).tokens}
    assert torch.equal(mesh.session.export()(**tokens).logits, restored.session.export()(**tokens).logits)


def test_a_checkpoint_elsewhere_must_be_named_and_one_of_another_run_is_not_taken(tmp_path, address):
    def train(out, seed, **options):
        mesh = MeshCallback(mesh=address, step_budget_ms=2, resume_from=options.pop("resume_from", None))
        trainer = trainer_of(tmp_path / out, [mesh], max_steps=4, save_strategy="steps", save_steps=2, seed=seed)
        trainer.train(**options)
        return trainer

    train("first", 1)
    train("second", 2)
    there = str(tmp_path / "first" / "out" / "checkpoint-2")
    with pytest.raises(ConfigError, match="Which checkpoint of step 2 is this"):
        train("second", 2, resume_from_checkpoint=there)
    assert train("second", 2, resume_from_checkpoint=there, resume_from=there).state.global_step == 4


def test_a_checkpoint_without_a_session_is_told(tmp_path, address):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    trainer_of(tmp_path, [], **options).train()
    checkpoint = tmp_path / "out" / "checkpoint-2"
    assert not (checkpoint / SESSION_FILE).exists()
    shutil.rmtree(tmp_path / "out" / "checkpoint-4")
    with pytest.warns(UserWarning, match="holds no session"):
        trainer_of(tmp_path, [MeshCallback(mesh=address, step_budget_ms=2)], **options).train(
            resume_from_checkpoint=True
        )


@pytest.mark.parametrize("accumulated", [1, 3])
def test_it_steps_with_the_loss_that_the_trainer_logs(tmp_path, witness, accumulated):
    trainer = trainer_of(tmp_path, [MeshCallback()], gradient_accumulation_steps=accumulated, size=16)
    trainer.train()
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(witness.losses) == trainer.state.global_step == len(logged)
    assert witness.losses == pytest.approx(logged, abs=1e-4)
    assert set(witness.samples) == {4 * accumulated}
    # The Trainer clips before it says that the optimizer will step.
    norms = [min(entry["grad_norm"], trainer.args.max_grad_norm) for entry in trainer.state.log_history[: len(logged)]]
    assert witness.norms == pytest.approx(norms, rel=1e-3)
    assert witness.epochs == [0, 1]
    assert witness.closed


def test_a_loss_per_batch_is_meant_over_the_batches_of_a_step(tmp_path, witness):
    class Plain(Trainer):
        """As for a model that is not told how many items a step has."""

        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.model_accepts_loss_kwargs = False

    trainer = trainer_of(tmp_path, [MeshCallback()], gradient_accumulation_steps=2, size=16, kind=Plain)
    trainer.train()
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert witness.losses == pytest.approx(logged, abs=1e-4)


def test_where_the_model_returns_no_loss_the_logged_one_is_told_after_one_warning(tmp_path, witness):
    trainer = trainer_of(tmp_path, [MeshCallback()], label_smoothing_factor=0.1)
    with pytest.warns(UserWarning, match="returns no loss") as warned:
        trainer.train()
    assert len([each for each in warned if "returns no loss" in str(each.message)]) == 1
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert witness.losses == logged[:-1]


def test_the_optimizer_is_the_users_own_class(tmp_path, witness):
    trainer_of(tmp_path, [MeshCallback()]).train()
    assert type(witness.given[1]).__module__.startswith("torch.optim")


def test_the_session_is_closed_when_the_training_raises(tmp_path, witness):
    class Breaks(TrainerCallback):
        def on_step_end(self, *_, **__):
            raise RuntimeError("out of disk")

    with pytest.raises(RuntimeError, match="out of disk"), MeshCallback() as mesh:
        trainer_of(tmp_path, [mesh, Breaks()]).train()
    assert witness.closed
    assert mesh._model._forward_hooks == {}


def test_a_retry_with_a_smaller_batch_goes_on_in_the_same_session(tmp_path, address):
    class TooMuch(TrainerCallback):
        raised = False

        def on_step_end(self, args, state, control, **_):
            if state.global_step == 2 and not self.raised:
                self.raised = True
                raise RuntimeError("CUDA out of memory.")

    mesh = MeshCallback(mesh=address, step_budget_ms=2)
    trainer = trainer_of(tmp_path, [mesh, TooMuch()], auto_find_batch_size=True, num_train_epochs=1)
    trainer.train()
    assert mesh.session.global_step == 2 + trainer.state.global_step


def test_without_a_mesh_there_is_one_warning_and_the_training_ends(tmp_path, monkeypatch):
    monkeypatch.setenv("ESPER_HOME", str(tmp_path))
    trainer = trainer_of(tmp_path, [MeshCallback()])
    with pytest.warns(UserWarning, match="No mesh found") as warned:
        trainer.train()
    assert trainer.state.global_step == 2 * BATCHES
    assert len([each for each in warned if "No mesh found" in str(each.message)]) == 1


def test_the_mesh_changes_nothing_when_it_says_nothing(tmp_path, address, differences):
    def train(callbacks):
        trainer = trainer_of(tmp_path, callbacks)
        trainer.train()
        return trainer.model.state_dict()

    assert not differences(train([]), train([MeshCallback(mesh=address, step_budget_ms=2)]))


def test_a_missing_extra_is_named():
    script = (
        "import sys; sys.modules['transformers'] = None\n"
        "try:\n    import esper_client.integrations.huggingface\n"
        "except Exception as error:\n    print(type(error).__name__, error)"
    )
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert said.startswith("ConfigError")
    assert "pip install 'esper-rpc[huggingface]'" in said
