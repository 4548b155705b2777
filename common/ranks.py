"""Several processes that train one network: `torchrun --nproc-per-node 2 train_mnist.py`, on GPUs or on CPU cores.

All processes draw the whole batch from the same random numbers, and process r of N takes its part: image r, r + N,
r + 2 N, ... Their gradients are averaged. So the run is that of one process, up to the order of sums, and a checkpoint
does not know how many processes made it. Only the first process, rank 0, prints, writes and makes pictures.

Without torchrun there is one process, and nothing here does anything.
"""

import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from common.errors import LessonError


def rank() -> int:
    """Which of the processes this is: 0, ..., N - 1."""
    return int(os.environ.get("RANK", 0))


def world() -> int:
    """N, the number of processes."""
    return int(os.environ.get("WORLD_SIZE", 1))


def join(device: torch.device) -> torch.device:
    """Meets the other processes; returns the device of this one. LessonError if there is none for it."""
    if world() == 1:
        return device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        torch.cuda.set_device(device)
    elif device.type != "cpu":
        raise LessonError(f"several processes run on cuda or cpu, not on {device.type}: add --device cpu")
    # NCCL refuses two processes on one GPU. The time is for the pictures that rank 0 makes while the others wait.
    alone = device.type == "cuda" and int(os.environ["LOCAL_WORLD_SIZE"]) <= torch.cuda.device_count()
    dist.init_process_group("nccl" if alone else "gloo", timeout=timedelta(hours=6))
    return device


def leave() -> None:
    """Ends the meeting: what comes after it, each process does alone."""
    if dist.is_initialized():
        dist.destroy_process_group()


def share(*tensors: Tensor) -> list[Tensor]:
    """The part of this process of tensors (B, ...): every N-th entry, from its rank on."""
    return [tensor[rank() :: world()] for tensor in tensors]


def gather(part: Tensor) -> Tensor:
    """The whole (B, ...) of which each process has its `part`, as `share` made them."""
    if world() == 1:
        return part
    parts = [torch.empty_like(part) for _ in range(world())]
    dist.all_gather(parts, part.contiguous())
    return torch.stack(parts, dim=1).flatten(0, 1)


@torch.no_grad()
def average_gradients(network: torch.nn.Module) -> None:
    """Replaces each gradient by its mean over the processes, all in one message."""
    if world() == 1:
        return
    gradients = [p.grad for p in network.parameters() if p.grad is not None]
    message = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(message)
    for gradient, mean in zip(gradients, (message / world()).split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


def agreed(value):
    """Rank 0's value (a number, a word), in all processes."""
    values = [value]
    if world() > 1:
        dist.broadcast_object_list(values)
    return values[0]


def largest(value: int, device: torch.device) -> int:
    """The largest of the processes' values."""
    return int(gather(torch.tensor([value], device=device)).max())
