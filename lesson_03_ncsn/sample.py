"""Draw digits from a trained network: `python sample.py`, and look at output/drawn.png."""

import sys
from argparse import ArgumentParser
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the folder that holds common/

from sampler import annealed_langevin_dynamics
from score_network import ScoreNetwork

from common.checkpoint import load_checkpoint, load_weights
from common.cli import check_positive, run
from common.images import check_finite, save_grid
from common.machine import choose_device, in_batches

LESSON = Path(__file__).resolve().parent.name
NETWORK_OPTIONS = ("width", "patch", "blocks", "activation", "skip")  # fields of train_mnist.Config


def load_network(path: str | Path, device: torch.device) -> tuple[ScoreNetwork, dict]:
    """The network in a checkpoint, and the checkpoint. LessonError if it cannot be used."""
    checkpoint = load_checkpoint(path, LESSON, device)
    config, sigmas = checkpoint["config"], checkpoint["network"]["sigmas"]
    options = {name: config[name] for name in NETWORK_OPTIONS}
    network = ScoreNetwork(sigmas, checkpoint["image_shape"][0], **options)
    load_weights(network, checkpoint["network"], path)
    return network.to(device, memory_format=torch.channels_last).eval(), checkpoint


@torch.no_grad()
def draw(
    network: ScoreNetwork, shape: tuple, T: int, epsilon: float, precision: str, seed: int, stop=(), bar=None
) -> list[Tensor]:
    """Images of `shape` (N, C, H, W) after each noise scale; ends early if `stop` becomes true.

    The same seed gives the same images. `bar`, if there is one, is told of each network call.
    """
    sigmas, frames = network.sigmas, []
    generator = torch.Generator(sigmas.device).manual_seed(seed)  # its own, so that a training's is left alone
    score = in_batches(network, precision, sigmas.device, bar)
    x = torch.rand(shape, generator=generator, device=sigmas.device)
    for frame in annealed_langevin_dynamics(score, x, sigmas, T, epsilon, generator):
        frames.append(frame)
        if stop:
            return frames
    check_finite(frames[-1])
    return frames


def main() -> None:
    """Reads the flags and writes one picture."""
    parser = ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--checkpoint", default="output/checkpoint.pt", help="what train_mnist.py wrote")
    parser.add_argument("--num", type=int, default=64, help="how many images (default: 64)")
    parser.add_argument("--seed", type=int, default=1, help="the same seed draws the same images (default: 1)")
    parser.add_argument("--T", type=int, default=100, help="Langevin steps at each noise scale (default: 100)")
    parser.add_argument("--epsilon", type=float, default=2e-5, help="step size at sigma_L (default: 2e-5)")
    parser.add_argument("--output", default="output/drawn.png", help="the picture (default: output/drawn.png)")
    options = parser.parse_args()
    check_positive(options, "num", "T", "epsilon")

    network, checkpoint = load_network(options.checkpoint, choose_device("auto"))
    shape, precision = (options.num, *checkpoint["image_shape"]), checkpoint["config"]["precision"]
    with tqdm(total=options.num * options.T * len(network.sigmas), unit=" calls", unit_scale=True) as bar:
        images = draw(network, shape, options.T, options.epsilon, precision, options.seed, bar=bar)[-1]
    save_grid(images.cpu(), options.output)
    print(f"step {checkpoint['step']} of {options.checkpoint}; look at {options.output}")


if __name__ == "__main__":
    run(main)
