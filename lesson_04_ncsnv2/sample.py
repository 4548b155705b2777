"""Draw from a trained network, fill in, walk between digits: `python sample.py`, and look at output/drawn.png."""

import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the folder that holds common/

from sampler import (
    annealed_langevin_dynamics,
    consistent_annealed_sampling,
    denoise,
    inpaint,
    langevin_step_size,
    smallest_eta,
    tweedie,
)
from score_network import ScoreNetwork

from common.checkpoint import load_checkpoint, load_weights
from common.cli import run
from common.errors import LessonError
from common.images import check_finite
from common.machine import choose_device, in_batches, sampling_precision
from common.play import choose_noise_scales, find_checkpoint, langevin_steps, play, print_info, read_flags

FOLDER = Path(__file__).resolve().parent
LESSON = FOLDER.name
NETWORK_OPTIONS = ("width", "patch", "blocks", "activation", "skip")  # fields of train_mnist.Config
SAMPLERS = ("consistent", "langevin")
ETA = 0.4  # of consistent annealed sampling: less leaves noise in a few images, more makes them less varied


def load_network(path: str | Path, device: torch.device) -> tuple[ScoreNetwork, dict]:
    """The network in a checkpoint, with its averaged weights, and the checkpoint. LessonError if it cannot be used."""
    checkpoint = load_checkpoint(path, LESSON, device, needs=("ema", "config", "image_shape", "step"))
    config, sigmas = checkpoint["config"], checkpoint["ema"]["sigmas"]
    options = {name: config[name] for name in NETWORK_OPTIONS}
    network = ScoreNetwork(sigmas, checkpoint["image_shape"][0], **options)
    load_weights(network, checkpoint["ema"], path)
    return network.to(device, memory_format=torch.channels_last).eval(), checkpoint


@torch.no_grad()
def draw(network, shape: tuple, noise, sampler: str, calls: int, precision: str, stop=(), bar=None) -> list[Tensor]:
    """Images of `shape` (N, C, H, W) after each noise scale and, last, denoised; ends early if `stop` becomes true.

    noise(x): normal noise like x, as from common.noise; calls: network calls for each image; `bar` is told of each.
    With fewer calls than noise scales, consistent sampling takes some of the scales only, evenly chosen.
    """
    sigmas, frames = network.sigmas, []
    score = in_batches(network, precision, sigmas.device, bar)
    x = sigmas[0] * noise(torch.empty(shape, device=sigmas.device))
    if sampler == "langevin":
        T = langevin_steps(calls, len(sigmas), 1)
        steps = annealed_langevin_dynamics(score, x, sigmas, T, langevin_step_size(sigmas, T), noise)
    elif calls < 3:
        raise LessonError(f"--calls {calls}: consistent sampling needs at least 3, two noise scales and one to denoise")
    else:
        some = choose_noise_scales(sigmas, calls - 1)
        epsilon = max(ETA, smallest_eta(sigmas[some])) * float(sigmas[-1]) ** 2
        T = (calls - 1) // len(some)
        steps = consistent_annealed_sampling(lambda x, i: score(x, some[i]), x, sigmas[some], T, epsilon, noise)
    for frame in steps:
        frames.append(frame)
        if stop:
            return frames
    check_finite(frames[-1])
    return [*frames, denoise(score, frames[-1], sigmas)]


def main() -> None:
    """Reads the flags, and makes the pictures that they ask for."""
    options, device = read_flags(__doc__, SAMPLERS), choose_device("auto")
    path = find_checkpoint(options.checkpoint, FOLDER)
    network, checkpoint = load_network(path, device)
    if options.info:
        return print_info(checkpoint, network, path)
    sigmas = network.sigmas
    T = checkpoint["config"]["T"] if options.sampler == "langevin" else 1
    calls = options.calls or T * len(sigmas) + 1
    precision = sampling_precision(options.precision, checkpoint, network)

    def sample(shape, noise, bar):
        return draw(network, shape, noise, options.sampler, calls, precision, bar=bar)

    def fill_in(y, known, noise, bar):
        score, start = in_batches(network, precision, device, bar), sigmas[0] * noise(y)
        T = langevin_steps(calls, len(sigmas), 1)
        *_, x = inpaint(score, y, known, start, sigmas, T, langevin_step_size(sigmas, T), noise)
        return denoise(score, x, sigmas) * (1 - known) + y * known

    def guess(x, i):
        return tweedie(in_batches(network, precision, device), x, sigmas, i)

    play(options, checkpoint, sigmas, calls, sample, fill_in, guess)


if __name__ == "__main__":
    run(main)
