"""Train on scikit-learn's handwritten digits on several ranks, each with a share of the images.

    esper up &
    torchrun --nproc-per-node 2 examples/train_ddp.py --epochs 5

The first rank asks the mesh; what it decides happens on all of them, and their weights stay the same.
"""

from __future__ import annotations

import argparse
import hashlib

import esper_client  # Before torch: it sets how OpenMP's threads wait.

import torch  # isort: skip
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler


def digest(model: nn.Module) -> str:
    """Tell weights by their bytes."""
    content = b"".join(tensor.numpy().tobytes() for tensor in model.state_dict().values())
    return hashlib.sha256(content).hexdigest()[:16]


def main(epochs: int) -> None:
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    digits = load_digits()
    images, labels = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    data = TensorDataset(images, labels)
    sampler: DistributedSampler[tuple[torch.Tensor, ...]] = DistributedSampler(data)
    loader = DataLoader(data, batch_size=32, sampler=sampler)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)

    # Every rank attaches, before it wraps the model, and every rank steps.
    with esper_client.attach(model, optimizer) as mesh:
        ddp = DistributedDataParallel(model)
        for epoch in range(epochs):
            mesh.start_epoch(epoch)
            sampler.set_epoch(epoch)
            for x, y in loader:
                loss = nn.functional.cross_entropy(ddp(x), y)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                mesh.step(loss)
        plain = mesh.export()
    with torch.no_grad():
        accuracy = (plain(images).argmax(1) == labels).float().mean().item()
    print(f"rank {dist.get_rank()} weights {digest(plain)} accuracy {accuracy:.3f}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=5)
    main(parser.parse_args().epochs)
