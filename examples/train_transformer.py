"""Train a small transformer to write verses letter by letter, and keep its seeds in a checkpoint of your own.

    esper up &
    python examples/train_transformer.py --steps 600 --checkpoint verses.pt

Run again with the same checkpoint it goes on where it was.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import esper_client  # Before torch: it sets how OpenMP's threads wait.

import torch  # isort: skip
from torch import Tensor, nn

TEXT = (Path(__file__).parent / "verses.txt").read_text()
LETTERS = sorted(set(TEXT))
CONTEXT = 64


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.before_attention, self.before_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query_key_value, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        parts = self.query_key_value(self.before_attention(x)).view(batch, length, 3, self.heads, -1)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        seen = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(seen.transpose(1, 2).reshape(batch, length, width))
        return x + self.mlp(self.before_mlp(x))


class Writer(nn.Module):
    def __init__(self, width: int = 64, blocks: int = 2, heads: int = 4) -> None:
        super().__init__()
        self.letters, self.places = nn.Embedding(len(LETTERS), width), nn.Embedding(CONTEXT, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(blocks)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, len(LETTERS))

    def forward(self, tokens: Tensor) -> Tensor:
        places = torch.arange(tokens.shape[1], device=tokens.device)
        return self.head(self.norm(self.blocks(self.letters(tokens) + self.places(places))))


def write(model: nn.Module, length: int = 120) -> str:
    tokens = torch.tensor([[LETTERS.index("\n")]])
    with torch.no_grad():
        for _ in range(length):
            likely = model(tokens[:, -CONTEXT:])[:, -1].softmax(-1)
            tokens = torch.cat([tokens, torch.multinomial(likely, 1)], 1)
    return "".join(LETTERS[token] for token in tokens[0, 1:])


def main(steps: int, checkpoint: Path | None) -> None:
    torch.manual_seed(0)
    text = torch.tensor([LETTERS.index(letter) for letter in TEXT])
    model = Writer()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    # In the attention and in the MLP of each block, where a seed adds to what the residual stream gets.
    sites = [f"blocks.{i}.{place}" for i in range(2) for place in ("out", "mlp.2")]

    with esper_client.attach(model, optimizer, sites=sites) as mesh:
        if checkpoint is not None and checkpoint.exists():
            saved = torch.load(checkpoint, weights_only=True)
            model.load_state_dict(saved["model"])
            # Before the optimizer: a kept seed has its group there.
            mesh.load_state_dict(saved["mesh"])
            optimizer.load_state_dict(saved["optimizer"])
        for step in range(steps):
            starts = torch.randint(len(text) - CONTEXT, (16,))
            window = torch.stack([text[start : start + CONTEXT + 1] for start in starts])
            loss = nn.functional.cross_entropy(model(window[:, :-1]).flatten(0, 1), window[:, 1:].flatten())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            mesh.step(loss, samples=len(window))
            if step % 100 == 0:
                print(f"step {step} loss {loss.item():.3f}")
        if checkpoint is not None:
            state = {"model": model.state_dict(), "mesh": mesh.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save(state, checkpoint)
        print(f"loss {loss.item():.3f}")
        print(write(mesh.export()))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--checkpoint", type=Path)
    arguments = parser.parse_args()
    main(arguments.steps, arguments.checkpoint)
