"""Train the judge's classifier, common/digit_classifier.py: `python docs/train_judge.py` writes its weights."""

import math
import sys
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the folder that holds common/

from common.data import load_images, load_labels
from common.digit_classifier import WEIGHTS, DigitClassifier, load_classifier
from common.files import atomic_write


def jitter(x: Tensor) -> Tensor:
    """Images x (N, 1, 28, 28), each turned by up to 10 degrees, scaled by up to 10 % and shifted by up to 2 pixels."""
    angle, size, right, down = torch.empty(4, len(x)).uniform_(-1, 1)
    angle, size = angle * math.radians(10), 1 + size / 10
    cos, sin = size * angle.cos(), size * angle.sin()
    theta = torch.stack([cos, -sin, right * 2 / 14, sin, cos, down * 2 / 14], dim=1).view(-1, 2, 3)  # 14 pixels are 1.0
    return F.grid_sample(x, F.affine_grid(theta, x.shape, align_corners=False), align_corners=False)


@torch.no_grad()
def accuracy(model: DigitClassifier, images: Tensor, labels: Tensor) -> float:
    """Share of images (N, 1, 28, 28), uint8, that the model puts in the class that labels (N,) say."""
    right = [(model(x / 255).argmax(1) == y).sum() for x, y in zip(images.split(500), labels.split(500), strict=True)]
    return int(sum(right)) / len(images)


def train(epochs: int = 12, batch_size: int = 200, peak_lr: float = 3e-3, seed: int = 0) -> DigitClassifier:
    """Train on the 60 000 training digits: AdamW, one cycle of the learning rate.

    Label smoothing is for the features: without it the loss rewards larger and larger ones for as long as it trains.
    """
    torch.manual_seed(seed)
    images, labels = load_images("mnist", split="train"), load_labels("mnist", split="train")
    model = DigitClassifier()
    batches = torch.cat([torch.randperm(len(images)) for _ in range(epochs)]).split(batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=peak_lr, total_steps=len(batches))
    for batch in tqdm(batches, desc="training"):
        loss = F.cross_entropy(model(jitter(images[batch] / 255)), labels[batch], label_smoothing=0.02)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model


def main() -> None:
    """Train, save, and report the accuracy of what was saved."""
    weights = {name: weight.half() for name, weight in train().state_dict().items()}  # 16 bits: half the download
    with atomic_write(WEIGHTS) as temporary:
        torch.save(weights, temporary)
    share = accuracy(load_classifier(), load_images("mnist", split="test"), load_labels("mnist", split="test"))
    print(f"{WEIGHTS.name}: {share:.2%} of the 10 000 test digits, {WEIGHTS.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
