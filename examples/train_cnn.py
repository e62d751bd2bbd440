"""Train a convolutional network on scikit-learn's handwritten digits, seeds at its convolutions.

esper up &
python examples/train_cnn.py --epochs 5
"""

from __future__ import annotations

import argparse

import esper_client  # Before torch: it sets how OpenMP's threads wait.

import torch  # isort: skip
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(128, 10),
    )  # fmt: skip


def main(epochs: int) -> None:
    torch.manual_seed(0)
    digits = load_digits()
    images, labels = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16, torch.tensor(digits.target)
    loader = DataLoader(TensorDataset(images, labels), batch_size=64, shuffle=True)
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(loader))

    with esper_client.attach(model, optimizer, sites=["0", "4"]) as mesh:
        for epoch in range(epochs):
            mesh.start_epoch(epoch)
            for x, y in loader:
                loss = nn.functional.cross_entropy(model(x), y)
                # The mesh decides while backward and optimizer work.
                mesh.begin_step(loss, samples=len(x))
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                mesh.finish_step()
                scheduler.step()
            print(f"epoch {epoch} loss {loss.item():.3f}")
        plain = mesh.export().eval()
    with torch.no_grad():
        print(f"accuracy {(plain(images).argmax(1) == labels).float().mean().item():.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=5)
    main(parser.parse_args().epochs)
