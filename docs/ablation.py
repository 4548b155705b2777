"""From lesson 3 to lesson 4, one technique after another: `python docs/ablation.py` trains, samples and prints a table.

Row r has the first r of the changes in ROWS. The same in all rows: the number of training images, which are not
dequantised; noise scales drawn equally often; the optimiser; the width of the network; network calls for a picture.
The lesson runs' skip around the network is off: with lesson 3's network it does not learn noise scales far above 1.
The weights of rows 3 to 6 come from one training, so a seed takes four trainings.

The same command goes on where it was interrupted. Two processes can share the work: --rows 0,1,2 and --rows 3,4,5,6.
"""

import copy
import csv
import math
import sys
import time
from argparse import ArgumentParser, Namespace
from pathlib import Path
from statistics import mean

import torch
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the folder that holds common/ and the lessons

import lesson_03_ncsn.sampler as sampler_3
import lesson_03_ncsn.score_network as score_network_3
import lesson_04_ncsnv2.sampler as sampler_4
import lesson_04_ncsnv2.score_network as score_network_4
from common.checkpoint import load_checkpoint, save_checkpoint
from common.cli import run
from common.config import check_choice, check_range, flag_of
from common.data import load_images
from common.digit_metrics import digit_report
from common.errors import LessonError
from common.files import atomic_write
from common.images import save_grid
from common.machine import InBatches, autocast, choose_device, training_precision
from common.optimizer import Optimizer
from lesson_04_ncsnv2.loss import denoising_score_matching_loss
from lesson_04_ncsnv2.noise_scales import (
    geometric_noise_scales,
    largest_pairwise_distance,
    noise_scale_ratio,
    number_of_noise_scales,
)

ROWS = (
    "lesson 3",
    "+ Technique 1: sigma_1 is the largest distance",
    "+ Technique 2: L from the overlap",
    "+ Technique 3: one network for all scales, divided by sigma",
    "+ Technique 4: epsilon computed",
    "+ Technique 5: averaged weights",
    "+ the last denoising step",
)
SIGMA_L, D = 0.01, 28 * 28
SETTINGS = ("steps", "batch_size", "width", "decay", "skip")  # of a training; the networks in a folder share them
KEY = ("row", "seed", "step", *SETTINGS, "calls", "n")  # what tells one line of results.csv from another
MEASURES = ("fid", "floor", "precision", "recall")
COLUMNS = (*KEY, "L", "T", "epsilon", "train_seconds", "sample_seconds", *MEASURES)


def ladder(row: int, distance: float) -> Tensor:
    """The noise scales (L,) of a row; `distance` is the largest between two training images."""
    sigma_1 = distance if row >= 1 else 1.0
    L = number_of_noise_scales(sigma_1, SIGMA_L, noise_scale_ratio(D)) if row >= 2 else 10
    return geometric_noise_scales(sigma_1, SIGMA_L, L)


def make_network(row: int, sigmas: Tensor, options: Namespace, device: torch.device) -> torch.nn.Module:
    """The score network of a row, with the lesson run's options but for its width."""
    lesson = score_network_4 if row >= 3 else score_network_3
    network = lesson.ScoreNetwork(sigmas, 1, options.width, patch=2, blocks=1, activation="relu", skip=options.skip)
    return network.to(device, memory_format=torch.channels_last)


def training_step(network, optimizer, x: Tensor, i: Tensor, z: Tensor, precision: str, rate: float = 0.0) -> None:
    """One step with learning rate `rate` on images x, noise z (B, C, H, W) and noise scales i (B,)."""
    with autocast(x.device, precision):
        loss = denoising_score_matching_loss(network, x, network.sigmas, i, z).mean()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(network.parameters(), 0.1 * D)
    optimizer.step(rate)


def train(row: int, seed: int, images: Tensor, sigmas: Tensor, options: Namespace) -> dict:
    """Trains the network of a row: {"precision", "seconds", "snapshots": {step: {"raw": weights, "ema": weights}}}.

    A snapshot is taken after each quarter of the training.
    """
    device, B, steps = images.device, options.batch_size, options.steps
    torch.manual_seed(seed)
    generator = torch.Generator(device).manual_seed(seed)
    network = make_network(row, sigmas, options, device)
    ema = copy.deepcopy(network).requires_grad_(False)
    precision = training_precision(options.precision, device)
    optimizer, snapshots, begin = Optimizer(network, "muon"), {}, time.perf_counter()
    for step in tqdm(range(1, steps + 1), desc=f"training, row {row}, seed {seed}", unit=" steps"):
        x = images[torch.randint(len(images), (B,), generator=generator, device=device)] / 255  # (B, C, H, W)
        u = torch.rand(1, generator=generator, device=device)
        i = ((torch.arange(B, device=device) + u) / B * len(sigmas)).long().clamp(max=len(sigmas) - 1)  # (B,)
        z = torch.randn(x.shape, generator=generator, device=device)
        fall = 1.0 if options.decay == "constant" else 0.5 * (1 + math.cos(math.pi * (step - 1) / steps))
        training_step(network, optimizer, x, i, z, precision, 3e-3 * min(1.0, step / 100) * fall)
        d = min(0.995, (1 + step) / (10 + step))
        with torch.no_grad():
            for average, weights in zip(ema.parameters(), network.parameters(), strict=True):
                average.lerp_(weights, 1 - d)
        if step in quarters(steps):
            pair = {"raw": network, "ema": ema}
            snapshots[step] = {name: copy.deepcopy(module.state_dict()) for name, module in pair.items()}
    return {"precision": precision, "seconds": time.perf_counter() - begin, "snapshots": snapshots}


def quarters(steps: int) -> list[int]:
    """The steps after which a training saves its weights; the last is the last."""
    return [max(1, steps * k // 4) for k in (1, 2, 3, 4)]


@torch.no_grad()
def draw(row: int, network: torch.nn.Module, n: int, T: int, epsilon: float, precision: str, seed: int) -> Tensor:
    """n images (n, 1, 28, 28) by the sampler of a row, from the start that its lesson has."""
    sigmas = network.sigmas
    generator = torch.Generator(sigmas.device).manual_seed(seed)
    kind = torch.rand if row == 0 else torch.randn
    x = kind((n, 1, 28, 28), generator=generator, device=sigmas.device) * sigmas[0]  # row 0: sigma_1 = 1
    score = InBatches(network, precision)
    lesson = sampler_4 if row >= 4 else sampler_3  # lesson 4 writes alpha where lesson 3 has alpha / 2
    steps = lesson.annealed_langevin_dynamics(score, x, sigmas, T, epsilon, generator)
    *_, x = tqdm(steps, total=len(sigmas), desc=f"sampling, row {row}", unit=" noise scales")
    return sampler_4.denoise(score, x, sigmas) if row >= 6 else x


def measure(row: int, trained: dict, step: int, sigmas: Tensor, options: Namespace, key: dict, device) -> dict:
    """One line of results.csv: draws images with the weights after `step` and compares them with real digits."""
    T = options.calls // len(sigmas)
    epsilon = sampler_4.langevin_step_size(sigmas, T) if row >= 4 else 2e-5
    network = make_network(row, sigmas, options, device)
    network.load_state_dict(trained["snapshots"][step]["ema" if row >= 5 else "raw"])
    begin = time.perf_counter()
    samples = draw(row, network.eval(), options.num, T, epsilon, trained["precision"], key["seed"]).cpu()
    seconds = time.perf_counter() - begin
    line = {**key, "L": len(sigmas), "T": T, "epsilon": epsilon, "train_seconds": trained["seconds"]}
    line |= {"sample_seconds": seconds, **dict.fromkeys(MEASURES, math.nan)}
    if samples.isfinite().all():  # if not, the row has failed, and its measures stay "not a number"
        save_grid(samples[:32], Path(options.output) / f"row_{row}_seed_{key['seed']}_step_{step}.png", columns=8)
        report = digit_report(samples.clamp(0, 1))
        line |= {name: report["samples"][name] for name in MEASURES if name != "floor"}
        line["floor"] = report["floor"]["fid"]
    return line


def read_results(path: Path) -> list[dict]:
    """The lines of results.csv, each {column: text}; none if there is no such file."""
    return list(csv.DictReader(path.read_text().splitlines())) if path.is_file() else []


def write_table(lines: list[dict], options: Namespace) -> str:
    """A Markdown table of the rows measured after the last step: means, and the range where there are several seeds."""
    table = ["| | training s | calls | digit FID | precision | recall | seeds |", "| --- |" + " --- |" * 6]
    for row, title in enumerate(ROWS):
        found = [line for line in lines if int(line["row"]) == row]
        values = {name: [float(line[name]) for line in found] for name in ("train_seconds", *MEASURES)}
        cells = [f"{mean(values['train_seconds']):.0f}" if found else "-"]
        cells += [str(int(found[0]["L"]) * int(found[0]["T"]) + (row >= 6)) if found else "-"]
        for name, form in (("fid", ".1f"), ("precision", ".2f"), ("recall", ".2f")):
            v = values[name]
            several = f" ({min(v):{form}} to {max(v):{form}})" if len(v) > 1 else ""
            cells.append(f"{mean(v):{form}}{several}" if v else "-")
        table.append(f"| {title} | " + " | ".join(cells) + f" | {len(found)} |")
    floor = [float(line["floor"]) for line in lines if line["floor"] != "nan"]
    real = f"; {options.num} real digits score {mean(floor):.1f}" if floor else ""
    table += ["", f"n = {options.num} pictures a row, {options.steps * options.batch_size} training images{real}.", ""]
    return "\n".join(table)


def parse_options() -> Namespace:
    """The flags. `--smoke` changes the defaults, so that everything is tried in seconds."""
    parser = ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--smoke", action="store_true", help="few steps of a tiny network: tests this script")
    small = "--smoke" in sys.argv

    def number(flag, default, smoke, what):
        parser.add_argument(flag, type=int, default=smoke if small else default, help=f"{what} (default: {default})")

    number("--steps", 1500, 4, "training steps")
    number("--batch-size", 64, 8, "images in a step")
    number("--width", 32, 4, "channels of the network at full size")
    number("--calls", 480, 96, "network calls for a picture: T is this / L, rounded down")
    number("--num", 250, 4, "pictures drawn for each row")
    parser.add_argument("--rows", default="0,1,2,3,4,5,6", help="rows of the table (default: 0,1,2,3,4,5,6)")
    parser.add_argument("--seeds", default="0", help="e.g. 0,1,2; everything is done for each (default: 0)")
    parser.add_argument("--curve", action="store_true", help="also measure rows 4 and 5 after each quarter of training")
    parser.add_argument("--decay", default="cosine", help="of the learning rate: cosine or constant (default: cosine)")
    parser.add_argument("--skip", action="store_true", help="the lesson runs' skip around the network, in all rows")
    names = ("auto", "float32", "bfloat16")
    parser.add_argument("--precision", default="auto", choices=names, help="of the network (default: auto)")
    parser.add_argument("--output", default=str(Path(__file__).parent / "output"), help="folder (default: docs/output)")
    options = parser.parse_args()
    for name in ("steps", "batch_size", "calls"):
        check_range(flag_of(name), getattr(options, name))
    check_range("--width", options.width, 2, 4096)
    check_range("--num", options.num, 4, 10_000)
    check_choice("--decay", options.decay, ("cosine", "constant"))
    for name, choices in (("rows", range(len(ROWS))), ("seeds", range(1000))):
        words = getattr(options, name).split(",")
        if not all(word.isdecimal() and int(word) in choices for word in words):
            raise LessonError(f"--{name} {getattr(options, name)}: numbers from 0 to {choices[-1]} with commas between")
        setattr(options, name, sorted({int(word) for word in words}))
    return options


def main() -> None:
    """Reads the flags; trains and measures what results.csv does not hold yet; prints the table."""
    options = parse_options()
    folder, device = Path(options.output), choose_device()
    results, settings = folder / "results.csv", {name: getattr(options, name) for name in SETTINGS}
    images = load_images("mnist")[: 1000 if options.smoke else None].to(device)  # (N, 1, 28, 28) uint8
    distance = largest_pairwise_distance(images / 255)  # Technique 1
    ladders = {row: ladder(row, distance).to(device) for row in options.rows}
    L = max(map(len, ladders.values()))
    if options.calls < L:
        raise LessonError(f"--calls {options.calls}: at least {L}, one for each noise scale")
    shared = {**settings, "calls": options.calls, "n": options.num}

    for seed in options.seeds:
        for row in options.rows:
            sigmas, trained = ladders[row], None
            path = folder / f"network_{min(row, 3)}_seed_{seed}.pt"
            for step in quarters(options.steps) if options.curve and row in (4, 5) else [options.steps]:
                key = {"row": row, "seed": seed, "step": step, **shared}
                if any(all(line[name] == str(key[name]) for name in KEY) for line in read_results(results)):
                    continue
                if not path.is_file():
                    done = train(row, seed, images, sigmas, options)
                    save_checkpoint(path, "ablation", settings=settings, **done)
                trained = trained or load_checkpoint(path, "ablation")
                if trained["settings"] != settings:
                    raise LessonError(f"{path} was trained with other settings: {trained['settings']}; see --output")
                line = measure(row, trained, step, sigmas, options, key, device)
                new = not results.is_file()
                with results.open("a", newline="") as file:
                    writer = csv.DictWriter(file, COLUMNS)
                    if new:
                        writer.writeheader()
                    writer.writerow(line)

    shared["step"] = options.steps
    lines = [x for x in read_results(results) if all(x[name] == str(value) for name, value in shared.items())]
    table = write_table(lines, options)
    with atomic_write(folder / "table.md") as temporary:
        temporary.write_text(table)
    print(table)


if __name__ == "__main__":
    run(main)
