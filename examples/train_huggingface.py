"""Train a small Llama to write verses letter by letter with the Hugging Face Trainer: the mesh is one callback.

    pip install 'esper-rpc[huggingface]'
    esper up &
    python examples/train_huggingface.py --steps 300

Nothing is downloaded: the model is made here, and the text lies beside this file.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from esper_client.integrations.huggingface import MeshCallback

import torch  # isort: skip
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

TEXT = (Path(__file__).parent / "verses.txt").read_text()
LETTERS = sorted(set(TEXT))
CONTEXT = 64


class Windows(Dataset[dict[str, torch.Tensor]]):
    def __init__(self) -> None:
        self.text = torch.tensor([LETTERS.index(letter) for letter in TEXT])

    def __len__(self) -> int:
        return len(self.text) - CONTEXT

    def __getitem__(self, start: int) -> dict[str, torch.Tensor]:
        window = self.text[start : start + CONTEXT]
        return {"input_ids": window, "labels": window}


def main(steps: int) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(LETTERS), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=CONTEXT, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as directory, MeshCallback() as mesh:
        args = TrainingArguments(
            output_dir=directory, max_steps=steps, per_device_train_batch_size=16, learning_rate=2e-3, logging_steps=50,
            save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True,
        )  # fmt: skip
        trainer = Trainer(model=LlamaForCausalLM(config), args=args, train_dataset=Windows(), callbacks=[mesh])
        trainer.train()
        plain = mesh.session.export().eval()
    start = torch.tensor([[LETTERS.index("\n")]])
    written = plain.generate(start, max_new_tokens=CONTEXT - 1, do_sample=True)
    print("".join(LETTERS[token] for token in written[0, 1:]))
    print(f"loss {trainer.state.log_history[-1]['train_loss']:.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=300)
    main(parser.parse_args().steps)
