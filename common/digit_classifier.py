"""The judge's eyes: a small classifier of digits, whose features `common.digit_metrics` compares.

The usual Frechet distance looks through Inception, which was trained on the colour photographs of ImageNet. It has
never seen enlarged gray digits, and its features say little about them; hence a network that was trained on digits.
Its weights are part of the repository, so that everybody's numbers compare. From the repository's root

    python -m common.digit_classifier

makes them again, in a minute and a half on two cores. The shipped ones know 99.44 % of the 10 000 test digits.
"""

import math
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from common.data import load_images, load_labels
from common.errors import LessonError
from common.files import atomic_write

WEIGHTS = Path(__file__).with_suffix(".pt")


class DigitClassifier(nn.Module):
    """Three strided convolutions and two linear layers: 258 k parameters. No dropout, no batch norm, hence no modes."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 5, stride=2, padding=2)
        self.conv2 = nn.Conv2d(32, 64, 5, stride=2, padding=2)
        self.conv3 = nn.Conv2d(64, 128, 3, stride=2, padding=1)
        self.hidden = nn.Linear(128 * 4 * 4, 64)
        self.classes = nn.Linear(64, 10)

    def features(self, x: Tensor) -> Tensor:
        """The last hidden layer, (N, 64) and >= 0, of images x (N, 1, 28, 28) in [0, 1]."""
        x = F.relu(self.conv1(x))  # (N, 32, 14, 14)
        x = F.relu(self.conv2(x))  # (N, 64, 7, 7)
        x = F.relu(self.conv3(x))  # (N, 128, 4, 4)
        return F.relu(self.hidden(x.flatten(1)))  # (N, 64)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, 10) of images x (N, 1, 28, 28) in [0, 1]."""
        return self.classes(self.features(x))


def load_classifier(path: Path = WEIGHTS) -> DigitClassifier:
    """The trained classifier, on the CPU. Raises LessonError if its weights are missing or damaged."""
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises a different class for each way in which a file can be damaged
        advice = "run `python -m common.digit_classifier` in the repository's root"
        raise LessonError(f"{path} is missing or damaged: {advice}") from error
    with torch.device("meta"):  # no initialisation: it would draw from the global generator of a running training
        model = DigitClassifier()
    model.load_state_dict(weights, assign=True)
    return model.float().requires_grad_(False).eval()


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
