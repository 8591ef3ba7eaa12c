"""Write the digits suite as a folder tree with fewer test images: python data.py [FOLDER, default data/digits-small].

All training images, the first 500 test images of each domain in an order drawn with seed 0; the suite's own split.
Fifty private models on seven thousand test images, under several evaluation modes, would cost more than the training.
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image

from fedsim.data import load_dataset

TEST = 500
DOMAINS = ("mnist", "street", "utility", "synth", "mnistm")


def write(root: Path) -> None:
    suite = load_dataset("digits")
    for domain in DOMAINS:
        for split in ("train", "test"):
            images, labels = (suite.x_train, suite.y_train) if split == "train" else (suite.x_test, suite.y_test)
            indices = suite.slice(domain, split)
            if split == "test":
                indices = np.random.default_rng(0).permutation(indices)[:TEST]
            lines = []
            for i in indices:
                path = Path(domain) / f"digit{labels[i]}" / f"{split}-{i}.png"
                (root / path).parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(np.moveaxis(images[i], 0, -1)).save(root / path)
                lines.append(f"{path} {labels[i]}")
            (root / f"{domain}_{split}.txt").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    write(Path(sys.argv[1] if len(sys.argv) > 1 else "data/digits-small"))
