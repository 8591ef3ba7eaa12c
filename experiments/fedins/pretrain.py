"""Pre-train a small network on two domains of the digits suite that the federation does not have; write its backbone.

    python experiments/fedins/pretrain.py runs/small-cnn.safetensors
    python experiments/fedins/pretrain.py runs/vit-tiny-32.safetensors --model vit-tiny-32

The classifier is left out of the file: in the federation every method starts with a new one. On one core some minutes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from fedsim.data.digits import load_digits
from fedsim.examples import Examples
from fedsim.models import build_model
from fedsim.models.weights import head_path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--model", default="small-cnn")
    parser.add_argument("--domains", default="synth,street")
    parser.add_argument("--images", type=int, default=6000, help="training images a domain")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--lr", type=float, default=1e-3)
    options = parser.parse_args()

    domains = options.domains.split(",")
    # Seed 1000: other pictures than those of the federation's own runs, whose suite has seed 0.
    data = load_digits(1000, options.images, domains)
    examples = Examples(data, torch.device("cpu"), torch.float32)
    torch.manual_seed(0)
    model = build_model(options.model, classes=len(data.classes), shape=data.shape)
    optimizer = torch.optim.AdamW(model.parameters(), options.lr, weight_decay=0.05)
    order, batch = np.random.default_rng(0), 64
    steps = options.epochs * (len(data.y_train) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.lr, total_steps=steps, pct_start=0.1)
    for epoch in range(options.epochs):
        model.train()
        total = 0.0
        rows = order.permutation(len(data.y_train))
        for start in range(0, len(rows) - batch + 1, batch):
            x, y = examples.batch("train", np.sort(rows[start : start + batch]))
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += float(loss.detach())
        print(f"epoch {epoch + 1}: loss {total / (len(rows) // batch):.3f}", flush=True)
    for domain in domains:
        print(f"{domain}: {accuracy(model, examples, data.slice(domain, 'test')):.1%} of its test images")
    head = head_path(model)
    options.file.parent.mkdir(parents=True, exist_ok=True)
    backbone = {n: v.contiguous() for n, v in model.state_dict().items() if not n.startswith(f"{head}.")}
    save_file(backbone, options.file)
    print(f"{options.file}: {sum(v.numel() for v in backbone.values())} numbers")


@torch.no_grad()
def accuracy(model: torch.nn.Module, examples: Examples, rows: np.ndarray) -> float:
    model.eval()
    hits = 0
    for part in np.array_split(rows, -(-len(rows) // 250)):
        x, y = examples.batch("test", part)
        hits += int((model(x).argmax(-1) == y).sum())
    return hits / len(rows)


if __name__ == "__main__":
    main()
