"""`python sample.py`: each thing that it can do, on the checkpoint that comes with a lesson; pictures are measured."""

import functools
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import common.data
import lesson_03_ncsn.sampler
from common.checkpoint import load_network, save_checkpoint
from common.errors import LessonError
from common.noise import SeededNoise, noise_like
from common.play import read_mask
from lesson_04_ncsnv2.noise_scales import geometric_noise_scales
from lesson_04_ncsnv2.sampler import denoise
from lesson_04_ncsnv2.unconditional import noise_after_langevin
from tests import warm
from tests.conftest import LESSONS
from tests.running import DIFFUSION, ENVIRONMENT, ROOT, TWO_LESSONS, quick, run_here, same_images, script, some_pictures

sys.path.append(str(ROOT / "docs"))

import pretrained

FEW = {  # network calls, too few for digits
    "lesson_03_ncsn": 10,
    "lesson_04_ncsnv2": 9,
    "lesson_05_ddpm": 8,
    "lesson_07_score_sde": 15,
    "lesson_09_improved_ddpm": 8,
}
FEW_LANGEVIN = {**FEW, "lesson_04_ncsnv2": 97}


def sample(lesson, *flags, few=FEW):
    """Runs sample.py on pretrained.pt; whatever the machine does faster, in float32."""
    checkpoint = () if "--checkpoint" in flags else ("--checkpoint", ROOT / lesson / "pretrained.pt")
    fixed = {"--calls", "--info", "--denoise", "--encoded"} & set(flags)
    fixed |= {"--interpolate-images"} & set(flags) if lesson == "lesson_07_score_sde" else set()
    calls = () if fixed else ("--calls", few[lesson])
    precision = () if "--info" in flags else ("--precision", "float32")
    return run_here(lesson, *checkpoint, *calls, *precision, *flags, name="sample")


def shipped(lesson):
    """The network, the configuration and the checkpoint in a lesson's pretrained.pt."""
    return load_network(script(lesson.name, "sample"), ROOT / lesson.name / "pretrained.pt", torch.device("cpu"))


def done(result):
    assert result.status == 0, result.stderr
    return result.stdout


def line(result):
    """The one line of an error."""
    assert result.status == 1
    error = result.stderr.splitlines()[-1]
    assert error.startswith("error: ") and "Traceback" not in result.stderr
    return error


def tiles(path, columns, scale=2, size=28):
    """The images of a grid as uint8 (rows, columns, size, size) or (rows, columns, size, size, 3)."""
    pixels, step = np.asarray(Image.open(path)), scale * size + 2
    rows = (pixels.shape[0] - 2) // step
    assert pixels.shape[:2] == (2 + rows * step, 2 + columns * step)
    cut = [
        [pixels[2 + r * step :: scale, 2 + k * step :: scale][:size, :size] for k in range(columns)]
        for r in range(rows)
    ]
    return np.array(cut)


# The checkpoint that comes with a lesson


def test_the_shipped_checkpoint_is_small_and_made_by_the_defaults(lesson):
    path = ROOT / lesson.name / "pretrained.pt"
    assert path.stat().st_size <= 3_000_000
    found = torch.load(path, weights_only=True)
    config = script(lesson.name).Config()
    for name, value in found["config"].items():
        if name != "precision":  # precision: chosen when the run began
            assert getattr(config, name) == value, name
    assert found["step"] == config.steps and "python train_mnist.py" in found["made"]
    assert not set(found) & {"optimizer", "log", "generator"}
    weights = found["ema"] if "ema" in found else found["network"]
    assert "sigmas" not in weights or weights["sigmas"].dtype == torch.float32
    assert {w.dtype for w in weights.values() if w.ndim > 1} == {torch.float16}


def test_without_a_checkpoint_of_ones_own(lesson, tmp_path):
    """In a process of its own and a copy of the lesson, which has no output/."""
    shutil.copytree(ROOT / lesson.name, tmp_path / lesson.name, ignore=shutil.ignore_patterns("output"))
    shutil.copytree(ROOT / "common", tmp_path / "common", ignore=shutil.ignore_patterns("mnist"))
    flags = ("--num", 5, "--calls", FEW[lesson.name])
    ran = warm.run("sample.py", *flags, cwd=tmp_path / lesson.name, env=ENVIRONMENT)
    assert ran.status == 0, ran.stderr
    assert "using pretrained.pt" in ran.stdout and "look at output/drawn.png" in ran.stdout
    with Image.open(tmp_path / lesson.name / "output" / "drawn.png") as picture:
        assert picture.size == (3 * 58 + 2, 2 * 58 + 2)


def test_ones_own_checkpoint_comes_first(lesson, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ("--num", 1, "--calls", FEW[lesson.name], "--precision", "float32")
    assert "using pretrained.pt" in done(run_here(lesson.name, *flags, name="sample"))
    (tmp_path / "output").mkdir(exist_ok=True)
    (tmp_path / "output" / "checkpoint.pt").write_text("no checkpoint")
    assert "output/checkpoint.pt is damaged" in line(run_here(lesson.name, *flags, name="sample"))


def test_info(lesson):
    text = done(sample(lesson.name, "--info"))
    network, config, checkpoint = shipped(lesson)
    assert f"{sum(p.numel() for p in network.parameters()):,}" in text
    assert f"{lesson.name}, step {checkpoint['step']}\n" in text
    if lesson.name in DIFFUSION:  # some of so many
        assert "noise       1000 levels, among them:\n" in text
        printed = [int(word) for word in re.findall(r"t (\d+)", text.partition("among them:")[2])]
        assert printed == torch.linspace(1000, 1, 30).round().int().tolist()
    else:
        sigmas = scales_in_pictures(lesson).tolist()
        assert f"noise       {len(sigmas)} levels:\n" in text
        printed = [float(word) for word in re.findall(r"sigma (\S+)", text.partition("levels:")[2])]
        assert printed == pytest.approx(sigmas, rel=6e-4)
    for name in ("width", "batch_size", "learning_rate"):
        assert re.search(rf"{name} +{getattr(config, name)}\n", text)


@pytest.mark.lessons(*DIFFUSION)
def test_a_network_that_is_sampled_with_has_no_dropout(lesson, tmp_path):
    checkpoint = torch.load(ROOT / lesson.name / "pretrained.pt", weights_only=True)
    checkpoint["config"]["dropout"] = 0.5
    save_checkpoint(tmp_path / "c.pt", checkpoint.pop("lesson"), **checkpoint)
    network, config, _ = load_network(script(lesson.name, "sample"), tmp_path / "c.pt", torch.device("cpu"))
    x, t = torch.randn(2, 1, 28, 28), torch.tensor([3, 500])
    with torch.no_grad():
        a, b = (torch.stack(tuple(network(x, t))) for _ in range(2))  # noise alone, or noise and variance
    assert config.dropout == 0.5 and torch.equal(a, b)


@pytest.mark.lessons("lesson_05_ddpm")  # one is enough: it is common/ that prints
def test_info_may_be_read_in_part(lesson):
    """`python sample.py --info | head -1`: the reader is gone before Python has given away what was printed."""
    command = [sys.executable, "sample.py", "--info", "--checkpoint", "pretrained.pt"]
    how = {"cwd": ROOT / lesson.name, "env": {**ENVIRONMENT, "PYTHONUNBUFFERED": ""}, "text": True}
    process = subprocess.Popen(command, **how, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait() == 1


# Plain samples


def test_a_sample_is_decided_by_its_seed_alone(lesson, tmp_path):
    """Whatever the number of images and of those that run at once: image k of --seed 5 is image 0 of --seed 5 + k."""
    for name, seed, num in (("a", 5, 7), ("b", 5, 3), ("c", 7, 5)):
        done(sample(lesson.name, "--seed", seed, "--num", num, "--save-tensor", tmp_path / name, "--output",
                    tmp_path / "x.png"))  # fmt: skip
    a, b, c = (torch.load(tmp_path / name, weights_only=True) for name in "abc")
    assert a.shape == (7, 1, 28, 28)
    assert same_images(a[:3], b) and same_images(a[2:], c)
    assert (a[0] - a[1]).abs().max() > 0.1
    pixels = tiles(tmp_path / "x.png", 3).reshape(-1, 28, 28)[:5]
    assert np.array_equal(pixels, (c[:, 0].clamp(0, 1) * 255).round().byte().numpy())


@pytest.mark.lessons(*TWO_LESSONS)
def test_more_images_than_are_drawn_at_once(lesson, tmp_path, monkeypatch):
    flags = ("--num", 5, "--output", tmp_path / "x.png", "--save-tensor")
    done(sample(lesson.name, *flags, tmp_path / "whole"))
    monkeypatch.setattr("common.play.AT_ONCE", 2)
    done(sample(lesson.name, *flags, tmp_path / "parts"))
    whole, parts = (torch.load(tmp_path / name, weights_only=True) for name in ("whole", "parts"))
    assert same_images(whole, parts)


@pytest.mark.parametrize("name, calls", [("lesson_04_ncsnv2", 97), ("lesson_05_ddpm", 50), ("lesson_07_score_sde", 35)])
def test_the_shipped_network_draws_digits(name, calls, tmp_path):
    """Not the judge's number, which needs a thousand: ink on a black background, in the middle of the picture."""
    done(sample(name, "--num", 16, "--calls", calls, "--save-tensor", tmp_path / "a", "--output",
                tmp_path / "a.png"))  # fmt: skip
    images, digits = torch.load(tmp_path / "a", weights_only=True), common.data.load_images("mnist")[:1000] / 255
    for statistic in (torch.mean, torch.std):
        assert float(statistic(images)) == pytest.approx(float(statistic(digits)), rel=0.35)  # of 16
    assert images[:, :, :2].abs().max() < 0.1  # no digit reaches the edge


def test_gif_and_strip(lesson, tmp_path):
    num, columns = (64, 8) if lesson.name == "lesson_04_ncsnv2" else (16, 4)
    flags = ("--num", num, "--gif", tmp_path / "a.gif", "--strip", tmp_path / "s.png", "--output", tmp_path / "a.png")
    done(sample(lesson.name, *flags))
    with Image.open(tmp_path / "a.gif") as gif, Image.open(tmp_path / "a.png") as drawn:
        assert gif.n_frames == FEW[lesson.name] and gif.info["loop"] == 0
        assert gif.size == drawn.size
        gif.seek(gif.n_frames - 1)
        assert difference(np.asarray(gif.convert("L")), np.asarray(drawn)) <= 9  # of 16 grays, which are 17 apart
    assert (tmp_path / "a.gif").stat().st_size < 2_000_000
    strip, grid = tiles(tmp_path / "s.png", 8), tiles(tmp_path / "a.png", columns)
    samples = grid.reshape(num, 28, 28)
    assert len(strip) == 8 and np.array_equal(strip[:, -1], samples[:8])  # the last moment is the sample


OUTPUTS = {"lesson_09_improved_ddpm": 2}  # of a network, where it is more than one


class Counting:
    """A score, or noise, of zero, that counts its calls and remembers where it was asked first."""

    def __init__(self, sigmas=None, outputs=1, sigma_max=None):
        self.sigmas, self.outputs, self.calls, self.levels, self.first = sigmas, outputs, 0, [], None
        self.sigma_max = sigma_max

    def parameters(self):
        return iter([torch.zeros(1)])

    def __call__(self, x, i):
        self.calls, self.first = self.calls + 1, x if self.first is None else self.first
        self.levels.append(i[0].item())
        return torch.zeros_like(x) if self.outputs == 1 else (torch.zeros_like(x),) * self.outputs


def counted(lesson, sampler, calls=None, **config):
    """The score after one use of the lesson's `draw`, and the frames."""
    module, (network, trained, _) = script(lesson.name, "sample"), shipped(lesson)
    outputs = OUTPUTS.get(lesson.name, 1)
    score = Counting(getattr(network, "sigmas", None), outputs, getattr(network, "sigma_max", None))
    trained = SimpleNamespace(**{**vars(trained), **config})
    calls = calls or module.number_of_calls(network, trained, sampler)
    return score, list(module.draw(score, trained, (50, 1, 8, 8), SeededNoise(range(50)), sampler, calls))


def test_calls_decide_how_often_the_network_is_called(lesson):
    if lesson.name == "lesson_03_ncsn":
        assert [counted(lesson, "langevin", n)[0].calls for n in (10, 25)] == [10, 20]
    elif lesson.name in DIFFUSION:
        for sampler in ("ddim", "ancestral"):
            for n in (2, 7, 39, 40):  # of 40
                score, frames = counted(lesson, sampler, n, T=40)
                assert score.calls == len(frames) == n and all(frame.shape == (50, 1, 8, 8) for frame in frames)
    elif lesson.name == "lesson_07_score_sde":
        for sampler, corrector, each in (("euler", True, 1), ("heun", True, 2), ("predictor_corrector", True, 2),
                                         ("predictor_corrector", False, 1)):  # fmt: skip
            for n in (each + 1, 8, 21):  # whole steps, and one call to denoise
                score, frames = counted(lesson, sampler, n, corrector=corrector)
                assert len(frames) == 1 + (n - 1) // each and score.calls == 1 + each * (len(frames) - 1)
    else:
        assert [counted(lesson, "langevin", n)[0].calls for n in (97, 200)] == [97, 193]
        assert [counted(lesson, "consistent", n)[0].calls for n in (3, 20, 97, 200)] == [3, 20, 97, 193]


def assert_start(lesson, score):
    """Lesson 3: uniform noise in [0, 1], as in the paper. Lessons 4 and 7: noise of the largest scale. 5: N(0, 1)."""
    if lesson.name == "lesson_03_ncsn":
        assert 0 <= score.first.min() < 0.01 and 0.99 < score.first.max() <= 1
        assert float(score.first.std()) == pytest.approx(12**-0.5, rel=0.05)
    else:
        largest = score.sigma_max if score.sigmas is None else score.sigmas[0]
        scale = 1 if lesson.name in DIFFUSION else float(largest)
        assert float(score.first.std()) == pytest.approx(scale, rel=0.05)
        assert abs(float(score.first.mean())) < 0.05 * scale


def test_samples_start_from_what_the_first_step_expects(lesson):
    if lesson.name == "lesson_07_score_sde":
        walks = [("predictor_corrector", sde) for sde in ("ve", "vp", "sub_vp")]
        for sampler, sde in (("heun", "ve"), ("euler", "vp"), *walks):
            score, _ = counted(lesson, sampler, 9, sde=sde)
            assert_start(lesson, score)  # where the network is asked, which is of noise scales, whatever the SDE
            assert score.levels[0] == pytest.approx(float(score.sigma_max), rel=1e-4)
            assert score.levels[-1] == pytest.approx(0.01, rel=1e-4)
        return
    for sampler in script(lesson.name, "sample").SAMPLERS:
        score, _ = counted(lesson, sampler)
        assert_start(lesson, score)
        first, last = (999, 0) if lesson.name in DIFFUSION else (0, len(score.sigmas) - 1)
        assert score.levels[0] == first and score.levels[-1] == last


@pytest.mark.lessons("lesson_03_ncsn", "lesson_04_ncsnv2")
def test_the_noise_that_a_sampler_adds_has_the_size_of_the_step_that_was_asked_for(lesson):
    """With a score of zero, x is the start and the sum of all noise: the variances of Algorithm 1, added up."""
    score, frames = counted(lesson, "langevin", 4 * len(shipped(lesson)[0].sigmas) + 1)
    sigmas, T = score.sigmas.double(), 4
    if lesson.name == "lesson_03_ncsn":
        start, alpha = 1 / 12, lesson.sampler.langevin_step_size(sigmas, T, 100, 2e-5) * sigmas**2 / sigmas[-1] ** 2
    else:
        start, alpha = sigmas[0] ** 2, 2 * lesson.sampler.langevin_step_size(sigmas, T) * sigmas**2 / sigmas[-1] ** 2
    assert float(frames[-1].double().var()) == pytest.approx(float(start + T * alpha.sum()), rel=0.05)


def test_one_two_or_three_langevin_steps_are_long_enough_for_a_network_that_cannot_correct_the_noise():
    """From Technique 4's step it would be left with too much of it (test_unconditional.py has how much)."""
    module, sigmas = script("lesson_04_ncsnv2", "sample"), geometric_noise_scales(16.9, 0.01, 96)
    shares = {T: noise_after_langevin(sigmas, T, torch.tensor(module.step_size(sigmas, T))) for T in (1, 2, 3, 4, 10)}
    assert all(share < 1.55 for share in shares.values())  # noise over sigma_L; 467 with Technique 4's step and T = 1


def test_few_calls_take_some_of_the_noise_scales_evenly_chosen():
    lesson = SimpleNamespace(name="lesson_04_ncsnv2")
    score, frames = counted(lesson, "consistent", 5)
    L = len(score.sigmas)
    assert score.levels == [0, round((L - 1) / 3), round(2 * (L - 1) / 3), L - 1, L - 1] and len(frames) == 5


def test_few_calls_take_some_of_the_timesteps_evenly_chosen():
    for sampler in ("ddim", "ancestral"):
        assert counted(SimpleNamespace(name="lesson_05_ddpm"), sampler, 5)[0].levels == [999, 749, 500, 250, 0]


def test_a_consistent_step_goes_halfway_from_ddpms_to_the_guess_and_refills_the_noise():
    """With a score of zero the step adds only noise: what is missing of sigma_2 after (1 - eta) sigma_1.

    1 - eta is half of DDPM's, which is 1 / gamma^2.
    """
    score, frames = counted(SimpleNamespace(name="lesson_04_ncsnv2"), "consistent")
    sigma_1, sigma_2 = score.sigmas[:2].double().tolist()
    expected = sigma_1**2 + sigma_2**2 - (0.5 * (sigma_2 / sigma_1) ** 2 * sigma_1) ** 2
    assert float(frames[0].double().var()) == pytest.approx(expected, rel=0.05)


def test_completions_start_as_samples_do_and_in_lessons_4_and_7_end_with_the_denoising_step(lesson):
    module, (network, config, _) = script(lesson.name, "sample"), shipped(lesson)
    y, known = torch.rand(30, 1, 8, 8), torch.zeros(1, 1, 8, 8)
    known[..., :4] = 1
    score = Counting(getattr(network, "sigmas", None), sigma_max=getattr(network, "sigma_max", None))
    config.corrector = False  # of lesson 7: it has no step for a score of zero
    L = 0 if score.sigmas is None else len(score.sigmas)
    made = module.fill_in(score, config, y, known, SeededNoise(range(30)), 2 * L + 1 if L else 5)
    assert_start(lesson, score)
    torch.testing.assert_close(made[..., :4], y[..., :4], rtol=0, atol=1e-6 if lesson.name in DIFFUSION else 0)
    assert not torch.equal(made[..., 4:], y[..., 4:])
    if lesson.name in DIFFUSION:
        assert score.levels == [999, 749, 500, 250, 0]
        return
    if lesson.name == "lesson_07_score_sde":
        sigmas = [float(score.sigma_max) ** (1 - k / 4) * 0.01 ** (k / 4) for k in range(5)]
        assert score.levels == pytest.approx(sigmas, rel=1e-4)
        return
    assert score.levels[: 2 * L] == [n for n in range(L) for _ in range(2)]
    assert score.levels[2 * L :] == ([L - 1] if lesson.name == "lesson_04_ncsnv2" else [])


def test_fewer_langevin_steps_are_as_much_longer():
    """Lesson 3's T = 100 and epsilon = 2e-5: half the steps of twice the length, and none longer than sigma_L^2."""
    sigmas = geometric_noise_scales(1, 0.01, 10)
    step_size = lesson_03_ncsn.sampler.langevin_step_size
    sizes = {T: step_size(sigmas, T, 100, 2e-5) for T in (400, 100, 50, 20, 5)}
    assert sizes == pytest.approx({400: 2e-5, 100: 2e-5, 50: 4e-5, 20: 1e-4, 5: 1e-4})
    assert step_size(sigmas, 10, 100, 3e-4) == 3e-4  # a step that was asked for is not shortened


@pytest.fixture
def step_sizes(lesson, monkeypatch):
    """A function: how many steps at each of some noise scales -> the epsilon of samples, and that of completions."""
    module, (_, config, _), seen = script(lesson.name, "sample"), shipped(lesson), []

    def walk(score, x, sigmas, T, epsilon, generator):
        seen.append((T, epsilon))
        return iter([x])

    monkeypatch.setattr(module, "annealed_langevin_dynamics", walk)
    monkeypatch.setattr(module, "inpaint", lambda score, y, known, *how: walk(score, *how))

    def of(sigmas, steps, **changed):
        seen.clear()
        score, noise, y = Counting(sigmas), SeededNoise([1, 2]), torch.rand(2, 1, 4, 4)
        how = SimpleNamespace(**{**vars(config), **changed})
        calls = steps * len(sigmas) + (lesson.name == "lesson_04_ncsnv2")
        list(module.draw(score, how, y.shape, noise, "langevin", calls))
        module.fill_in(score, how, y, torch.ones(1, 1, 4, 4), noise, calls)
        assert [T for T, _ in seen] == [steps, steps]
        return [epsilon for _, epsilon in seen]

    return of


@pytest.mark.lessons("lesson_03_ncsn")
def test_samples_and_completions_have_the_steps_of_the_training_or_longer_ones_if_fewer(step_sizes):
    """T = 50 of 1e-4: 25 are twice as long, 100 no shorter, and one is as long as sigma_L^2."""
    sigmas = geometric_noise_scales(1, 0.05, 4)
    for T, epsilon in ((100, 1e-4), (50, 1e-4), (25, 2e-4), (5, 1e-3), (1, 0.05**2)):
        assert step_sizes(sigmas, T, T=50, epsilon=1e-4) == pytest.approx([epsilon, epsilon], rel=1e-5)


@pytest.mark.lessons("lesson_04_ncsnv2")
def test_samples_and_completions_have_the_step_that_leaves_the_least_noise_for_their_number_of_calls(step_sizes):
    """From T = 4 on at a single noise scale (Technique 4), and below after all of them, whatever T the training has."""
    sigmas = geometric_noise_scales(16.9, 0.01, 96)
    gamma = float(sigmas[0] / sigmas[1])

    def left_at_one_scale(r, T):
        variance = gamma**2
        for _ in range(T):
            variance = (1 - r) ** 2 * variance + 2 * r
        return variance

    def left_after_all(r, T):
        return float(noise_after_langevin(sigmas, T, torch.tensor(r * 0.01**2)))

    for T in (1, 2, 4, 12):
        left = left_at_one_scale if T >= 4 else left_after_all
        for epsilon in step_sizes(sigmas, T, T=5):
            r = epsilon / 0.01**2
            assert left(r, T) < min(left(0.9 * r, T), left(1.1 * r, T))


def test_the_default_number_of_calls(tmp_path):
    """Of lesson 3: 15 steps at each of 10 noise scales. Of lesson 4: one at each of 96, and one to denoise.

    Of lesson 5: 50 by DDIM, 100 by the paper's sampler, and never more than T. Of lesson 7: two for each of 17 steps of
    Heun's method, and as many as the paper's sampler has for the last pictures.
    """
    number_of_calls = script("lesson_05_ddpm", "sample").number_of_calls
    for T, expected in ((1000, (50, 100, 1000)), (70, (50, 70, 70)), (4, (4, 4, 4))):
        config = SimpleNamespace(T=T)
        found = [number_of_calls(None, config, sampler) for sampler in ("ddim", "ancestral")]
        assert (*found, number_of_calls(None, config, "ancestral", quick=False)) == expected
    number_of_calls = script("lesson_07_score_sde", "sample").number_of_calls
    for N, expected in ((96, (35, 50, 99, 191)), (5, (9, 5, 9, 9))):
        config, samplers = SimpleNamespace(N=N, corrector=True), ("heun", "euler", "predictor_corrector")
        found = [number_of_calls(None, config, sampler) for sampler in samplers]
        assert (*found, number_of_calls(None, config, "predictor_corrector", quick=False)) == expected
    for lesson, calls in (("lesson_03_ncsn", 150), ("lesson_04_ncsnv2", 97), ("lesson_05_ddpm", 50)):
        flags = ("--checkpoint", ROOT / lesson / "pretrained.pt", "--num", 1, "--precision", "float32")
        assert f"/{calls}" in run_here(lesson, *flags, "--output", tmp_path / "x.png", name="sample").stderr


# Algorithm 2


@pytest.mark.lessons("lesson_09_improved_ddpm")
@pytest.mark.parametrize("mask", ["left", "top", "bottom", "center"])
def test_each_mask(lesson, mask, tmp_path):
    test_inpainting_keeps_the_known_pixels(lesson, tmp_path, mask)


def test_inpainting_keeps_the_known_pixels(lesson, tmp_path, mask="right"):
    path = tmp_path / "f.png"
    done(sample(lesson.name, "--inpaint", mask, "--num", 2, "--output", path, few=FEW_LANGEVIN))
    rows, known = tiles(path, 8), read_mask(mask, 28, 28)[0, 0].bool().numpy()
    assert 0.25 <= (~known).mean() <= 0.5
    test_digits = {image.numpy().tobytes() for image in common.data.load_images("mnist", "test")}
    for original, masked, *completions in rows:
        assert original.tobytes() in test_digits
        for picture in (masked, *completions):
            assert np.array_equal(picture[known], original[known])
        assert (masked[~known] == 128).all()
        assert not np.array_equal(completions[0][~known], completions[1][~known])


@pytest.mark.parametrize(
    "mask, rows, columns",
    [
        ("left", (0, 8), (0, 6)),
        ("right", (0, 8), (6, 12)),
        ("top", (0, 4), (0, 12)),
        ("bottom", (4, 8), (0, 12)),
        ("center", (2, 6), (3, 9)),
    ],
)
def test_where_each_mask_has_its_hole(mask, rows, columns):
    expected = torch.ones(1, 1, 8, 12)
    expected[:, :, slice(*rows), slice(*columns)] = 0
    assert torch.equal(read_mask(mask, 8, 12), expected)


def test_inpainting_with_a_mask_of_ones_own(tmp_path):
    pixels = np.full((28, 28), 255, np.uint8)
    pixels[3:9, 20:] = 0
    Image.fromarray(pixels).save(tmp_path / "mask.png")
    assert np.array_equal(read_mask(str(tmp_path / "mask.png"), 28, 28)[0, 0].numpy(), pixels / 255)


@pytest.mark.lessons(*TWO_LESSONS)
@pytest.mark.parametrize("verb", [("--inpaint", "left"), ("--denoise",), ("--nearest",)], ids=lambda verb: verb[0])
def test_a_folder_of_other_pictures_is_read_as_the_network_needs_them(lesson, verb, tmp_path):
    Image.new("RGB", (60, 40), "white").save(tmp_path / "photograph.png")
    flags = ("--images", tmp_path, "--num", 2, "--output", tmp_path / "f.png")
    done(sample(lesson.name, *verb, *flags, few=FEW_LANGEVIN))


# Interpolation, nearest, denoise


@pytest.mark.lessons("lesson_05_ddpm")
def test_pictures_that_are_not_there_are_missed_before_sampling(lesson, tmp_path):
    ran = sample(lesson.name, "--nearest", "--images", tmp_path / "nowhere")
    assert "is not a folder" in ran.stderr and "calls" not in ran.stderr


def test_the_ends_of_an_interpolation_are_the_samples(lesson, tmp_path):
    done(sample(lesson.name, "--seed", 3, "--num", 4, "--output", tmp_path / "a.png"))
    done(sample(lesson.name, "--seed", 3, "--num", 2, "--interpolate", "--output", tmp_path / "i.png"))
    plain, rows = tiles(tmp_path / "a.png", 2).reshape(4, 28, 28), tiles(tmp_path / "i.png", 10)
    ends = np.array([rows[0, 0], rows[0, -1], rows[1, 0], rows[1, -1]])
    assert same_images(ends / 255, plain / 255, atol=1 / 255 + 1e-9)  # rounded
    assert not np.array_equal(rows[0, 4], rows[0, 5])


def test_seeded_noise_is_a_stream_for_each_seed():
    x = torch.empty(3, 2, 5, 5)
    noise, alone = SeededNoise([4, 5, 6]), SeededNoise([5])
    for _ in range(2):  # the second call continues each stream
        assert torch.equal(noise.like(x)[1:2], alone.like(x[:1]))
    assert noise_like(x, SeededNoise([4, 5, 6])).shape == x.shape
    generator = torch.Generator().manual_seed(4)
    assert torch.equal(noise_like(x[0], torch.Generator().manual_seed(4)), torch.randn(2, 5, 5, generator=generator))
    torch.manual_seed(7)
    z = noise_like(x)
    torch.manual_seed(7)
    assert torch.equal(z, torch.randn(3, 2, 5, 5))


def test_noise_between_two_seeds_is_standard_normal_all_the_way():
    x = torch.empty(9, 1, 200, 200)
    noise, a, b = SeededNoise([1] * 9, [2] * 9, torch.linspace(0, 1, 9)), SeededNoise([1]), SeededNoise([2])
    for _ in range(2):
        z, z_a, z_b = noise.like(x), a.like(x[:1]), b.like(x[:1])
        assert torch.equal(z[:1], z_a)
        torch.testing.assert_close(z[-1:], z_b)
    torch.testing.assert_close(z.flatten(1).std(dim=1), torch.ones(9), rtol=0.02, atol=0)
    angle = math.pi / 2 / 8
    torch.testing.assert_close(z[3:4], math.cos(3 * angle) * z_a + math.sin(3 * angle) * z_b)


@pytest.mark.lessons("lesson_05_ddpm")
def test_nearest(lesson, tmp_path):
    text = done(sample(lesson.name, "--nearest", "--num", 3, "--output", tmp_path / "n.png"))
    distances = [float(number) for number in re.findall(r"median distance (.*)", text)]
    assert len(distances) == 2 and 2 < distances[1] < 8  # test digits
    with Image.open(tmp_path / "n.png") as picture:
        assert picture.width > 300 and picture.height > 300


def scales_in_pictures(lesson):
    """How much noise a picture in [0, 1] has, compared with its ink, at each noise level from the noisiest on: (L,)."""
    network, config, _ = shipped(lesson)
    if lesson.name == "lesson_07_score_sde":
        return torch.logspace(math.log10(float(network.sigma_max)), math.log10(config.sigma_min), 100)
    if lesson.name not in DIFFUSION:
        return network.sigmas
    if lesson.name == "lesson_05_ddpm":
        abars = (1 - torch.linspace(config.beta_1, config.beta_T, config.T)).cumprod(0)
    else:  # the last of 1000 is cut, and near to zero in any case
        abars = torch.cos((torch.arange(1, config.T + 1) / config.T + 0.008) / 1.008 * math.pi / 2).square() / 0.99984
    return ((1 - abars) / abars).sqrt().flip(0) / 2  # of pixels in [-1, 1], which are twice as far apart


def test_denoise(lesson, tmp_path):
    """What the network believes is nearer to the digit than the noisy picture is, at every scale."""
    done(sample(lesson.name, "--denoise", "--num", 2, "--output", tmp_path / "d.png", "--save-tensor", tmp_path / "d"))
    done(sample(lesson.name, "--inpaint", "left", "--num", 2, "--output", tmp_path / "f.png", few=FEW_LANGEVIN))
    digits = torch.from_numpy(tiles(tmp_path / "f.png", 8)[:, :1]) / 255  # the same test digits
    guesses = torch.load(tmp_path / "d", weights_only=True).view(8, 2, 28, 28)
    errors = (guesses - digits[:, 0]).square().mean((1, 2, 3)).sqrt()
    sigmas = scales_in_pictures(lesson)
    some = torch.linspace(0, len(sigmas) - 1, 8).round().long().flip(0)
    assert (errors < sigmas[some]).all()  # sigma is how far the noisy picture is away
    assert errors[0] < 0.02 and errors[-1] > 0.1  # at the last one a digit can only be guessed


def test_denoise_a_picture_of_ones_own(lesson, tmp_path):
    Image.new("L", (28, 28)).save(tmp_path / "black.png")
    flags = ("--denoise", tmp_path / "black.png", "--output", tmp_path / "d.png", "--save-tensor", tmp_path / "d")
    done(sample(lesson.name, *flags))
    assert torch.load(tmp_path / "d", weights_only=True)[0].abs().max() < 0.1  # black, at the smallest noise scale


@pytest.mark.lessons("lesson_03_ncsn", "lesson_04_ncsnv2")
def test_denoise_is_tweedies_formula_at_the_last_scale(lesson):
    sigmas, x = geometric_noise_scales(3, 0.5, 4), torch.randn(2, 1, 4, 4)
    i = torch.tensor([0, 3])
    clean = lesson.sampler.tweedie(lambda x, i: -x / (1 + sigmas[i][:, None, None, None] ** 2), x, sigmas, i)
    torch.testing.assert_close(clean[0], x[0] / (1 + 9))  # the mean of N(0, 1) data, given x
    torch.testing.assert_close(clean[1], x[1] / (1 + 0.25))
    torch.testing.assert_close(denoise(lambda x, i: -x, x, sigmas), x * 0.75)


@pytest.mark.lessons("lesson_03_ncsn", "lesson_04_ncsnv2")
def test_algorithm_2_draws_the_unknown_given_the_known(lesson):
    """Two pixels with covariance 0.8 and, at the last scale, noise 0.3: the second one given the first, noisy y."""
    sigmas = geometric_noise_scales(4, 0.3, 8)
    covariance = torch.tensor([[1, 0.8], [0.8, 1]])

    def score(x, i):
        return -(x.flatten(1) @ torch.linalg.inv(covariance + sigmas[i[0]] ** 2 * torch.eye(2))).view_as(x)

    y, known = torch.tensor([1.5, 0]).repeat(4000, 1).view(4000, 1, 1, 2), torch.tensor([1.0, 0]).view(1, 1, 1, 2)
    *_, x = lesson.sampler.inpaint(score, y, known, torch.randn_like(y), sigmas, 400, 0.2 * 0.3**2)
    first, second = x[:, 0, 0].T
    assert first.mean() == pytest.approx(1.5, abs=0.03) and first.std() == pytest.approx(0.3, rel=0.05)
    slope = 0.8 / 1.09
    assert second.mean() == pytest.approx(1.5 * slope, abs=0.04)
    assert second.var() == pytest.approx(1.09 - 0.8 * slope + slope**2 * 0.09, rel=0.1)


# What only lessons 5 and 9 have: DDPM's pictures, and choices of the sampler


def pixels_of(path):
    """What --save-tensor wrote, as uint8 (N, 28, 28)."""
    return (torch.load(path, weights_only=True)[:, 0].clamp(0, 1) * 255).round().byte().numpy()


def difference(a, b):
    """Of grey levels: the largest."""
    return int(np.abs(a.astype(int) - b).max())


@pytest.mark.lessons(*DIFFUSION)
def test_progress_ends_with_the_samples(lesson, tmp_path):
    """Ten of twelve guesses of the clean image; the last one is the sample, and they come ever nearer to it."""
    flags = ("--calls", 12, "--num", 3, "--output", tmp_path / "p.png", "--save-tensor")
    done(sample(lesson.name, "--progress", *flags, tmp_path / "p"))
    done(sample(lesson.name, "--sampler", "ancestral", "--variance", "small", *flags, tmp_path / "a"))
    guesses, samples = pixels_of(tmp_path / "p").reshape(3, 10, 28, 28), pixels_of(tmp_path / "a")
    assert difference(guesses[:, -1], samples) <= 1
    away = np.square(guesses.astype(float) - samples[:, None]).mean((0, 2, 3))
    assert away[0] > 3 * away[4] > 9 * away[7] > 0


def test_progress_has_a_row_for_each_sample(tmp_path):
    done(sample("lesson_05_ddpm", "--progress", "--calls", 10, "--output", tmp_path / "p.png"))
    assert tiles(tmp_path / "p.png", 10).shape == (8, 10, 28, 28)


@pytest.mark.lessons(*DIFFUSION)
def test_samples_that_share_a_latent_are_the_more_alike_the_later_they_part(lesson, tmp_path):
    """Figure 7: a row for each t, with x_t itself, as it is on the way to a sample, and eight samples from it."""
    path = tmp_path / "s"
    done(sample(lesson.name, "--share-latent", "--calls", 12, "--seed", 3, "--save-tensor", path,
                "--output", tmp_path / "s.png"))  # fmt: skip
    rows = torch.load(path, weights_only=True).view(4, 9, 28, 28)
    assert np.array_equal(tiles(tmp_path / "s.png", 9).reshape(-1, 28, 28), pixels_of(path))
    spread = rows[:, 1:].std(dim=1).square().mean((1, 2)).sqrt()
    assert (spread.diff() < 0).all() and spread[3] < 0.6 * spread[0] and spread[3] > 0
    noise = SeededNoise([3])
    module, (network, config, _) = script(lesson.name, "sample"), shipped(lesson)
    config.variance = "small"
    torch.testing.assert_close(rows[0, 0], (SeededNoise([3]).like(torch.empty(1, 1, 28, 28))[0, 0] + 1) / 2)
    on_the_way = list(module.draw(network, config, (1, 1, 28, 28), noise, "ancestral", 12))
    for row, steps in zip(rows[1:], (3, 6, 9), strict=True):  # of 12
        assert same_images(row[0], on_the_way[steps - 1][0, 0].cpu())


def test_share_latent_has_as_many_samples_as_asked_for(tmp_path):
    done(sample("lesson_05_ddpm", "--share-latent", "--num", 2, "--output", tmp_path / "s.png"))
    assert len(tiles(tmp_path / "s.png", 3)) == 4


def test_interpolate_images_goes_from_one_test_digit_to_another(tmp_path):
    path = tmp_path / "i.png"
    done(sample("lesson_05_ddpm", "--interpolate-images", "--num", 3, "--calls", 20, "--output", path))
    rows = tiles(path, 10)
    test_digits = {image.numpy().tobytes() for image in common.data.load_images("mnist", "test")}
    assert len(rows) == 3
    for row in rows:
        known = [picture.tobytes() in test_digits for picture in row]
        assert known == [True, *[False] * 8, True] and not np.array_equal(row[0], row[-1])
        ends = row[[0, -1]].astype(float)
        for picture, near, far in ((row[1], *ends), (row[-2], *ends[::-1])):
            assert np.abs(picture - near).mean() < np.abs(picture - far).mean()


@pytest.mark.lessons(*DIFFUSION)
def test_both_images_of_an_interpolation_get_the_same_noise_of_half_of_the_steps(lesson):
    """As the network is first asked: mixtures, of which each is one more seventh of the way, at t = T/2."""
    module, (_, config, _), outputs = script(lesson.name, "sample"), shipped(lesson), OUTPUTS.get(lesson.name, 1)
    x, network = torch.rand(2, 2, 1, 28, 28), Counting(outputs=outputs)
    images, columns = module.interpolate_images(network, config, 2, 3, 1000, x)
    abar = 1 / (1 + (2 * scales_in_pictures(lesson)[500]) ** 2)  # t = 500 of 1000, from the noisiest on
    share = (torch.arange(8) / 7)[None, :, None, None, None]
    mixed = 2 * ((1 - share) * x[:, :1] + share * x[:, 1:]) - 1
    z = (network.first.view(2, 8, 1, 28, 28) - abar.sqrt() * mixed) / (1 - abar).sqrt()
    torch.testing.assert_close(z, z[:, :1].expand_as(z), rtol=0, atol=1e-4)
    assert float(z.std()) == pytest.approx(1, rel=0.05) and not torch.allclose(z[0], z[1], atol=0.1)
    assert network.levels == list(range(499, -1, -1)) and columns == 10
    assert torch.equal(images.view(2, 10, 1, 28, 28)[:, [0, -1]], x)
    for calls, levels in ((2, [499, 0]), (6, [499, 400, 200, 0])):  # whatever timesteps are kept
        few = Counting(outputs=outputs)
        module.interpolate_images(few, config, 2, 3, calls, x)
        assert few.levels == levels


@pytest.mark.lessons(*DIFFUSION)
def test_ddim_draws_no_noise_but_the_start(lesson):
    """With noise of zero predicted and no clip, each step keeps the guess, x_T / sqrt(abar_T)."""
    score, frames = counted(lesson, "ddim", 4, T=40, clip_x_0=False)
    made = 2 * frames[-1] - 1
    larger = made.std() / score.first.std()
    torch.testing.assert_close(made, larger * score.first, rtol=1e-4, atol=1e-4 * float(larger))
    assert larger > 1.2


@pytest.mark.lessons(*DIFFUSION)
@pytest.mark.parametrize("clip", [True, False])
def test_the_guess_is_clipped_as_the_configuration_says_in_every_picture(lesson, clip):
    """With noise of zero predicted, x_0-hat is noise that is many times as large as the image."""
    module, (_, config, _) = script(lesson.name, "sample"), shipped(lesson)
    network, x, noise = Counting(outputs=OUTPUTS.get(lesson.name, 1)), torch.rand(3, 2, 1, 8, 8), SeededNoise([1, 2, 3])
    config.clip_x_0 = clip
    y, z = x[:, 0], noise.like(x[:, 0])
    pictures = {name: make(network, config, 3, 1, 5, x) for name, make in module.PICTURES.items()}
    pictures = {name: images.unflatten(0, (-1, columns)) for name, (images, columns) in pictures.items()}
    made = [
        module.fill_in(network, config, y, torch.zeros(1, 1, 8, 8), noise, 5),
        module.noise_and_guess(network, config, y, z, 500)[1],
        pictures["progress"][:, 0],
        pictures["progress"][:, -1],
        pictures["share_latent"][0, 1:],
        pictures["share_latent"][3, 1:],
        pictures["interpolate_images"][:, 1:-1].flatten(0, 1),
    ]
    for images in made:
        assert ((images >= 0) & (images <= 1)).all() if clip else images.min() < -0.5 and images.max() > 1.5


@pytest.mark.lessons("lesson_09_improved_ddpm")
def test_no_guess_looks_at_the_variance(lesson):
    module, (_, config, _) = script(lesson.name, "sample"), shipped(lesson)
    x, z, made = torch.rand(2, 2, 1, 8, 8), torch.randn(2, 1, 8, 8), []
    for v in (0.0, 1.0):
        network = lambda x, t, v=v: (torch.zeros_like(x), torch.full_like(x, v))
        images = [make(network, config, 2, 1, 5, x)[0] for make in module.PICTURES.values()]
        images.append(module.fill_in(network, config, x[:, 0], torch.zeros(1, 1, 8, 8), SeededNoise([1, 2]), 5))
        made.append(torch.cat([*images, module.noise_and_guess(network, config, x[:, 0], z, 500)[1]]))
    assert torch.equal(*made)


def test_a_guess_that_is_not_clipped_makes_another_picture(tmp_path):
    for name, flags in (("default", ()), ("yes", ("--clip-x-0",)), ("no", ("--no-clip-x-0",))):
        done(sample("lesson_05_ddpm", *flags, "--num", 3, "--save-tensor", tmp_path / name,
                    "--output", tmp_path / "x.png"))  # fmt: skip
    default, yes, no = (torch.load(tmp_path / name, weights_only=True) for name in ("default", "yes", "no"))
    assert torch.equal(default, yes) and yes.min() >= 0 and yes.max() <= 1
    assert no.min() < -0.01 and (yes - no.clamp(0, 1)).abs().max() > 0.1


@pytest.mark.lessons("lesson_05_ddpm")
def test_the_variance_of_all_steps(lesson, in_color, tmp_path):
    """The training has the small one; all four steps can have the large one."""
    for name, flags in (("default", ()), ("small", ("--variance", "small")), ("large", ("--variance", "large"))):
        done(sample(lesson.name, "--checkpoint", in_color / "checkpoint.pt", "--sampler", "ancestral", "--calls", 4,
                    *flags, "--num", 2, "--output", tmp_path / f"{name}.png"))  # fmt: skip
    default, small, large = ((tmp_path / f"{name}.png").read_bytes() for name in ("default", "small", "large"))
    assert default == small != large


# What only lesson 7 has: SDEs, predictors and correctors, a digit that one asks for, and latents


def test_the_flags_of_lesson_7_choose_sde_predictor_and_corrector(tmp_path):
    module, seen = script("lesson_07_score_sde", "sample"), []

    def walk(score, x, sigmas, *how):
        seen.append((sigmas, *how))
        return iter([x])

    flags = ("--sampler", "predictor_corrector", "--calls", 7, "--num", 1, "--output", tmp_path / "x.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "predictor_corrector", walk)
        for more in ("", "--sde vp --predictor ancestral", "--sde sub_vp --predictor euler_maruyama --no-corrector"):
            done(sample("lesson_07_score_sde", *more.split(), *flags))
    ve, vp, sub_vp = seen
    assert ve[1:4] == ("reverse_diffusion", 1, 0.16) and len(ve[0]) == 4 and (ve[5] == 1).all()
    assert vp[1:3] == ("ancestral", 1) and len(vp[0]) == 4
    assert sub_vp[1:3] == ("euler_maruyama", 0) and len(sub_vp[0]) == 7
    torch.testing.assert_close(vp[0] * vp[5], (1 - vp[5] ** 2).sqrt(), rtol=1e-3, atol=0)  # m^2 and std^2 add up to 1
    torch.testing.assert_close(sub_vp[0] * sub_vp[5], 1 - sub_vp[5] ** 2, rtol=1e-3, atol=0)  # the square of VP's


class FirstPixels(torch.nn.Module):
    """A classifier whose log-probability of digit k has the gradient 1 at pixel k of the first row, and 0 elsewhere."""

    def forward(self, x, sigma):
        return x[:, 0, 0, :10]


def test_a_digit_that_is_asked_for_guides_every_step(monkeypatch):
    """With a score of zero and two noise scales: what the classifier's gradient adds in each of two calls."""
    lesson, module = SimpleNamespace(name="lesson_07_score_sde"), script("lesson_07_score_sde", "sample")
    monkeypatch.setattr(module, "load_classifier", FirstPixels)
    _, config, _ = shipped(lesson)
    sigma_max, sigma_L = 3.0, config.sigma_L
    for chosen, weight in (({"digit": 3, "guidance": None}, 1.0), ({"digit": 3, "guidance": 2.5}, 2.5)):
        free, guided = (
            list(module.draw(Counting(sigma_max=torch.tensor(sigma_max)), SimpleNamespace(**{**vars(config), **more}),
                             (2, 1, 28, 28), SeededNoise([1, 2]), "euler", 2))[-1]
            for more in ({"digit": None, "guidance": None}, chosen)
        )  # fmt: skip
        expected = torch.zeros(2, 1, 28, 28)
        expected[:, :, 0, 3] = weight * (sigma_max * (sigma_max - sigma_L) + sigma_L**2)
        torch.testing.assert_close(guided - free, expected, rtol=1e-4, atol=1e-4)


def test_a_digit_that_is_asked_for_guides_inpainting(monkeypatch):
    """As above, in the pixels that are filled in: a step of reverse diffusion, and one to denoise."""
    lesson, module = SimpleNamespace(name="lesson_07_score_sde"), script("lesson_07_score_sde", "sample")
    monkeypatch.setattr(module, "load_classifier", FirstPixels)
    _, config, _ = shipped(lesson)
    config.corrector, config.sigma_L, known, y = False, 0.5, torch.zeros(1, 1, 28, 28), torch.rand(2, 1, 28, 28)
    known[..., 4:] = 1
    for digit, guidance, added in ((3, None, 3.0**2), (3, 2.5, 2.5 * 3.0**2), (7, None, 0)):  # pixel 7 is known
        free, guided = (
            module.fill_in(Counting(sigma_max=torch.tensor(3.0)), SimpleNamespace(**{**vars(config), **more}),
                           y, known, SeededNoise([1, 2]), 2)
            for more in ({"digit": None, "guidance": None}, {"digit": digit, "guidance": guidance})
        )  # fmt: skip
        expected = torch.zeros(2, 1, 28, 28)
        expected[:, :, 0, digit] = added
        torch.testing.assert_close(guided - free, expected, rtol=1e-4, atol=1e-4)


def test_samples_of_an_sde_that_fades_images_are_as_bright_as_those_of_one_that_does_not(monkeypatch):
    """The sampler walks from m times the noise to m times the image, with the m of each noise scale."""
    lesson, module = SimpleNamespace(name="lesson_07_score_sde"), script("lesson_07_score_sde", "sample")
    image, seen = torch.rand(50, 1, 8, 8), []

    def walk(score, x, sigmas, *how):
        seen.append((float(x.std()), float(sigmas[0])))
        return (image / (1 + sigma**2).sqrt() for sigma in sigmas[1:])  # for VP, m^2 (1 + sigma^2) = 1

    monkeypatch.setattr(module, "predictor_corrector", walk)
    _, frames = counted(lesson, "predictor_corrector", 7, sde="vp")
    assert len(frames) == 4
    for frame in frames:
        torch.testing.assert_close(frame, image, rtol=1e-4, atol=1e-5)
    ((spread, sigma),) = seen
    assert spread == pytest.approx(sigma / (1 + sigma**2) ** 0.5, rel=0.05)


def test_the_flag_of_a_digit_reaches_the_sampler(tmp_path, monkeypatch):
    module, seen = script("lesson_07_score_sde", "sample"), []
    monkeypatch.setattr(module, "load_classifier", FirstPixels)
    monkeypatch.setattr(module, "guided_score", lambda score, classifier, *how: seen.append(how) or score)
    for flags in ((), ("--digit", 3), ("--digit", 0, "--guidance", 4), ("--digit", 5, "--inpaint", "left")):
        done(sample("lesson_07_score_sde", *flags, "--calls", 3, "--num", 1, "--output", tmp_path / "x.png"))
    assert seen == [(3, 1.0), (0, 4.0), (5, 1.0)]


def test_a_digit_of_pictures_that_the_classifier_does_not_know(tmp_path):
    flags = ("--dataset", "color_mnist", "--steps", 1, "--output", tmp_path / "run")
    assert quick("lesson_07_score_sde", *flags).status == 0
    result = sample("lesson_07_score_sde", "--digit", 3, "--checkpoint", tmp_path / "run" / "checkpoint.pt",
                    "--output", tmp_path / "x.png")  # fmt: skip
    assert "--digit: the classifier knows gray digits of 28x28 pixels only" in line(result)


def test_a_classifier_that_cannot_be_used(tmp_path, monkeypatch):
    """One's own comes first, damaged or not."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "output").mkdir()
    path = tmp_path / "output" / "classifier.pt"
    flags = ("--digit", 3, "--num", 1, "--output", tmp_path / "x.png")
    for content, expected in (
        (b"text", "output/classifier.pt is damaged"),
        ({"config": {}}, "is of another version of lesson_07_score_sde: it has no classifier"),
        ({"classifier": {"weight": torch.zeros(3)}}, "the weights in output/classifier.pt do not fit"),
    ):
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            save_checkpoint(path, "lesson_07_score_sde", **content)
        assert expected in line(sample("lesson_07_score_sde", *flags))
    shutil.copy(ROOT / "lesson_04_ncsnv2" / "pretrained.pt", path)
    assert "is a checkpoint of lesson_04_ncsnv2" in line(sample("lesson_07_score_sde", *flags))


class Ones:
    """A score of 1 everywhere."""

    sigma_max = torch.tensor(30.0)

    def __call__(self, x, sigma):
        return torch.ones_like(x)


@pytest.fixture
def latents_are(monkeypatch):
    """A function that makes given latents those of whatever is encoded, and a list of what the solvers are given."""
    module, seen = script("lesson_07_score_sde", "sample"), []

    def use(z):
        monkeypatch.setattr(module, "encode", lambda score, *how: seen.append(how) or z)
        monkeypatch.setattr(module, "decode", lambda score, *how: seen.append(how) or how[0])
        return seen

    return use


LATENTS = SimpleNamespace(sigma_min=0.2, sigma_L=0.5)


def test_images_are_encoded_dequantised_and_decoded_between_the_scales_of_the_training(latents_are):
    """Both ways are between sigma_min and sigma_max, and the last step is to denoise: sigma_min^2 times the score."""
    x = torch.randint(0, 256, (2, 2, 1, 28, 28)) / 255
    z = torch.tensor([3, -1.5]).view(2, 1, 1, 1) * torch.ones(2, 1, 28, 28) * 30
    seen = latents_are(z)
    images, columns = script("lesson_07_score_sde", "sample").encoded(Ones(), LATENTS, 2, 5, None, x)
    (given, *there), (latents, *back) = seen
    assert there == back == [0.2, 30] and torch.equal(latents, z) and columns == 3
    noise = torch.stack([torch.randn(1, 28, 28, generator=torch.Generator().manual_seed(seed)) for seed in (5, 6)])
    part = (1 + torch.erf(noise / 2**0.5)) / 2  # where in its interval each gray level is
    torch.testing.assert_close(given, (255 * x[:, 0] + part) / 256, rtol=0, atol=1e-6)
    pixels, shown, back = images.view(2, 3, 1, 28, 28).unbind(1)
    assert torch.equal(pixels, x[:, 0])
    torch.testing.assert_close(shown[:, 0, 0, 0], torch.tensor([1, 0.25]))  # of six standard deviations
    torch.testing.assert_close(back, z + 0.2**2)


def test_latents_between_two_images_lie_on_an_arc(latents_are):
    """At right angles with lengths 3 and 4, and at 60 degrees, where all have the same length."""
    a, b = torch.eye(2).view(2, 1, 1, 2)
    ends = torch.stack([3 * a, 4 * b, 2 * a, a + 3**0.5 * b])
    seen, x = latents_are(ends), torch.rand(2, 2, 1, 1, 2)
    module = script("lesson_07_score_sde", "sample")
    images, columns = module.interpolate_images(Ones(), LATENTS, 2, 5, None, x)
    right, sixty = torch.arange(8).view(8, 1, 1, 1) / 7 * math.pi / torch.tensor([2, 3]).view(2, 1, 1, 1, 1)
    expected = torch.cat([3 * right.cos() * a + 4 * right.sin() * b, 2 * (sixty.cos() * a + sixty.sin() * b)])
    torch.testing.assert_close(seen[1][0], expected, rtol=1e-4, atol=1e-5)
    rows = images.view(2, 10, 1, 1, 2)
    torch.testing.assert_close(rows[:, 1:-1].flatten(0, 1), expected + 0.2**2, rtol=1e-4, atol=1e-5)
    assert torch.equal(rows[:, [0, -1]], x) and columns == 10


def test_test_images_that_are_encoded_come_back(tmp_path):
    """A row for each: the image, its latent, which is noise, and what that is decoded to."""
    path = tmp_path / "e"
    done(sample("lesson_07_score_sde", "--encoded", "--num", 3, "--save-tensor", path, "--output", tmp_path / "e.png"))
    rows = torch.load(path, weights_only=True).view(3, 3, 28, 28)
    assert np.array_equal(tiles(tmp_path / "e.png", 3).reshape(-1, 28, 28), pixels_of(path))
    test_digits = {image.numpy().tobytes() for image in common.data.load_images("mnist", "test")}
    assert all((image * 255).round().byte().numpy().tobytes() in test_digits for image in rows[:, 0])
    assert (rows[:, 0] - rows[:, 2]).abs().mean() < 0.02
    latents = 6 * (rows[:, 1] - 0.5)  # in units of the largest noise scale
    assert latents.abs().mean() > 0.2 and not torch.allclose(latents[0], latents[1], atol=0.1)


def test_latents_between_two_test_digits(tmp_path):
    path = tmp_path / "i"
    done(sample("lesson_07_score_sde", "--interpolate-images", "--num", 1, "--save-tensor", path,
                "--output", tmp_path / "i.png"))  # fmt: skip
    row = torch.load(path, weights_only=True).view(10, 28, 28)
    assert len(tiles(tmp_path / "i.png", 10)) == 1
    assert (row[1] - row[0]).abs().mean() < 0.02 > (row[-2] - row[-1]).abs().mean()  # both ends come back
    away = (row[1:-1] - row[0]).abs().mean((1, 2))
    assert away[0] < away[3] < away[-1]


# What a person may get wrong


@pytest.mark.parametrize(
    "flags, expected",
    [
        ("--num 0", "--num must lie between 1 and "),
        ("--num -3", "--num must lie between 1 and "),
        ("--seed -1", "--seed must lie between 0 and "),
        ("--calls 0", "--calls must be greater than zero"),
        ("--inpaint nothing", "--inpaint nothing: there is no such picture; name one, or one of left, right, "),
        ("--inpaint {dir}/small.png", "the mask .*small.png has 14 x 20 pixels, but the images have 28 x 28: resize"),
        ("--inpaint {dir}/text.png", "cannot read the mask .*text.png"),
        ("--inpaint {dir}/white.png", "a mask needs black, to fill in, and white, to keep"),
        ("--denoise {dir}/text.png", "cannot read the picture .*text.png"),
        ("--denoise {dir}/absent.png", "cannot read the picture .*absent.png"),
        ("--output {dir}/x.jpg", "--output .*x.jpg: the name must end in .png"),
        ("--gif {dir}/x.png", "--gif .*x.png: the name must end in .gif"),
        ("--save-tensor {dir}", "cannot write .*: it is a folder; name a file"),
        ("--output {dir}/text.png/x.png", "cannot write .*x.png"),
        ("--denoise --calls 9", "--calls has no effect here, only for "),
        ("--denoise {dir}/small.png --num 2", "--num has no effect here, only for nearest, inpaint: leave it out"),
        ("--images {dir}", "--images has no effect here, only for nearest, inpaint, denoise"),
        ("--info", "--output has no effect here, only for drawn, "),
        ("--nearest --gif", "--gif and --strip show how plain samples come about: leave out --nearest"),
        ("--checkpoint {dir}/absent.pt", "there is no file .*absent.pt"),
        ("--checkpoint {dir}/text.png", "text.png is damaged, or not a file that these lessons wrote"),
    ],
)
def test_flags_that_cannot_be_used(lesson, flags, expected, tmp_path):
    check_flags(lesson, flags, expected, tmp_path)


@pytest.mark.lessons("lesson_03_ncsn", "lesson_04_ncsnv2")
def test_too_few_calls(lesson, tmp_path):
    check_flags(lesson, "--calls 2", "--calls 2: .* needs at least ", tmp_path)


@pytest.mark.lessons("lesson_05_ddpm")
@pytest.mark.parametrize(
    "flags, expected",
    [
        ("--calls 1", "--calls 1: with T = 1000, a chain takes 2 to 1000 steps"),
        ("--calls 1001", "--calls 1001: with T = 1000, a chain takes 2 to 1000 steps"),
        ("--calls 1 --inpaint left", "--calls 1: "),
        ("--calls 1001 --inpaint left", "--calls 1001: "),
        ("--calls 1001 --progress", "--calls 1001: "),
        ("--calls 1 --share-latent", "--calls 1: "),
        ("--calls 1001 --interpolate-images", "--calls 1001: "),
        ("--sampler ancestral --variance large --calls 999",
         "--calls 999: the large variance is for all 1000 steps; add --variance small"),
        ("--progress --gif", "--gif and --strip show how plain samples come about: leave out --progress$"),
        ("--share-latent --strip", "leave out --share-latent$"),
        ("--interpolate-images --gif", "leave out --interpolate-images$"),
        ("--num 0 --progress", "--num must lie between 1 and "),
        ("--variance small", "--variance has no effect here, only for ancestral: leave it out$"),
        ("--inpaint left --variance small", "--variance has no effect here"),
        ("--progress --sampler ancestral", "--sampler has no effect here"),
    ],
)  # fmt: skip
def test_flags_of_lesson_5_that_cannot_be_used(lesson, flags, expected, tmp_path):
    check_flags(lesson, flags, expected, tmp_path)


@pytest.mark.lessons("lesson_07_score_sde")
@pytest.mark.parametrize(
    "flags, expected",
    [
        ("--calls 1", "--calls 1: consistent needs at least 2, one step and one call to denoise"),
        ("--calls 1 --sampler euler", "--calls 1: euler needs at least 2"),
        ("--calls 2 --sampler predictor_corrector", "--calls 2: predictor_corrector needs at least 3"),
        ("--calls 1 --sampler predictor_corrector --no-corrector", "--calls 1: predictor_corrector needs at least 2"),
        ("--calls 2 --inpaint left", "--calls 2: predictor_corrector needs at least 3"),
        ("--encoded --gif", "leave out --encoded$"),
        ("--guidance 3", "--guidance"),
        ("--digit 3 --guidance nan", "--guidance"),
        ("--predictor ancestral", "--predictor has no effect here, only for predictor_corrector, inpaint: leave it"),
        ("--sampler heun --no-corrector", "--corrector has no effect here"),
        ("--encoded --calls 9", "--calls has no effect here, only for consistent, heun, euler, predictor_"),
        ("--interpolate-images --digit 3", "--digit has no effect here"),
        ("--denoise --sde vp", "--sde has no effect here"),
    ],
)
def test_flags_of_lesson_7_that_cannot_be_used(lesson, flags, expected, tmp_path):
    check_flags(lesson, flags, expected, tmp_path)


def check_flags(lesson, flags, expected, tmp_path):
    Image.new("L", (14, 20)).save(tmp_path / "small.png")
    Image.new("L", (28, 28), 255).save(tmp_path / "white.png")
    (tmp_path / "text.png").write_text("text")
    before = sorted(path.name for path in tmp_path.iterdir())
    flags = flags.replace("{dir}", str(tmp_path)).split()
    if "--output" not in flags:
        flags += ["--output", str(tmp_path / "x.png")]
    assert re.search(expected, line(sample(lesson.name, *flags)))
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_the_help_fits_a_screen(lesson, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    result = run_here(lesson.name, "--help", name="sample")
    assert result.status == 0 and len(result.stdout.splitlines()) <= 40


@pytest.mark.parametrize("flags", [("--inpaint", "left", "--nearest"), ("--sampler", "leapfrog"), ("--numb", 3)])
def test_flags_that_argparse_refuses(lesson, flags):
    result = sample(lesson.name, *flags)
    assert result.status == 2 and "Traceback" not in result.stderr


@pytest.mark.parametrize("flags", ["--progress --nearest", "--share-latent --progress", "--variance tiny"])
def test_flags_of_lesson_5_that_argparse_refuses(flags):
    result = sample("lesson_05_ddpm", *flags.split())
    assert result.status == 2 and "Traceback" not in result.stderr


@pytest.mark.parametrize("flags", ["--digit 10", "--digit three", "--guidance much", "--sde v", "--encoded --nearest"])
def test_flags_of_lesson_7_that_argparse_refuses(flags):
    result = sample("lesson_07_score_sde", *flags.split())
    assert result.status == 2 and "Traceback" not in result.stderr


@pytest.mark.parametrize("flag", ["--progress", "--variance=large", "--no-clip-x-0"])
@pytest.mark.lessons("lesson_03_ncsn", "lesson_04_ncsnv2")
def test_the_flags_of_lesson_5_are_its_own(lesson, flag):
    result = sample(lesson.name, flag)
    assert result.status == 2 and f"unrecognized arguments: {flag}" in result.stderr


@pytest.mark.parametrize("name", ["lesson_04_ncsnv2", "lesson_05_ddpm"])
def test_inpainting_with_another_sampler(name):
    module = script(name, "sample")
    error = line(sample(name, "--inpaint", "left", "--sampler", module.SAMPLERS[0]))
    assert f"--inpaint follows {module.SAMPLERS[-1]}: leave out --sampler" in error


def test_a_checkpoint_of_another_lesson_or_version(lesson, tmp_path):
    for other in [name for name in LESSONS if name != lesson.name]:
        error = line(sample(lesson.name, "--checkpoint", ROOT / other / "pretrained.pt"))
        assert f"is a checkpoint of {other}, not of {lesson.name}; use the scripts in {other}/" in error
    save_checkpoint(tmp_path / "old.pt", lesson.name, config={})
    assert f"is of another version of {lesson.name}: it has no " in line(
        sample(lesson.name, "--checkpoint", tmp_path / "old.pt")
    )


# Other data: three channels, and folders of pictures

FEW_OF_QUICK = {  # of short runs
    "lesson_03_ncsn": 10,
    "lesson_04_ncsnv2": 41,
    "lesson_05_ddpm": 4,
    "lesson_07_score_sde": 9,
    "lesson_09_improved_ddpm": 4,
}


@pytest.fixture(scope="module")
def in_color(lesson, tmp_path_factory):
    folder = tmp_path_factory.mktemp("color")
    result = quick(lesson.name, "--dataset", "color_mnist", "--output", folder)
    assert result.status == 0, result.stderr
    return folder


@pytest.fixture(scope="module")
def from_a_folder(lesson, tmp_path_factory):
    """A training on a folder of 20 gray pictures of other sizes, and one that is damaged."""
    pictures, folder = tmp_path_factory.mktemp("pictures"), tmp_path_factory.mktemp("folder")
    for k in range(20):
        Image.fromarray(np.random.default_rng(k).integers(0, 255, (20 + k, 40), np.uint8)).save(pictures / f"{k}.png")
    (pictures / "damaged.png").write_bytes(b"\x89PNG\r\n")
    flags = ("--images", pictures, "--image-size", 16, "--channels", 1, "--batch-size", 4, "--output", folder)
    result = quick(lesson.name, *flags)
    assert result.status == 0, result.stderr
    assert re.search(r"left out .*damaged\.png", result.stderr)
    return folder


@pytest.mark.lessons(*TWO_LESSONS)
def test_a_pretrained_checkpoint_is_made_from_a_run(lesson, in_color, tmp_path, monkeypatch):
    """Rounded to float16, the network draws the same pictures up to a grey level or two."""
    folder = tmp_path / lesson.name
    shutil.copytree(in_color, folder / "output")
    monkeypatch.setattr(sys, "argv", ["pretrained.py", str(folder)])
    pretrained.main()
    for name in ("pretrained.pt", "output/checkpoint.pt"):
        flags = ("--num", 1, "--save-tensor", tmp_path / Path(name).stem, "--output", tmp_path / "x.png")
        done(sample(lesson.name, "--checkpoint", folder / name, *flags, few=FEW_OF_QUICK))
    small, whole = (torch.load(tmp_path / name, weights_only=True) for name in ("pretrained", "checkpoint"))
    torch.testing.assert_close(small, whole, rtol=0, atol=2 / 255 * float(whole.abs().max()))
    assert 2 * (folder / "pretrained.pt").stat().st_size < (folder / "output" / "checkpoint.pt").stat().st_size
    monkeypatch.setattr(sys, "argv", ["pretrained.py"])
    with pytest.raises(LessonError, match="name the lesson's folder"):
        pretrained.main()


@pytest.mark.parametrize("verb", ["drawn", "inpaint right", "interpolate", "nearest", "denoise", "info"])
@pytest.mark.parametrize("kind", ["in_color", "from_a_folder"])
def test_everything_works_on_other_data(lesson, kind, verb, request, tmp_path, monkeypatch):
    monkeypatch.setattr("common.play.load_pictures", lambda data, split: some_pictures(data))  # not all 60 000
    checkpoint = request.getfixturevalue(kind) / "checkpoint.pt"
    flags = () if verb == "drawn" else tuple(f"--{verb}".split())
    flags += () if verb == "info" else ("--num", 2, "--output", tmp_path / "x.png")
    flags = ("--checkpoint", checkpoint, *flags)
    text = done(sample(lesson.name, *flags, few=FEW_OF_QUICK))
    if verb == "info":
        assert f"images      {'3 x 28 x 28' if kind == 'in_color' else '1 x 16 x 16'}" in text
        return
    with Image.open(tmp_path / "x.png") as picture:
        assert picture.mode == "RGB" or verb != "drawn" or kind == "from_a_folder"
    if verb == "inpaint right" and kind == "in_color":
        rows, known = tiles(tmp_path / "x.png", 8), read_mask("right", 28, 28)[0, 0].bool().numpy()
        assert rows.shape[-1] == 3 and (rows[:, 2:, known] == rows[:, :1, known]).all()


@pytest.mark.lessons(*DIFFUSION)
@pytest.mark.parametrize("verb", ["progress", "share-latent", "interpolate-images"])
@pytest.mark.parametrize("kind", ["in_color", "from_a_folder"])
def test_the_pictures_of_lesson_5_on_other_data(lesson, kind, verb, request, tmp_path):
    checkpoint, path = request.getfixturevalue(kind) / "checkpoint.pt", tmp_path / "x.png"
    flags = ("--checkpoint", checkpoint, "--num", 2, f"--{verb}", "--output", path, "--save-tensor", tmp_path / "x")
    done(sample(lesson.name, *flags, few=FEW_OF_QUICK))
    shape = (3, 28, 28) if kind == "in_color" else (1, 16, 16)
    number = {"progress": 2 * 4, "share-latent": 4 * 3, "interpolate-images": 2 * 10}[verb]  # 4 calls: 4 guesses
    assert torch.load(tmp_path / "x", weights_only=True).shape == (number, *shape)
    with Image.open(path) as picture:
        assert picture.mode == ("RGB" if kind == "in_color" else "L")


@pytest.mark.lessons("lesson_07_score_sde")
@pytest.mark.parametrize("verb", ["encoded", "interpolate-images"])
@pytest.mark.parametrize("kind", ["in_color", "from_a_folder"])
def test_the_pictures_of_lesson_7_on_other_data(lesson, kind, verb, request, tmp_path, monkeypatch):
    monkeypatch.setattr("common.play.load_pictures", lambda data, split: some_pictures(data))  # not all 60 000
    module = script(lesson.name, "sample")
    for name in ("encode", "decode"):  # fewer steps than for a picture to look at
        monkeypatch.setattr(module, name, functools.partial(getattr(module, name), steps=3))
    checkpoint, path = request.getfixturevalue(kind) / "checkpoint.pt", tmp_path / "x.png"
    flags = ("--checkpoint", checkpoint, "--num", 2, f"--{verb}", "--output", path, "--save-tensor", tmp_path / "x")
    done(sample(lesson.name, *flags, few=FEW_OF_QUICK))
    shape = (3, 28, 28) if kind == "in_color" else (1, 16, 16)
    assert torch.load(tmp_path / "x", weights_only=True).shape == (2 * {"encoded": 3}.get(verb, 10), *shape)
    with Image.open(path) as picture:
        assert picture.mode == ("RGB" if kind == "in_color" else "L")


def test_folders_that_cannot_be_trained_on(lesson, tmp_path):
    for folder, expected in ((tmp_path, "has no readable picture"), (tmp_path / "absent", "is not a folder")):
        result = run_here(lesson.name, "--smoke", "--images", folder, "--output", tmp_path / "output")
        assert expected in line(result)
    assert list(tmp_path.iterdir()) == []
