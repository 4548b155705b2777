"""What to run on, and in which precision: chosen by what the machine does faster, never by its name."""

import contextlib
import time
from collections.abc import Callable

import torch
from torch import Tensor

from common.errors import LessonError

DEVICES = ("auto", "cpu", "cuda", "mps")
PRECISIONS = ("auto", "float32", "bfloat16")


def choose_device(name: str) -> torch.device:
    """The torch device for a name in DEVICES; "auto" takes CUDA, then MPS, then the CPU. LessonError if absent."""
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        name = next(n for n in ("cuda", "mps", "cpu") if available[n])
    if name not in available:
        raise LessonError(f"--device {name}: choose one of {', '.join(DEVICES)}")
    if not available[name]:
        raise LessonError(f"--device {name}: this machine or this build of PyTorch has none; try --device auto")
    return torch.device(name)


def autocast(device: torch.device, precision: str):
    """The context in which a network runs: bfloat16 autocast, or none for float32."""
    if precision == "bfloat16":
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return contextlib.nullcontext()


def seconds_per_step(step, device: torch.device, repeats: int = 3) -> float:
    """The least wall time of `repeats` calls of `step()`, after one that is not counted."""
    times = []
    for _ in range(1 + repeats):
        begin = time.perf_counter()
        step()
        if device.type != "cpu":
            torch.get_device_module(device).synchronize()
        times.append(time.perf_counter() - begin)
    return min(times[1:])


def choose_precision(name: str, device: torch.device, step) -> tuple[str, float]:
    """The precision to train in, and the seconds that one `step(precision)` takes in it.

    "auto" times both and takes the faster. LessonError for a name that is not in PRECISIONS.
    """
    if name not in PRECISIONS:
        raise LessonError(f"--precision {name}: choose one of {', '.join(PRECISIONS)}")
    names = PRECISIONS[1:] if name == "auto" else (name,)
    seconds = {name: seconds_per_step(lambda: step(name), device) for name in names}  # noqa: B023
    fastest = min(seconds, key=seconds.get)
    return fastest, seconds[fastest]


@torch.no_grad()
def sampling_precision(name: str, checkpoint: dict, network) -> str:
    """The precision to sample in: `name`, or if that is "auto", the one of the checkpoint's training.

    Not whichever is faster by a little, which could change from one call to the next, and with it the picture of a
    seed; only where bfloat16 takes half as long again as float32, on a machine that has no unit for it, is it float32.
    """
    if name != "auto":
        return name
    trained = checkpoint["config"]["precision"]
    if trained != "bfloat16":
        return trained
    device = network.sigmas.device
    x = torch.zeros(32, *checkpoint["image_shape"], device=device)
    i = torch.zeros(32, dtype=torch.long, device=device)

    def seconds(precision):
        with autocast(device, precision):
            return seconds_per_step(lambda: network(x, i), device)

    return "float32" if seconds("bfloat16") > 1.5 * seconds("float32") else "bfloat16"


def steps_in(minutes: float, seconds: float) -> int:
    """How many training steps of `seconds` fit into `minutes`, if an eighth goes to start-up and pictures."""
    return max(1, int(minutes * 60 * 7 / 8 / seconds))


def in_batches(network, precision: str, device: torch.device, bar=None, batch_size: int = 100) -> Callable:
    """The network as a function (x, i) -> score that runs at most `batch_size` images at once, in `precision`.

    `bar`, if there is one, is told how many images each call took.
    """

    def score(x: Tensor, i: Tensor) -> Tensor:
        parts = []
        with autocast(device, precision):
            for a, b in zip(x.split(batch_size), i.split(batch_size)):
                parts.append(network(a, b))
                if bar is not None:
                    bar.update(len(a))
        return torch.cat(parts)

    return score
