"""How good are the digits? `python evaluate.py output/checkpoint.pt`, or a tensor of samples, prints a table."""

import sys
from argparse import ArgumentParser
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the folder that holds common/

from sample import SAMPLERS, draw, load_network

from common.checkpoint import load_tensor
from common.cli import check_positive, check_range, run
from common.digit_metrics import digit_report, print_report
from common.machine import choose_device, sampling_precision
from common.noise import SeededNoise


def main() -> None:
    """Reads the flags, draws the samples if a checkpoint is given, and prints the table."""
    parser = ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("path", help="a checkpoint, or samples (N, C, 28, 28) in [0, 1] saved by torch.save")
    parser.add_argument("--num", type=int, default=1000, help="how many samples to draw (default: 1000)")
    parser.add_argument("--seed", type=int, default=1, help="the same seed draws the same samples (default: 1)")
    parser.add_argument("--sampler", default="langevin", choices=SAMPLERS, help="(default: langevin)")
    parser.add_argument("--calls", type=int, help="network calls for each sample (default: the run's)")
    parser.add_argument("--save", help="also write the samples, as a tensor, to this file")
    options = parser.parse_args()
    check_range(options, "num", 4, 10_000)
    if options.calls is not None:
        check_positive(options, "calls")

    samples = load_tensor(options.path)
    if samples is None:
        network, checkpoint = load_network(options.path, choose_device("auto"))
        config, shape, L = checkpoint["config"], (options.num, *checkpoint["image_shape"]), len(network.sigmas)
        calls = options.calls or config["T"] * L
        precision = sampling_precision("auto", checkpoint, network)
        print(f"step {checkpoint['step']}, {options.sampler}, {calls} network calls, {precision}")
        noise = SeededNoise(options.seed, options.num)
        with tqdm(total=options.num * calls, unit=" calls", unit_scale=True) as bar:
            samples = draw(network, shape, noise, calls, config, precision, bar=bar)[-1].cpu()
    if options.save:
        torch.save(samples, options.save)
    print_report(digit_report(samples.clamp(0, 1)))


if __name__ == "__main__":
    run(main)
