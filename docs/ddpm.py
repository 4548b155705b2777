"""What lesson 5 measures: `python docs/ddpm.py`, or names of some of its experiments.

All but `prediction`, which trains, take the network of lesson_05_ddpm/pretrained.pt. Adds lines to docs/ddpm.csv after
each measurement, and leaves out those that are there; `python docs/figures_ddpm.py` makes pictures of them.
"""

import copy
import functools
import importlib
import itertools
import math
import sys
from argparse import ArgumentParser
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import origin
from techniques import Table, fid

from common.checkpoint import load_lesson, load_network
from common.cli import run
from common.config import check_choice, check_range, learning_rate
from common.data import load_images
from common.machine import InBatches, autocast, choose_device, sampling_precision, training_precision
from common.noise import noise_like
from common.optimizer import Optimizer
from common.play import evenly
from lesson_05_ddpm.likelihood import prior_term, terms
from lesson_05_ddpm.loss import noisy_image
from lesson_05_ddpm.noise_network import NoiseNetwork
from lesson_05_ddpm.noise_schedule import posterior
from lesson_05_ddpm.sampler import ancestral_sampling, ddim_sampling

CALLS = (10, 25, 50, 100, 250, 1000)
GROUPS = {
    "t = 1": (1, 1),
    "t = 2": (2, 2),
    "t = 3 to 10": (3, 10),
    "t = 11 to 100": (11, 100),
    "the rest": (101, 10**9),
}


def load(name: str, path: str, smoke: bool = False) -> SimpleNamespace:
    """What lesson 5 or 9 has learned: its `network`, to be called with any number of images, from a checkpoint;
    `float32`, the same in float32, for bounds: the last bits of a pixel are what rounding spoils; its `config`; its
    noise schedule, `betas` and `alpha_bars` (T,). `smoke` puts a tiny network, which has learned nothing, in its place.
    """
    lesson = load_lesson(name)
    network, config, found = load_network(lesson, path, choose_device())
    origin.check_gray_digits(path, found)
    if smoke:
        config.width, config.T, config.beta_T = 8, 20, 0.5
        network = lesson.make_network(config, 1, {}).to(choose_device()).eval()
    precision = sampling_precision("auto", config.precision, choose_device())
    betas, alpha_bars = lesson.schedule(config)
    return SimpleNamespace(
        network=InBatches(network, precision), float32=InBatches(network, "float32"), config=config,
        betas=betas, alpha_bars=alpha_bars,
    )  # fmt: skip


def calls(table: Table, five: SimpleNamespace) -> None:
    """How many network calls does each sampler need?"""
    T = len(five.betas)

    def by_ddim(eta, clip=True):
        return lambda x, noise, K: ddim_sampling(
            five.network, x, five.alpha_bars, evenly(T, K), eta=eta, clip=clip, generator=noise
        )

    def by_algorithm_2(variance, clip=True):
        return lambda x, noise, K: ancestral_sampling(five.network, x, five.betas, variance, clip, noise)

    for setting, sampler, Ks in (
        ("DDIM", by_ddim(0.0), CALLS[:-1]),
        ("ancestral, small variance", by_ddim(1.0), CALLS[:-1]),
        ("ancestral, small variance, no clip", by_ddim(1.0, clip=False), (50, 100)),
        ("ancestral, small variance", by_algorithm_2("small"), CALLS[-1:]),
        ("ancestral, large variance", by_algorithm_2("large"), CALLS[-1:]),
    ):
        for K in table.missing(setting, [min(K, T) for K in Ks]):
            noise = table.noise()
            *_, x = sampler(noise.like(torch.empty(table.n, 1, 28, 28)).to(choose_device()), noise, K)
            table.add(setting, K, fid=fid(((x + 1) / 2).cpu()))


def called_once(network: Callable) -> Callable:
    """The network for several bounds in turn: the same noisy images come for each, and it is called for the first."""
    cache = {}

    def called(x, t):
        if int(t[0]) not in cache:
            cache.clear()
            cache[int(t[0])] = network(x, t)
        return cache[int(t[0])]

    return called


@torch.no_grad()
def bits(table: Table, five: SimpleNamespace) -> None:
    """What does each step cost in bits per dimension, and how far is the guess from the picture? (Sec. 4.3)"""
    T, images = len(five.betas), table.digits()[0]
    settings = [(variance, clip) for variance in ("small", "large") for clip in (True, False)]
    if not any(table.missing(name(*each), [T]) for each in settings):
        return
    found = {each: [] for each in settings}
    for part in images.split(250):
        x_0, network = 2 * part - 1, called_once(five.float32)
        generators = (torch.Generator(x_0.device).manual_seed(table.seed) for _ in settings)
        each = [terms(network, x_0, five.betas, *how, noise) for how, noise in zip(settings, generators)]
        for step in zip(*each, strict=True):
            for how, (L, error) in zip(settings, step, strict=True):
                found[how].append((L.cpu(), error.cpu()))
    prior = float(prior_term(2 * images - 1, five.alpha_bars[-1]).mean())
    for how, pairs in found.items():
        parts = [torch.stack([torch.stack(pair) for pair in pairs[k : k + T]]) for k in range(0, len(pairs), T)]
        L, error = torch.cat(parts, dim=2).mean(2).flip(0).unbind(1)  # (T,), of t = 1, ..., T
        rate = torch.cat([L.flip(0).cumsum(0).flip(0)[1:], torch.zeros(1)]) + prior  # what x_t has cost, for each t
        for group, (a, b) in GROUPS.items():
            table.add(f"{name(*how)}: {group}", a, bits=float(L[a - 1 : b].sum()))
        for t in sorted({min(t, T) for t in (1, 2, 5, 10, 20, 50, *range(100, 1001, 100))}):
            table.add(f"{name(*how)}: rate", t, rate=float(rate[t - 1]), rmse=127.5 * math.sqrt(float(error[t - 1])))
        table.add(f"{name(*how)}: prior", T, bits=prior)
        table.add(name(*how), T, bits=float(L.sum()) + prior, deviation=float(torch.cat(parts, 2)[:, 0].sum(0).std()))


def name(variance: str, clip: bool) -> str:
    """What a setting of the bound is called."""
    return f"{variance} variance, {'clip' if clip else 'no clip'}"


@torch.no_grad()
def loss(table: Table, five: SimpleNamespace) -> None:
    """How far from the best linear denoiser, and from zero, is the loss at each t?"""
    T, x_0 = len(five.betas), 2 * table.digits()[0] - 1
    train = 2 * load_images("mnist")[: 1000 if table.smoke else None].flatten(1).double() / 255 - 1
    variances = torch.linalg.eigvalsh(train.T.cov())  # (784,), of the principal components
    for t in table.missing("network", sorted({min(t, T) for t in (1, 2, 5, 10, 20, 50, 100, 250, 500, 750, 1000)})):
        n = torch.full((len(x_0),), int(t) - 1, device=x_0.device)
        eps, abar = noise_like(x_0, table.noise()), float(five.alpha_bars[int(t) - 1])
        error = (eps - five.float32(noisy_image(x_0, five.alpha_bars, n, eps), n)).square().mean()
        table.add("network", t, loss=float(error))
        table.add("best linear denoiser", t, loss=float((abar * variances / (abar * variances + 1 - abar)).mean()))


def histograms(table: Table, five: SimpleNamespace) -> None:
    """How many bits does a model need that knows how often each pixel has each gray level, and nothing else?

    The frequencies are those of the training digits, and of one more digit that has all 256 levels at once.
    """
    if not table.missing("pixels", [table.n]):
        return
    digits = load_images("mnist").flatten(1).long()  # (60000, 784)
    counts = torch.full((digits.shape[1], 256), 1 / 256)
    for part in digits.split(5000):
        counts.scatter_add_(1, part.T, torch.ones(part.T.shape))
    probabilities = counts / counts.sum(1, keepdim=True)  # (784, 256)
    pixels = (255 * table.digits()[0]).round().flatten(1).long().cpu()
    table.add("pixels", table.n, bits=float(-probabilities.gather(1, pixels.T).log2().mean()))


PREDICTIONS, OBJECTIVES = ("eps", "x_0", "mu"), ("L_simple", "L")


def as_noise(prediction: str, out: Tensor, x_t: Tensor, table_at: Callable[[Tensor], Tensor], tables: dict) -> Tensor:
    """eps, from what a network puts out that predicts eps, x_0 or the mean mu-tilde of q(x_{t-1} | x_t, x_0)."""
    at = {key: table_at(value) for key, value in tables.items()}
    if prediction == "eps":
        return out
    x_0 = out if prediction == "x_0" else (out - at["c2"] * x_t) / at["c1"]
    return (x_t - at["a"] * x_0) / at["s"]


def weights(prediction: str, objective: str, betas: Tensor) -> Tensor:
    """What the squared error of eps counts at each t, (T,), so that the loss is L_simple of the prediction, or L.

    L (Eq. 12) is the same for all of them: beta^2 / (2 sigma^2 alpha (1 - abar)), here with sigma^2 = beta, and at
    t = 1 too, where the bound has the decoder's term. Both are scaled to a mean of 1.
    """
    abar = (1 - betas).cumprod(0)
    w = betas / (2 * (1 - betas) * (1 - abar))  # L
    if objective == "L_simple":
        c1 = posterior(betas)[0]
        x_0 = (1 - abar) / abar  # the squared error of x_0 for one of eps
        w = {"eps": torch.ones_like(betas), "x_0": x_0, "mu": c1**2 * x_0}[prediction]
    return w / w.mean()


def prediction(table: Table, five: SimpleNamespace) -> None:
    """What should the network predict, and with which weights? (Table 2 of the paper, at equal time)"""
    T, betas, device = len(five.betas), five.betas, choose_device()
    train_mnist = importlib.import_module("train_mnist")  # the lesson's: `load` has put its folder first
    config = copy.copy(five.config)
    config.steps, config.batch_size = (3, 8) if table.smoke else (800, config.batch_size)
    images = load_images("mnist").to(device)
    c1, c2, _ = posterior(betas)
    tables = {"a": five.alpha_bars.sqrt(), "s": (1 - five.alpha_bars).sqrt(), "c1": c1, "c2": c2}
    precision = training_precision("auto", device)
    for kind, objective in itertools.product(PREDICTIONS, OBJECTIVES):
        names = [f"{kind}, {objective}, {variance} variance" for variance in ("small", "large")]
        if not any([table.missing(each, [config.steps]) for each in names]):
            continue
        torch.manual_seed(table.seed)
        generator = torch.Generator(device).manual_seed(table.seed)
        options = {key: getattr(config, key) for key in ("width", "levels", "blocks", "patch")}
        network = NoiseNetwork(1, **options).to(device, memory_format=torch.channels_last)
        ema, optimizer = copy.deepcopy(network).requires_grad_(False), Optimizer(network, config.optimizer)
        w = weights(kind, objective, betas).to(device, torch.float32)

        def noise(model, x_t, t, kind=kind):
            at = lambda values: values.to(x_t)[t][:, None, None, None]
            return as_noise(kind, model(x_t, t), x_t, at, tables)

        for step in range(1, config.steps + 1):
            some = torch.randint(len(images), (config.batch_size,), generator=generator, device=device)
            x_0 = images[some] / 127.5 - 1
            t = train_mnist.draw_timesteps(len(x_0), T, generator)
            eps = noise_like(x_0, generator)
            with autocast(device, precision):
                error = (eps - noise(network, noisy_image(x_0, five.alpha_bars, t, eps), t)).square().mean((1, 2, 3))
            (w[t] * error).mean().backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), config.clip)
            optimizer.step(learning_rate(step, config))
            train_mnist.update_ema(ema, network, step, config.ema_decay)
        model = functools.partial(noise, InBatches(ema.eval(), precision))
        for variance, each in zip(("small", "large"), names):
            start = table.noise()
            x = start.like(torch.empty(table.n, 1, 28, 28)).to(device)
            *_, x = ancestral_sampling(model, x, betas, variance, generator=start)
            table.add(each, config.steps, fid=fid(((x + 1) / 2).cpu()))


EXPERIMENTS = {"calls": (calls, 1000), "bits": (bits, 500), "histograms": (histograms, 10_000), "loss": (loss, 1000),
               "prediction": (prediction, 500)}  # fmt: skip


def measure(doc: str, lesson: str, csv: str, experiments: dict, load: Callable = load) -> None:
    """Does the experiments that are named, or all: {name: (function(table, trained), how many images)}; trained is
    load(lesson, path of the checkpoint, whether it is a smoke test).
    """
    parser = ArgumentParser(description=doc.split("\n")[0], allow_abbrev=False)
    parser.add_argument("names", nargs="*", metavar="name", help=f"of {', '.join(experiments)} (default: all)")
    parser.add_argument("--checkpoint", default=str(ROOT / lesson / "pretrained.pt"))
    parser.add_argument("--seed", type=int, default=1, help="of images and noise (default: 1)")
    parser.add_argument("--num", type=int, help="how many images (default: 100 to 1000)")
    parser.add_argument("--again", action="store_true", help="measure what is there already, too")
    parser.add_argument("--output", default=str(ROOT / "docs"), help=f"folder of {csv} (default: docs)")
    parser.add_argument("--smoke", action="store_true", help="a tiny network and few images: tests the script")
    options = parser.parse_args()
    for each in options.names:
        check_choice("experiment", each, experiments)
    if options.num is not None:
        check_range("--num", options.num, 2, 10_000)
    own = options.smoke or options.checkpoint != parser.get_default("checkpoint")
    origin.check_place(Path(options.output) / csv, own)
    trained = load(lesson, options.checkpoint, options.smoke)
    for each in options.names or experiments:
        function, n = experiments[each]
        print(f"{each}: {function.__doc__}", flush=True)
        n = options.num or (8 if options.smoke else n)
        table = Table(Path(options.output) / csv, each, n, options.seed, options.again, options.smoke)
        table.tell_what_is_there()
        function(table, trained)


if __name__ == "__main__":
    run(lambda: measure(__doc__, "lesson_05_ddpm", "ddpm.csv", EXPERIMENTS))
