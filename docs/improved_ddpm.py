"""What lesson 9 measures: `python docs/improved_ddpm.py`, or names of some of its experiments.

All but `ablation`, which trains, take the network of lesson_09_improved_ddpm/pretrained.pt; `gradient` trains others
for a few steps, too. Adds lines to docs/improved_ddpm.csv after each measurement, and leaves out those that are there;
`python docs/figures_ddpm.py` makes pictures of them.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from ddpm import GROUPS, called_once, measure
from techniques import Table, fid, train_lesson

from common.cli import run
from common.data import load_images
from common.machine import InBatches, choose_device
from common.noise import noise_like
from common.play import evenly
from lesson_09_improved_ddpm.likelihood import prior_term, terms
from lesson_09_improved_ddpm.loss import bound_term, hybrid_loss, noisy_image
from lesson_09_improved_ddpm.noise_schedule import respaced_betas
from lesson_09_improved_ddpm.sampler import ancestral_sampling, ddim_sampling
from lesson_09_improved_ddpm.timestep_sampler import LossAwareTimesteps, UniformTimesteps

LESSON = "lesson_09_improved_ddpm"
VARIANCES = ("learned", "small", "large")
EARLY = (20, 100, 500)  # steps after which the noise of the gradient is measured, besides the end


def sample(nine: SimpleNamespace, table: Table, K: int, variance: str) -> Tensor:
    """n images (n, 1, 28, 28) in [0, 1], with K network calls. variance "DDIM": no fresh noise."""
    noise, kept = table.noise(), evenly(len(nine.betas), K)
    x = noise.like(torch.empty(table.n, 1, 28, 28)).to(choose_device())
    if variance == "DDIM":
        steps = ddim_sampling(nine.network, x, nine.alpha_bars, kept)
    else:
        betas = respaced_betas(nine.betas, kept)
        steps = ancestral_sampling(nine.network, x, betas, kept, generator=noise, variance=variance)
    *_, x = steps
    return ((x + 1) / 2).cpu()


def calls(table: Table, nine: SimpleNamespace) -> None:
    """How many network calls does each variance need?"""
    T = len(nine.betas)
    for K in [min(K, T) for K in (10, 25, 50, 100, 250, 1000)]:
        for variance in ("learned",) if K >= 250 else ("learned", "small", "large", "DDIM"):
            for _ in table.missing(variance, [K]):
                table.add(variance, K, fid=fid(sample(nine, table, K, variance)))


@torch.no_grad()
def bound(nine: SimpleNamespace, x_0: Tensor, K: int, seed: int) -> dict[str, Tensor]:
    """Terms of the bound in bits/dim, means over x_0 (B, C, H, W) in [-1, 1], of t = 1, ..., K and of the prior:
    {variance: (K + 1,)}. The network is called once for all.
    """
    kept, network = evenly(len(nine.betas), K), called_once(nine.float32)
    betas = respaced_betas(nine.betas, kept)
    generators = (torch.Generator(x_0.device).manual_seed(seed) for _ in VARIANCES)
    each = [terms(network, x_0, betas, kept, generator=g, variance=v) for g, v in zip(generators, VARIANCES)]
    steps = [[float(L.mean()) for L, _ in step] for step in zip(*each, strict=True)]
    prior = float(prior_term(x_0, nine.alpha_bars[-1]).mean())
    found = torch.tensor(steps).flip(0).T  # (variances, K)
    return {v: torch.cat([L, torch.tensor([prior])]) for v, L in zip(VARIANCES, found, strict=True)}


def bits(table: Table, nine: SimpleNamespace) -> None:
    """What does each step cost, with the learned and with both fixed variances, and with fewer steps?"""
    T, x_0 = len(nine.betas), 2 * table.digits()[0] - 1
    for K in [min(K, T) for K in (1000, 250, 100, 50, 25, 10)]:
        if table.missing("learned", [K]):
            for variance, L in bound(nine, x_0, K, table.seed).items():
                for group, (a, b) in GROUPS.items() if K == T else ():
                    table.add(f"{variance}: {group}", a, bits=float(L[:-1][a - 1 : b].sum()))
                table.add(variance, K, bits=float(L.sum()))


@torch.no_grad()
def v(table: Table, nine: SimpleNamespace) -> None:
    """Which v has the network learned, where a pixel is black for sure, and elsewhere?"""
    T, x_0 = len(nine.betas), 2 * table.digits()[0] - 1
    inside = (x_0 > -0.99) & (x_0 < 0.99)
    for t in table.missing("black", sorted({min(t, T) for t in (1, 2, 3, 5, 10, 20, 50, *range(100, 1001, 100))})):
        n = torch.full((len(x_0),), int(t) - 1, device=x_0.device)
        _, learned = nine.network(noisy_image(x_0, nine.alpha_bars, n, noise_like(x_0, table.noise())), n)
        table.add("black", t, v=float(learned[x_0 < -0.99].mean()))
        table.add("gray", t, v=float(learned[inside].mean()))
        table.add("all", t, v=float(learned.mean()))


def trained(table: Table, steps: int, **how) -> SimpleNamespace:
    """A network that train_mnist.py has trained with a configuration, as `load` of docs/ddpm.py returns it."""
    how |= {"batch_size": 16, "width": 8, "T": 30} if table.smoke else {}
    lesson, training = train_lesson(LESSON, steps=3 if table.smoke else steps, seed=table.seed, **how)
    ema = training.parts["ema"].requires_grad_().eval()
    betas, alpha_bars = lesson.schedule(training.config)
    return SimpleNamespace(
        network=InBatches(ema, training.precision), float32=InBatches(ema, "float32"), config=training.config,
        betas=betas, alpha_bars=alpha_bars,
    )  # fmt: skip


def gradient(table: Table, nine: SimpleNamespace) -> None:
    """How noisy is the gradient of each objective? Trace of its covariance over its squared length, batches of 64."""
    gradient_noise(table, lambda: nine, "")
    for steps in EARLY[: 1 if table.smoke else None]:
        gradient_noise(table, lambda steps=steps: trained(table, steps, decay="constant"), f", step {steps}")


OBJECTIVES = {
    "hybrid, uniform": (hybrid_loss, False),
    "hybrid, importance": (hybrid_loss, True),  # the same p_t, of the terms of the bound
    "vlb, uniform": (bound_term, False),
    "vlb, importance": (bound_term, True),
}


def gradient_noise(table: Table, of: Callable[[], SimpleNamespace], when: str) -> None:
    """Adds a line for each of OBJECTIVES, unless it is there. of: returns the network."""
    wanted = [name for name in OBJECTIVES if table.missing(f"{name}{when}", [64])]
    if not wanted:
        return
    nine, images, generator = of(), load_images("mnist"), torch.Generator().manual_seed(table.seed)
    T, network, device = len(nine.betas), nine.network.network.train(), choose_device()
    aware = LossAwareTimesteps(T)

    def batch(size):
        """Training images (size, 1, 28, 28) in [-1, 1], drawn on the CPU and moved, as t and the noise are."""
        return images[torch.randint(len(images), (size,), generator=generator)].to(device) / 127.5 - 1

    with torch.no_grad():  # its history, ten losses for each t
        for _ in range(10):
            for t in torch.arange(T).split(100):
                x_0 = batch(len(t))
                aware.update(t, bound_term(nine.network, x_0, nine.betas, t.to(device), noise_like(x_0, generator)))
    for name in wanted:
        loss, importance = OBJECTIVES[name]
        chooser, gradients = aware if importance else UniformTimesteps(T), []
        for _ in range(3 if table.smoke else 100):
            x_0 = batch(64)
            t, weight = (each.to(device) for each in chooser.draw(64, generator))
            network.zero_grad()
            (weight * loss(network, x_0, nine.betas, t, noise_like(x_0, generator))).mean().backward()
            gradients.append(torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None]).double())
        g = torch.stack(gradients)
        trace = float(g.var(0).sum())
        table.add(f"{name}{when}", 64, noise=trace / max(1e-30, float(g.mean(0).square().sum()) - trace / len(g)))
    network.zero_grad()
    network.eval()


FIVE = {"objective": "simple", "variance": "small"}
OLD = {"schedule": "linear", "scale_shift": False}
ABLATION = {
    "lesson 5": {**FIVE, **OLD},
    "cosine schedule": {**FIVE, "scale_shift": False},
    "learned variance, hybrid": OLD,
    "scale-shift norm": {**FIVE, "schedule": "linear"},
    "vlb, uniform t": {"objective": "vlb", **OLD},
    "vlb, importance sampling": {"objective": "vlb", "timesteps": "importance", **OLD},
    "lesson 9": {},
}


def ablation(table: Table, nine: SimpleNamespace) -> None:
    """What is each change worth, alone, after as many steps? Digit FID with 50 calls, and bits/dim of 50 digits."""
    steps = 3 if table.smoke else 600
    for name, how in list(ABLATION.items())[: 1 if table.smoke else None]:
        if not table.missing(name, [steps]):
            continue
        changed = trained(table, steps, **how)
        variance, K = changed.config.variance, len(changed.betas)
        some = load_images("mnist", "test")[:50].to(choose_device()) / 127.5 - 1
        value = fid(sample(changed, table, min(50, K), variance))
        table.add(name, steps, fid=value, bits=float(bound(changed, some, K, table.seed)[variance].sum()))


EXPERIMENTS = {"calls": (calls, 1000), "bits": (bits, 250), "v": (v, 250), "gradient": (gradient, 100),
               "ablation": (ablation, 500)}  # fmt: skip


if __name__ == "__main__":
    run(lambda: measure(__doc__, LESSON, "improved_ddpm.csv", EXPERIMENTS))
