"""Other people's code on the digits, for as much processor time as a lesson run has: `python docs/others.py NAME`.

NAME is denoising-diffusion-pytorch or smalldiffusion. Neither is in the requirements of this project: make an
environment of its own for it, outside this folder, with `pip install -r requirements.txt` and

    denoising-diffusion-pytorch==2.3.4                     or    smalldiffusion==0.5.0

Each is used as its README or its example for small gray pictures says, but for what the comments here name. Writes the
samples as a tensor, for `python -m common.evaluate`.
"""

import math
import sys
import time
from argparse import ArgumentParser
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from common.cli import run
from common.config import check_choice, check_range
from common.data import load_images
from common.files import atomic_write, check_writable


class Budget:
    """`left()` until `minutes` of processor time are over; `images` counts what was trained on."""

    def __init__(self, minutes: float):
        self.minutes, self.began, self.images = minutes, time.process_time(), 0

    def left(self) -> bool:
        """Whether there is time for one more step."""
        return time.process_time() < self.began + 60 * self.minutes


def denoising_diffusion_pytorch(budget: Budget, num: int) -> Tensor:
    """Its U-Net and GaussianDiffusion, with the numbers of its README's Trainer; 50 calls of its DDIM."""
    from denoising_diffusion_pytorch import GaussianDiffusion, Unet
    from ema_pytorch import EMA

    x = F.pad(load_images("mnist"), (2, 2, 2, 2))  # to 32 pixels: its network needs a multiple of 8
    network = Unet(dim=64, dim_mults=(1, 2, 4, 8), channels=1)
    diffusion = GaussianDiffusion(network, image_size=32, timesteps=1000, sampling_timesteps=50)
    optimizer = torch.optim.Adam(diffusion.parameters(), lr=8e-5, betas=(0.9, 0.99))
    ema = EMA(diffusion, beta=0.995, update_every=10)
    while budget.left():
        for _ in range(2):  # gradient_accumulate_every, of batches of 32
            (diffusion(x[torch.randint(len(x), (32,))] / 255) / 2).backward()
        torch.nn.utils.clip_grad_norm_(diffusion.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.update()
        budget.images += 64
    torch.manual_seed(1)
    with torch.no_grad():
        samples = torch.cat([ema.ema_model.eval().sample(batch_size=50) for _ in range(math.ceil(num / 50))])
    return samples[:num, :, 2:-2, 2:-2]


def smalldiffusion(budget: Budget, num: int) -> Tensor:
    """Its example fashion_mnist_unet.py; 20 calls of its sampler."""
    from accelerate import Accelerator
    from smalldiffusion import Scaled, ScheduleLogLinear, Unet, samples, training_loop
    from torch_ema import ExponentialMovingAverage

    accelerator = Accelerator(cpu=True)
    x = 2 * load_images("mnist") / 255 - 1  # without the flips: digits have none
    batches = torch.utils.data.DataLoader(x, batch_size=128, shuffle=True)  # its 1024 need more than 17 GB
    schedule = ScheduleLogLinear(sigma_min=0.01, sigma_max=20, N=800)
    network = Scaled(Unet)(28, 1, 1, ch=64, ch_mult=(1, 1, 2), attn_resolutions=(14,))
    ema = ExponentialMovingAverage(network.parameters(), decay=0.999)
    for _ in training_loop(batches, network, schedule, epochs=1000, lr=7e-4, accelerator=accelerator):
        ema.update()
        budget.images += 128
        if not budget.left():
            break
    torch.manual_seed(1)
    how = {"gam": 1.6, "batchsize": 250, "accelerator": accelerator}
    with ema.average_parameters(), torch.no_grad():
        network.eval()
        parts = [list(samples(network, schedule.sample_sigmas(20), **how))[-1] for _ in range(math.ceil(num / 250))]
    return (torch.cat(parts)[:num] + 1) / 2


CODES = {"denoising-diffusion-pytorch": denoising_diffusion_pytorch, "smalldiffusion": smalldiffusion}


def main() -> None:
    """Trains, samples, and says what comes next."""
    parser = ArgumentParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument("name", help=f"one of {', '.join(CODES)}")
    parser.add_argument("--minutes", type=float, default=15.5, help="of processor time (default: 15.5)")
    parser.add_argument("--num", type=int, default=500, help="how many samples (default: 500)")
    parser.add_argument("--output", type=Path, default=Path("others.pt"), help="for the samples (default: others.pt)")
    options = parser.parse_args()
    check_choice("code", options.name, CODES)
    check_range("--minutes", options.minutes)
    check_range("--num", options.num, 4, 10_000)
    check_writable(options.output)  # now, not after the work
    torch.manual_seed(0)
    budget = Budget(options.minutes)
    samples = CODES[options.name](budget, options.num)
    with atomic_write(options.output) as temporary:
        torch.save(samples.clamp(0, 1).cpu().contiguous(), temporary)
    print(f"{options.name}: trained on {budget.images} images; now: python -m common.evaluate {options.output}")


if __name__ == "__main__":
    run(main)
