"""Whole runs of all lessons: what they leave behind, and that they go on as if they had never been interrupted."""

import csv
import dataclasses
import itertools
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import common.run
from common.checkpoint import load_network
from common.data import load_images
from tests import warm
from tests.running import (
    DIFFUSION,
    ENVIRONMENT,
    ROOT,
    TWO_LESSONS,
    hashes,
    loss_of,
    quick,
    read_checkpoint,
    run,
    run_here,
    script,
)

GRID = 8 * (2 * 28 + 2) + 2  # pixels: 8 images, each enlarged twice, and 2 pixels between them
DENOISED = ("lesson_04_ncsnv2", "lesson_07_score_sde")  # lessons with a last step after the samplers'
LEVEL = dict.fromkeys(DIFFUSION, ("t ", r"\d+"))  # how a noise level is named, and numbered


def level_name(lesson):
    return LEVEL.get(lesson.name, ("sigma ", r"[\d.]+"))


def files_of_a_run(lesson, *previews):
    names = {"samples.png", "trajectory.gif", "loss.png", "metrics.csv", "config.json", "checkpoint.pt"}
    names |= {f"samples_step_{step:06d}.png" for step in previews}
    return names | ({"samples_before_denoising.png"} if lesson.name in DENOISED else set())


def read_metrics(folder):
    header, *rows = csv.reader(open(Path(folder) / "metrics.csv"))
    return header, [[float(value) for value in row] for row in rows]


def assert_equal(a, b):
    """Bit for bit, through all dicts and lists."""
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert list(a) == list(b)
        a, b = list(a.values()), list(b.values())
    if isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b):
            assert_equal(x, y)
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    else:
        assert a == b


def assert_same_run(folder, other):
    """The same weights, averages, optimiser, random numbers, metrics and pictures; only config.json may differ."""
    a, b = read_checkpoint(folder), read_checkpoint(other)
    del a["config"], b["config"]
    assert_equal(a, b)
    for name in ("metrics.csv", "samples.png", "trajectory.gif"):
        assert (folder / name).read_bytes() == (other / name).read_bytes()


def wait_until(condition, process, seconds=100):
    """Waits for condition() while the process runs."""
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "the run ended before its time"
        assert time.monotonic() < end, "nothing happened for a long time"
        time.sleep(0.002)


# What a run leaves behind


@pytest.fixture(scope="module")
def smoke(lesson, tmp_path_factory):
    """`python train_mnist.py --smoke` in the lesson's folder: (output folder, not to be changed; what it printed)."""
    folder = tmp_path_factory.mktemp("smoke") / lesson.name
    result = run(lesson.name, "--smoke", "--output", folder)
    assert result.status == 0, result.stderr
    return folder, result


@pytest.fixture(scope="module")
def straight(lesson, tmp_path_factory):
    """The output folder of a run of 12 steps that was never interrupted."""
    folder = tmp_path_factory.mktemp(lesson.name)
    assert quick(lesson.name, "--steps", 12, "--output", folder).status == 0
    return folder


def test_smoke_leaves_its_files_and_no_others(lesson, smoke):
    assert set(hashes(smoke[0])) == files_of_a_run(lesson, 20)


def test_smoke_prints_what_it_is_about_to_do(lesson, smoke):
    folder, result = smoke
    assert re.search(r"^device +(cpu|cuda|mps) ", result.stdout, re.MULTILINE)
    assert re.search(r"^precision +(float32|bfloat16)$", result.stdout, re.MULTILINE)
    network = read_checkpoint(folder)["network"]
    parameters = sum(weights.numel() for name, weights in network.items() if "sigma" not in name)
    assert re.search(rf"^parameters +{parameters:,}$", result.stdout, re.MULTILINE)
    for name, value in json.loads((folder / "config.json").read_text()).items():
        assert re.search(rf"^  {name} +{re.escape(str(value))}$", result.stdout, re.MULTILINE), name
    assert re.search("^20 steps of 16 images, about 0.[0-9] minutes with the pictures$", result.stdout, re.MULTILINE)
    assert "images      60000 of 1 x 28 x 28 from mnist\n" in result.stdout and str(folder) in result.stdout
    level = "".join(level_name(lesson))
    assert re.search(rf"^noise +\d+ levels, from {level} to {level}$", result.stdout, re.MULTILINE)
    assert f"done: look at {folder / 'samples.png'}\n" in result.stdout
    assert re.search(r"320/320 .*images/s, loss=\d+\.\d", result.stderr)


def test_smoke_pictures_are_grids_of_64_digits(lesson, smoke):
    for name in files_of_a_run(lesson, 20):
        if name.startswith("samples"):
            with Image.open(smoke[0] / name) as picture:
                assert (picture.format, picture.mode, picture.size) == ("PNG", "L", (GRID, GRID)), name
                pixels = np.asarray(picture)
            cells = [pixels[r : r + 56, c : c + 56].tobytes() for r in range(2, GRID, 58) for c in range(2, GRID, 58)]
            assert len(set(cells)) == 64, name


def test_smoke_denoising_changes_the_picture(lesson, smoke):
    if lesson.name in DENOISED:
        before, after = (smoke[0] / name for name in ("samples_before_denoising.png", "samples.png"))
        assert before.read_bytes() != after.read_bytes()


def test_smoke_trajectory_moves(lesson, smoke):
    with Image.open(smoke[0] / "trajectory.gif") as gif:
        checkpoint = read_checkpoint(smoke[0])
        if lesson.name in DIFFUSION:
            steps = checkpoint["config"]["T"]
        elif lesson.name == "lesson_07_score_sde":  # from one to the next of N, and denoised
            steps = checkpoint["config"]["N"]
        else:
            steps = len(checkpoint["network"]["sigmas"]) + (lesson.name == "lesson_04_ncsnv2")
        full = (smoke[0] / "trajectory.gif").stat().st_size > 1_500_000  # of 2 MB, for which frames are left out
        assert gif.n_frames == min(36, steps) or full and gif.n_frames < min(36, steps)
        assert gif.n_frames > 3
        assert gif.size == (GRID, GRID)
        frames = []
        for k in range(gif.n_frames):
            gif.seek(k)
            frames.append(gif.convert("L").tobytes())
    assert len(set(frames)) > gif.n_frames / 2  # where noise is faint, two frames may look alike


def test_smoke_loss_plot_opens(smoke):
    with Image.open(smoke[0] / "loss.png") as picture:
        picture.load()
        assert picture.format == "PNG"
        assert picture.width > picture.height > 300


def test_smoke_metrics_are_finite_and_fall(lesson, smoke):
    header, rows = read_metrics(smoke[0])
    assert header[:2] == ["step", "loss"]
    assert len(header) == 2 + 5
    name, number = level_name(lesson)
    assert all(re.fullmatch(f"{name}{number} to {number}", band) for band in header[2:])
    assert [row[0] for row in rows] == [10, 20]
    assert all(len(row) == len(header) and all(map(math.isfinite, row)) for row in rows)
    zero = 1 if lesson.name in DIFFUSION else 28 * 28 / 2  # the loss of a network that returns zero
    assert 0 < rows[1][1] < rows[0][1] < 4 * zero


def test_smoke_configuration_is_what_the_flags_said(lesson, smoke):
    train_mnist = script(lesson.name)
    saved = json.loads((smoke[0] / "config.json").read_text())
    assert saved["precision"] in ("float32", "bfloat16")
    chosen = {**train_mnist.PRESETS["smoke"], "output": str(smoke[0]), "precision": saved["precision"]}
    assert saved == dataclasses.asdict(train_mnist.Config(**chosen))
    assert read_checkpoint(smoke[0])["config"] == saved


@pytest.mark.lessons(*DENOISED)
def test_smoke_noise_begins_at_the_largest_distance_of_all_digits(lesson, smoke):
    """Found by comparing each with each: it is that of number 26 785 from number 59 452."""
    network, (a, b) = read_checkpoint(smoke[0])["network"], load_images("mnist")[[26_785, 59_452]].double() / 255
    sigma = network["sigmas"][0] if "sigmas" in network else network["sigma_max"]
    assert float(sigma) == pytest.approx(float((a - b).norm()), rel=1e-5)


def test_smoke_checkpoint_has_all_a_run_needs(lesson, smoke):
    checkpoint = read_checkpoint(smoke[0])
    names = {"lesson", "step", "image_shape", "config", "network", "optimizer", "generator", "device", "data", "log"}
    names |= {"ema"} if lesson.name != "lesson_03_ncsn" else set()
    assert set(checkpoint) == names | ({"timesteps"} if lesson.name == "lesson_09_improved_ddpm" else set())
    assert (checkpoint["lesson"], checkpoint["step"]) == (lesson.name, 20)
    assert checkpoint["image_shape"] == (1, 28, 28)
    config = SimpleNamespace(**checkpoint["config"])
    network = script(lesson.name, "sample").make_network(config, 1, checkpoint["network"])
    for name in ("network", "ema") if "ema" in checkpoint else ("network",):
        network.load_state_dict(checkpoint[name])
        assert all(weights.isfinite().all() and weights.dtype == torch.float32 for weights in network.parameters())
    if "ema" in checkpoint:
        assert not torch.equal(checkpoint["ema"]["last.weight"], checkpoint["network"]["last.weight"])


def test_three_channels(lesson, tmp_path):
    result = quick(lesson.name, "--dataset", "color_mnist", "--output", tmp_path)
    assert result.status == 0
    assert set(hashes(tmp_path)) == files_of_a_run(lesson)
    outputs = 2 if lesson.name == "lesson_09_improved_ddpm" else 1
    assert read_checkpoint(tmp_path)["network"]["last.bias"].shape == (outputs * 3 * 2**2,)
    with Image.open(tmp_path / "samples.png") as picture:
        assert (picture.mode, picture.size) == ("RGB", (2 * 58 + 2, 2 * 58 + 2))
        r, g, b = (np.asarray(channel) for channel in picture.split())
    assert (r != g).any() and (g != b).any()


def test_the_seed_decides(lesson, straight, tmp_path):
    assert quick(lesson.name, "--seed", 1, "--steps", 10, "--output", tmp_path).status == 0
    a, b = read_metrics(tmp_path)[1][0], read_metrics(straight)[1][0]
    assert a[0] == b[0] == 10
    assert a[1] != b[1]


def test_ones(lesson, tmp_path):
    ones = ("--steps", 1, "--batch-size", 1, "--preview-every", 1)
    assert quick(lesson.name, *ones, "--output", tmp_path).status == 0
    assert [row[0] for row in read_metrics(tmp_path)[1]] == [1]
    assert set(hashes(tmp_path)) == files_of_a_run(lesson, 1)


@pytest.mark.parametrize("name, flag", [("lesson_03_ncsn", "--L"), ("lesson_05_ddpm", "--T")])
def test_ladder_of_two_scales_and_chain_of_two_steps(name, flag, tmp_path):
    assert quick(name, flag, 2, "--output", tmp_path).status == 0
    assert len(read_metrics(tmp_path)[0]) == 2 + 2


def test_previews_do_not_change_the_training(lesson, straight, tmp_path):
    assert quick(lesson.name, "--steps", 12, "--preview-every", 7, "--output", tmp_path).status == 0
    assert set(hashes(straight)) == files_of_a_run(lesson)
    assert set(hashes(tmp_path)) == files_of_a_run(lesson, 7)
    assert_same_run(straight, tmp_path)


def test_sample_draws_from_the_checkpoint(lesson, straight, tmp_path):
    flags = (
        "--checkpoint",
        straight / "checkpoint.pt",
        "--num",
        3,
        "--calls",
        4 if lesson.name in DIFFUSION else 10,
    )
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        result = run_here(lesson.name, *flags, "--seed", seed, "--output", tmp_path / f"{name}.png", name="sample")
        assert result.status in (0, None)
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.size == (2 * 58 + 2, 2 * 58 + 2)
    a, b, c = hashes(tmp_path).values()
    assert a == b != c


@pytest.mark.lessons("lesson_04_ncsnv2", "lesson_05_ddpm", "lesson_07_score_sde", "lesson_09_improved_ddpm")
def test_samples_are_drawn_with_the_averaged_weights(lesson, straight):
    network, _, checkpoint = load_network(
        script(lesson.name, "sample"), straight / "checkpoint.pt", torch.device("cpu")
    )
    for name, weights in network.named_parameters():
        assert torch.equal(weights, checkpoint["ema"][name])
    assert not torch.equal(network.state_dict()["last.weight"], checkpoint["network"]["last.weight"])


# Going on after any kind of end


def test_resume_is_exact(lesson, straight, tmp_path):
    assert quick(lesson.name, "--steps", 6, "--output", tmp_path).status == 0
    assert read_checkpoint(tmp_path)["step"] == 6
    assert run_here(lesson.name, "--output", tmp_path, "--resume", "--steps", 12).status == 0
    assert_same_run(straight, tmp_path)


@pytest.mark.lessons(*DIFFUSION)
def test_resume_with_dropout_is_exact(lesson, straight, tmp_path):
    """Its random numbers are torch's own, which no checkpoint holds, and pictures are drawn on the way."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    dropout = ("--dropout", 0.3, "--output")
    assert quick(lesson.name, "--steps", 12, *dropout, whole).status == 0
    assert quick(lesson.name, "--steps", 6, "--preview-every", 3, *dropout, parts).status == 0
    assert run_here(lesson.name, "--output", parts, "--resume", "--steps", 12).status == 0
    assert_same_run(whole, parts)
    a, b = (read_checkpoint(folder)["network"]["last.weight"] for folder in (whole, straight))
    assert not torch.equal(a, b)  # dropout does something


def test_ctrl_c_and_sigterm_finish_the_step_save_and_say_how_to_go_on(tmp_path):
    """A run is stopped with the one; the line it prints is typed into a shell; that run is stopped with the other."""
    name, folder, step = "lesson_05_ddpm", tmp_path / "a run", 0
    flags = ("--smoke", "--precision", "float32", "--steps", 10**6, "--preview-every", 10**6, "--output", folder)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # where the shell finds python
    how = {"cwd": ROOT / name, "env": {**ENVIRONMENT, "PYTHONUNBUFFERED": "1", "PATH": path}, "shell": True}
    advice = shlex.join(["python", "train_mnist.py", *map(str, flags)])
    for number in (signal.SIGINT, signal.SIGTERM):
        printed, said = tmp_path / f"stderr of {number}", tmp_path / f"stdout of {number}"
        with (
            open(printed, "w") as err,
            open(said, "w") as out,
            subprocess.Popen(f"exec {advice}", **how, stdout=out, stderr=err) as process,
        ):
            try:
                wait_until(lambda: "minutes with the pictures" in said.read_text(), process)  # noqa: B023
                process.send_signal(number)
                process.wait(timeout=60)
            finally:
                process.kill()
        assert process.returncode == 128 + number
        assert "Traceback" not in printed.read_text()
        line = re.fullmatch(r"stopped and saved after step (\d+); go on with: (.*)", said.read_text().splitlines()[-1])
        assert int(line[1]) == read_checkpoint(folder)["step"] > step
        assert set(hashes(folder)) == {"checkpoint.pt", "config.json", "metrics.csv", "loss.png"}
        step, advice = int(line[1]), line[2]

    python, script_name, *flags = shlex.split(advice)
    assert (python, script_name, flags[-1]) == ("python", "train_mnist.py", "--resume")
    assert run_here(name, *flags, "--steps", step + 10, digits=60_000).status == 0
    steps = [row[0] for row in read_metrics(folder)[1]]
    assert steps[: step // 10 + 1] == list(range(10, step + 11, 10))
    assert (folder / "samples.png").exists()


def draw_with_signal(draw, number=signal.SIGTERM):
    """`draw`, interrupted the first time it is called; a second signal would end the program, and that is the test."""
    numbers = [number]

    def interrupted(*arguments):
        if numbers:
            signal.raise_signal(numbers.pop())
        return draw(*arguments)

    return interrupted


@pytest.mark.lessons(*TWO_LESSONS)
@pytest.mark.parametrize("every, step", [(10, 11), (1000, 12)], ids=["in a preview", "in the last pictures"])
def test_a_signal_while_pictures_are_made(lesson, straight, tmp_path, every, step):
    """Pictures take long, so they are given up; nothing else is lost, and --resume makes the last ones."""
    draw = draw_with_signal(script(lesson.name).draw)
    result = quick(lesson.name, "--steps", 12, "--preview-every", every, "--output", tmp_path, draw=draw)
    assert result.status == 128 + signal.SIGTERM
    assert set(hashes(tmp_path)) == {"checkpoint.pt", "config.json", "metrics.csv", "loss.png"}
    assert read_checkpoint(tmp_path)["step"] == step
    advice = result.stdout.splitlines()[-1].partition("go on with: python train_mnist.py ")[2]
    assert advice.endswith(" --resume")
    assert run_here(lesson.name, *shlex.split(advice)).status == 0
    assert_same_run(straight, tmp_path)


@pytest.mark.lessons("lesson_09_improved_ddpm")  # it is common/ that says it
def test_the_advice_after_a_stop_knows_the_flags_from_the_checkpoint(lesson, straight, tmp_path, monkeypatch):
    """Also those of --config, which --resume would refuse."""
    monkeypatch.chdir(tmp_path)
    flags = ("--config", straight / "config.json", "--preview-every", 10)
    for where in ((), ("--output", "a place")):
        result = run_here(lesson.name, *flags, *where, draw=draw_with_signal(script(lesson.name).draw))
        assert result.status == 128 + signal.SIGTERM, result.stderr
        advice = shlex.split(result.stdout.splitlines()[-1].partition("go on with: python train_mnist.py ")[2])
        assert advice == [*where, "--resume"]
        assert run_here(lesson.name, *advice).status == 0


@pytest.mark.lessons(*TWO_LESSONS)
def test_a_run_of_so_many_minutes_keeps_the_steps_that_it_found(lesson, tmp_path):
    """They are found in step 10, from what eight steps took; a resume does not look for them again.

    By a clock that goes on by a second each time it is read: eight steps take one, and three of the four are over.
    """
    flags, clock = ("--minutes", 1 / 15, "--preview-every", 12, "--output", tmp_path), itertools.count()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common.run, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
        patch.setattr(common.run, "CALL", 1e9)  # pictures cost nothing: all of the time goes to steps
        result = quick(lesson.name, *flags, draw=draw_with_signal(script(lesson.name).draw))
    assert result.status == 128 + signal.SIGTERM
    found = json.loads((tmp_path / "config.json").read_text())
    assert found["minutes"] == 0.0 and found["steps"] == 10 + int(0.97 * 1 * 8)
    assert f"\n{found['steps']} steps of 8 images, about 0.0 minutes with the pictures\n" in result.stdout
    assert read_checkpoint(tmp_path)["step"] == 13
    advice = result.stdout.splitlines()[-1].partition("go on with: python train_mnist.py ")[2]
    assert run_here(lesson.name, *shlex.split(advice)).status == 0
    assert read_checkpoint(tmp_path)["step"] == found["steps"]


def test_kill_at_any_moment_leaves_a_whole_checkpoint(tmp_path):
    """The run saves after every step. It is killed once while it writes a checkpoint, then wherever it is."""
    flags = ["--smoke", "--steps", 10**6, "--preview-every", 1, "--L", 5, "--precision", "float32"]
    flags += ["--output", tmp_path]
    checkpoint, step = tmp_path / "checkpoint.pt", 0

    for moment in ("writing", "random", "random"):
        start = time.time()
        process = warm.Popen(["train_mnist.py", *flags], cwd=ROOT / "lesson_03_ncsn", env=ENVIRONMENT)
        try:
            wait_until(lambda: checkpoint.exists() and checkpoint.stat().st_mtime > start, process)  # noqa: B023
            if moment == "writing":
                wait_until(lambda: any(tmp_path.glob(".checkpoint.pt.*.tmp")), process)
            else:
                time.sleep(random.uniform(0, 0.5))
        finally:
            process.kill()
        assert process.wait() == -signal.SIGKILL
        saved = read_checkpoint(tmp_path)["step"]
        assert saved > step
        step = saved
        for path in tmp_path.iterdir():
            if path.suffix == ".png":
                with Image.open(path) as picture:
                    picture.load()  # raises if it is cut short
            elif path.suffix != ".tmp":
                assert path.name in ("checkpoint.pt", "config.json", "metrics.csv", ".in_use")
        assert json.loads((tmp_path / "config.json").read_text())["L"] == 5
        flags = [*flags, "--resume"]
    ended = run_here("lesson_03_ncsn", *flags, "--steps", step + 2, "--preview-every", 1000, digits=60_000)
    assert ended.status == 0, ended.stderr
    assert not any(path.name.startswith(".") for path in tmp_path.iterdir())  # no temporaries, no mark
    assert read_checkpoint(tmp_path)["step"] == step + 2
    assert (tmp_path / "samples.png").exists()


# A run and the one before it


def test_a_second_run_needs_resume_or_overwrite(lesson, smoke):
    folder, before = smoke[0], hashes(smoke[0])
    for result in (run_here(lesson.name, "--output", folder), run_here(lesson.name, "--smoke", "--output", folder)):
        assert result.status == 1
        assert result.stdout == ""
        assert len(result.stderr.splitlines()) == 1
        assert all(flag in result.stderr for flag in ("--resume", "--overwrite", "--output"))
        assert hashes(folder) == before


@pytest.mark.lessons(*TWO_LESSONS)
def test_overwrite_replaces_the_earlier_run_and_nothing_else(lesson, straight, tmp_path):
    folder = shutil.copytree(straight, tmp_path / "copy")
    (folder / "samples_step_000123.png").write_text("of the earlier run")
    (folder / "notes.txt").write_text("mine")
    assert quick(lesson.name, "--overwrite", "--output", folder).status == 0
    assert set(hashes(folder)) == files_of_a_run(lesson) | {"notes.txt"}
    assert (folder / "notes.txt").read_text() == "mine"
    assert read_checkpoint(folder)["step"] == 5


@pytest.mark.lessons(*TWO_LESSONS)
def test_a_finished_run_can_be_resumed_for_its_pictures(lesson, straight, tmp_path):
    folder = shutil.copytree(straight, tmp_path / "copy")
    (folder / "samples.png").unlink()
    assert run_here(lesson.name, "--resume", "--output", folder).status == 0
    assert set(hashes(folder)) == files_of_a_run(lesson)
    assert_same_run(straight, folder)


# A loss that is not finite


def test_a_learning_rate_far_too_high(lesson, tmp_path):
    result = quick(lesson.name, "--learning-rate", "1e30", "--output", tmp_path)
    assert result.status == 1
    scale = rf"step 2, noise level \d+ of \d+ \({''.join(level_name(lesson))}\)"
    assert re.fullmatch(rf"error: the loss is not finite at {scale}; .*--learning-rate", result.stderr.splitlines()[-1])
    assert hashes(tmp_path) == {}


@pytest.mark.parametrize("every", [2, 4], ids=["when it would be saved", "between two checkpoints"])
def test_a_bad_loss_keeps_the_last_good_checkpoint(lesson, tmp_path, every):
    levels, (name, loss_function) = [], loss_of(lesson)

    def loss_with_a_bad_one(network, x, *how):
        loss = loss_function(network, x, *how)
        if lesson.name == "lesson_07_score_sde":  # the part of a hundred, even in ln sigma
            t = math.log(float(how[0][3]) / 0.001) / math.log(float(network.sigma_max) / 0.001)
            levels.append(int(100 * (1 - t)) + 1)
        else:
            levels.append(len(how[0]) - int(how[1][3]) if lesson.name in DIFFUSION else int(how[1][3]) + 1)
        return loss + torch.where(torch.arange(8) == 3, math.inf, 0) if len(levels) == 6 else loss

    flags = ("--steps", 8, "--preview-every", every, "--output", tmp_path)
    result = quick(lesson.name, *flags, **{name: loss_with_a_bad_one})
    assert result.status == 1
    assert f"error: the loss is not finite at step 6, noise level {levels[5]} of " in result.stderr.splitlines()[-1]
    checkpoint = read_checkpoint(tmp_path)
    assert checkpoint["step"] == 4
    for name in ("network", "ema") if "ema" in checkpoint else ("network",):
        assert all(weights.isfinite().all() for weights in checkpoint[name].values())
    assert set(hashes(tmp_path)) - {f"samples_step_{step:06d}.png" for step in (2, 4)} == {
        "checkpoint.pt", "config.json", "metrics.csv", "loss.png"
    }  # fmt: skip


def test_weights_that_are_not_finite_are_never_saved(lesson, tmp_path):
    result = quick(lesson.name, "--learning-rate", "inf", "--steps", 1, "--output", tmp_path)
    assert result.status == 1
    assert "error: the weights are not finite after step 1; " in result.stderr.splitlines()[-1]
    assert hashes(tmp_path) == {}


@pytest.mark.parametrize("flags", [("--preview-every", 1), ("--steps", 1)], ids=["in a preview", "at the end"])
def test_pictures_that_are_not_finite_are_an_error_in_one_line(lesson, tmp_path, flags):
    """After the first step with such a learning rate the weights are finite, and what comes out of them is not."""
    result = quick(lesson.name, "--learning-rate", "1e30", *flags, "--output", tmp_path)
    assert result.status == 1
    assert re.match("error: .*not finite.*--learning-rate", result.stderr.splitlines()[-1])
    assert not any(name.startswith("samples") for name in hashes(tmp_path))
