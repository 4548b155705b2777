"""What each technique of NCSNv2 does, in an experiment that can see it: `python docs/techniques.py`, or names of some.

Nearly all of them take the networks of both lessons' pretrained.pt and vary one thing. Adds lines to
docs/techniques.csv after each measurement, and leaves out those that are there; `python docs/figures.py` makes pictures
of them. Each experiment prints its question, what was expected before it was first run, and what comes out.
"""

import copy
import functools
import importlib
import inspect
import math
import signal
import sys
import tempfile
from argparse import ArgumentParser
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import figures
import origin

import lesson_03_ncsn.sampler as sampler_3
from common.checkpoint import load_lesson, load_network
from common.cli import ENDS, run
from common.config import check_choice, check_range
from common.data import load_images, load_labels
from common.digit_classifier import load_classifier
from common.digit_metrics import digit_features, frechet_distance, precision_recall
from common.files import check_writable
from common.images import save_gif, some_frames
from common.machine import InBatches, autocast, choose_device, sampling_precision
from common.noise import SeededNoise
from common.optimizer import Optimizer
from common.play import evenly
from common.run import Run
from lesson_04_ncsnv2.loss import denoising_score_matching_loss
from lesson_04_ncsnv2.noise_scales import geometric_noise_scales
from lesson_04_ncsnv2.sampler import (
    ancestral_eta,
    annealed_langevin_dynamics,
    consistent_annealed_sampling,
    denoise,
    langevin_step_size,
    smallest_eta,
)
from lesson_04_ncsnv2.unconditional import noise_after_langevin, step_size_for_all_scales

COLUMNS = (*figures.TECHNIQUES_COLUMNS, *origin.COLUMNS)


class Trained(NamedTuple):
    """A lesson's trained network, to be called with any number of images, its configuration, and its sample.py."""

    network: InBatches
    config: SimpleNamespace
    lesson: ModuleType


def load(name: str, path: str, smoke: bool) -> Trained:
    """Reads a lesson's checkpoint. `smoke` puts a tiny network, which has learned nothing, in its place."""
    lesson = load_lesson(name)
    network, config, found = load_network(lesson, path, choose_device())
    origin.check_gray_digits(path, found)
    if smoke:
        config.width, some = 4, evenly(len(network.sigmas), 6)
        network = lesson.make_network(config, 1, {"sigmas": network.sigmas[some]}).to(choose_device())
    return Trained(in_batches(network, config), config, lesson)


def in_batches(network: nn.Module, config: SimpleNamespace) -> InBatches:
    """The network as `sample.py` calls it."""
    return InBatches(network.eval(), sampling_precision("auto", config.precision, network.sigmas.device))


class Table:
    """The lines of one experiment in techniques.csv, and the images and the noise that it works with."""

    def __init__(self, path: Path, experiment: str, n: int, seed: int, again: bool, smoke: bool):
        self.path, self.experiment, self.n, self.seed, self.smoke = path, experiment, n, seed, smoke
        lines = origin.read(path, COLUMNS)
        mine = [line for line in lines if (line[0], *line[5:7]) == (experiment, str(n), str(seed))]
        check_writable(path)  # now, not after the work
        if again or not path.is_file():
            lines, mine = [line for line in lines if line not in mine], []
            origin.write(path, lines)
        self.there = {(line[1], line[2]) for line in mine}

    def missing(self, setting: str, xs) -> list:
        """Those of the numbers xs that have not been measured in this setting; in a smoke test, of the first."""
        xs = list(xs)[: 1 if self.smoke else None]
        return [x for x in xs if (setting, f"{x:.6g}") not in self.there]

    def add(self, setting: str, x: float, **values: float) -> None:
        """Writes what was measured at x, a line for each value, unless it is there; prints it."""
        lines = origin.read(self.path, COLUMNS)  # anew: another process may have added some
        for name, value in values.items() if self.missing(setting, [x]) else ():
            line = self.experiment, setting, f"{x:.6g}", name, f"{value:.6g}", self.n, self.seed
            lines.append([*line, *origin.origin(self.experiment)])
        origin.write(self.path, lines)
        self.there.add((setting, f"{x:.6g}"))
        print(f"  {setting}: {x:.4g}: " + ", ".join(f"{name} {v:.4g}" for name, v in values.items()), flush=True)

    def tell_what_is_there(self) -> None:
        """Prints what is left out, and how to measure it anew."""
        if self.there:
            print(f"  {len(self.there)} measurements are in {self.path} already; --again makes them anew", flush=True)

    def digits(self) -> tuple[Tensor, Tensor]:
        """n test digits (n, 1, 28, 28) in [0, 1] that the seed chooses, and their labels (n,)."""
        some = torch.randperm(10_000, generator=torch.Generator().manual_seed(self.seed))[: self.n]
        return load_images("mnist", "test")[some].to(choose_device()) / 255, load_labels("mnist", "test")[some]

    def noise(self) -> SeededNoise:
        """Noise for n images, the same each time."""
        return SeededNoise(range(self.seed, self.seed + self.n))


def levels(network: InBatches, L: int) -> Tensor:
    """L noise levels (L,) from the first to the last of lesson 4's network."""
    return geometric_noise_scales(float(network.sigmas[0]), float(network.sigmas[-1]), L).to(network.sigmas.device)


def on_levels(network: InBatches, sigmas: Tensor):
    """The score of lesson 4's network on noise levels (L,) that it need not have been trained on (Technique 3)."""
    return lambda x, i: network(x, torch.zeros_like(i)) * (network.sigmas[0] / sigmas[i])[:, None, None, None]


def sample(four: Trained, table: Table, L: int, T: int = 1, r=None, sampler=consistent_annealed_sampling):
    """n images before and after the last denoising step, by a sampler of lesson 4 on L levels, r = epsilon / sigma_L^2.

    r = None is the eta of consistent sampling in lesson 4's sample.py; a smoke test then has 6 levels.
    """
    sigmas, noise = levels(four.network, 6 if table.smoke and r is None else L), table.noise()
    epsilon = (four.lesson.measured_eta(sigmas) if r is None else r) * float(sigmas[-1]) ** 2
    score, x = on_levels(four.network, sigmas), noise.like(torch.empty(table.n, 1, 28, 28, device=sigmas.device))
    *_, x = sampler(score, sigmas[0] * x, sigmas, T, epsilon, noise)
    return x, denoise(score, x, sigmas)


@functools.cache
def real_features() -> Tensor:
    """The judge's features (10000, F) of the test digits."""
    return digit_features(load_images("mnist", "test") / 255)


def fid(x: Tensor) -> float:
    """Digit FID of images (N, 1, 28, 28), clamped to [0, 1]; not a number if they are not finite."""
    return frechet_distance(digit_features(x.clamp(0, 1)), real_features()) if x.isfinite().all() else math.nan


def judged(x: Tensor) -> dict[str, float]:
    """Digit FID, precision and recall of images (N, 1, 28, 28), clamped to [0, 1]."""
    found = digit_features(x.clamp(0, 1))
    precision, recall = precision_recall(real_features(), found)
    return {"fid": frechet_distance(found, real_features()), "precision": precision, "recall": recall}


def noise_in(x: Tensor) -> float:
    """The standard deviation of the upper three rows of pixels in an image, the median of those of x (N, C, H, W).

    Digits are black there; the median leaves out the few whose strokes reach so far.
    """
    return x[:, :, :3].std(dim=(1, 2, 3)).median().item()


def quality(before: Tensor, after: Tensor) -> dict[str, float]:
    """Digit FID, and how much noise there was before the last denoising step."""
    return {"fid": fid(after), "noise": noise_in(before)}


def train(network: nn.Module, steps: int, seed: int, precision: str) -> Iterator[int]:
    """Trains as lesson 4 does, but at a constant rate and with all levels equally often; yields after each step."""
    images, sigmas, generator = load_images("mnist"), network.sigmas, torch.Generator().manual_seed(seed)
    optimizer, B = Optimizer(network, "muon"), 64
    for step in range(1, steps + 1):
        x = images[torch.randint(len(images), (B,), generator=generator)] / 255  # (B, 1, 28, 28)
        i = torch.randint(len(sigmas), (B,), generator=generator)
        x, i, z = (t.to(sigmas.device) for t in (x, i, torch.randn(x.shape, generator=generator)))
        with autocast(x.device, precision):
            loss = denoising_score_matching_loss(network, x, sigmas, i, z).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 0.1 * x[0].numel())
        optimizer.step(3e-3 * min(1.0, step / 100))
        yield step


def new_network(trained: Trained, sigmas: Tensor, seed: int, **changes) -> nn.Module:
    """An untrained network of a lesson on the noise levels (L,), with the configuration of its trained one."""
    torch.manual_seed(seed)
    config = SimpleNamespace(**{**vars(trained.config), **changes})
    network = trained.lesson.make_network(config, 1, {"sigmas": sigmas})
    return network.to(sigmas.device, memory_format=torch.channels_last)


def technique_1(three: Trained, four: Trained, table: Table) -> None:
    """Does a chain forget where it started? (Technique 1: sigma_1 is the largest distance between two images.)

    Chains start at test digits plus sigma_1 z. How many keep their class? Chance is 10 %. Lesson 4's also start
    part-way, with the noise of a smaller level of its schedule.
    PREDICTION. Lesson 3 (sigma_1 = 1): about 85 %, since digits of two classes are some 8 apart, and along the line
    between them noise has a standard deviation of 1. Lesson 4 (sigma_1 = 16.9): 10 to 15 %. Its curve begins near 97 %,
    is half-way down between 2 and 3, and at 15 % from 6 on: Technique 1 is safe, not tight.
    """
    x, labels = table.digits()

    def kept(score, sigmas, sampler, T, epsilon):  # without the last denoising step, which changes no class
        noise = table.noise()
        *_, y = sampler(score, x + sigmas[0] * noise.like(x), sigmas, T, epsilon, noise)
        return (load_classifier().classes(digit_features(y.clamp(0, 1))).argmax(1) == labels).double().mean().item()

    sigmas = three.network.sigmas
    for sigma in table.missing("lesson 3", [float(sigmas[0])]):  # as its quick samples are made
        T, config = three.lesson.QUICK_T, three.config
        epsilon = sampler_3.langevin_step_size(sigmas, T, config.T, config.epsilon)
        share = kept(three.network, sigmas, sampler_3.annealed_langevin_dynamics, T, epsilon)
        table.add("lesson 3", sigma, kept=share)
    sigmas = four.network.sigmas
    for sigma in table.missing("lesson 4", sigmas[evenly(int((sigmas > 0.3).sum()), 9)].tolist()):
        rest = sigmas[sigmas <= sigma]
        score, epsilon = on_levels(four.network, rest), four.lesson.measured_eta(rest) * float(rest[-1]) ** 2
        table.add("lesson 4", sigma, kept=kept(score, rest, consistent_annealed_sampling, 1, epsilon))


def train_lesson(name: str, make_network: Callable | None = None, **how) -> tuple[ModuleType, Run]:
    """A lesson's sample.py, and its run with another `make_network` or configuration; it writes and says nothing."""
    lesson, train_mnist = load_lesson(name), importlib.import_module("train_mnist")
    handlers = {number: signal.getsignal(number) for number in ENDS}  # which a training replaces
    if make_network:
        lesson.make_network = train_mnist.make_network = make_network
    with tempfile.TemporaryDirectory() as folder:
        config = train_mnist.Config(preview_every=10_000, output=folder, **how)
        with closing(Run(config, lesson.LESSON)) as training:
            none = 2 * [torch.zeros(1, *training.image_shape)]  # the last pictures, which take minutes
            training.leads, training.last_pictures = False, lambda frames: none
            train_mnist.train(training.config, training)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    return lesson, training


@torch.no_grad()
def wrong_noise(three: Trained, four: Trained, table: Table) -> Iterator[tuple[str, float, Tensor, Tensor]]:
    """Yields setting, k, sigma_i s(x, i) at x = test digits + k sigma_i z, and z, at k and levels that are missing."""
    (x, _), factors = table.digits(), (0.5, 0.6, 0.7, 0.8, 0.9, 1, 1.08, 1.2, 1.4, 1.67, 2)
    z = table.noise().like(x)
    for name, network in (("lesson 3", three.network), ("lesson 4", four.network)):
        for sigma in (0.03, 0.1, 0.3):
            i = (network.sigmas / sigma).log().abs().argmin().expand(len(x))  # (n,)
            sigma_i = network.sigmas[i[0]]
            for k in table.missing(f"{name} at {sigma}", factors):
                yield f"{name} at {sigma}", k, sigma_i * network(x + k * sigma_i * z, i), z


def technique_2(three: Trained, four: Trained, table: Table) -> None:
    """What does a network do with noise that is not of its level? (Technique 2: neighbouring levels overlap.)

    It sees test digits plus k sigma_i z. Lesson 3's is conditioned on sigma_i and should return -k z, the score of one
    image; lesson 4's is not and should return -z whatever k. We measure the loss per pixel. Then lesson 4 samples with
    96 network calls, spent on few levels with many steps each, or on many levels.
    PREDICTION. Lesson 3: as at k = 1 to 10 % up to k = 1.08, the ratio of lesson 4's levels, and five times that at
    k = 1.67, its own ratio: instance normalisation takes away the size of the input, so the output hardly grows with k,
    and the error is about (k - 1)^2. Lesson 4: falls slowly, within a factor of two. 96 calls: 24, 48 and 96 levels
    alike to 20 %, 12 levels half as bad again.
    """
    for setting, k, s, z in wrong_noise(three, four, table):
        table.add(setting, k, loss=(s + (k if "lesson 3" in setting else 1) * z).square().mean().item())
    for L in table.missing("96 calls", (12, 24, 48, 96)):
        table.add("96 calls", L, **quality(*sample(four, table, L, T=1 if table.smoke else 96 // L)))


def technique_3(three: Trained, four: Trained, table: Table) -> None:
    """What does s(x) / sigma bring? (Technique 3: the network is not conditioned on sigma; its output is divided.)

    (a) Size: 300 training steps on lesson 4's levels, without our skip, of lesson 3's network as the paper starts it,
    with its last norm started at 1 / sigma (ours, in lesson 3), and of lesson 4's. The loss of test digits by level.
    (b) Between levels: lesson 4's network samples on 60 and on 150 levels, most of which it was not trained on.
    (c) Does it see the level? The root mean square of sigma_i s(x, i) at x = test digits + k sigma_i z.
    PREDICTION. (a) The paper's start learns nothing at sigma <= 0.03 (392 = D / 2, or worse), where its output would
    have to grow a hundredfold. The others are below 200 everywhere, lesson 4 the lower: each of its norms has 96 times
    as many images. (b) FID with 60, 96 and 150 levels within 15 %. (c) Lesson 4: flat, 0.9 to 1.05. Lesson 3: grows,
    but by less than half of what k does.
    """
    sigmas, (x, _) = four.network.sigmas, table.digits()
    some, names = (
        evenly(len(sigmas), 10).to(sigmas.device),
        ("lesson 3 as in the paper", "lesson 3 from 1/sigma", "lesson 4"),
    )
    for name in (name for name in names if table.missing(name, sigmas[some].tolist())):
        network = new_network(four if name == "lesson 4" else three, sigmas, table.seed, skip=False)
        if name == "lesson 3 as in the paper":  # gamma and alpha of the last norm back to about 1
            network.norm.gamma.data *= sigmas[:, None]
            network.norm.alpha.data *= sigmas[:, None]
        batched = in_batches(network, four.config)
        for _ in train(network, 2 if table.smoke else 300, table.seed, batched.precision):
            pass
        for i in some:
            with torch.no_grad():
                at = i.expand(len(x)), table.noise().like(x)
                table.add(
                    name, float(sigmas[i]), loss=denoising_score_matching_loss(batched, x, sigmas, *at).mean().item()
                )
    for L in table.missing("other levels", (60, 96, 150)):
        table.add("other levels", L, **quality(*sample(four, table, L)))
    for setting, k, s, _ in wrong_noise(three, four, table):
        table.add(setting, k, size=s.square().mean().sqrt().item())


def technique_4(three: Trained, four: Trained, table: Table) -> None:
    """Which step size is best, and does a formula know it? (Technique 4: epsilon is computed, for one level.)

    Algorithm 1 with T steps at each level and r = epsilon / sigma_L^2, also with Technique 4's r, and with the best r
    of the recursion over all levels (unconditional.py). Beside digit FID: the standard deviation of the background
    before the last denoising step, and the recursion's prediction of it.
    PREDICTION. A U for each T. T = 1: noise with Technique 4's r = 0.145 (FID above 100), digits with the recursion's
    r = 0.6 (below 40). T = 3: best at 0.2 to 0.35, above Technique 4's 0.126, and noise at 0.06. Where the recursion
    predicts less than 0.05, it is right to 20 %. T = 10, added later: digit FID below 10 from 0.08 to 0.25.
    """
    sigmas, L = four.network.sigmas.cpu(), len(four.network.sigmas)
    sigma_L = float(sigmas[-1])
    for T in (1, 2, 3, 10):
        rs = {f"T = {T}": (0.06, 0.25, 0.5)}
        rs[f"T = {T} by Technique 4"] = (langevin_step_size(sigmas, T) / sigma_L**2,)
        rs[f"T = {T} by the recursion"] = (step_size_for_all_scales(sigmas, T) / sigma_L**2,)
        for setting, several in rs.items():
            for r in table.missing(setting, several):
                found = quality(*sample(four, table, L, T, r, annealed_langevin_dynamics))
                table.add(
                    setting, r, **found, predicted=sigma_L * float(noise_after_langevin(sigmas, T, r * sigma_L**2))
                )


def eta(three: Trained, four: Trained, table: Table) -> None:
    """Which eta is best in consistent sampling, between DDIM's and 1, and does it change with the number of calls?

    DDIM's is 1 - 1 / gamma, the smallest possible. DDPM's is 1 - 1 / gamma^2, below which an unconditional network lets
    an excess of noise grow from level to level. We add one value between them and four above.
    PREDICTION. Noise is left below DDPM's eta, whatever the number of calls: at DDIM's, excess grows by sigma_1 /
    sigma_L in all. The best FID is just above DDPM's: 0.25 to 0.5 with 49 and 97 calls, within a tenth of DDPM's with
    7 and 13. Far above it, samples become less varied and FID rises again.
    """
    for calls in (97, 49, 25, 13, 7):
        sigmas = levels(four.network, calls - 1)
        ddim, ddpm = smallest_eta(sigmas), ancestral_eta(sigmas)
        above = (ddpm + (1 - ddpm) * part for part in (0.15, 0.3, 0.6, 1))
        for x in table.missing(f"{calls} calls", (ddim, (ddim + ddpm) / 2, ddpm, *above)):
            table.add(f"{calls} calls", x, **quality(*sample(four, table, calls - 1, r=x)))


def technique_5(three: Trained, four: Trained, table: Table) -> None:
    """What does averaging the weights change? (Technique 5: samples come from an EMA of the weights.)

    The paper's case: lesson 4's network trained at a constant rate, 800 steps. Ten times near the end, 25 steps apart,
    the raw and the averaged weights (decay 0.995) draw images from the same noise. ink is their mean pixel.
    PREDICTION. From one time to the next, the ink of the raw weights changes by 5 to 20 %, their FID by a factor of
    1.5; that of the averaged weights by less than 2 % and 10 %, and their FID is at or below the best of the raw.
    """
    times = range(2, 4) if table.smoke else range(575, 801, 25)
    frames = {"raw weights": [], "averaged weights": []}
    if not table.missing("averaged weights", times):
        return
    network = new_network(four, four.network.sigmas, table.seed)
    average = copy.deepcopy(network).requires_grad_(False)
    for step in train(network, times[-1], table.seed, four.network.precision):
        with torch.no_grad():  # as lesson 4's update_ema
            for a, weights in zip(average.parameters(), network.parameters(), strict=True):
                a.lerp_(weights, 1 - min(0.995, (1 + step) / (10 + step)))
        for setting, module in zip(frames, (network, average)) if step in times else ():
            _, x = sample(four._replace(network=in_batches(module, four.config)), table, L=48)
            table.add(setting, step, ink=x.clamp(0, 1).mean().item(), fid=fid(x))
            frames[setting].append(x[:8].cpu())
    path = table.path.parent / "images" / "lesson_04_technique_5_pictures.png"
    figures.raw_and_averaged(path, {name: x[-6:] for name, x in frames.items()}, list(times)[-6:])
    save_gif([torch.cat(pair) for pair in zip(*frames.values())], path.with_suffix(".gif"), 300, 300, columns=8)


def last_step(three: Trained, four: Trained, table: Table) -> None:
    """What does the last denoising step change? Digit FID cannot see noise of 0.01; which distance can?

    Samples of both lessons before (0) and after (1) the step, clamped to [0, 1]; and as many training digits. pixels is
    the Frechet distance of pixels turned into the principal axes of the test digits, each divided by
    sqrt(variance + 0.01^2): noise of 0.01 counts where digits vary less than that, as in the corners.
    PREDICTION. Background from 0.011 to below 0.004; pixels down by at least half of what lies above the training
    digits; digit FID by less than 1. Lesson 3, which has no such step, gains as much.
    """
    test = load_images("mnist", "test")[: 500 if table.smoke else None].flatten(1) / 255
    variances, axes = torch.linalg.eigh(test.double().T.cov())
    to_axes = (axes / (variances.clamp(min=0) + 0.01**2).sqrt()).float()  # (D, D)
    real = test @ to_axes

    def measure(setting, x, images):
        pixels = frechet_distance(images.clamp(0, 1).flatten(1) @ to_axes, real)
        table.add(setting, x, noise=noise_in(images), pixels=pixels, fid=fid(images))

    for setting, (network, config, lesson) in {"lesson 3": three, "lesson 4": four}.items():
        if table.missing(setting, (0, 1)):
            sampler, shape = lesson.SAMPLERS[0], (table.n, 1, 28, 28)
            calls = lesson.number_of_calls(network, config, sampler)
            frames = some_frames(lesson.draw(network, config, shape, table.noise(), sampler, calls), 1)
            before = frames[-1 if setting == "lesson 3" else -2]
            after = denoise(network, before, network.sigmas)
            measure(setting, 0, before.cpu())
            measure(setting, 1, after.cpu())
            if setting == "lesson 4":
                path = table.path.parent / "images" / "lesson_04_last_step.png"
                figures.before_and_after(path, before[0], after[0])
    if table.missing("training digits", (0,)):
        some = torch.randperm(60_000, generator=torch.Generator().manual_seed(table.seed))[: table.n]
        measure("training digits", 0, load_images("mnist")[some] / 255)


def closer_levels(first: float, last: float, n: int, density: float) -> Tensor:
    """n noise levels (n,), `density` times as close from sigma = 2 to 0.5 as elsewhere, in the logarithm of sigma."""
    log_sigma = torch.linspace(math.log(first), math.log(last), 100_001)
    decided = (log_sigma > math.log(0.5)) & (log_sigma < math.log(2))
    passed = torch.where(decided, density, 1.0).double().cumsum(0)
    wanted = torch.linspace(0, 1, n, dtype=torch.float64) * passed[-1]
    return log_sigma[torch.searchsorted(passed, wanted).clamp(max=100_000)].exp()


@torch.no_grad()
def half_way_sampling(score: Callable, x: Tensor, sigmas: Tensor, noise: SeededNoise) -> Tensor:
    """Consistent sampling on levels (L,) of any ratio: at each step, eta is half-way from DDPM's to 1.

    Lesson 4's `consistent_annealed_sampling` has one eta for all. x has noise of the first level, the result of the
    last; L - 1 network calls.
    """
    for n, (sigma, following) in enumerate(zip(sigmas[:-1], sigmas[1:])):
        left = (following / sigma) ** 2 / 2  # 1 - eta: the share of the noise that the step leaves
        fresh = (following**2 - (left * sigma) ** 2).sqrt()
        i = torch.full((len(x),), n, device=x.device)
        x = x + (1 - left) * sigma**2 * score(x, i) + fresh * noise.like(x)
    return x


def calls_where(three: Trained, four: Trained, table: Table) -> None:
    """Are digits better if more of the calls are at the noise levels where they are decided, sigma = 2 to 0.5?

    Consistent sampling with the eta of lesson 4's sample.py, and levels `density` times as close there as elsewhere.
    PREDICTION. 25 calls: a density of 2 is better by 1 to 2 than 1, and 4 is no better than 2. 49 and 97 calls: no
    difference of more than 1.
    """
    ends = four.network.sigmas[[0, -1]]
    for calls in (25, 49, 97)[: 1 if table.smoke else None]:
        for density in table.missing(f"{calls} calls", (0.5, 1, 2, 4)):
            sigmas = closer_levels(*ends.tolist(), calls, density).to(ends.device)
            score, noise = on_levels(four.network, sigmas), table.noise()
            x = sigmas[0] * noise.like(torch.empty(table.n, 1, 28, 28, device=sigmas.device))
            x = half_way_sampling(score, x, sigmas, noise)
            table.add(f"{calls} calls", density, **quality(x, denoise(score, x, sigmas)))


def set_dilations(network: nn.Module, dilations: tuple[int, int]) -> nn.Module:
    """Gives the 3x3 convolutions of the last two stages of lesson 4's network other dilations; returns it."""
    for stage, dilation in zip(network.stages[2:], dilations, strict=True):
        for module in stage.modules():
            if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3):
                module.dilation = module.padding = (dilation, dilation)
    return network


def receptive_field(three: Trained, four: Trained, table: Table) -> None:
    """How far must the network see? The dilations of its last two stages are 2 and 4, on maps of 7x7.

    (a) Where do the inputs lie that matter? The squared gradient of one pixel in the middle of the guessed image, with
    respect to the noisy image: within how many pixels are 50 % and 90 % of it? (b) The lesson run with other dilations,
    x is the first: 1 and 1, 1 and 2, 2 and 4. Digit FID with 97 calls.
    PREDICTION. (a) 90 % within 2 pixels at sigma = 0.1, within 8 at 1, and half of it farther than 6 at 3. (b) No
    difference beyond that of two seeds: each chained pooling sees 9x9 of the 7x7 already.
    """
    x = table.digits()[0][:200]
    rows = torch.arange(28, device=x.device) - 14
    distance = torch.maximum(rows.abs()[:, None], rows.abs())  # (28, 28), in pixels from the middle
    for wanted in table.missing("influence", (3, 1, 0.3, 0.1)):
        i = (four.network.sigmas / wanted).log().abs().argmin().expand(len(x))  # (B,)
        sigma = four.network.sigmas[i[0]]
        noisy = (x + sigma * SeededNoise(range(len(x))).like(x)).requires_grad_()
        guess = noisy + sigma**2 * four.network(noisy, i)
        squared = torch.autograd.grad(guess[:, :, 14, 14].sum(), noisy)[0].square().sum((0, 1))  # (28, 28)
        share = torch.stack([squared[distance <= d].sum() for d in range(15)]) / squared.sum()
        table.add("influence", wanted, half=int((share < 0.5).sum()), most=int((share < 0.9).sum()))
    make = four.lesson.make_network
    for dilations in ((1, 1), (1, 2), (2, 4))[: 1 if table.smoke else None]:
        changed = lambda *how, dilations=dilations: set_dilations(make(*how), dilations)
        setting = f"dilations {dilations[0]} and {dilations[1]}"
        for _ in table.missing(setting, [dilations[0]]):
            how = {"steps": 3, "batch_size": 8, "width": 4} if table.smoke else {}
            _, run = train_lesson("lesson_04_ncsnv2", changed, seed=0, **how)
            trained = four._replace(network=in_batches(run.parts["ema"], run.config))
            table.add(setting, dilations[0], **quality(*sample(trained, table, L=96)))


EXPERIMENTS = {  # and how many images each takes
    technique_1: 200,
    technique_2: 500,
    technique_3: 500,
    technique_4: 200,
    eta: 500,
    technique_5: 100,
    last_step: 1000,
    calls_where: 1000,
    receptive_field: 1000,
}


def main() -> None:
    """Measures what is missing, in the experiments that are named or in all."""
    names = {function.__name__: function for function in EXPERIMENTS}
    parser = ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("names", nargs="*", metavar="name", help=f"of {', '.join(names)} (default: all)")
    add("--lesson-3", metavar="PATH", default=ROOT / "lesson_03_ncsn" / "pretrained.pt", help="its checkpoint")
    add("--lesson-4", metavar="PATH", default=ROOT / "lesson_04_ncsnv2" / "pretrained.pt", help="its checkpoint")
    add("--num", type=int, help="images for each measurement (default: 100 to 1000, see EXPERIMENTS)")
    add("--seed", type=int, default=1, help="of the noise, and of what is trained (default: 1)")
    add("--again", action="store_true", help="measure anew what is there already")
    add("--smoke", action="store_true", help="8 images of tiny networks: tests this script")
    add("--output", type=Path, default=ROOT / "docs", help="folder of techniques.csv and images/ (default: docs)")
    options = parser.parse_args()
    for name in options.names:
        check_choice("experiment", name, names)
    if options.num is not None:
        check_range("--num", options.num, 4, 10_000)
    own = any(getattr(options, name) != parser.get_default(name) for name in ("smoke", "lesson_3", "lesson_4"))
    origin.check_place(options.output / "techniques.csv", own)
    three = load("lesson_03_ncsn", options.lesson_3, options.smoke)
    four = load("lesson_04_ncsnv2", options.lesson_4, options.smoke)
    for name in options.names or names:
        print(f"{name}: {inspect.getdoc(names[name])}\n")
        n = options.num or (8 if options.smoke else EXPERIMENTS[names[name]])
        table = Table(options.output / "techniques.csv", name, n, options.seed, options.again, options.smoke)
        table.tell_what_is_there()
        names[name](three, four, table)


if __name__ == "__main__":
    run(main)
