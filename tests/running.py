"""Running a lesson's scripts: as a person would, or inside the test's process, which saves reading the digits."""

import contextlib
import functools
import hashlib
import importlib
import io
import os
import signal
import sys
from pathlib import Path

import pytest
import torch

import common.cli
import common.data
import common.play
import common.run
import common.training_log
from common.machine import choose_device
from tests import warm
from tests.warm import Result

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}  # networks as small as these only lose time with more threads
FEW_SCALES = {
    "lesson_03_ncsn": ("--L", 3, "--T", 1),
    "lesson_04_ncsnv2": ("--overlap", 0.01),
    "lesson_05_ddpm": ("--T", 4, "--beta-T", 0.5),
    "lesson_07_score_sde": ("--N", 4),
    "lesson_09_improved_ddpm": ("--T", 4),
}
TWO_LESSONS = ("lesson_03_ncsn", "lesson_09_improved_ddpm")  # the first and the last, where it is common/ that acts
DIFFUSION = ("lesson_05_ddpm", "lesson_09_improved_ddpm")  # lessons with t in place of noise scales
LOSS = {  # lessons 3, 4 and 7 have denoising_score_matching_loss
    "lesson_05_ddpm": "noise_prediction_loss",
    "lesson_09_improved_ddpm": "hybrid_loss",
}


def loss_of(lesson):
    """The name of a lesson's loss, and the function: (network, x, table of the noise levels, level, noise) -> (B,).

    Lesson 7's has no table: its levels are the noise scales themselves.
    """
    name = LOSS.get(lesson.name, "denoising_score_matching_loss")
    return name, getattr(lesson.loss, name)


def same_images(a, b, atol: float = 1e-3) -> bool:
    """Whether images in [0, 1] are the same but for the order of sums, in batches of other sizes.

    On a GPU, whose float32 convolutions round to TF32, single pixels differ more: there their mean has to be the same.
    """
    a, b = torch.as_tensor(a), torch.as_tensor(b)
    assert a.shape == b.shape
    difference = (a - b).abs()
    return bool(difference.max() <= atol if choose_device().type == "cpu" else difference.mean() <= 5e-3)


def run(lesson, *flags, root=ROOT):
    """Runs the script in a process of its own, with the 60 000 digits."""
    return warm.run("train_mnist.py", *flags, cwd=root / lesson, env=ENVIRONMENT)


@functools.cache
def script(lesson, name="train_mnist"):
    """A lesson's script as a module. It imports the files beside it by names that the other lesson has too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / lesson))
        for path in (ROOT / lesson).glob("*.py"):
            sys.modules.pop(path.stem, None)
        return importlib.import_module(f"{lesson}.{name}")


@functools.cache
def some_images(name):
    return common.data.load_images(name)[:1000]


def some_pictures(config):
    return common.data.load_pictures(config) if config.images else some_images(config.dataset)


def run_here(lesson, *flags, name="train_mnist", digits=1000, samples=4, **patches):
    """Runs a lesson's script in this process, with the first 1000 digits (or all: 60 000) and an empty loss.png.

    Pictures are grids of 4 samples, not of 64.
    patches: {name: value} that the lesson's train_mnist.py, or sample.py, has in place of its own.
    """
    module, out, err = script(lesson, name), io.StringIO(), io.StringIO()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{name}.py", *map(str, flags)])
        if digits == 1000:
            patch.setattr(common.run, "load_pictures", some_pictures)
        patch.setattr(common.run, "SAMPLES", samples)
        # Drawing the plot takes half of the time of such a short run
        patch.setattr(common.training_log, "save_loss_plot", lambda *arguments: arguments[-2].touch())
        for key, value in patches.items():
            patch.setattr(module, key, value)
        try:
            torch.set_num_threads(1)
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as ended:
                if name == "sample":
                    common.play.main(module)
                else:
                    common.run.start(module.train, module.Config, module.PRESETS, module.LESSON)
        finally:
            torch.set_num_threads(threads)
            for number, handler in handlers.items():
                signal.signal(number, handler)
    code = ended.value.code
    if isinstance(code, str):  # Python prints it, and exits with 1
        return Result(1, out.getvalue(), err.getvalue() + code + "\n")
    return Result(code or 0, out.getvalue(), err.getvalue())


def quick(lesson, *flags, **patches):
    """run_here for the shortest run that makes every kind of file: 5 steps of 8 images, no previews, one checkpoint."""
    flags = ("--steps", 5, "--batch-size", 8, "--preview-every", 1000, *FEW_SCALES.get(lesson, ()), *flags)
    return run_here(lesson, "--smoke", "--device", "cpu", "--precision", "float32", *flags, **patches)


def read_checkpoint(folder):
    return torch.load(Path(folder) / "checkpoint.pt", weights_only=False)  # which is faster; it is a test's own


def hashes(folder):
    """{name: hash} of every file in a folder, hidden ones too."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(Path(folder).iterdir())}
