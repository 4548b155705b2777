"""How fast is this machine? `python -m common.bench` (or `make bench`) times lesson 4, and says on what.

Everything that is compared runs in turn, round after round, in one process, and the median of the rounds is printed.
"""

import platform
import re
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

LESSON = Path(__file__).resolve().parents[1] / "lesson_04_ncsnv2"
sys.path.insert(0, str(LESSON))

from loss import denoising_score_matching_loss
from noise_scales import geometric_noise_scales
from sample import NETWORK_OPTIONS
from score_network import ScoreNetwork
from train_mnist import PRESETS, Config

from common.machine import PRECISIONS, autocast, choose_device, choose_precision, in_batches
from common.optimizer import Optimizer

ROUNDS = 5


def training_step(config, precision: str, device: torch.device, batch_size: int):
    """A function without arguments that takes one training step on random images."""
    sigmas = geometric_noise_scales(16.8758, 0.01, 96).to(device)
    network = ScoreNetwork(sigmas, 1, **{name: getattr(config, name) for name in NETWORK_OPTIONS})
    network.to(device, memory_format=torch.channels_last)
    optimizer = Optimizer(network, config.optimizer, fused=device.type != "mps")
    x = torch.rand(batch_size, 1, 28, 28, device=device)

    def step():
        i, z = torch.randint(len(sigmas), (batch_size,), device=device), torch.randn_like(x)
        with autocast(device, precision):
            denoising_score_matching_loss(network, x, sigmas, i, z).mean().backward()
        optimizer.step(config.learning_rate)

    return step


def network_call(config, precision: str, device: torch.device, batch_size: int):
    """A function without arguments that evaluates the score of `batch_size` images once."""
    sigmas = geometric_noise_scales(16.8758, 0.01, 96).to(device)
    network = ScoreNetwork(sigmas, 1, **{name: getattr(config, name) for name in NETWORK_OPTIONS})
    score = in_batches(network.to(device, memory_format=torch.channels_last), precision, device)
    x, i = torch.rand(batch_size, 1, 28, 28, device=device), torch.zeros(batch_size, dtype=torch.long, device=device)
    return torch.no_grad()(lambda: score(x, i))


def start_up() -> tuple[float, float]:
    """Seconds from the start of train_mnist.py to its first step, and its peak memory in MB."""
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        command = [sys.executable, "train_mnist.py", "--output", folder]
        run = subprocess.Popen(command, cwd=LESSON, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, bufsize=0)
        shown = b""
        while not re.search(rb"[1-9][\d.]*k?/", shown):  # the progress bar has left 0
            shown += run.stderr.read(64)
        seconds = time.perf_counter() - begin
        time.sleep(20)  # the memory has its peak after a few steps
        run.send_signal(signal.SIGTERM)
        run.communicate()
    return seconds, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024


def main() -> None:
    """Prints the table."""
    device = choose_device("auto")
    seconds, megabytes = start_up()  # first: a process that grows later would be counted for its child's memory
    lesson, paper = Config(), Config(**PRESETS["paper"])
    work = {}
    for name, config, batch_size in (
        ("lesson run", lesson, lesson.batch_size),
        ("paper's network", paper, paper.batch_size),
    ):
        for precision in ("float32", "bfloat16"):
            work[f"{name}, training step, {precision}"] = (
                training_step(config, precision, device, batch_size),
                batch_size,
            )
            work[f"{name}, sampling, {precision}"] = network_call(config, precision, device, 64), 64
    rates = {name: [] for name in work}
    for _ in range(1 + ROUNDS):
        for name, (step, images) in work.items():
            begin = time.perf_counter()
            step()
            if device.type != "cpu":
                torch.get_device_module(device).synchronize()
            rates[name].append(images / (time.perf_counter() - begin))
    chip = platform.processor() or platform.machine()
    print(
        f"{device}, {chip}, {torch.get_num_threads()} threads, PyTorch {torch.__version__}, median of {ROUNDS} rounds"
    )
    for name, values in rates.items():
        print(f"{name:42}{statistics.median(values[1:]):8.1f} images/s")  # the first round warms up
    trials = {name: training_step(lesson, name, device, lesson.batch_size) for name in PRECISIONS[1:]}
    print(f"chosen by train_mnist.py: {choose_precision('auto', device, lambda name: trials[name]())[0]}")
    print(f"train_mnist.py: {seconds:.1f} s to its first step, {megabytes:.0f} MB of memory at most")


if __name__ == "__main__":
    main()
