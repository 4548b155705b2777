"""`python -m common.evaluate`, with a judge that only looks at what it is given, and `python -m common.bench`."""

import contextlib
import io
import itertools
import re
import sys
import time
from types import SimpleNamespace

import pytest
import torch

import common.bench
import common.cli
import common.evaluate
from common.errors import LessonError
from common.files import Claim
from common.machine import choose_device
from common.noise import SeededNoise
from tests import warm
from tests.running import DIFFUSION, ENVIRONMENT, ROOT, Result, quick, script, some_pictures


@pytest.fixture
def evaluate(monkeypatch):
    """Runs common.evaluate in this process: (what came out, what the judge was given)."""
    given = []

    def digit_report(samples):
        given.append(samples)
        return {}

    def run(*flags):
        out, err = io.StringIO(), io.StringIO()
        monkeypatch.setattr(sys, "argv", ["evaluate", *map(str, flags)])
        monkeypatch.setattr(common.evaluate, "load_lesson", lambda name: script(name, "sample"))
        monkeypatch.setattr(common.evaluate, "digit_report", digit_report)
        monkeypatch.setattr(common.evaluate, "print_report", lambda report: print("the report"))
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as ended:
            common.cli.run(common.evaluate.main)
        code = ended.value.code or 0
        if isinstance(code, str):
            return Result(1, out.getvalue(), err.getvalue() + code + "\n"), given
        return Result(code, out.getvalue(), err.getvalue()), given

    return run


@pytest.fixture(scope="module")
def short(lesson, tmp_path_factory):
    folder = tmp_path_factory.mktemp(lesson.name)
    flags = ("--no-clip-x-0",) if lesson.name in DIFFUSION else ()  # or no sample would leave [0, 1]
    T = {"lesson_03_ncsn": 20, "lesson_04_ncsnv2": 2}.get(lesson.name, 8)  # 20: more than a quick look takes
    many = "--N" if lesson.name == "lesson_07_score_sde" else "--T"
    assert quick(lesson.name, many, T, *flags, "--output", folder).status == 0
    return folder / "checkpoint.pt"


def test_samples_of_a_checkpoint_are_the_papers_and_those_of_the_seed(lesson, short, evaluate, tmp_path):
    """As many calls as the run's T or N takes, image k of seed + k, clamped for the judge and saved as they are."""
    result, (given,) = evaluate(short, "--num", 5, "--seed", 7, "--save", tmp_path / "s.pt")
    assert result.status == 0 and result.stdout.endswith("the report\n")
    checkpoint = torch.load(short, weights_only=True)
    if lesson.name in DIFFUSION:
        sampler, calls = "ancestral", 8
    elif lesson.name == "lesson_07_score_sde":
        sampler, calls = "predictor_corrector", 2 * 7 + 1
    else:
        L = len(checkpoint["network"]["sigmas"])
        sampler, calls = "langevin", 20 * L if lesson.name == "lesson_03_ncsn" else 2 * L + 1
    assert f"{lesson.name}, step 5, {sampler}, at most {calls} network calls, float32\n" in result.stdout
    saved = torch.load(tmp_path / "s.pt", weights_only=True)
    assert saved.shape == (5, 1, 28, 28) and torch.equal(saved.clamp(0, 1), given) and saved.min() < 0
    sample = script(lesson.name, "sample")
    network, config, _ = common.evaluate.load_network(sample, short, choose_device())
    noise = SeededNoise(range(8, 10))
    *_, expected = sample.draw(network, config, (2, 1, 28, 28), noise, sampler, calls)
    torch.testing.assert_close(saved[1:3], expected.cpu(), rtol=1e-3, atol=1e-3)


def test_calls_and_sampler(lesson, short, evaluate):
    calls = 7 if lesson.name in DIFFUSION else 50
    for sampler in script(lesson.name, "sample").SAMPLERS:
        result, _ = evaluate(short, "--num", 4, "--sampler", sampler, "--calls", calls)
        assert f"{sampler}, at most {calls} network calls" in result.stdout and result.status == 0
    result, _ = evaluate(short, "--sampler", "leapfrog")
    assert result.status == 1 and "--sampler leapfrog: choose one of " in result.stderr


def test_samples_are_made_in_the_precision_that_is_printed(evaluate, monkeypatch):
    """Whatever the machine would choose."""
    path, seen = ROOT / "lesson_03_ncsn" / "pretrained.pt", []

    def sample_all(lesson, network, config, shape, seed, sampler, calls, precision):
        seen.append((shape, seed, sampler, calls, precision))
        return torch.zeros(shape), []

    monkeypatch.setattr(common.evaluate, "sample_all", sample_all)
    for chosen in ("float32", "bfloat16"):
        monkeypatch.setattr(common.evaluate, "sampling_precision", lambda *how, chosen=chosen: chosen)
        result, _ = evaluate(path, "--num", 4, "--calls", 20)
        assert f"langevin, at most 20 network calls, {chosen}\n" in result.stdout
        assert seen.pop() == ((4, 1, 28, 28), 1, "langevin", 20, chosen)


def test_digits_in_color_are_judged(evaluate, tmp_path):
    flags = ("--dataset", "color_mnist", "--steps", 1, "--output", tmp_path)
    assert quick("lesson_03_ncsn", *flags).status == 0
    result, given = evaluate(tmp_path / "checkpoint.pt", "--num", 4)
    assert result.status == 0, result.stderr
    assert [samples.shape for samples in given] == [(4, 3, 28, 28)]


def test_a_tensor_of_samples(evaluate, tmp_path):
    torch.save(torch.linspace(-1, 2, 4 * 784).view(4, 1, 28, 28), tmp_path / "x.pt")
    result, (given,) = evaluate(tmp_path / "x.pt")
    assert result.status == 0 and given.min() == 0 and given.max() == 1 and given.shape == (4, 1, 28, 28)
    result, _ = evaluate(tmp_path / "x.pt", "--seed", 2, "--num", 4)
    assert result.status == 1 and "x.pt has the samples already: leave out --num, --seed" in result.stderr


@pytest.mark.parametrize(
    "flags, expected",
    [
        ("--num 3", "--num must lie between 4 and "),
        ("--calls 0", "--calls must be greater than zero"),
        ("--save {tmp}/file/x.pt", "cannot write .*x.pt"),
        ("--save {tmp}", "cannot write .*: it is a folder"),
    ],
)
def test_mistakes_are_found_before_the_work(lesson, short, evaluate, flags, expected, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(common.evaluate, "sample_all", None)
    result, given = evaluate(short, *flags.replace("{tmp}", str(tmp_path)).split())
    assert result.status == 1 and re.search(f"error: {expected}", result.stderr) and given == []


def test_what_is_no_digit_is_not_judged(lesson, short, evaluate, tmp_path, monkeypatch):
    monkeypatch.setattr(common.evaluate, "sample_all", None)
    for changes, expected in (
        ({"image_shape": (1, 16, 16)}, "the digit metrics need images"),
        ({"config": {"dataset": "fashion_mnist"}}, "was not trained on digits"),
        ({"config": {"images": "folder"}}, "was not trained on digits"),
    ):
        checkpoint = torch.load(short, weights_only=True)
        checkpoint["config"].update(changes.pop("config", {}))
        torch.save({**checkpoint, **changes}, tmp_path / "x.pt")
        result, given = evaluate(tmp_path / "x.pt")
        assert result.status == 1 and expected in result.stderr and given == []


@pytest.mark.parametrize("samples", [torch.empty(0, 1, 28, 28), torch.zeros(4, 1, 28, 28, dtype=torch.uint8)])
def test_tensors_that_are_no_samples(evaluate, samples, tmp_path):
    torch.save(samples, tmp_path / "x.pt")
    result, _ = evaluate(tmp_path / "x.pt")
    assert result.status == 1 and "holds no samples: save floats" in result.stderr


def test_files_that_are_no_checkpoint(evaluate, tmp_path):
    torch.save([1], tmp_path / "list.pt")
    for name, expected in (("absent.pt", "there is no file"), ("list.pt", "is not a checkpoint of these lessons")):
        result, _ = evaluate(tmp_path / name)
        assert result.status == 1 and expected in result.stderr


# The bench


def test_bench_times_the_lessons_own_loop(lesson, monkeypatch, capsys):
    """By a clock that goes on by a second each time it is read: four steps of 16 images take one, and so does the first
    frame of 16 pictures; after a second there are no more.
    """
    module, seconds, steps = script(lesson.name), itertools.count(), []

    class Optimizer(module.Optimizer):
        def step(self, rate):
            steps.append(rate)
            super().step(rate)

    sample = script(lesson.name, "sample")
    monkeypatch.setattr(common.bench, "load_lesson", lambda name: sample)
    monkeypatch.setattr("common.run.load_pictures", some_pictures)
    monkeypatch.setattr("common.run.SAMPLES", 16)
    monkeypatch.setitem(sys.modules, "train_mnist", module)
    monkeypatch.setattr(module, "Optimizer", Optimizer)
    monkeypatch.setattr(time, "perf_counter", lambda: next(seconds))
    rounds = 2 if lesson.name == "lesson_03_ncsn" else 1
    monkeypatch.setattr(sys, "argv", ["bench", lesson.name, "--rounds", str(rounds), "--smoke"])
    precisions, time_round = [], common.bench.time_round

    def watched(name, preset, precision):
        timed = time_round(name, preset, precision)
        precisions.append((precision, timed.config.precision, timed.precision))
        return timed

    monkeypatch.setattr(common.bench, "time_round", watched)
    release, released = Claim.release, []
    monkeypatch.setattr(Claim, "release", lambda claim: released.append(claim) or release(claim))
    common.bench.main()
    assert precisions == rounds * [("float32",) * 3, ("bfloat16",) * 3]
    assert len(released) == rounds * 2  # a run's folder is given back, in each round and precision
    out = capsys.readouterr().out
    first = 1 if lesson.name in DIFFUSION else module.PRESETS["smoke"].get("T", 2)  # calls; 2: predictor and corrector
    for precision in ("float32", "bfloat16"):
        assert re.search(rf"^smoke, {precision} +64\.0 +{16 * first}\.0$", out, re.MULTILINE), out
    assert len(steps) == rounds * 2 * 5 and out.startswith(f"{lesson.name}, ")
    assert re.search("^train_mnist.py chooses (float32|bfloat16)$", out, re.MULTILINE)


def test_bench_has_a_row_for_each_network_and_precision(monkeypatch, capsys):
    """The medians of three rounds, of which each adds another whole number to what tells the rows apart."""
    rates = {(None, "float32"): 0.1, (None, "bfloat16"): 0.2, ("paper", "float32"): 0.3, ("paper", "bfloat16"): 0.4}
    asked = []

    def time_round(name, preset, precision):
        asked.append((name, preset, precision))
        rate = (9, 5, 1)[(len(asked) - 1) // 4] + rates[preset, precision]
        return SimpleNamespace(training=rate, sampling=10 * rate)

    monkeypatch.setattr(common.bench, "time_round", time_round)
    monkeypatch.setattr(sys, "argv", ["bench", "lesson_05_ddpm"])
    common.bench.main()
    assert len(asked) == 12 and {name for name, *_ in asked} == {"lesson_05_ddpm"}
    rows = [re.split("  +", line) for line in capsys.readouterr().out.splitlines()[2:6]]
    assert rows == [
        ["lesson run, float32", "5.1", "51.0"],
        ["lesson run, bfloat16", "5.2", "52.0"],
        ["paper's network, float32", "5.3", "53.0"],
        ["paper's network, bfloat16", "5.4", "54.0"],
    ]


def test_a_bench_of_no_rounds(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["bench", "--rounds", "0"])
    with pytest.raises(LessonError, match="--rounds must be greater than zero"):
        common.bench.main()


def test_bench_starts_as_the_makefile_starts_it():
    ran = warm.run("-m", "common.bench", "--rounds", 1, "--smoke", cwd=ROOT, env=ENVIRONMENT)
    assert ran.status == 0 and ran.stdout.startswith("lesson_04_ncsnv2, "), ran.stderr


def test_evaluate_starts_as_the_readmes_start_it():
    command = "-m", "common.evaluate", "lesson_03_ncsn/pretrained.pt", "--num", 4, "--calls", 10
    ran = warm.run(*command, cwd=ROOT, env=ENVIRONMENT)
    assert ran.status == 0 and "digit FID" in ran.stdout, ran.stderr
    assert "lesson_03_ncsn, step 5000, langevin, at most 10 network calls" in ran.stdout
