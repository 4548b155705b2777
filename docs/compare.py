"""The five lessons on equal terms: `python docs/compare.py`, or names of some of its experiments.

`calls`, `many calls`, `bits` and `cost` take the weights of the lesson runs: pretrained.pt is seed 0, and seed 1 and 2
are in output_1 and output_2 of a lesson's folder (`python train_mnist.py --seed 1 --output output_1`). `ten minutes`
and `ten minutes, bits` take output_ten (`python train_mnist.py --minutes 10 --output output_ten`), and output_ten_1 to
output_ten_4 (the same with `--seed 1`, or the `--steps` that the first run found). What is not there is left out.
`backbone` trains. Adds lines to docs/compare.csv after each measurement, and leaves out those that are there; `python
docs/figures.py compare` makes a picture of them. The seed of a line is that of the training.
"""

import os
import subprocess
import sys
import tempfile
import time
from argparse import ArgumentParser, Namespace
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import ddpm
import improved_ddpm
import origin
import score_sde
from techniques import Table, judged, train_lesson

from common.checkpoint import load_lesson, load_network
from common.cli import run
from common.config import check_choice, check_range
from common.data import load_images
from common.errors import LessonError
from common.machine import choose_device, sampling_precision
from common.play import sample_all
from lesson_05_ddpm.likelihood import bits_per_dim as bound_in_bits
from lesson_05_ddpm.noise_network import NoiseNetwork
from lesson_07_score_sde.likelihood import bits_per_dim, dequantise, log_likelihood

SAMPLERS = {  # a lesson's best sampler of about 10, 25, 50, 100 and 1000 network calls
    "lesson_03_ncsn": [("langevin", K) for K in (10, 20, 50, 100, 1000)],
    "lesson_04_ncsnv2": [*(("consistent", K) for K in (10, 25, 50, 97)), ("langevin", 961)],
    "lesson_05_ddpm": [("ancestral", K) for K in (10, 25, 50, 100, 1000)],
    "lesson_07_score_sde": [("heun", 9), *(("consistent", K) for K in (25, 50, 100)), ("predictor_corrector", 999)],
    "lesson_09_improved_ddpm": [("ancestral", K) for K in (10, 25, 50, 100, 1000)],
}
WITH_BITS = ("lesson_05_ddpm", "lesson_07_score_sde", "lesson_09_improved_ddpm")
FEW_STEPS = 800  # of `backbone`, with BATCH images each: a fifth of a lesson run
BATCH = 128


def checkpoint(name: str, seed: int, experiment: str = "calls") -> Path:
    """Where the weights of a lesson's run are."""
    if experiment.startswith("ten minutes"):
        return ROOT / name / ("output_ten" + f"_{seed}" * (seed > 0)) / "checkpoint.pt"
    return ROOT / name / ("pretrained.pt" if seed == 0 else f"output_{seed}/checkpoint.pt")


def score(table: Table, setting: str, K: int, lesson: ModuleType, network, config, shape, sampler: str) -> None:
    """Adds digit FID, precision and recall of n samples, of the image seeds 1, 2, ..."""
    number_format = sampling_precision("auto", config.precision, choose_device())
    images, _ = sample_all(lesson, network, config, (table.n, *shape), 1, sampler, K, number_format)
    table.add(setting, K, **judged(images))


def calls(name: str, table: Table) -> None:
    """How good are the digits after so many network calls, by the lesson's best sampler for them?"""
    few, many, path = SAMPLERS[name][:4], SAMPLERS[name][4:], checkpoint(name, table.seed, table.experiment)
    if not path.is_file():
        return print(f"  {path} is not there: left out")
    wanted = {"calls": few, "many calls": many, "ten minutes": few + many}[table.experiment]
    for sampler, K in wanted[: 1 if table.smoke else None]:
        for _ in table.missing(f"{name}, {sampler}", [K]):
            lesson = load_lesson(name)
            network, config, found = load_network(lesson, path, choose_device())
            score(table, f"{name}, {sampler}", K, lesson, network, config, found["image_shape"], sampler)


def bits(name: str, path: Path, images: Tensor, seed: int) -> float:
    """Bits/dim of images (B, 1, 28, 28) in [0, 1]: the bound of lesson 5 (small variance) or 9, the ODE of 7."""
    noise = torch.Generator(images.device).manual_seed(seed)
    if name == "lesson_07_score_sde":
        seven, x = score_sde.load(name, str(path)), dequantise(images, noise)
        log_p = [log_likelihood(seven.float32, part, 0.001, seven.sigma_max, generator=noise) for part in x.split(100)]
        return float(bits_per_dim(torch.cat(log_p), images[0].numel()).mean())
    found, x_0 = ddpm.load(name, str(path)), 2 * images - 1
    if name == "lesson_09_improved_ddpm":
        return float(improved_ddpm.bound(found, x_0, min(1000, len(found.betas)), seed)["learned"].sum())
    return float(bound_in_bits(found.float32, x_0, found.betas, "small", generator=noise).sum(1).mean())


def likelihood(name: str, table: Table) -> None:
    """How many bits per dimension do the same test digits take, with lessons 5, 7 and 9?"""
    path = checkpoint(name, table.seed, table.experiment)
    if name not in WITH_BITS:
        return
    if not path.is_file():
        return print(f"  {path} is not there: left out")
    for _ in table.missing(name, [0]):
        images = load_images("mnist", "test")[:: 10_000 // table.n][: table.n].to(choose_device()) / 255
        table.add(name, 0, bits=bits(name, path, images, seed=1))


def timed(*command) -> tuple[float, float]:
    """The seconds that a command takes in a process of its own, and the gigabytes of memory at most.

    At most, because Linux counts what this script itself has when it starts the process.
    """
    begin = time.perf_counter()
    process = subprocess.Popen([sys.executable, *map(str, command)], stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)  # of this process alone, and not of all before it
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise LessonError(f"{Path(command[0]).name} failed, with status {process.returncode}")
    return time.perf_counter() - begin, used.ru_maxrss / 1e6  # kilobytes, on Linux


def cost(name: str, table: Table) -> None:
    """What does a lesson run take? Parameters, images, images a second, gigabytes; seconds for 64 digits, 100 calls."""
    if not table.missing(name, [0]):
        return
    lesson = load_lesson(name)
    network, _, found = load_network(lesson, checkpoint(name, 0), choose_device())
    config = found["config"]
    sampler, K = SAMPLERS[name][3]
    with tempfile.TemporaryDirectory() as folder:
        flags = ROOT / name / "train_mnist.py", "--preview-every", 10_000, "--output", folder, "--overwrite"
        (few, _), (more, gigabytes) = (timed(*flags, "--steps", steps) for steps in (20, 140))
        sampling = ROOT / name / "sample.py", "--sampler", sampler, "--output", f"{folder}/drawn.png"
        startup, _ = timed(ROOT / name / "sample.py", "--info")
        seconds, _ = timed(*sampling, "--calls", K, "--checkpoint", checkpoint(name, 0))
    table.add(
        name,
        0,
        parameters=sum(p.numel() for p in network.parameters()),
        images=config["steps"] * config["batch_size"],
        rate=120 * config["batch_size"] / (more - few),
        gigabytes=gigabytes,
        seconds=seconds - startup,
    )


class Backbone(nn.Module):
    """Lesson 5's network in the place of a lesson's own: it gets images of unit size, and returns noise or a score.

    For a lesson with a ladder of scales, `sigmas` (L,), or with `sigma_max`, the score is -eps / sigma, of images
    c x with c = 1 / sqrt(0.2 + mean x^2). Told: the position of sigma on the ladder, from 0 to 1000, in place of t.
    """

    def __init__(self, channels: int, weights: dict, told: bool):
        super().__init__()
        self.network, self.told = NoiseNetwork(channels, width=32, levels=2, blocks=1, patch=2), told
        for name in ("sigmas", "sigma_max"):
            if name in weights:
                self.register_buffer(name, torch.as_tensor(weights[name]).clone())

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        """x (B, C, H, W) noisy images, level (B,): i of a ladder, or sigma; returns the score (B, C, H, W)."""
        if hasattr(self, "sigmas"):
            sigma, place = self.sigmas[level], level / len(self.sigmas)
        else:
            sigma, place = level, (self.sigma_max / level).log() / (self.sigma_max / 0.001).log()
        c = torch.rsqrt(0.2 + x.square().mean(dim=(1, 2, 3), keepdim=True))  # (B, 1, 1, 1)
        t = 1000 * place if self.told else torch.zeros_like(sigma)
        return -self.network(c * x, t) / sigma[:, None, None, None]


def backbone(name: str, table: Table) -> None:
    """How good are the digits if all lessons have lesson 5's network, and the same number of images?"""
    steps, batch_size = (3, 8) if table.smoke else (FEW_STEPS, BATCH)
    if not table.missing(f"{name}, {SAMPLERS[name][2][0]}", [SAMPLERS[name][2][1]]):
        return
    make = lambda config, channels, weights: Backbone(channels, weights, told=name != "lesson_04_ncsnv2")
    make = None if "ddpm" in name else make  # lessons 5 and 9 have it already
    changes = {"scale_shift": False} if name == "lesson_09_improved_ddpm" else {}
    lesson, training = train_lesson(name, make, steps=steps, batch_size=batch_size, seed=table.seed, **changes)
    network = training.parts.get("ema", training.parts["network"]).eval()
    for sampler, K in SAMPLERS[name][2:4]:
        K = min(K, 20) if table.smoke else K
        score(table, f"{name}, {sampler}", K, lesson, network, training.config, training.image_shape, sampler)


EXPERIMENTS = {  # and how many images and seeds each takes
    "calls": (calls, 1000, 3),
    "cost": (cost, 64, 1),
    "backbone": (backbone, 1000, 3),
    "many calls": (calls, 1000, 3),
    "bits": (likelihood, 500, 3),
    "ten minutes": (calls, 1000, 5),
    "ten minutes, bits": (likelihood, 500, 5),
}


def read_options(parser: ArgumentParser, experiments: dict) -> Namespace:
    """The flags of `parser`, and which experiments and lessons: all if none is named. LessonError for others."""
    parser.add_argument("names", nargs="*", metavar="name", help=f"of {', '.join(experiments)} (default: all)")
    parser.add_argument("--lessons", nargs="*", default=list(SAMPLERS), metavar="folder", help="(default: all five)")
    parser.add_argument("--smoke", action="store_true", help="a few steps and few images: tests the script")
    options = parser.parse_args()
    for each in options.names:
        check_choice("experiment", each, experiments)
    for name in options.lessons:
        check_choice("--lessons", name, SAMPLERS)
    options.names = options.names or list(experiments)
    return options


def main() -> None:
    """Measures what is missing in the file."""
    parser = ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--num", type=int, help="how many images (default: 1000)")
    parser.add_argument("--output", type=Path, default=ROOT / "docs", help="folder of compare.csv (default: docs)")
    options = read_options(parser, EXPERIMENTS)
    if options.num is not None:
        check_range("--num", options.num, 4, 10_000)
    origin.check_place(options.output / "compare.csv", options.smoke)
    for each in options.names:
        function, n, seeds = EXPERIMENTS[each]
        print(f"{each}: {function.__doc__}", flush=True)
        n = options.num or (8 if options.smoke else n)
        for seed in range(1 if options.smoke else seeds):
            for name in options.lessons:
                function(name, Table(options.output / "compare.csv", each, n, seed, False, options.smoke))


if __name__ == "__main__":
    run(main)
