"""The scripts that make the tables and figures of the READMEs."""

import contextlib
import csv
import importlib
import io
import math
import re
import runpy
import shutil
import signal
import sys
import types
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from tests.running import ROOT, Result

sys.path.append(str(ROOT / "docs"))

import compare
import figures
import figures_ddpm
import figures_sde
import gpu
import measure
import origin
import others
import techniques

from common.data import load_images
from common.errors import LessonError
from common.machine import InBatches
from common.noise import SeededNoise
from lesson_04_ncsnv2.sampler import ancestral_eta, consistent_annealed_sampling
from lesson_04_ncsnv2.score_network import ScoreNetwork
from lesson_09_improved_ddpm.noise_schedule import spaced_timesteps
from tests import test_ddpm


def run_script(name, *flags):
    """Runs `python docs/NAME FLAGS` from the top folder, in this process, which saves importing torch."""
    out, err, threads = io.StringIO(), io.StringIO(), torch.get_num_threads()
    files = {path.stem for path in ROOT.glob("lesson_*/*.py")}  # names that the lessons share
    modules = {name: sys.modules.pop(name) for name in files & sys.modules.keys()}
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"docs/{name}", *map(str, flags)])
        patch.setattr(sys, "path", sys.path[:])
        patch.chdir(ROOT)
        patch.setenv("OMP_NUM_THREADS", "1")  # for the trainings that it starts
        try:
            torch.set_num_threads(1)
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as ended:
                runpy.run_path(str(ROOT / "docs" / name), run_name="__main__")
        finally:
            torch.set_num_threads(threads)
            for number, handler in handlers.items():
                signal.signal(number, handler)
            for each in files & sys.modules.keys():
                del sys.modules[each]
            sys.modules.update(modules)
    code = ended.value.code
    return Result(1 if isinstance(code, str) else code or 0, out.getvalue(), err.getvalue() + f"{code or ''}")


def test_the_exact_score_is_the_gradient_of_the_log_density():
    images, sigmas = torch.rand(7, 1, 4, 4), torch.tensor([2.0, 0.3])
    i, x = torch.tensor([0, 1, 1]), torch.rand(3, 1, 4, 4, requires_grad=True)
    away = (x.flatten(1)[:, None] - images.flatten(1)).square().sum(2)  # (3, 7)
    (-away / (2 * sigmas[i][:, None] ** 2)).logsumexp(1).sum().backward()
    torch.testing.assert_close(figures.exact_score(images, sigmas)(x.detach(), i), x.grad)


FROM_CSV = ["compare", "measure", "lesson_04_eta", "lesson_04_technique_4", "lesson_05_calls", "lesson_05_loss",
            "lesson_05_rate", "lesson_07_calls", "lesson_09_calls", "lesson_09_v"]  # fmt: skip


@pytest.mark.parametrize("name", FROM_CSV)
def test_a_picture_shows_the_numbers_of_today(name, monkeypatch):
    """Those of the CSV file beside it; if not, make it again: `python docs/figures....py NAME`."""
    found = []
    for module in (figures, figures_ddpm, figures_sde):
        monkeypatch.setattr(module, "save", lambda figure, path: found.append(figures.drawn(figure)))
    {**figures.FIGURES, **figures_ddpm.FIGURES, **figures_sde.FIGURES}[name](Path("not written"))
    with Image.open(ROOT / "docs" / "images" / f"{name}.png") as picture:
        assert [picture.text["drawn"]] == found


def test_the_checksum_of_a_picture_sees_a_number_and_a_title():
    def checksum(y, title="a"):
        figure = Figure()
        panel = figure.add_subplot()
        panel.plot([1, 2], [3, y])
        panel.scatter([1], [y])
        panel.set_title(title)
        return figures.drawn(figure)

    assert checksum(1.62) == checksum(1.6201) != checksum(1.55)
    assert checksum(1.62) != checksum(1.62, "b")


@pytest.mark.parametrize("name", ["lesson_04_ladder", "measure"])
def test_figures(name, tmp_path):
    figures.FIGURES[name](tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_the_figure_of_step_sizes_prints_the_table_of_the_recursion(tmp_path, capsys):
    figures.step_size(tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    printed = re.findall(r"^\| [123] \|.*", capsys.readouterr().out, re.MULTILINE)
    page = (ROOT / "lesson_04_ncsnv2" / "README.md").read_text()
    assert len(printed) == 3 and "\n".join(printed) in page


def test_figures_of_measurements(tmp_path):
    source = tmp_path / "calls.csv"
    with pytest.raises(LessonError, match="cannot read"):
        figures.sampling_calls(tmp_path / "a.png", source)
    source.write_text("sampler,calls,n,seed,fid\nconsistent,97,100,1,12.5\nlangevin,961,100,1,13\n")
    figures.sampling_calls(tmp_path / "a.png", source)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(LessonError, match="needs the columns"):
        figures.technique_1(tmp_path / "b.png", source)


def test_the_measure_of_damages_runs_and_goes_on(tmp_path):
    file = tmp_path / "measure.csv"
    flags = ("measure.py", "missing", "--num", 20, "--seeds", 1, "--csv", file)
    first = run_script(*flags)
    assert first.status == 0, first.stderr
    before = file.read_text()
    header, *lines = before.splitlines()
    assert header == ",".join(measure.COLUMNS) and [line.split(",")[1] for line in lines] == ["1", "2", "5"]
    file.write_text("".join(f"{line}\n" for line in (header, *lines[:-1])))
    again = run_script(*flags)
    assert again.status == 0 and file.read_text() == before
    assert again.stdout == first.stdout and "| missing classes: 5 of 10 |" in first.stdout
    with pytest.raises(LessonError, match="run python docs/measure.py"):
        figures.measure(tmp_path / "a.png", file)


def test_damages_that_cannot_be_measured(tmp_path):
    for flags, text in ((["nothing"], "choose one of noise, "), (["--num", "3"], "--num must lie between 4")):
        ran = run_script("measure.py", *flags, "--csv", tmp_path / "measure.csv")
        assert ran.status == 1 and ran.stderr.startswith("error: ") and text in ran.stderr


def test_the_table_of_damages_is_that_of_the_file():
    lines = list(csv.reader((ROOT / "docs" / "measure.csv").read_text().splitlines()))
    assert measure.write_table(lines, 1000) in (ROOT / "docs" / "experiments.md").read_text()


def test_figures_that_are_not_there():
    ran = run_script("figures.py", "nothing")
    assert ran.status == 1 and ran.stderr.startswith("error: there is no figure nothing: choose from ")


def test_lesson_4_on_its_own_noise_levels():
    four = techniques.load("lesson_04_ncsnv2", ROOT / "lesson_04_ncsnv2" / "pretrained.pt", smoke=True)
    device = four.network.sigmas.device
    x, i = torch.rand(3, 1, 28, 28, device=device), torch.tensor([0, 3, 5], device=device)
    score = techniques.on_levels(four.network, four.network.sigmas)
    with torch.no_grad():
        torch.testing.assert_close(score(x, i), four.network(x, i))
    sigmas = techniques.levels(four.network, 6)
    assert sigmas[0] == four.network.sigmas[0] and sigmas[-1] == four.network.sigmas[-1]


def test_the_techniques_run_and_go_on(tmp_path):
    first = run_script("techniques.py", "--smoke", "--output", tmp_path)
    assert first.status == 0, first.stderr
    assert all(f"{name.__name__}: " in first.stdout for name in techniques.EXPERIMENTS)
    csv = tmp_path / "techniques.csv"
    lines = csv.read_text().splitlines()
    assert lines[0] == ",".join(techniques.COLUMNS)
    assert len(lines) == len({tuple(line.split(",")[:4]) for line in lines}) > 100
    names = {path.name for path in (tmp_path / "images").iterdir()}
    pictures = "lesson_04_technique_5_pictures"
    assert names == {f"{pictures}.png", f"{pictures}.gif", "lesson_04_last_step.png"}
    for name in [name for name in figures.FIGURES if "technique_" in name or name == "lesson_04_eta"]:
        figures.FIGURES[name](tmp_path / "figure.png", csv)

    again = run_script("techniques.py", "--smoke", "--output", tmp_path)
    assert again.status == 0 and csv.read_text().splitlines() == lines
    anew = run_script("techniques.py", "technique_1", "--smoke", "--again", "--output", tmp_path)
    measured = [sorted(line.split(",")[:4] for line in some) for some in (csv.read_text().splitlines(), lines)]
    assert anew.status == 0 and measured[0] == measured[1]
    assert "lesson 3: 1: kept" in anew.stdout and "lesson 3: 1: kept" not in again.stdout


def test_levels_are_closer_where_the_digit_is_decided():
    even, closer = (techniques.closer_levels(16.0, 0.01, 97, density) for density in (1, 4))
    torch.testing.assert_close(even, torch.logspace(math.log10(16), -2, 97), rtol=1e-3, atol=0)
    inside = lambda sigmas: int(((sigmas > 0.5) & (sigmas < 2)).sum())
    share = math.log(4) / math.log(1600)
    assert inside(even) == pytest.approx(97 * share, abs=1)
    assert inside(closer) == pytest.approx(97 * 4 * share / (1 + 3 * share), abs=1)
    assert closer[[0, -1]].tolist() == pytest.approx([16, 0.01], rel=1e-3)


def test_half_way_sampling_leaves_the_noise_of_the_last_level():
    """On data at one point, whose score is exact; two levels: a step of lesson 4's sampler, half-way from DDPM's."""
    sigmas, seeds = torch.tensor([3.0, 1.0, 0.2]), range(400)
    score = lambda x, i: (0.7 - x) / sigmas[i][:, None, None, None] ** 2
    x = 0.7 + sigmas[0] * SeededNoise(seeds).like(torch.empty(400, 1, 8, 8))
    y = techniques.half_way_sampling(score, x, sigmas, SeededNoise(range(400, 800)))
    assert y.mean() == pytest.approx(0.7, abs=0.01) and y.std() == pytest.approx(0.2, rel=0.02)
    mine = techniques.half_way_sampling(score, x, sigmas[:2], SeededNoise(seeds))
    eta = (1 + ancestral_eta(sigmas[:2])) / 2
    sampler = consistent_annealed_sampling(score, x, sigmas[:2], 1, eta * float(sigmas[1]) ** 2, SeededNoise(seeds))
    torch.testing.assert_close(mine, next(sampler))


def test_dilations_are_those_of_the_last_two_stages():
    lesson_4 = lambda: ScoreNetwork(torch.tensor([2.0, 1.0]), width=8, blocks=2)
    dilations = lambda network: [
        {m.dilation[0] for m in stage.modules() if isinstance(m, torch.nn.Conv2d) and m.kernel_size == (3, 3)}
        for stage in network.stages
    ]
    assert dilations(techniques.set_dilations(lesson_4(), (2, 4))) == dilations(lesson_4()) == [{1}, {1}, {2}, {4}]
    changed = techniques.set_dilations(lesson_4(), (1, 3))
    assert dilations(changed) == [{1}, {1}, {1}, {3}]
    assert changed(torch.rand(2, 1, 16, 16), torch.tensor([0, 1])).shape == (2, 1, 16, 16)  # padded as far as dilated


def test_techniques_that_cannot_run(tmp_path):
    for flags, text in (
        (["nothing"], "choose one of technique_1, technique_2, "),
        (["--num", "1"], "--num must lie between"),
        (["--lesson-4", "nothing.pt"], "there is no file nothing.pt"),
    ):
        ran = run_script("techniques.py", "--smoke", "--output", tmp_path, *flags)
        assert ran.status == 1 and ran.stderr.startswith("error: ") and text in ran.stderr
    with pytest.raises(LessonError, match="run python docs/t.py eta"):
        (tmp_path / "t.csv").write_text(
            ",".join(figures.TECHNIQUES_COLUMNS) + "\ntechnique_1,lesson 3,1,kept,0.9,8,1\n"
        )
        figures.eta(tmp_path / "a.png", tmp_path / "t.csv")


@pytest.mark.parametrize("name, number", [("ddpm", "05"), ("score_sde", "07"), ("improved_ddpm", "09")])
def test_the_measurements_of_lessons_5_to_9_run_and_go_on(name, number, tmp_path):
    first = run_script(f"{name}.py", "--smoke", "--output", tmp_path)
    assert first.status == 0, first.stderr
    file = tmp_path / f"{name}.csv"
    lines = file.read_text().splitlines()
    assert lines[0] == ",".join(techniques.COLUMNS)
    with file.open(newline="") as text:
        rows = [tuple(row[:4]) for row in csv.reader(text)]
    assert len(rows) == len(set(rows)) > 20
    for figure in {"05": ("calls", "loss"), "07": ("calls",), "09": ("calls", "v")}[number]:
        make = {**figures_ddpm.FIGURES, **figures_sde.FIGURES}[f"lesson_{number}_{figure}"]
        make(tmp_path / "figure.png", file)
        assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    again = run_script(f"{name}.py", "--smoke", "--output", tmp_path)
    assert again.status == 0 and file.read_text().splitlines() == lines


@pytest.mark.parametrize(
    "command",
    [
        ("techniques.py", "technique_1", "--smoke"),
        ("techniques.py", "technique_1", "--lesson-4", "mine.pt"),
        ("ddpm.py", "loss", "--smoke"),
        ("score_sde.py", "bits", "--checkpoint", "mine.pt"),
        ("compare.py", "calls", "--smoke"),
        ("gpu.py", "speed", "--smoke"),
        ("sampling_calls.py", "--checkpoint", "mine.pt"),
    ],
    ids=" ".join,
)
def test_published_numbers_are_of_the_lessons_own_networks(command):
    ran = run_script(*command)
    assert ran.status == 1 and "has what the lessons' own networks measured: add another --output" in ran.stderr


def test_what_is_measured_needs_no_other_runs(tmp_path):
    """Of lesson 7 two experiments compare with a run that is not in the repository."""
    shutil.copy(ROOT / "docs" / "score_sde.csv", tmp_path)
    before = (tmp_path / "score_sde.csv").read_bytes()
    ran = run_script("score_sde.py", "loss", "conditioning", "encoding", "--output", tmp_path)
    assert ran.status == 0 and ran.stdout.count("measurements are in") == 3 and "; --again makes them" in ran.stdout
    assert (tmp_path / "score_sde.csv").read_bytes() == before


def test_a_line_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    table = techniques.Table(tmp_path / "t.csv", "e", 8, 1, False, False)
    table.add("setting", 1, fid=2.0)
    before = (tmp_path / "t.csv").read_text()

    class HalfAWriter:
        def __init__(self, file, **how):
            self.file = file

        def writerows(self, lines):
            self.file.write("half a li")
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(origin.csv, "writer", HalfAWriter)
    with pytest.raises(LessonError, match="cannot write .*t.csv"):
        table.add("setting", 2, fid=3.0)
    assert (tmp_path / "t.csv").read_text() == before
    monkeypatch.undo()
    techniques.Table(tmp_path / "t.csv", "other", 8, 1, False, False).add("setting", 1, fid=4.0)
    table.add("setting", 2, fid=3.0)  # and what another process has written since stays
    assert [line.split(",")[:5] for line in (tmp_path / "t.csv").read_text().splitlines()[1:]] == [
        ["e", "setting", "1", "fid", "2"], ["other", "setting", "1", "fid", "4"], ["e", "setting", "2", "fid", "3"],
    ]  # fmt: skip


def test_figures_show_the_first_seed_and_number_of_images(tmp_path):
    rows = [("a", 1, 0.5, 1000, 1), ("a", 2, 0.6, 1000, 1), ("a", 1, 0.9, 8, 1), ("a", 2, 0.8, 1000, 2)]
    lines = [",".join(figures.TECHNIQUES_COLUMNS)]
    lines += [f"calls,{setting},{x},fid,{value},{n},{seed}" for setting, x, value, n, seed in rows]
    (tmp_path / "t.csv").write_text("\n".join(lines))
    points, n = figures.read_experiment(tmp_path / "t.csv", "calls", "fid")
    assert points == {"a": [(1.0, 0.5), (2.0, 0.6)]} and n == "n = 1000"


def test_measurements_are_of_gray_digits():
    for config in ({"images": "", "dataset": "color_mnist"}, {"images": "/photographs", "dataset": "mnist"}):
        with pytest.raises(LessonError, match="x.pt was trained on (color_mnist|/photographs): name one of mnist"):
            origin.check_gray_digits("x.pt", {"config": config})
    origin.check_gray_digits("x.pt", {"config": {"images": "", "dataset": "mnist"}})


@pytest.mark.parametrize("script, name", [(techniques, "lesson_04_ncsnv2"), (compare.ddpm, "lesson_05_ddpm"),
                                            (compare.score_sde, "lesson_07_score_sde")])  # fmt: skip
def test_each_script_refuses_other_pictures(script, name, tmp_path):
    checkpoint = torch.load(ROOT / name / "pretrained.pt", weights_only=True)
    checkpoint["config"]["dataset"] = "fashion_mnist"
    torch.save(checkpoint, tmp_path / "x.pt")
    with pytest.raises(LessonError, match="was trained on fashion_mnist"):
        script.load(name, tmp_path / "x.pt", False)


def test_a_takeover_has_97_calls_and_goes_from_sigma_max_to_sigma_L(tmp_path, monkeypatch):
    walks = []

    def follow(sampler, network, x, sigmas, *rest):
        walks.append((sampler, sigmas))
        return iter([x])

    seven = types.SimpleNamespace(sigma_max=16.88, config=types.SimpleNamespace(sigma_L=0.01), network=None,
                                  smoke=False, lesson=types.SimpleNamespace(follow=follow))  # fmt: skip
    monkeypatch.setattr(compare.score_sde, "denoise", lambda network, x, sigma: x)
    monkeypatch.setattr(compare.score_sde, "judged", lambda x: {"fid": 1.0})
    compare.score_sde.takeover(techniques.Table(tmp_path / "t.csv", "takeover", 2, 1, False, False), seven)
    assert len(walks) == 2 * (5 * 2 + 1)
    pairs = [walks[k : k + 2] for k in (*range(0, 10, 2), *range(11, 21, 2))]
    for (first, above), (then, below) in pairs:
        assert {first, then} == {"heun", "consistent"} and float(above[-1]) == pytest.approx(float(below[0]))
        assert (float(above[0]), float(below[-1])) == pytest.approx((16.88, 0.01))
        calls = sum((len(sigmas) - 1) * (1 + (name == "heun")) for name, sigmas in ((first, above), (then, below)))
        assert abs(calls - 96) <= 2
    assert [walks[k][0] for k in (10, 21)] == ["heun", "consistent"]


def test_ctrl_c_is_heard_again_after_a_training_in_a_script(monkeypatch):
    before = {number: signal.getsignal(number) for number in techniques.ENDS}

    def train(config, training):
        for number in techniques.ENDS:
            signal.signal(number, signal.SIG_DFL)  # as a StopRequest takes them

    monkeypatch.setattr(techniques.importlib, "import_module", lambda name: types.SimpleNamespace(
        Config=lambda **how: types.SimpleNamespace(**how), train=train))  # fmt: skip
    monkeypatch.setattr(techniques, "load_lesson", lambda name: types.SimpleNamespace(LESSON=name))
    run = types.SimpleNamespace(image_shape=(1, 28, 28), config=None, close=lambda: None)
    monkeypatch.setattr(techniques, "Run", lambda config, lesson: run)
    techniques.train_lesson("lesson_05_ddpm", steps=1)
    assert {number: signal.getsignal(number) for number in techniques.ENDS} == before


def test_each_comparison_takes_its_weights_and_its_calls(tmp_path, monkeypatch):
    name, found = "lesson_04_ncsnv2", []
    for path in ("pretrained.pt", *(f"output_{of}/checkpoint.pt" for of in ("2", "ten", "ten_1"))):
        (tmp_path / name / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name / path).touch()
    monkeypatch.setattr(compare, "ROOT", tmp_path)
    monkeypatch.setattr(compare, "load_lesson", lambda name: None)
    monkeypatch.setattr(compare, "load_network", lambda _, path, device: (path, None, {"image_shape": (1, 28, 28)}))
    monkeypatch.setattr(
        compare, "score", lambda table, setting, K, lesson, path, *rest: found.append((path.relative_to(tmp_path), K))
    )
    for experiment, seed, path, calls in (
        ("calls", 0, "pretrained.pt", [10, 25, 50, 97]),
        ("many calls", 2, "output_2/checkpoint.pt", [961]),
        ("ten minutes", 0, "output_ten/checkpoint.pt", [10, 25, 50, 97, 961]),
        ("ten minutes", 1, "output_ten_1/checkpoint.pt", [10, 25, 50, 97, 961]),
    ):
        found.clear()
        compare.calls(name, techniques.Table(tmp_path / "c.csv", experiment, 8, seed, False, False))
        assert [(str(where), K) for where, K in found] == [(f"{name}/{path}", K) for K in calls]


def test_the_bits_of_a_normal_density_by_lesson_7(monkeypatch):
    """Of its exact score, log p(x) at the smallest noise scale is that of N(0, 0.3^2 + 0.001^2)."""
    exact = types.SimpleNamespace(float32=lambda x, sigma: -x / (0.09 + sigma**2)[:, None, None, None], sigma_max=50.0)
    monkeypatch.setattr(compare.score_sde, "load", lambda name, path: exact)
    images = torch.rand(130, 1, 6, 6)
    x, variance = compare.dequantise(images, torch.Generator().manual_seed(3)), 0.09 + 1e-6
    nats = x.square().mean() / (2 * variance) + 0.5 * math.log(2 * math.pi * variance)
    found = compare.bits("lesson_07_score_sde", "nowhere", images, seed=3)
    assert found == pytest.approx(8 + float(nats) / math.log(2), abs=0.01)


@pytest.mark.parametrize("name", compare.WITH_BITS[::2])
def test_the_bits_of_a_network_that_says_nothing(name, monkeypatch):
    """The chain then costs what the lesson's own bound says; with other seeds nearly the same. No bfloat16 is used."""
    likelihood = importlib.import_module(f"{name}.likelihood")
    betas, zero = torch.linspace(0.01, 0.5, 8, dtype=torch.float64), lambda x, t: torch.zeros_like(x)
    says = zero if name == "lesson_05_ddpm" else lambda x, t: (zero(x, t), zero(x, t))

    def network(x, t):
        assert not torch.is_autocast_enabled(x.device.type)
        return says(x, t)

    both = {"network": InBatches(network, "bfloat16"), "float32": InBatches(network, "float32")}
    found = types.SimpleNamespace(**both, betas=betas, alpha_bars=(1 - betas).cumprod(0))
    monkeypatch.setattr(compare.ddpm, "load", lambda name, path: found)
    images = torch.rand(40, 1, 6, 6)
    values = [compare.bits(name, "nowhere", images, seed) for seed in (1, 2)]
    own = likelihood.bits_per_dim(network, 2 * images - 1, betas, generator=torch.Generator().manual_seed(1))
    assert values[0] == pytest.approx(float(own.sum(1).mean()), rel=1e-5)
    assert values[1] != values[0] and values[1] == pytest.approx(values[0], rel=0.1)


def test_bounds_and_losses_of_lessons_5_and_9_are_those_of_float32(tmp_path, monkeypatch):
    """Also where samples are drawn, or the network has been trained, in bfloat16."""
    ddpm, improved_ddpm = compare.ddpm, compare.improved_ddpm
    monkeypatch.setattr(ddpm, "sampling_precision", lambda *how: "bfloat16")
    five = ddpm.load("lesson_05_ddpm", str(ROOT / "lesson_05_ddpm" / "pretrained.pt"), smoke=True)
    lesson = types.SimpleNamespace(schedule=lambda config: (None, None))
    training = types.SimpleNamespace(parts={"ema": torch.nn.Linear(1, 1)}, precision="bfloat16", config=None)
    monkeypatch.setattr(improved_ddpm, "train_lesson", lambda *how, **more: (lesson, training))
    table = lambda name: techniques.Table(tmp_path / "x.csv", name, 4, 1, False, True)
    for found in (five, improved_ddpm.trained(table("ablation"), 3)):
        assert (found.network.precision, found.float32.precision) == ("bfloat16", "float32")
        assert found.network.network is found.float32.network
    del five.network
    ddpm.bits(table("bits"), five)
    ddpm.loss(table("loss"), five)


def test_all_seeds_code_the_same_digits(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(compare, "bits", lambda name, path, images, seed: seen.append((images, seed)) or 2.0)
    monkeypatch.setattr(compare, "checkpoint", lambda *_: ROOT / "README.md")
    for name, seed in (("lesson_05_ddpm", 2), ("lesson_09_improved_ddpm", 3), ("lesson_04_ncsnv2", 2)):
        compare.likelihood(name, techniques.Table(tmp_path / "c.csv", "ten minutes, bits", 500, seed, False, False))
    (first, one), (second, two) = seen
    assert torch.equal(first, second) and one == two and first.shape == (500, 1, 28, 28)
    assert torch.equal((255 * first).round().byte().cpu(), load_images("mnist", "test")[::20])


def test_a_comparison_goes_through_its_seeds_and_its_number_of_images(tmp_path, monkeypatch):
    seen = []
    for each, (_, n, seeds) in compare.EXPERIMENTS.items():
        record = lambda name, table: seen.append((table.experiment, table.n, table.seed))
        monkeypatch.setitem(compare.EXPERIMENTS, each, (record, n, seeds))
    monkeypatch.setattr(sys, "argv", ["compare.py", "--lessons", "lesson_05_ddpm", "--output", str(tmp_path)])
    compare.main()
    expected = {"calls": (1000, 3), "cost": (64, 1), "backbone": (1000, 3), "many calls": (1000, 3)}
    expected |= {"bits": (500, 3)}
    expected |= {"ten minutes": (1000, 5), "ten minutes, bits": (500, 5)}
    assert seen == [(each, n, seed) for each, (n, seeds) in expected.items() for seed in range(seeds)]


def test_the_comparison_runs_and_goes_on(tmp_path):
    flags = "compare.py", "calls", "backbone", "--smoke", "--lessons", "lesson_04_ncsnv2", "--output", tmp_path
    first = run_script(*flags)
    assert first.status == 0, first.stderr
    text = (tmp_path / "compare.csv").read_text()
    assert text.count("calls,") == 3 and text.count("backbone,") == 3
    assert run_script(*flags).status == 0 and (tmp_path / "compare.csv").read_text() == text
    assert "choose one of lesson_03_ncsn" in run_script(*flags[:3], "--lessons", "lesson_06").stderr


def test_what_a_gpu_does_is_measured(tmp_path):
    """Here by the CPU, and a tiny network."""
    file = tmp_path / "gpu.csv"
    flags = "gpu.py", "speed", "paper", "--smoke", "--lessons", "lesson_05_ddpm", "--csv", file, "--output", tmp_path
    first = run_script(*flags)
    assert first.status == 0, first.stderr
    found = [line[:4] for line in csv.reader(file.read_text().splitlines()[1:]) if line[3] != "gigabytes"]  # of a GPU
    assert found[:2] == [["speed", "lesson_05_ddpm, smoke", "0", y] for y in ("training", "sampling")]
    assert [line[3] for line in found[2:]] == ["minutes", "images", "fid", "precision", "recall", "bits"]
    assert (tmp_path / "lesson_05_ddpm_paper" / "drawn.png").is_file()


def test_a_training_that_has_had_its_minutes_is_stopped_as_by_ctrl_c(tmp_path, monkeypatch):
    script = tmp_path / "lesson" / "train_mnist.py"
    script.parent.mkdir()
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    script.write_text("import time\ntry:\n    time.sleep(60)\nexcept KeyboardInterrupt:\n    raise SystemExit(130)\n")
    assert gpu.timed_training("lesson", tmp_path, [], minutes=2 / 60) < 30
    script.write_text("raise SystemExit('no such thing')\n")
    with pytest.raises(LessonError, match=r"train_mnist.py failed: see .*printed\.txt"):
        gpu.timed_training("lesson", tmp_path, [])
    assert "no such thing" in (tmp_path / "printed.txt").read_text()


@pytest.mark.parametrize("weights", [{"sigmas": torch.tensor([10.0, 1.0, 0.1])}, {"sigma_max": 10.0}])
@pytest.mark.parametrize("told", [True, False])
def test_the_network_that_all_lessons_share(weights, told):
    backbone, seen = compare.Backbone(1, weights, told), {}

    def network(x, t):
        seen.update(size=x.square().mean((1, 2, 3)), t=t)
        return torch.ones_like(x)

    backbone.network = torch.nn.Module()
    backbone.network.forward = network
    sigma = torch.tensor([10.0, 0.1])
    x = sigma[:, None, None, None] * torch.randn(2, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    out = backbone(x, torch.tensor([0, 2]) if "sigmas" in weights else sigma)
    torch.testing.assert_close(out, -torch.ones_like(x) / sigma[:, None, None, None])
    torch.testing.assert_close(seen["size"], x.square().mean((1, 2, 3)) / (0.2 + x.square().mean((1, 2, 3))))
    ladder = [0, 2 / 3] if "sigmas" in weights else [0, 0.5]  # sigma 0.1 is half-way from 10 to 0.001
    torch.testing.assert_close(seen["t"], 1000 * torch.tensor(ladder) if told else torch.zeros(2))


def test_the_variance_that_few_steps_leave():
    """The figures' recursion against the tests' own, for the fixed variances; the true one is right with any number."""
    for K in (10, 100):
        for variance in ("small", "large"):
            kept = torch.cat([torch.ones(1, dtype=torch.float64), test_ddpm.ABARS[spaced_timesteps(1000, K)]])
            _, expected = test_ddpm.chain_of(0.3, 0.5, 1 - kept[1:] / kept[:-1], variance)
            assert figures_ddpm.variance_left(K, variance) == pytest.approx(expected, rel=1e-9)
        assert figures_ddpm.variance_left(K, "true") == pytest.approx(0.25, rel=1e-3)


def test_a_command_is_timed_and_may_fail():
    seconds, gigabytes = compare.timed("-c", "import time; time.sleep(0.2); x = b'x' * 200_000_000")
    assert seconds > 0.2 < gigabytes
    with pytest.raises(LessonError, match="status 3"):
        compare.timed("-c", "raise SystemExit(3)")


def test_other_peoples_code_gets_its_time_and_its_samples_are_written(tmp_path, monkeypatch):
    monkeypatch.setitem(others.CODES, "mine", lambda budget, num: torch.full((num, 1, 28, 28), float(budget.left())))
    output = tmp_path / "x.pt"
    monkeypatch.setattr("sys.argv", ["others.py", "mine", "--num", "5", "--output", str(output)])
    others.main()
    assert torch.equal(torch.load(output), torch.ones(5, 1, 28, 28))
    assert not others.Budget(0).left()
    assert run_script("others.py", "nonsense").status == 1


def test_the_likeliest_digits_and_the_least_likely(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(figures_sde, "log_likelihood", lambda score, x, *_, **how: 1000 - x.flatten(1).sum(1))
    monkeypatch.setattr(figures_sde, "show_grid", lambda panel, images: shown.append(images[0].sum((1, 2, 3))))
    figures_sde.likely(tmp_path / "figure.png", n=60)
    assert shown[0].max() < shown[1].min()  # here, ink makes a digit unlikely


@pytest.mark.parametrize("name", ["lesson_05_forward", "lesson_07_sdes", "lesson_07_paths", "lesson_09_schedules"])
def test_figures_of_lessons_5_to_9(name, tmp_path):
    {**figures_ddpm.FIGURES, **figures_sde.FIGURES}[name](tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
