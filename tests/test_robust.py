"""What people run into, as other projects' reports tell: odd data, odd places, late mistakes. Nothing is lost."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import common.cli
import common.evaluate
import common.play
import common.run
import common.training_log
from common.config import RunConfig, parse_config
from common.errors import LessonError
from common.files import Claim
from common.images import some_frames
from lesson_04_ncsnv2.noise_scales import largest_pairwise_distance
from tests import warm
from tests.conftest import LESSONS
from tests.running import (
    DIFFUSION,
    ENVIRONMENT,
    FEW_SCALES,
    ROOT,
    TWO_LESSONS,
    hashes,
    quick,
    read_checkpoint,
    run_here,
    script,
)
from tests.test_train import draw_with_signal, files_of_a_run

pytestmark = pytest.mark.lessons(*TWO_LESSONS)  # almost all of this is what common/ does
FEW = {
    "lesson_03_ncsn": ("--calls", 10),
    "lesson_04_ncsnv2": ("--calls", 22),
    "lesson_05_ddpm": ("--calls", 4),
    "lesson_09_improved_ddpm": ("--calls", 4),
}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Ten odd pictures, of which nine can be read, and what lies beside them."""
    folder = tmp_path_factory.mktemp("my pictures")
    for k, (mode, size) in enumerate([("RGB", (30, 20)), ("L", (7, 90)), ("CMYK", (40, 40)), ("1", (33, 33))] * 2):
        pixels = np.random.default_rng(k).integers(0, 255, (*size[::-1], 3), np.uint8)
        ending = "jpg" if mode == "CMYK" else "tif"
        Image.fromarray(pixels).convert(mode).save(folder / f"{k} ü.{ending}")
    Image.new("RGBA", (1, 1), (9, 9, 9, 0)).save(folder / "one pixel.png")
    (folder / "empty.png").touch()
    (folder / "notes.txt").write_text("mine")
    return folder


def on(pictures, size=16):
    return "--images", pictures, "--image-size", size, "--channels", 1


# Small or degenerate data


@pytest.fixture(scope="module")
def trained(lesson, pictures, tmp_path_factory):
    """A training on nine pictures, with a batch of 16 and grids of 64."""
    folder = tmp_path_factory.mktemp("trained")
    result = quick(lesson.name, *on(pictures), "--output", folder)
    assert result.status == 0, result.stderr
    line = f"9 pictures from {pictures}, 2 files left out (1 .txt, 1 that cannot be read)\n"
    assert line in result.stderr and f"images      9 of 1 x 16 x 16 from {pictures}\n" in result.stdout
    assert set(hashes(folder)) == files_of_a_run(lesson)
    return folder / "checkpoint.pt"


@pytest.mark.parametrize(
    "verb, num", [("nearest", 12), ("nearest", 17), ("inpaint left", 17), ("denoise", 12), ("interpolate", 12)]
)  # more than the nine pictures, and of 17 the nearest are a grid
def test_verbs_on_fewer_pictures_than_asked_for(lesson, trained, tmp_path, verb, num):
    check_verb(lesson, trained, tmp_path, verb, num)


@pytest.mark.lessons(*DIFFUSION)
@pytest.mark.parametrize("verb", ["progress", "share-latent", "interpolate-images"])
@pytest.mark.parametrize("num", [3, 12])
def test_the_papers_pictures_on_fewer_pictures_than_asked_for(lesson, trained, tmp_path, verb, num):
    """Of nine there are four pairs."""
    check_verb(lesson, trained, tmp_path, verb, num)


def check_verb(lesson, trained, tmp_path, verb, num):
    flags = ("--checkpoint", trained, "--num", num, *f"--{verb}".split(), "--output", tmp_path / "x.png")
    calls = () if verb == "denoise" else FEW[lesson.name]
    result = run_here(lesson.name, *flags, *calls, name="sample")
    assert result.status == 0, result.stderr
    with Image.open(tmp_path / "x.png") as picture:
        picture.load()
    if verb == "nearest":
        assert "a folder has no test pictures to compare with\n" in result.stdout
        assert "test images" not in result.stdout and "samples: median distance" in result.stdout


@pytest.mark.lessons("lesson_05_ddpm")  # one is enough: it is common/ that draws
def test_nearest_of_many_is_a_grid(lesson, tmp_path):
    """Each image beside its nearest, without a panel for each, which took minutes."""
    flags = ("--num", 100, "--nearest", "--precision", "float32", "--output", tmp_path / "x.png")
    checkpoint = ("--checkpoint", ROOT / lesson.name / "pretrained.pt")
    begin = time.monotonic()
    result = run_here(lesson.name, *checkpoint, *flags, *("--calls", 10), name="sample")
    assert result.status == 0 and time.monotonic() - begin < 60
    with Image.open(tmp_path / "x.png") as picture:
        assert picture.width % 58 == 2 and picture.height % 58 == 2
        assert (picture.width // 58) * (picture.height // 58) >= 400 and (picture.width // 58) % 2 == 0


# The wrong data, in silence


def test_a_resume_on_other_pictures_is_refused(lesson, pictures, tmp_path):
    mine = shutil.copytree(pictures, tmp_path / "mine")
    folder = tmp_path / "run"
    assert quick(lesson.name, *on(mine), "--output", folder).status == 0
    before = hashes(folder)
    Image.new("L", (9, 9)).save(mine / "new.png")
    result = run_here(lesson.name, "--resume", "--steps", 8, "--output", folder)
    assert result.status == 1 and "is a run on other pictures (9 pictures, " in result.stderr
    assert ", not 10 pictures, " in result.stderr and hashes(folder) == before
    (mine / "new.png").unlink()
    assert run_here(lesson.name, "--resume", "--steps", 8, "--output", folder).status == 0


def test_a_folder_of_pictures_that_has_been_moved_is_named_anew(lesson, pictures, tmp_path):
    shutil.copytree(pictures, tmp_path / "mine")
    folder = tmp_path / "run"
    assert quick(lesson.name, *on(tmp_path / "mine"), "--output", folder).status == 0
    (tmp_path / "mine").rename(tmp_path / "yours")
    again = "--resume", "--steps", 8, "--output", folder
    assert "mine is not a folder" in run_here(lesson.name, *again).stderr
    result = run_here(lesson.name, *again, "--images", tmp_path / "yours")
    assert result.status == 0, result.stderr
    assert read_checkpoint(folder)["step"] == 8
    assert read_checkpoint(folder)["config"]["images"] == str(tmp_path / "yours")


def test_a_run_does_not_read_what_it_wrote(lesson, pictures, tmp_path):
    mine = shutil.copytree(pictures, tmp_path / "mine")
    assert quick(lesson.name, *on(mine), "--output", mine / "output").status == 0
    result = quick(lesson.name, *on(mine), "--overwrite", "--output", mine / "output")
    assert result.status == 0 and f"9 pictures from {mine}, " in result.stderr


def test_pictures_are_found_from_another_folder_and_can_be_named_anew(lesson, pictures, tmp_path, monkeypatch):
    shutil.copytree(pictures, tmp_path / "here" / "mine")
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert quick(lesson.name, *on("mine"), "--output", "run").status == 0
    checkpoint = tmp_path / "here" / "run" / "checkpoint.pt"
    monkeypatch.chdir(tmp_path / "there")
    flags = ("--checkpoint", checkpoint, "--denoise", "--output", "x.png")
    assert run_here(lesson.name, *flags, name="sample").status == 0
    (tmp_path / "here" / "mine").rename(tmp_path / "moved")
    gone = run_here(lesson.name, *flags, name="sample")
    assert gone.status == 1 and "is not a folder" in gone.stderr
    assert run_here(lesson.name, *flags, "--images", tmp_path / "moved", name="sample").status == 0


@pytest.mark.lessons("lesson_05_ddpm")  # one is enough: common/ finds them
def test_a_lesson_in_another_folder_knows_its_own_weights(lesson, tmp_path):
    shutil.copytree(ROOT / lesson.name, tmp_path / "my copy", ignore=shutil.ignore_patterns("output"))
    shutil.copytree(ROOT / "common", tmp_path / "common", ignore=shutil.ignore_patterns("mnist"))
    ran = warm.run("sample.py", "--checkpoint", "pretrained.pt", "--info", cwd=tmp_path / "my copy", env=ENVIRONMENT)
    assert ran.status == 0 and ran.stdout.startswith("pretrained.pt: lesson_0"), ran.stderr


def test_samples_from_minus_one_to_one_are_judged_with_a_word(tmp_path, monkeypatch, capsys):
    torch.save(torch.linspace(-1, 1, 4 * 784).view(4, 1, 28, 28), tmp_path / "x.pt")
    monkeypatch.setattr(sys, "argv", ["evaluate", str(tmp_path / "x.pt")])
    monkeypatch.setattr(common.evaluate, "digit_report", lambda samples: {})
    monkeypatch.setattr(common.evaluate, "print_report", lambda report: None)
    common.evaluate.main()
    assert (
        "values from -1.00 to 1.00 are clamped to [0, 1]; if black is -1, save (x + 1) / 2\n" in capsys.readouterr().out
    )


# Work that would be lost for a late reason


@pytest.mark.lessons("lesson_05_ddpm")  # one is enough: it is common/ that saves
def test_samples_that_cannot_be_saved_are_judged_all_the_same(lesson, tmp_path, monkeypatch, capsys):
    def full(path):
        raise LessonError(f"cannot write {path}: No space left on device")

    monkeypatch.setattr(common.evaluate, "load_lesson", lambda name: script(name, "sample"))
    monkeypatch.setattr(common.evaluate, "digit_report", lambda samples: {})
    monkeypatch.setattr(common.evaluate, "print_report", lambda report: print("the report"))
    monkeypatch.setattr(common.evaluate, "atomic_write", full)
    flags = ("--num", "4", "--calls", "97", "--save", str(tmp_path / "s.pt"))
    monkeypatch.setattr(sys, "argv", ["evaluate", str(ROOT / lesson.name / "pretrained.pt"), *flags])
    common.evaluate.main()
    printed = capsys.readouterr()
    assert printed.out.endswith("the report\n") and "warning: no " in printed.err and "No space left" in printed.err


def test_by_products_that_cannot_be_written_do_not_end_a_training(lesson, tmp_path):
    """A table that is open elsewhere, a plot for which matplotlib is set up wrongly, a picture, an animation."""

    def broken(*arguments, **options):
        raise RuntimeError("Key backend: 'nothing' is not a valid value")

    (tmp_path / "metrics.csv").mkdir()
    (tmp_path / "metrics.csv" / "open").touch()
    (tmp_path / "samples_step_000003.png").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common.run, "find_earlier_run", lambda folder, overwrite: [])
        patch.setattr(common.run, "save_gif", broken)
        result = quick(lesson.name, "--preview-every", 3, "--output", tmp_path)
    assert result.status == 0, result.stderr
    for name in ("metrics.csv or loss.png", "preview", "trajectory.gif"):
        assert f"warning: no {name}: " in result.stderr, name
    assert read_checkpoint(tmp_path)["step"] == 5 and (tmp_path / "samples.png").is_file()


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="no SIGHUP here")
def test_a_closed_terminal_is_a_request_to_stop(lesson, tmp_path):
    draw = draw_with_signal(script(lesson.name).draw, signal.SIGHUP)
    handler = signal.getsignal(signal.SIGHUP)
    try:
        result = quick(lesson.name, "--steps", 12, "--preview-every", 5, "--output", tmp_path, draw=draw)
    finally:
        signal.signal(signal.SIGHUP, handler)
    assert result.status == 128 + signal.SIGHUP and read_checkpoint(tmp_path)["step"] == 6
    assert run_here(lesson.name, "--resume", "--output", tmp_path).status == 0
    assert read_checkpoint(tmp_path)["step"] == 12


def test_a_terminal_that_nohup_may_close_is_no_request_to_stop():
    """A program started by nohup has been told not to hear SIGHUP, and goes on when its terminal is closed."""
    handlers = {number: signal.getsignal(number) for number in common.cli.ENDS}
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell does for a program behind `&`
        stop = common.cli.StopRequest()
        signal.raise_signal(signal.SIGHUP)
        assert not stop
        signal.raise_signal(signal.SIGTERM)
        assert stop.signal_number == signal.SIGTERM
        stop = common.cli.StopRequest()
        signal.raise_signal(signal.SIGINT)
        assert stop.signal_number == signal.SIGINT
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def test_ctrl_c_that_ends_the_reader_of_stderr_first_loses_nothing(tmp_path):
    """As `python train_mnist.py 2>&1 | tee log`: the terminal tells both, and tee does not wait."""
    name, folder = "lesson_05_ddpm", tmp_path / "run"
    flags = ("--smoke", "--precision", "float32", "--steps", 10**6, "--preview-every", 10**6, "--output", folder)
    command = [sys.executable, "train_mnist.py", *map(str, flags)]
    how = {"cwd": ROOT / name, "env": {**ENVIRONMENT, "PYTHONUNBUFFERED": "1"}, "stderr": subprocess.STDOUT}
    with subprocess.Popen(command, **how, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert any("minutes with the pictures" in line for line in process.stdout)
            process.stdout.close()
            process.send_signal(signal.SIGINT)
            process.wait(timeout=60)
        finally:
            process.kill()
    assert process.returncode != 0 and read_checkpoint(folder)["step"] >= 10


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied", "ro"), OSError(28, "No space left")])
def test_what_the_operating_system_refuses_is_one_line(error, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as ended:
        common.cli.run(main)
    assert ended.value.code == f"error: {error}" and capsys.readouterr() == ("", "")


# Memory and time


def test_frames_are_thinned_out_as_they_come():
    for number in (1, 2, 3, 71, 72, 73, 97, 432, 5000):
        alive = []

        def frames(number=number, alive=alive):
            for n in range(number):
                frame = torch.tensor([n])
                alive.append(frame)
                yield frame

        kept = [int(frame) for frame in some_frames(frames())]
        assert kept[0] == 0 and kept[-1] == number - 1 and kept[-2:] == list(range(number))[-2:]
        assert len(kept) <= 75 and (number <= 72) == (kept == list(range(number)))
        steps = np.diff(kept[:-2])
        assert len(steps) == 0 or steps.max() <= 2 * steps.min()


def test_technique_1_reads_bytes_as_they_are():
    images = torch.randint(0, 256, (700, 1, 5, 5), dtype=torch.uint8)
    every = torch.cdist(images.flatten(1).double(), images.flatten(1).double())
    assert largest_pairwise_distance(images) == pytest.approx(float(every.max()), rel=1e-12)
    assert largest_pairwise_distance(images) / 255 == pytest.approx(largest_pairwise_distance(images / 255), rel=1e-6)


# Two runs in one folder


def test_a_second_run_in_the_same_folder_is_refused(lesson, tmp_path):
    assert quick(lesson.name, "--output", tmp_path).status == 0
    before = hashes(tmp_path)
    claim = Claim(tmp_path)
    for flags in (("--overwrite",), ("--resume", "--steps", 9)):
        result = run_here(lesson.name, *flags, "--output", tmp_path)
        assert result.status == 1 and f"another run is writing to {tmp_path}: " in result.stderr
    claim.release()
    assert hashes(tmp_path) == before


def test_the_mark_of_a_dead_run_is_no_obstacle(lesson, tmp_path):
    for name in (".in_use", ".checkpoint.pt.123.tmp", ".samples_step_000500.png.9.tmp", ".mine.tmp"):
        (tmp_path / name).touch()
    assert quick(lesson.name, "--output", tmp_path).status == 0
    assert set(hashes(tmp_path)) == files_of_a_run(lesson) | {".mine.tmp"}


# Where it runs


def test_home_is_not_a_folder_named_tilde(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path)), monkeypatch.setenv("USERPROFILE", str(tmp_path))
    config, *_ = parse_config(RunConfig, {"smoke": {}}, ["--output=~/run", "--images=~/pictures"])
    assert config.output == str(tmp_path / "run") and config.images == str(tmp_path / "pictures")


def start_oddly(lesson, arguments, pictures, folder, **environment):
    """A short training in a process of its own."""
    flags = ("--smoke", "--steps", 2, "--device", "cpu", "--precision", "float32", *FEW_SCALES[lesson.name])
    words = [sys.executable, *arguments, *flags, *on(pictures), "--output", folder]
    return {"args": list(map(str, words)), "env": {**ENVIRONMENT, **environment}}


@pytest.mark.lessons("lesson_05_ddpm")  # one is enough: the interpreter compiles all of torch anew
def test_no_docstrings_a_safe_path_and_a_terminal_that_knows_no_umlauts(lesson, pictures, tmp_path):
    environment = {"PYTHONSAFEPATH": "1", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    folder = tmp_path / "Übung 1"
    how = start_oddly(lesson, ["-OO", "train_mnist.py"], pictures, folder, **environment)
    ran = subprocess.run(**how, cwd=ROOT / lesson.name, capture_output=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    assert b"\\xdcbung" in ran.stdout and (folder / "samples.png").is_file()
    assert b"\r" not in ran.stderr  # in a file, each state of the bar is a line


@pytest.mark.lessons("lesson_05_ddpm")  # one is enough: it is common/ that prints
def test_closed_streams(lesson, pictures, tmp_path):
    how = start_oddly(lesson, ["train_mnist.py"], pictures, tmp_path / "run")
    words = ["sh", "-c", 'exec "$0" "$@" <&- >&- 2>&-', *how["args"]]
    ran = subprocess.run(words, env=how["env"], cwd=ROOT / lesson.name, timeout=120)
    assert ran.returncode == 0 and (tmp_path / "run" / "samples.png").is_file()


@pytest.mark.lessons(*LESSONS)
def test_started_as_a_module(lesson):
    ran = warm.run("-m", f"{lesson.name}.train_mnist", "--help", cwd=ROOT, env=ENVIRONMENT)
    assert ran.status == 0 and "--batch-size" in ran.stdout, ran.stderr


def test_make_in_a_folder_with_a_space(tmp_path):
    folder = tmp_path / "my lessons"
    (folder / ".venv" / "bin").mkdir(parents=True)
    (folder / "lesson_04_ncsnv2").mkdir()
    shutil.copy(ROOT / "Makefile", folder)
    python = folder / ".venv" / "bin" / "python"
    python.write_text('#!/bin/sh\necho "$(basename "$PWD")" "$@"\n')
    python.chmod(0o755)
    for name in ("requirements.txt", "requirements-dev.txt", ".venv/installed", ".venv/installed-dev"):
        (folder / name).touch()
        os.utime(folder / name, (len(name), len(name)))
    mine = ("MAKEFLAGS", "MAKELEVEL", "MFLAGS", "VENV", "PYTHON")  # of the make that runs the tests
    environment = {name: value for name, value in os.environ.items() if name not in mine}
    ran = subprocess.run(["make", "train", "bench"], cwd=folder, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert "lesson_04_ncsnv2 train_mnist.py\n" in ran.stdout and "my lessons -m common.bench\n" in ran.stdout


# Signals


def test_ctrl_c_while_a_run_starts_is_a_line(lesson, tmp_path, monkeypatch):
    def interrupted(config):
        raise KeyboardInterrupt

    monkeypatch.setattr(common.run, "load_pictures", interrupted)
    result = run_here(lesson.name, "--smoke", "--output", tmp_path / "run", digits=60_000)
    assert (result.status, result.stderr, result.stdout) == (130, "\nstopped\n", "") and not (tmp_path / "run").exists()


def test_ctrl_c_in_sampling_is_a_line_within_two_seconds(tmp_path):
    command = [sys.executable, "sample.py", "--calls", "100000", "--checkpoint", "pretrained.pt", "--output"]
    how = {"cwd": ROOT / "lesson_03_ncsn", "env": ENVIRONMENT, "text": True, "stderr": subprocess.PIPE}
    how["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # which a shell's background jobs ignore
    with subprocess.Popen([*command, str(tmp_path / "x.png")], **how) as process:
        assert "calls" in process.stderr.readline()  # the bar has begun
        time.sleep(0.5)
        begin = time.monotonic()
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
        assert process.wait(timeout=20) == 130 and time.monotonic() - begin < 2
    assert "Traceback" not in rest and rest.endswith("\nstopped\n") and not (tmp_path / "x.png").exists()


@pytest.mark.lessons(*LESSONS)
def test_a_stop_in_pictures_is_answered_at_the_next_network_call(lesson, tmp_path):
    """Not after the noise scale, which takes T calls."""
    calls = []

    def stop_in_the_second_call(network, config, shape, generator, sampler, number):
        class Stopping:
            def __call__(self, x, i):
                calls.append(len(x))
                if len(calls) == 2:
                    signal.raise_signal(signal.SIGTERM)
                return network(x, i)

            def __getattr__(self, name):
                return getattr(network, name)

        return script(lesson.name, "sample").draw(Stopping(), config, shape, generator, sampler, number)

    flags = ("--N" if lesson.name == "lesson_07_score_sde" else "--T", 50, "--steps", 2, "--output", tmp_path)
    result = quick(lesson.name, *flags, draw=stop_in_the_second_call)
    assert result.status == 128 + signal.SIGTERM and len(calls) == 2
    assert "the checkpoint is saved, the last pictures are not made" in result.stdout


def test_metrics_are_still_a_table(trained):
    header, *rows = csv.reader(open(Path(trained).parent / "metrics.csv"))
    assert header[:2] == ["step", "loss"] and len(rows) == 1 and json.loads(rows[0][0]) == 5
