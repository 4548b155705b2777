"""The plumbing that both lessons share, and the small functions of train_mnist.py."""

import dataclasses
import math
import os
import re
import signal
import sys
import types

import pytest
import torch

from common.checkpoint import load_checkpoint, load_weights, save_checkpoint
from common.cli import StopRequest, check_choice, check_positive, check_range, field_comments, parse_config, run
from common.errors import LessonError
from common.machine import autocast, choose_device, choose_precision, seconds_per_step
from common.output import open_output, resume_run, save_run
from common.training_log import TrainingLog
from tests.running import hashes, script


@dataclasses.dataclass(frozen=True)
class Config:
    steps: int = 100  # how long, in 100 % of cases
    learning_rate: float = 1e-3  # how fast
    sigma_L: float = 0.01  # upper case stays
    skip: bool = True  # yes or no
    dataset: str = "mnist"  # which pictures
    minutes: float = 0.0  # instead of steps
    output: str = "output"  # where


PRESETS = {"paper": {"steps": 5000, "dataset": "cifar10", "skip": False}, "smoke": {"steps": 2}}


# The command line


def test_defaults():
    config, named, resume, overwrite = parse_config(Config, PRESETS, [])
    assert config == Config()
    assert named == set()
    assert resume is False and overwrite is False


def test_flags_have_the_types_of_the_fields():
    flags = "--steps 7 --learning-rate 1e-2 --sigma-L 1 --dataset 3 --no-skip --resume".split()
    config, named, resume, overwrite = parse_config(Config, PRESETS, flags)
    assert config == Config(steps=7, learning_rate=0.01, sigma_L=1.0, dataset="3", skip=False)
    assert [type(value) for value in dataclasses.astuple(config)] == [int, float, float, bool, str, float, str]
    assert named == {"steps", "learning_rate", "sigma_L", "dataset", "skip"}
    assert resume is True and overwrite is False


def test_presets_change_defaults_and_flags_beat_presets_in_any_order():
    config, named, _, _ = parse_config(Config, PRESETS, ["--paper"])
    assert config == Config(**PRESETS["paper"])
    assert named == {"steps", "dataset", "skip"}
    for flags in (["--paper", "--steps", "9", "--skip"], ["--steps", "9", "--skip", "--paper"]):
        config, named, _, overwrite = parse_config(Config, PRESETS, [*flags, "--overwrite"])
        assert config == Config(steps=9, dataset="cifar10", skip=True)
        assert overwrite is True


@pytest.mark.parametrize(
    "flags", ["--stpes 3", "--step 3", "--steps 3.5", "--steps", "--paper --smoke", "--resume --overwrite", "word"]
)
def test_what_cannot_be_read_ends_with_status_2(capsys, flags):
    with pytest.raises(SystemExit) as ended:
        parse_config(Config, PRESETS, flags.split())
    assert ended.value.code == 2
    assert "error: " in capsys.readouterr().err


def test_help_shows_each_default_and_comment(capsys):
    with pytest.raises(SystemExit) as ended:
        parse_config(Config, PRESETS, ["--help"])
    assert ended.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert __doc__ in text
    assert "--steps INT how long, in 100 % of cases (default: 100)" in text
    assert "--learning-rate FLOAT how fast (default: 0.001)" in text
    assert "--skip, --no-skip yes or no (default: True)" in text
    assert "--paper steps 5000, dataset cifar10, skip False" in text


def test_help_of_the_lessons(lesson, capsys):
    train_mnist = script(lesson.name)
    with pytest.raises(SystemExit):
        parse_config(train_mnist.Config, train_mnist.PRESETS, ["--help"])
    text = " ".join(capsys.readouterr().out.split())
    comments = field_comments(train_mnist.Config)
    for field in dataclasses.fields(train_mnist.Config):
        assert f"{comments[field.name]} (default: {field.default})" in text
        assert re.match("paper|ours", comments[field.name]), f"{field.name}: where does the number come from?"
    for name, changes in train_mnist.PRESETS.items():
        base, _, dataset = name.partition(" on ")
        assert f"--{base} " in text and (not dataset or f"; on {dataset}: " in text)
        assert set(changes) <= {field.name for field in dataclasses.fields(train_mnist.Config)}
        train_mnist.check(train_mnist.Config(**changes))
    train_mnist.check(train_mnist.Config())


def test_checks():
    config = types.SimpleNamespace(batch_size=0, rate=math.nan, name="x", good=1)
    check_positive(config, "good")
    check_choice(config, "name", ("x", "y"))
    check_range(config, "good", 1, 1)
    with pytest.raises(LessonError, match="^--batch-size must be greater than zero, not 0$"):
        check_positive(config, "good", "batch_size", "rate")
    with pytest.raises(LessonError, match="^--rate must be greater than zero, not nan$"):
        check_positive(config, "rate")
    with pytest.raises(LessonError, match="^--rate must lie between 0 and 1, not nan$"):
        check_range(config, "rate", 0, 1)
    with pytest.raises(LessonError, match="^--good must lie between 2 and 3, not 1$"):
        check_range(config, "good", 2, 3)
    with pytest.raises(LessonError, match="^--name x: choose one of 1, 2$"):
        check_choice(config, "name", (1, 2))


def raises(error):
    def main():
        raise error

    return main


@pytest.mark.parametrize(
    "main, code",
    [
        (lambda: 0, 0),
        (lambda: 143, 143),
        (raises(LessonError("what to do")), "error: what to do"),
        (raises(MemoryError()), "error: the memory is full; try a smaller --batch-size or --width"),
        (
            raises(RuntimeError("CUDA out of memory.\nTried to allocate")),
            "error: the memory is full; try a smaller --batch-size or --width",
        ),
    ],
)
def test_run_ends_the_program(main, code):
    with pytest.raises(SystemExit) as ended:
        run(main)
    assert ended.value.code == code


@pytest.mark.parametrize("error", [RuntimeError("a mistake in the code"), ValueError(), KeyboardInterrupt()])
def test_run_hides_no_mistake_of_ours(error):
    with pytest.raises(type(error)) as caught:
        run(raises(error))
    assert caught.value is error


# Signals


@pytest.fixture
def handlers():
    """Puts the signal handlers back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stop_request_remembers_the_first_signal_and_lets_the_second_through(handlers, monkeypatch, capsys, number):
    stop = StopRequest()
    assert not stop
    os.kill(os.getpid(), number)
    assert stop
    assert signal.getsignal(signal.SIGINT) == signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    monkeypatch.setattr(sys, "argv", ["train_mnist.py", "--overwrite", "--output", "a folder", "--steps", "9"])
    assert stop.exit_status("saved") == 128 + number
    advice = "saved; go on with: python train_mnist.py --output 'a folder' --steps 9 --resume\n"
    assert capsys.readouterr().out == advice


# Checkpoints


def test_checkpoint_round_trip(tmp_path):
    path = tmp_path / "new" / "checkpoint.pt"
    module = torch.nn.Linear(3, 2)
    state = {"network": module.state_dict(), "step": 7, "log": [1.5, [math.inf, "text", None]], "flag": True}
    save_checkpoint(path, "lesson_xx", **state)
    found = load_checkpoint(path, "lesson_xx")
    assert found.keys() == {"lesson", *state}
    assert (found["lesson"], found["step"], found["log"], found["flag"]) == ("lesson_xx", 7, state["log"], True)
    other = torch.nn.Linear(3, 2)
    assert not torch.equal(other.weight, module.weight)
    load_weights(other, found["network"], path)
    assert torch.equal(other.weight, module.weight)
    assert list(hashes(path.parent)) == ["checkpoint.pt"]


def test_weights_that_do_not_fit(tmp_path):
    with pytest.raises(LessonError, match="the weights in x.pt do not fit"):
        load_weights(torch.nn.Linear(3, 3), torch.nn.Linear(3, 2).state_dict(), "x.pt")


def test_checkpoint_of_another_lesson_and_of_none(tmp_path):
    save_checkpoint(tmp_path / "x.pt", "lesson_xx")
    with pytest.raises(LessonError, match="x.pt is a checkpoint of lesson_xx, not of lesson_yy"):
        load_checkpoint(tmp_path / "x.pt", "lesson_yy")
    with pytest.raises(LessonError, match="there is no file .*y.pt"):
        load_checkpoint(tmp_path / "y.pt", "lesson_xx")
    with pytest.raises(LessonError, match="there is no file"):  # a folder
        load_checkpoint(tmp_path, "lesson_xx")


# The output folder


def test_open_output_takes_a_folder_that_is_new_or_has_other_files(tmp_path):
    open_output(tmp_path / "new", overwrite=False)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "drawn.png").write_text("mine")
    before = hashes(tmp_path)
    for overwrite in (False, True):
        open_output(tmp_path, overwrite)
        assert hashes(tmp_path) == before


@pytest.mark.parametrize(
    "name",
    ["checkpoint.pt", "config.json", "metrics.csv", "loss.png", "trajectory.gif", "samples.png",
     "samples_before_denoising.png", "samples_step_000500.png"],
)  # fmt: skip
def test_open_output_sees_each_file_of_a_run(tmp_path, name):
    (tmp_path / name).write_text("of an earlier run")
    with pytest.raises(LessonError, match="holds an earlier run: .*--resume.*--overwrite.*--output"):
        open_output(tmp_path, overwrite=False)
    assert (tmp_path / name).read_text() == "of an earlier run"
    open_output(tmp_path, overwrite=True)


def saved(folder, step=10, **changes):
    config = Config(output=str(folder), **changes)
    save_run(config, "lesson_xx", step, (1, 4, 4), {"network": torch.nn.Linear(1, 1)}, torch.Generator())
    return config


def resume(*flags):
    config, named, _, _ = parse_config(Config, PRESETS, list(map(str, flags)))
    return resume_run(config, named, "lesson_xx")


def test_resume_keeps_the_configuration_of_the_run(tmp_path):
    config = saved(tmp_path, steps=50, dataset="cifar10")
    found, checkpoint = resume("--output", tmp_path)
    assert found == config
    assert checkpoint["step"] == 10
    assert checkpoint["image_shape"] == (1, 4, 4)


def test_resume_may_change_the_number_of_steps_but_not_the_data(tmp_path):
    config = saved(tmp_path, steps=50, dataset="cifar10")
    found, _ = resume("--output", tmp_path, "--steps", 60, "--dataset", "cifar10")
    assert found == dataclasses.replace(config, steps=60)
    with pytest.raises(LessonError, match="was made with --dataset cifar10: resume without --dataset"):
        resume("--output", tmp_path, "--dataset", "mnist")
    with pytest.raises(LessonError, match="is already at step 10: ask for more --steps"):
        resume("--output", tmp_path, "--steps", 9)


def test_resume_of_a_run_of_so_many_minutes_keeps_its_steps(tmp_path):
    saved(tmp_path, steps=50)
    found, _ = resume("--output", tmp_path, "--minutes", 3, "--smoke")
    assert (found.steps, found.minutes) == (50, 0.0)


def test_a_run_that_was_moved_goes_on_where_it_is(tmp_path):
    saved(tmp_path / "old")
    (tmp_path / "old").rename(tmp_path / "new")
    found, _ = resume("--output", tmp_path / "new")
    assert found.output == str(tmp_path / "new")


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    saved(tmp_path)
    before = hashes(tmp_path)
    network = torch.nn.Linear(1, 1)
    network.weight.data.fill_(math.nan)
    with pytest.raises(LessonError, match="not finite after step 11"):
        save_run(Config(output=str(tmp_path)), "lesson_xx", 11, (1, 4, 4), {"network": network}, torch.Generator())
    assert hashes(tmp_path) == before


# The machine


def test_choose_device():
    assert choose_device("cpu") == torch.device("cpu")
    best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    assert choose_device("auto").type == best
    with pytest.raises(LessonError, match="--device tpu: choose one of auto, cpu, cuda, mps"):
        choose_device("tpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.raises(LessonError, match="--device cuda: .*try --device auto"):
            choose_device("cuda")


def test_choose_precision_takes_the_faster(monkeypatch):
    monkeypatch.setattr("common.machine.seconds_per_step", lambda step, device: step())
    seconds, cpu = {"float32": 2.0, "bfloat16": 3.0}, torch.device("cpu")
    assert choose_precision("auto", cpu, seconds.get) == ("float32", 2.0)
    assert choose_precision("bfloat16", cpu, seconds.get) == ("bfloat16", 3.0)
    seconds["bfloat16"] = 1.0
    assert choose_precision("auto", cpu, seconds.get) == ("bfloat16", 1.0)
    assert choose_precision("float32", cpu, seconds.get) == ("float32", 2.0)
    with pytest.raises(LessonError, match="--precision float16: choose one of auto, float32, bfloat16"):
        choose_precision("float16", cpu, seconds.get)


def test_seconds_per_step_leaves_out_the_first(monkeypatch):
    clock, calls = iter([0.0, 100.0, 200.0, 203.0, 300.0, 302.0, 400.0, 404.0]), []
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    assert seconds_per_step(lambda: calls.append(1), torch.device("cpu"), repeats=3) == 2.0
    assert len(calls) == 4


def test_autocast():
    a = torch.ones(2, 2)
    with autocast(a.device, "bfloat16"):
        assert (a @ a).dtype == torch.bfloat16
    with autocast(a.device, "float32"):
        assert (a @ a).dtype == torch.float32


# The record of a run

SIGMAS = torch.tensor([512.0, 256, 128, 64, 32, 16, 8, 4, 2, 1])  # two in each of five bands


def test_log_rows_are_means_over_images_and_bands(tmp_path):
    log = TrainingLog(SIGMAS)
    log.add(1, torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0, 1, 9]))
    log.add(2, torch.tensor([6.0]), torch.tensor([8]))
    assert log.close_row() == 3.0
    log.add(3, torch.tensor([5.0, 7.0]), torch.tensor([4, 5]))
    log.close_row()
    nan = math.nan
    expected = [[2, 3.0, 1.5, nan, nan, nan, 4.5], [3, 6.0, nan, nan, 6.0, nan, nan]]
    assert log.rows == [pytest.approx(row, nan_ok=True) for row in expected]
    log.write(tmp_path, D=16)
    header, *rows = (tmp_path / "metrics.csv").read_text().splitlines()
    assert header == (
        "step,loss,sigma 512 to 256,sigma 128 to 64,sigma 32 to 16,sigma 8 to 4,sigma 2 to 1"  # neighbours, all there
    )
    assert rows == ["2,3.0,1.5,nan,nan,nan,4.5", "3,6.0,nan,nan,6.0,nan,nan"]
    assert set(hashes(tmp_path)) == {"metrics.csv", "loss.png"}


@pytest.mark.parametrize("L", [2, 3, 5, 7, 11])
def test_log_bands_divide_any_ladder(tmp_path, L):
    sigmas = torch.linspace(L, 1, L)
    log = TrainingLog(sigmas)
    log.add(1, sigmas, torch.arange(L))
    log.close_row()
    log.write(tmp_path, D=16)
    bands = (tmp_path / "metrics.csv").read_text().splitlines()[0].split(",")[2:]
    assert len(bands) == min(5, L)
    edges = [tuple(map(int, re.fullmatch(r"sigma (\d+) to (\d+)", band).groups())) for band in bands]
    assert edges[0][0] == L and edges[-1][1] == 1
    assert all(high >= low for high, low in edges)
    assert all(low == high + 1 for (_, low), (high, _) in zip(edges, edges[1:]))
    assert log.rows[0][2:] == pytest.approx([(high + low) / 2 for high, low in edges])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_log_names_step_and_scale_of_a_bad_loss(tmp_path, bad):
    log = TrainingLog(SIGMAS)
    log.add(11, torch.tensor([1.0, 2.0]), torch.tensor([0, 1]))
    log.check()
    log.add(12, torch.tensor([1.0, bad, bad]), torch.tensor([0, 7, 2]))
    log.add(13, torch.tensor([bad]), torch.tensor([9]))
    for use in (log.check, log.close_row, log.state_dict, lambda: log.write(tmp_path, D=16)):
        with pytest.raises(LessonError, match=r"not finite at step 12, noise scale 8 of 10 \(sigma 4\); .*--learning"):
            use()
    assert log.rows == []
    assert hashes(tmp_path) == {}


def test_log_goes_on_after_a_round_trip(tmp_path):
    def add(log, steps):
        for step in steps:
            generator = torch.Generator().manual_seed(step)
            i = torch.randint(10, (16,), generator=generator)
            log.add(step, torch.rand(16, generator=generator), i)
            if step % 10 == 0:
                log.close_row()

    straight, first, second = (TrainingLog(SIGMAS) for _ in range(3))
    add(straight, range(1, 21))
    add(first, range(1, 14))
    first.write(tmp_path, D=16)
    assert (tmp_path / "metrics.csv").read_text().splitlines()[-1].startswith("13,")  # what is there so far
    torch.save(first.state_dict(), tmp_path / "log.pt")
    second.load_state_dict(torch.load(tmp_path / "log.pt", weights_only=True))
    add(second, range(14, 21))
    assert second.rows == straight.rows
    assert len(second.rows) == 2


# The small functions of train_mnist.py


def config_of(lesson, **changes):
    return script(lesson.name).Config(**changes)


def test_learning_rate_warms_up_and_falls_to_zero_in_half_a_cosine(lesson):
    config = config_of(lesson, steps=1000, learning_rate=3.0, warmup=100, decay="cosine")
    rate = [script(lesson.name).learning_rate(step, config) for step in range(1, 1001)]
    assert rate[0] == pytest.approx(3 / 100)
    assert max(range(1000), key=rate.__getitem__) + 1 == 100
    assert rate[:100] == sorted(rate[:100])
    assert rate[99:] == sorted(rate[99:], reverse=True)
    assert rate[500] == pytest.approx(1.5)  # after half of the steps
    assert 0 < rate[-1] < 3e-5


def test_learning_rate_is_constant_if_asked(lesson):
    learning_rate = script(lesson.name).learning_rate
    config = config_of(lesson, steps=10, learning_rate=3.0, warmup=0, decay="constant")
    assert [learning_rate(step, config) for step in range(1, 11)] == [3.0] * 10
    config = config_of(lesson, steps=10, learning_rate=3.0, warmup=3, decay="constant")
    assert [learning_rate(step, config) for step in range(1, 5)] == pytest.approx([1.0, 2.0, 3.0, 3.0])


def draws(lesson, batch_size, sigmas, focus, times):
    generator = torch.Generator().manual_seed(1)
    draw = script(lesson.name).draw_noise_scales
    i = torch.stack([draw(batch_size, sigmas, focus, generator) for _ in range(times)])
    assert i.dtype == torch.long
    assert i.min() >= 0 and i.max() < len(sigmas)
    return i  # (times, B)


def test_noise_scales_of_a_batch_are_spread_evenly(lesson):
    i = draws(lesson, batch_size=30, sigmas=SIGMAS, focus=0.0, times=20)
    counts = (i[:, :, None] == torch.arange(10)).sum(1)  # (times, L)
    assert ((counts - 3).abs() <= 1).all()
    i = draws(lesson, batch_size=4, sigmas=SIGMAS, focus=0.0, times=20)
    assert (i.diff(dim=1) >= 2).all()  # 10 / 4 apart


@pytest.mark.parametrize("batch_size", [1, 7, 64])  # below and above the number of scales
def test_noise_scales_are_equally_likely(lesson, batch_size):
    i = draws(lesson, batch_size, SIGMAS, 0.0, times=3000 // batch_size)
    frequency = i.flatten().bincount(minlength=10) / i.numel()
    assert frequency == pytest.approx([0.1] * 10, abs=0.025)


def test_noise_scales_near_the_focus_come_more_often(lesson):
    sigmas = torch.logspace(1, -2, 31)
    i = draws(lesson, batch_size=64, sigmas=sigmas, focus=0.5, times=300)
    density = 0.15 + torch.exp(-0.5 * (sigmas / 0.5).log().square())
    frequency = i.flatten().bincount(minlength=31) / i.numel()
    assert frequency == pytest.approx((density / density.sum()).tolist(), abs=0.003)
    assert frequency.max() > 3 * frequency.min() > 0
    assert sigmas[frequency.argmax()] == pytest.approx(0.5, rel=0.3)


def test_ema_warms_up_and_then_decays():
    train_mnist = script("lesson_04_ncsnv2")
    network, ema = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    for step, d in ((1, 2 / 11), (5, 6 / 15), (10_000, 0.99)):
        network.weight.data.fill_(1.0)
        ema.weight.data.fill_(0.0)
        train_mnist.update_ema(ema, network, step, decay=0.99)
        assert ema.weight.item() == pytest.approx(1 - d)
        assert network.weight.item() == 1.0


def test_ema_of_a_constant_is_the_constant_and_of_a_step_forgets_the_first_weights():
    update_ema = script("lesson_04_ncsnv2").update_ema
    network, ema = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    network.weight.data.fill_(1.0)
    ema.weight.data.fill_(1000.0)  # as a random start would be: far from where training goes
    for step in range(1, 101):
        update_ema(ema, network, step, decay=0.999)
    assert ema.weight.item() == pytest.approx(1.0, abs=1e-3)  # 0.999^100 would have left 90 % of it
