"""Train on scikit-learn's handwritten digits with Lightning: the mesh is one callback.

pip install 'esper-rpc[lightning]'
esper up &
python examples/train_lightning.py --epochs 5
"""

from __future__ import annotations

import argparse
from typing import Any

from esper_client.integrations.lightning import MeshCallback

import torch  # isort: skip
from lightning.pytorch import LightningModule, Trainer
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


class Digits(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10))

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self.net(x), y)

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=1e-2)


def main(epochs: int) -> None:
    torch.manual_seed(0)
    digits = load_digits()
    images, labels = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    loader = DataLoader(TensorDataset(images, labels), batch_size=64, shuffle=True)
    mesh = MeshCallback()
    # Its checkpoints hold the seeds too; `trainer.fit(..., ckpt_path=...)` goes on with them.
    trainer = Trainer(
        max_epochs=epochs, callbacks=[mesh], accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Digits(), loader)
    plain = mesh.session.export().net
    with torch.no_grad():
        print(f"accuracy {(plain(images).argmax(1) == labels).float().mean().item():.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=5)
    main(parser.parse_args().epochs)
