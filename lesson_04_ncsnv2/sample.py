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
    tweedie,
)
from score_network import ScoreNetwork

from common.checkpoint import load_checkpoint, load_weights
from common.cli import run
from common.errors import LessonError
from common.images import check_finite
from common.machine import choose_device, in_batches, sampling_precision
from common.play import find_checkpoint, play, print_info, read_flags

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


def langevin_steps(calls: int, L: int) -> int:
    """T, how many steps at each of L noise scales make, with the last denoising step, at most `calls` network calls.

    LessonError for less than one.
    """
    if calls < L + 1:
        raise LessonError(f"--calls {calls}: Langevin dynamics needs at least {L + 1}, one for each scale and one more")
    return (calls - 1) // L


@torch.no_grad()
def draw(network, shape: tuple, noise, sampler: str, calls: int, precision: str, stop=(), bar=None) -> list[Tensor]:
    """Images of `shape` (N, C, H, W) after each noise scale and, last, denoised; ends early if `stop` becomes true.

    noise(x): normal noise like x, as from common.noise; calls: network calls for each image; `bar` is told of each.
    With fewer calls than noise scales, consistent sampling takes some of the scales only, evenly chosen.
    """
    sigmas, frames, L = network.sigmas, [], len(network.sigmas)
    score = in_batches(network, precision, sigmas.device, bar)
    x = sigmas[0] * noise(torch.empty(shape, device=sigmas.device))
    if sampler == "langevin":
        T = langevin_steps(calls, L)
        steps = annealed_langevin_dynamics(score, x, sigmas, T, langevin_step_size(sigmas, T), noise)
    elif calls < 3:
        raise LessonError(f"--calls {calls}: consistent sampling needs at least 3, two noise scales and one to denoise")
    else:
        some = torch.linspace(0, L - 1, min(L, calls - 1), device=sigmas.device).round().long()
        eta = max(ETA, 1 - float((sigmas[some][1:] / sigmas[some][:-1]).min()))
        epsilon, T = eta * float(sigmas[-1]) ** 2, (calls - 1) // len(some)
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
    precision = sampling_precision(
        options.precision, checkpoint["config"]["precision"], network, checkpoint["image_shape"]
    )

    def sample(shape, noise, bar):
        return draw(network, shape, noise, options.sampler, calls, precision, bar=bar)

    def fill_in(y, known, noise, bar):
        score, start = in_batches(network, precision, device, bar), sigmas[0] * noise(y)
        T = langevin_steps(calls, len(sigmas))
        *_, x = inpaint(score, y, known, start, sigmas, T, langevin_step_size(sigmas, T), noise)
        return denoise(score, x, sigmas) * (1 - known) + y * known

    def guess(x, i):
        return tweedie(in_batches(network, precision, device), x, sigmas, i)

    play(options, checkpoint, sigmas, calls, sample, fill_in, guess)


if __name__ == "__main__":
    run(main)
