"""Two ranks under Lightning or Hugging Face, as torchrun would start them. Each ends with DIRECTORY/rank-N.pt."""

from __future__ import annotations

import os

from rank import LIFE, Orders, mesh_of

import torch  # isort: skip
from torch import nn
from torch.utils.data import Dataset

# What is imported before the ranks are forked.
MODULES = {
    "lightning": ["lightning.pytorch", "esper_client.integrations.lightning"],
    "huggingface": [
        "transformers.trainer",
        "transformers.models.llama.modeling_llama",
        "esper_client.integrations.huggingface",
    ],
}

STEPS = 50


class Conducted:
    """Stands for a training in `Orders`, which asks it for its session and its step."""

    def __init__(self, session):
        self.session = session


def orders_of(callback, fake):
    conducted = Conducted(callback.session)
    return Orders(conducted, fake, LIFE, 0) if fake is not None else None


def give(orders, step):
    if orders is not None and step in orders.orders:
        orders.give(orders.orders[step], "residual_mlp")


def save(model, callback, rank, directory):
    stages = [slot.stage for slot in callback.session.host.seeds.values()]
    state = {"model": model.state_dict(), "session": callback.session.state_dict(), "stages": stages}
    torch.save(state, directory / f"rank-{rank}.pt")


def lightning(rank, directory, fake, address):
    from lightning.pytorch import Callback, LightningModule, Trainer
    from torch.utils.data import DataLoader, TensorDataset

    from esper_client.integrations.lightning import MeshCallback

    class Tiny(LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))

        def training_step(self, batch, _):
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=0.01)

    class Conductor(Callback):
        orders = None

        def on_train_start(self, *_):
            self.orders = orders_of(mesh, fake)

        def on_train_batch_start(self, trainer, *_):
            give(self.orders, trainer.global_step)

    mesh, model = MeshCallback(mesh=address, step_budget_ms=2), Tiny()
    data = TensorDataset(torch.randn(800, 6), torch.randint(0, 3, (800,)))
    Trainer(
        max_steps=STEPS, strategy="ddp", devices=2, accelerator="cpu", callbacks=[mesh, Conductor()], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    ).fit(model, DataLoader(data, batch_size=8))  # fmt: skip
    save(model, mesh, rank, directory)


class Words(Dataset):
    def __len__(self):
        return 800

    def __getitem__(self, index):
        tokens = torch.randint(0, 32, (8,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": tokens, "labels": tokens}


def huggingface(rank, directory, fake, address):
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

    from esper_client.integrations.huggingface import MeshCallback

    class Conductor(TrainerCallback):
        orders = None

        def on_train_begin(self, *_, **__):
            self.orders = orders_of(mesh, fake)

        def on_step_begin(self, args, state, control, **_):
            give(self.orders, state.global_step)

    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=16,
    )  # fmt: skip
    with MeshCallback(mesh=address, step_budget_ms=2) as mesh:
        args = TrainingArguments(
            output_dir=str(directory / "out"), max_steps=STEPS, per_device_train_batch_size=4, use_cpu=True,
            report_to=[], save_strategy="no", disable_tqdm=True, learning_rate=0.01,
        )  # fmt: skip
        trainer = Trainer(
            model=LlamaForCausalLM(config), args=args, train_dataset=Words(), callbacks=[mesh, Conductor()]
        )
        trainer.train()
        save(trainer.model, mesh, rank, directory)


def train(framework, rank, directory, size):
    # What torchrun sets, by which the frameworks find that they are one rank of several.
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "TORCHELASTIC_RUN_ID": "none",
    }  # fmt: skip
    torch.manual_seed(0)
    with mesh_of(rank, directory) as (fake, address):
        {"lightning": lightning, "huggingface": huggingface}[framework](rank, directory, fake, address)
