"""Draw from a trained network, fill in, walk between digits: `python sample.py`, and look at output/drawn.png."""

import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the folder that holds common/

from sampler import annealed_langevin_dynamics, inpaint, langevin_step_size, tweedie
from score_network import ScoreNetwork

from common.checkpoint import load_checkpoint, load_weights
from common.cli import run
from common.images import check_finite
from common.machine import choose_device, in_batches, sampling_precision
from common.play import find_checkpoint, langevin_steps, play, print_info, read_flags

FOLDER = Path(__file__).resolve().parent
LESSON = FOLDER.name
NETWORK_OPTIONS = ("width", "patch", "blocks", "activation", "skip")  # fields of train_mnist.Config
SAMPLERS = ("langevin",)
QUICK_T = 15  # Langevin steps at each noise scale when a picture should not take long; the paper has 100


def load_network(path: str | Path, device: torch.device) -> tuple[ScoreNetwork, dict]:
    """The network in a checkpoint, and the checkpoint. LessonError if it cannot be used."""
    checkpoint = load_checkpoint(path, LESSON, device, needs=("network", "config", "image_shape", "step"))
    config, sigmas = checkpoint["config"], checkpoint["network"]["sigmas"]
    options = {name: config[name] for name in NETWORK_OPTIONS}
    network = ScoreNetwork(sigmas, checkpoint["image_shape"][0], **options)
    load_weights(network, checkpoint["network"], path)
    return network.to(device, memory_format=torch.channels_last).eval(), checkpoint


@torch.no_grad()
def draw(network, shape: tuple, noise, calls: int, config: dict, precision: str, stop=(), bar=None) -> list[Tensor]:
    """Images of `shape` (N, C, H, W) after each noise scale; ends early if `stop` becomes true.

    noise(x): normal noise like x, as from common.noise; calls: network calls for each image; `bar` is told of each;
    config: has the T and epsilon of the training run.
    """
    sigmas, frames = network.sigmas, []
    T = langevin_steps(calls, len(sigmas))
    epsilon = langevin_step_size(sigmas, T, config["T"], config["epsilon"])
    score = in_batches(network, precision, sigmas.device, bar)
    x = torch.special.ndtr(noise(torch.empty(shape, device=sigmas.device)))  # uniform in [0, 1]
    for frame in annealed_langevin_dynamics(score, x, sigmas, T, epsilon, noise):
        frames.append(frame)
        if stop:
            return frames
    check_finite(frames[-1])
    return frames


def main() -> None:
    """Reads the flags, and makes the pictures that they ask for."""
    options, device = read_flags(__doc__, SAMPLERS), choose_device("auto")
    path = find_checkpoint(options.checkpoint, FOLDER)
    network, checkpoint = load_network(path, device)
    if options.info:
        return print_info(checkpoint, network, path)
    sigmas, config = network.sigmas, checkpoint["config"]
    calls = options.calls or min(QUICK_T, config["T"]) * len(sigmas)
    precision = sampling_precision(options.precision, checkpoint, network)

    def sample(shape, noise, bar):
        return draw(network, shape, noise, calls, config, precision, bar=bar)

    def fill_in(y, known, noise, bar):
        score, start = in_batches(network, precision, device, bar), torch.special.ndtr(noise(y))
        T = langevin_steps(calls, len(sigmas))
        epsilon = langevin_step_size(sigmas, T, config["T"], config["epsilon"])
        *_, x = inpaint(score, y, known, start, sigmas, T, epsilon, noise)
        return x * (1 - known) + y * known

    def guess(x, i):
        return tweedie(in_batches(network, precision, device), x, sigmas, i)

    play(options, checkpoint, sigmas, calls, sample, fill_in, guess)


if __name__ == "__main__":
    run(main)
