"""Train a small classifier on scikit-learn's handwritten digits under the mesh that `esper up` runs.

    esper up &
    python examples/train_digits.py --epochs 3

Without a mesh it warns once and trains all the same.
"""

from __future__ import annotations

import argparse

import esper_client  # Before torch: it sets how OpenMP's threads wait.

import torch  # isort: skip
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def main(epochs: int) -> None:
    torch.manual_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.data, dtype=torch.float32) / 16
    loader = DataLoader(TensorDataset(images, torch.tensor(digits.target)), batch_size=64, shuffle=True)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    criterion = nn.CrossEntropyLoss()

    with esper_client.attach(model, optimizer) as mesh:
        for epoch in range(epochs):
            mesh.start_epoch(epoch)
            for x, y in loader:
                loss = criterion(model(x), y)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                mesh.step(loss)
            print(f"epoch {epoch} loss {loss.item():.3f}")
        plain = mesh.export()  # An ordinary module: kept seeds inside, nothing of the mesh.
    with torch.no_grad():
        accuracy = (plain(images).argmax(1) == torch.tensor(digits.target)).float().mean().item()
    print(f"accuracy {accuracy:.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=3)
    main(parser.parse_args().epochs)
