"""What to run on, and in which precision: chosen by what the machine does faster, never by its name."""

import functools
import platform
import re
import time
import warnings
from pathlib import Path

import torch
from torch import Tensor

from common.cli import Stopped
from common.errors import LessonError

CLEARLY = 1.25  # times as fast: so far from 1 that two timings on one machine come to the same choice


def choose_device(name: str = "auto") -> torch.device:
    """The torch device for "cpu", "cuda", "mps", or "auto": CUDA, then MPS, then the CPU. LessonError if absent."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    name = next(n for n in available if available[n]) if name == "auto" else name
    if not available[name]:
        raise LessonError(f"--device {name}: this machine or this build of PyTorch has none; try --device auto")
    return torch.device(name)


def describe(device: torch.device) -> str:
    """What numbers were measured on: the GPU, or the processor, whether it has bf16 and its threads; and PyTorch."""
    pytorch = f"PyTorch {torch.__version__.split('+')[0]}"
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, {pytorch}"
    about = Path("/proc/cpuinfo")  # Linux
    text = about.read_text() if about.is_file() else ""
    found = re.search(r"^model name\s*: (.*)", text, re.MULTILINE)
    name = found[1] if found else platform.processor() or platform.machine()
    threads = torch.get_num_threads()
    return f"{name}{' with bf16' * ('bf16' in text)}, {threads} thread{'s' * (threads > 1)}, {pytorch}"


def synchronize(device: torch.device) -> None:
    """Waits until the device has done what it was told."""
    if device.type != "cpu":
        torch.get_device_module(device).synchronize()


def autocast(device: torch.device, precision: str, cache: bool = True) -> torch.autocast:
    """The context in which a network runs in "bfloat16" or "float32"; `cache`: whether it keeps weights it has cast."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16", cache_enabled=cache)


def log_ndtr(x: Tensor) -> Tensor:
    """ln of the normal distribution function, exact far below 0 too; any shape. MPS has none: the CPU computes it."""
    return torch.special.log_ndtr(x.cpu() if x.device.type == "mps" else x).to(x.device)


@functools.cache
def bfloat16_speedup(device: torch.device) -> float:
    """How many times as fast as in float32 a matrix product is in bfloat16: the least of six times of each.

    The products are those of a convolution of 64 channels; 0 where bfloat16 does not work, as on an older macOS.
    """
    best = {}
    try:
        for dtype in (torch.float32, torch.bfloat16):
            a = torch.ones(8 if device.type == "cpu" else 1024, 256, 576, dtype=dtype, device=device)
            times = []
            for _ in range(7):
                begin = time.perf_counter()
                a @ a[0, :64].mT
                synchronize(device)
                times.append(time.perf_counter() - begin)
            best[dtype] = min(times[1:])
    except (RuntimeError, TypeError):
        return 0.0
    return best[torch.float32] / best[torch.bfloat16]


def training_precision(name: str, device: torch.device) -> str:
    """The precision to train in: `name`, or if that is "auto", bfloat16 where it is clearly faster."""
    if name != "auto":
        return name
    return "bfloat16" if bfloat16_speedup(device) > CLEARLY else "float32"


def sampling_precision(name: str, trained: str, device: torch.device) -> str:
    """The precision to sample in: `name`, or if that is "auto", that of the training, so that a seed keeps its picture.

    Only where bfloat16 is clearly slower than float32, on a machine without a unit for it, is it float32.
    """
    if name == "auto" and trained == "bfloat16" and bfloat16_speedup(device) < 1 / CLEARLY:
        return "float32"
    return trained if name == "auto" else name


def train_as_graph(network: torch.nn.Module, precision: str) -> None:
    """Lets a GPU run a network, forward and backward, as one CUDA graph each: the same values, several times as fast.

    Without it Python starts thousands of small operations in each step, and the GPU waits for Python. The graph is
    recorded at the first call with gradients. Calls without, and with another number of images, run as before.
    """
    plain, graph, shape = network.forward, None, None

    def forward(x, level):
        nonlocal graph, shape
        if not torch.is_grad_enabled() or (graph and x.shape != shape):
            return plain(x, level)
        if not graph:
            network.forward = plain
            with autocast(x.device, precision, cache=False), warnings.catch_warnings():
                warnings.filterwarnings("ignore", "The AccumulateGrad node's stream")  # of PyTorch's own warm-up
                graph = torch.cuda.make_graphed_callables(network, (x.clone(), level.clone())).forward
            network.forward, shape = forward, x.shape
        return graph(x, level)

    network.forward = forward


class InBatches:
    """A network to sample with: it takes any number of images, and runs at most `batch_size` at once, in `precision`.

    Called as the network is, with x (N, C, H, W) and the noise level of each (N,); returns what that returns, a tensor
    or several. Its attributes are the network's. `bar`, if there is one, is told how many images each call took. Raises
    Stopped once `stop` is true. Without a batch_size it is 100 on a CPU, for its caches, and 400 elsewhere: a GPU is
    done with 100 before Python has asked for the next layer.
    """

    def __init__(self, network: torch.nn.Module, precision: str, bar=None, batch_size: int | None = None, stop=False):
        self.network, self.precision, self.bar, self.batch_size = network, precision, bar, batch_size
        self.stop = stop

    def __call__(self, x: Tensor, level: Tensor) -> Tensor:
        parts = []
        batch_size = self.batch_size or (100 if x.device.type == "cpu" else 400)
        for a, b in zip(x.split(batch_size), level.split(batch_size), strict=True):
            if self.stop:
                raise Stopped
            with autocast(x.device, self.precision):
                parts.append(self.network(a, b))
            if self.bar is not None:
                self.bar.update(len(a))
        return torch.cat(parts) if isinstance(parts[0], Tensor) else tuple(map(torch.cat, zip(*parts, strict=True)))

    def __getattr__(self, name):
        return getattr(self.network, name)
