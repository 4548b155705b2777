"""The pieces of common.run: an earlier run in the folder, what a resume may change, and how long a run will take."""

import dataclasses
import json
import re
from contextlib import closing

import pytest
import torch

import common.run
from common.checkpoint import save_checkpoint
from common.config import RunConfig, parse_config
from common.errors import LessonError
from common.run import Run, find_earlier_run, resume_run
from tests.running import TWO_LESSONS, hashes, quick, read_checkpoint, run_here, script

FILES = ["checkpoint.pt", "config.json", "metrics.csv", "loss.png", "trajectory.gif", "samples.png",
         "samples_before_denoising.png", "samples_step_000500.png", "samples_step_1000000.png"]  # fmt: skip
MINE = ["notes.txt", "drawn.png", "samples_my_favourites.png", "samples_step_1.png", "my_checkpoint.pt", "samples.png~"]


# An earlier run


def test_a_folder_that_is_new_or_has_other_files(tmp_path):
    assert find_earlier_run(tmp_path / "new", overwrite=False) == []
    for name in MINE:
        (tmp_path / name).write_text("mine")
    for overwrite in (False, True):
        assert find_earlier_run(tmp_path, overwrite) == []


@pytest.mark.parametrize("name", FILES)
def test_each_file_of_a_run_is_seen(tmp_path, name):
    (tmp_path / name).write_text("of an earlier run")
    with pytest.raises(LessonError, match="holds an earlier run: .*--resume.*--overwrite.*--output"):
        find_earlier_run(tmp_path, overwrite=False)
    over = [] if name in ("checkpoint.pt", "config.json") else [tmp_path / name]  # the others are written over
    assert find_earlier_run(tmp_path, overwrite=True) == over
    assert (tmp_path / name).read_text() == "of an earlier run"


@pytest.mark.lessons(*TWO_LESSONS)
@pytest.mark.parametrize("flags", [("--learning-rate", "inf"), ("--batch-size", 10**15)], ids=["bad", "too large"])
def test_overwrite_waits_until_the_new_run_has_taken_a_step(lesson, tmp_path, flags):
    for name in FILES + MINE:
        (tmp_path / name).write_text(f"my {name}")
    before = hashes(tmp_path)
    failed = quick(lesson.name, "--overwrite", "--steps", 1, *flags, "--output", tmp_path)
    assert failed.status == 1 and hashes(tmp_path) == before
    assert quick(lesson.name, "--overwrite", "--output", tmp_path).status == 0
    after = hashes(tmp_path)
    assert all(after[name] == before[name] for name in MINE)
    assert "samples_step_000500.png" not in after and after["checkpoint.pt"] != before["checkpoint.pt"]
    assert read_checkpoint(tmp_path)["step"] == 5


@pytest.mark.lessons(*TWO_LESSONS)
def test_a_new_run_from_the_numbers_of_an_earlier_one(lesson, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    assert quick(lesson.name, "--seed", 4, "--clip", 0.3, "--output", first).status == 0
    before = hashes(first)
    result = run_here(lesson.name, "--config", first / "config.json", "--steps", 3, "--output", second)
    assert result.status == 0, result.stderr
    a, b = (json.loads((folder / "config.json").read_text()) for folder in (first, second))
    assert b == {**a, "steps": 3, "output": str(second)} and a["seed"] == 4 and a["clip"] == 0.3
    assert hashes(first) == before


# What a resume may change

PRESETS = {"smoke": {"steps": 2}}


def saved(folder, step=10, **changes):
    config = RunConfig(output=str(folder), **changes)
    parts = dict.fromkeys(("network", "device", "generator"))
    save_checkpoint(folder / "checkpoint.pt", "lesson_xx", config=dataclasses.asdict(config), step=step, **parts)
    return config


def resume(*flags):
    config, named, _, _ = parse_config(RunConfig, PRESETS, list(map(str, flags)))
    return resume_run(config, named, "lesson_xx")


def test_resume_keeps_the_configuration_of_the_run(tmp_path):
    config = saved(tmp_path, steps=50, dataset="cifar10")
    found, checkpoint = resume("--output", tmp_path)
    assert found == config and checkpoint["step"] == 10


def test_resume_may_change_how_it_runs_but_not_what_it_learns(tmp_path):
    config = saved(tmp_path, steps=50, dataset="cifar10", decay="constant")
    flags = ("--steps", 60, "--dataset", "cifar10", "--device", "cpu", "--precision", "float32", "--preview-every", 7)
    found, _ = resume("--output", tmp_path, *flags)
    assert found == dataclasses.replace(config, steps=60, device="cpu", precision="float32", preview_every=7)
    for flag, value in (("--dataset", "mnist"), ("--seed", 1), ("--batch-size", 8), ("--learning-rate", 1.0)):
        with pytest.raises(LessonError, match=f"was made with {flag} .*: resume without {flag}"):
            resume("--output", tmp_path, flag, value)
    with pytest.raises(LessonError, match="is already at step 10: ask for more --steps"):
        resume("--output", tmp_path, "--steps", 9)


def test_a_resume_may_change_no_number_that_counts_in_what_is_learned(lesson, tmp_path):
    """All but those that are named here: the loop's, the network's and the samplers'."""
    free = {"steps", "minutes", "preview_every", "device", "precision", "images"}
    config, refused = script(lesson.name).Config(output=str(tmp_path), decay="constant"), set()
    parts = dict.fromkeys(("network", "device", "generator"))
    save_checkpoint(tmp_path / "checkpoint.pt", lesson.name, config=dataclasses.asdict(config), step=10, **parts)
    for name, value in dataclasses.asdict(config).items():
        if name != "output":
            other = value + "x" if isinstance(value, str) else value + 1
            try:
                found, _ = resume_run(dataclasses.replace(config, **{name: other}), {name}, lesson.name)
            except LessonError as error:
                assert f"was made with --{name.replace('_', '-')} {value}: resume without" in str(error)
                refused.add(name)
    assert {field.name for field in dataclasses.fields(config)} - refused == {*free, "output"}


def test_the_steps_of_a_cosine_stay(tmp_path):
    """With more of them the learning rate would jump up again, from about 0 where the run ended."""
    config = saved(tmp_path, steps=50)
    assert resume("--output", tmp_path, "--steps", 50)[0] == config
    with pytest.raises(LessonError, match="is of a run of 50 steps, .*: resume without --steps, or start a new run"):
        resume("--output", tmp_path, "--steps", 60)


def test_resume_of_a_run_of_so_many_minutes_keeps_its_steps(tmp_path):
    saved(tmp_path, steps=50)
    found, _ = resume("--output", tmp_path, "--minutes", 3, "--smoke")
    assert (found.steps, found.minutes) == (50, 0.0)


def test_a_run_that_was_moved_goes_on_where_it_is(tmp_path):
    saved(tmp_path / "old")
    (tmp_path / "old").rename(tmp_path / "new")
    found, _ = resume("--output", tmp_path / "new")
    assert found.output == str(tmp_path / "new")


# Random numbers and data


def begun(tmp_path, images, checkpoint=None, **config):
    """A Run that has not begun a step, on the CPU."""
    config = RunConfig(output=str(tmp_path), device="cpu", precision="float32", **config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common.run, "load_pictures", lambda config: images)
        return closing(Run(config, "lesson_xx", checkpoint))


def test_the_seed_chooses_the_first_weights_and_the_batches(tmp_path):
    images, weights, batches = torch.arange(1000)[:, None], [], []
    for seed in (1, 1, 2, 0):
        with begun(tmp_path, images, seed=seed) as run:
            weights.append(torch.nn.Linear(3, 3).weight.flatten().tolist())
            batches.append(run.batch().flatten().tolist())
    for first, again, *others in (weights, batches):
        assert first == again and first != others[0] != others[1] != first


def test_a_batch_is_of_all_images(tmp_path):
    """Each thousand of the 60 000 comes about a thousand times."""
    with begun(tmp_path, torch.arange(60_000)[:, None], batch_size=60_000) as run:
        counts = (run.batch().flatten() // 1000).bincount(minlength=60)
    assert counts.shape == (60,) and 800 < counts.min() <= counts.max() < 1200


def test_other_pictures_of_the_same_number_are_other_pictures(tmp_path):
    images = torch.arange(12, dtype=torch.uint8).view(3, 1, 2, 2)
    with begun(tmp_path, images) as run:
        checkpoint = {"data": run.data}
    with begun(tmp_path, images.clone(), checkpoint):
        pass
    with pytest.raises(LessonError, match="is a run on other pictures .3 pictures, .*, not 3 pictures, "):
        begun(tmp_path, images.flip(0), checkpoint)


def stepped(monkeypatch, first, seed=0, rank=0):
    """(step, torch's own random numbers in it, images on the progress bar) of each step from `first` to the third."""
    run = object.__new__(Run)
    run.config, run.step, run.leads, run.ending = RunConfig(steps=3, batch_size=8, seed=seed), first - 1, True, 0
    monkeypatch.setattr(common.run, "StopRequest", lambda: False)
    monkeypatch.setenv("RANK", str(rank)), monkeypatch.setenv("WORLD_SIZE", "2")
    return [(step, torch.rand(5), run.bar.n) for step in run.steps()]


def test_dropout_is_another_in_each_step_process_and_run(monkeypatch):
    found = [numbers for seed in (0, 1) for rank in (0, 1) for _, numbers, _ in stepped(monkeypatch, 1, seed, rank)]
    assert len({tuple(numbers.tolist()) for numbers in found}) == len(found) == 2 * 2 * 3


def test_after_a_resume_dropout_and_the_progress_bar_go_on(monkeypatch):
    whole, rest = stepped(monkeypatch, 1, seed=5, rank=1), stepped(monkeypatch, 2, seed=5, rank=1)
    assert [(step, done) for step, _, done in whole] == [(1, 0), (2, 8), (3, 16)]
    assert [(step, done) for step, _, done in rest] == [(2, 8), (3, 16)]
    for (_, a, _), (_, b, _) in zip(whole[1:], rest, strict=True):
        assert torch.equal(a, b)


# How long it will take


def announced(monkeypatch, capsys, seconds, elapsed=0.0, done=10, calls=(50, 1000), **config):
    """(configuration after it, minutes that were said) where a step takes `seconds`."""
    run = object.__new__(Run)
    run.config = RunConfig(steps=4000, batch_size=64, preview_every=500, **config)
    run.step, run.calls, run.leads, run.began = done, calls, True, 0.0
    run.bar = type("Bar", (), {"write": lambda self, text, file: print(text)})()
    monkeypatch.setattr(common.run.time, "perf_counter", lambda: elapsed)
    run._announce(seconds)
    said = re.fullmatch(
        r"(\d+) steps of 64 images, about ([\d.]+) minutes with the pictures\n(the last pictures take most .*\n)?",
        capsys.readouterr().out,
    )
    assert int(said[1]) == run.config.steps
    assert bool(said[3]) == ("minutes" in config and run.config.steps - done < calls[1] / 4)  # a fourth of a step each
    return run.config, float(said[2])


def test_the_time_counts_the_pictures(monkeypatch, capsys):
    """3990 steps, 8 previews of 50 calls and 1000 calls at the end; a call for 64 images takes a fourth of a step."""
    _, minutes = announced(monkeypatch, capsys, 0.1)
    assert minutes == pytest.approx((3990 + 3990 / 500 * 50 / 4 + 1000 / 4) * 0.1 / 60, abs=0.06)


@pytest.mark.parametrize("minutes", [1.0, 2.0, 10.0])  # of one, the last pictures take most
def test_minutes_become_steps(monkeypatch, capsys, minutes):
    """With start-up and pictures they take nearly all of the time, and no more."""
    config, said = announced(monkeypatch, capsys, 0.1, elapsed=20.0, minutes=minutes)
    assert config.minutes == 0.0
    steps = config.steps - 10
    total = 20 + (steps * (1 + 12.5 / 500) + 250) * 0.1
    assert 0.93 * 60 * minutes < total < 60 * minutes and said == pytest.approx((total - 20) / 60, abs=0.06)


def test_minutes_that_are_over_end_the_run_soon(monkeypatch, capsys):
    config, _ = announced(monkeypatch, capsys, 5.0, elapsed=100.0, minutes=0.5)
    assert config.steps == 10


def test_all_processes_take_the_steps_that_the_first_one_finds(monkeypatch, capsys):
    monkeypatch.setattr(common.run.ranks, "agreed", lambda steps: 777)
    config, _ = announced(monkeypatch, capsys, 0.1, minutes=10.0)
    assert config.steps == 777


@pytest.mark.lessons(*TWO_LESSONS)
def test_the_time_is_that_of_eight_steps_after_two(lesson, tmp_path):
    """By a clock that goes on by 3, 9, 2, 2, ... seconds when a step gets its batch."""
    clock, announced, batch = [0.0], [], Run.batch

    def slow_batch(self):
        clock[0] += {1: 3.0, 2: 9.0}.get(self.step, 2.0)
        return batch(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "batch", slow_batch)
        patch.setattr(Run, "_announce", lambda self, seconds: announced.append((self.step, seconds)))
        patch.setattr(common.run.time, "perf_counter", lambda: clock[0])
        assert quick(lesson.name, "--steps", 12, "--output", tmp_path).status == 0
    assert announced == [(10, 2.0)]


@pytest.mark.lessons(*TWO_LESSONS)
def test_config_json_is_written_with_the_checkpoint(lesson, tmp_path):
    assert quick(lesson.name, "--output", tmp_path).status == 0
    assert json.loads((tmp_path / "config.json").read_text()) == read_checkpoint(tmp_path)["config"]
