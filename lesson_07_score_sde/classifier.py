"""A classifier of noisy digits, to ask for a digit with: `python classifier.py` trains it in one minute.

Not the judge of common/digit_classifier.py, which has never seen noise. Here the noise is the point: its gradient is
added to the score at each noise scale, and a classifier of clean digits knows nothing at most of them.
"""

import math
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path[:0] = map(str, Path(__file__).resolve().parents[:2])  # this folder, and the one that holds common/

from common.checkpoint import load_checkpoint, load_weights, save_checkpoint
from common.cli import progress, run
from common.data import load_images, load_labels
from common.files import check_writable
from common.layers import GroupNorm
from common.noise import noise_like
from common.optimizer import Optimizer

LESSON, KIND = "lesson_07_score_sde", "classifier"
SHIPPED = Path(__file__).with_suffix(".pt")
STEPS, BATCH, SIGMA_MIN, SIGMA_MAX = 2500, 128, 0.005, 20.0


class NoisyDigitClassifier(nn.Module):
    """Log-probabilities of the ten digits, given a noisy image and its noise scale (Sec. 5, App. I.1)."""

    def __init__(self, width=24):
        super().__init__()
        W = width
        self.convs = nn.ModuleList(
            nn.Conv2d(c_in, c_out, 3, stride=2, padding=1) for c_in, c_out in ((1, W), (W, 2 * W), (2 * W, 4 * W))
        )
        self.norms = nn.ModuleList(GroupNorm(8, c) for c in (W, 2 * W, 4 * W))
        self.embed = nn.ModuleList(nn.Linear(2, c) for c in (W, 2 * W, 4 * W))
        self.hidden = nn.Linear(4 * W * 16, 64)
        self.classes = nn.Linear(64, 10)

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        """x (B, 1, 28, 28) with noise of scale sigma (B,); returns (B, 10)."""
        log_sigma = sigma.log()[:, None]
        e = torch.cat([log_sigma / 4, torch.tanh(log_sigma)], dim=1)  # (B, 2)
        h = x * torch.rsqrt(0.3 + sigma**2)[:, None, None, None]
        for conv, norm, embed in zip(self.convs, self.norms, self.embed):  # 14, 7 and 4 pixels wide
            h = F.silu(norm(conv(h)) + embed(e)[:, :, None, None])
        return F.log_softmax(self.classes(F.silu(self.hidden(h.flatten(1)))).float(), dim=1)


def guided_score(
    score: Callable[[Tensor, Tensor], Tensor],
    classifier: Callable[[Tensor, Tensor], Tensor],
    digit: int | Tensor,
    guidance: float = 1.0,
) -> Callable[[Tensor, Tensor], Tensor]:
    """The score of noisy images of one class: s(x, sigma) + guidance grad_x log p(digit | x, sigma) (Eq. 14).

    classifier (x, sigma) -> log-probabilities (B, 10); digit: a class, or one for each image (B,). guidance 1 is Bayes'
    rule; more asks for what the classifier is surer of (ours; Dhariwal & Nichol 2021).
    """

    def score_of_class(x, sigma):
        with torch.enable_grad():
            noisy = x.detach().requires_grad_()
            chosen = torch.as_tensor(digit, device=x.device).expand(len(x))[:, None]
            log_p = classifier(noisy, sigma).gather(1, chosen).sum() + 0 * noisy.sum()  # even if it does not look at x
            (gradient,) = torch.autograd.grad(log_p, noisy)
        return score(x, sigma) + guidance * gradient

    return score_of_class


def load_classifier() -> NoisyDigitClassifier:
    """The one that `python classifier.py` made here, or else the one that comes with the lesson."""
    made = Path("output/classifier.pt")
    path = made if made.is_file() else SHIPPED
    found = load_checkpoint(path, LESSON, needs=(KIND,))
    classifier = NoisyDigitClassifier()
    load_weights(classifier, found[KIND], path)
    return classifier.float().requires_grad_(False).eval()


def noisy_digits(images: Tensor, labels: Tensor, generator: torch.Generator, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """n images at random, with noise of scales sigma (n,) that are even in ln sigma: x, sigma, and their labels."""
    k = torch.randint(len(images), (n,), generator=generator)
    u = (torch.arange(n) + torch.rand(1, generator=generator)) / n
    sigma = SIGMA_MIN * (SIGMA_MAX / SIGMA_MIN) ** u
    x = images[k] / 255
    return x + sigma[:, None, None, None] * noise_like(x, generator), sigma, labels[k]


def train() -> None:
    """Trains on 60 000 digits with noise of all scales, and writes output/classifier.pt."""
    check_writable("output/classifier.pt")  # now, not after the work
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    images, labels = load_images("mnist"), load_labels("mnist")
    classifier = NoisyDigitClassifier()
    optimizer = Optimizer(classifier, "adam")
    with progress(STEPS * BATCH, " images") as bar:
        for step in range(STEPS):
            x, sigma, y = noisy_digits(images, labels, generator, BATCH)
            loss = F.nll_loss(classifier(x, sigma), y)
            loss.backward()
            optimizer.step(2e-3 * 0.5 * (1 + math.cos(math.pi * step / STEPS)))
            bar.update(BATCH)
    images, labels = load_images("mnist", "test"), load_labels("mnist", "test")
    with torch.no_grad():
        for sigma in (0.01, 0.1, 0.3, 1.0, 3.0):
            x = images / 255 + sigma * noise_like(images / 255, generator)
            right = classifier(x, torch.full((len(x),), sigma)).argmax(1) == labels
            print(f"sigma {sigma}: {100 * right.float().mean():.1f} % of the test digits are recognised")
    weights = {name: w.half() if w.ndim > 1 else w for name, w in classifier.state_dict().items()}
    save_checkpoint("output/classifier.pt", LESSON, classifier=weights)


if __name__ == "__main__":
    run(train)
