"""The judge's eyes: a small classifier of digits, whose features `common.digit_metrics` compares.

The usual Frechet distance looks through Inception, which was trained on the colour photographs of ImageNet. It has
never seen enlarged gray digits, and its features say little about them; hence a network that was trained on digits.
Its weights are part of the repository, so that everybody's numbers compare; `python docs/train_judge.py` makes
them again, in a minute and a half on two cores. The shipped ones know 99.44 % of the 10 000 test digits.
"""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.errors import LessonError

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
        raise LessonError(f"{path} is missing or damaged: restore it, or run python docs/train_judge.py") from error
    with torch.device("meta"):  # no initialisation: it would draw from the global generator of a running training
        model = DigitClassifier()
    model.load_state_dict(weights, assign=True)
    return model.float().requires_grad_(False).eval()
