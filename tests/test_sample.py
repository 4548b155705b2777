"""`python sample.py`: each thing that it can do, on the checkpoint that comes with a lesson; pictures are measured."""

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
import common.pretrained
import lesson_03_ncsn.sampler
from common.checkpoint import load_network, save_checkpoint
from common.errors import LessonError
from common.noise import SeededNoise, noise_like
from common.play import read_mask
from lesson_04_ncsnv2.noise_scales import geometric_noise_scales
from lesson_04_ncsnv2.sampler import denoise
from lesson_04_ncsnv2.unconditional import noise_after_langevin
from tests.running import ENVIRONMENT, ROOT, run_here, script

FEW = {"lesson_03_ncsn": 10, "lesson_04_ncsnv2": 9}  # network calls, too few for digits
FEW_LANGEVIN = {"lesson_03_ncsn": 10, "lesson_04_ncsnv2": 97}


def sample(lesson, *flags, few=FEW):
    """Runs sample.py on pretrained.pt; whatever the machine does faster, in float32."""
    checkpoint = () if "--checkpoint" in flags else ("--checkpoint", ROOT / lesson / "pretrained.pt")
    calls = () if "--calls" in flags else ("--calls", few[lesson])
    result = run_here(lesson, *checkpoint, *calls, "--precision", "float32", *flags, name="sample")
    return result


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
    assert weights["sigmas"].dtype == torch.float32
    assert {w.dtype for w in weights.values() if w.ndim > 1} == {torch.float16}


def test_without_a_checkpoint_of_ones_own(lesson, tmp_path):
    """In a process of its own and a copy of the lesson, which has no output/."""
    shutil.copytree(ROOT / lesson.name, tmp_path / lesson.name, ignore=shutil.ignore_patterns("output"))
    shutil.copytree(ROOT / "common", tmp_path / "common", ignore=shutil.ignore_patterns("mnist"))
    command = [sys.executable, "sample.py", "--num", "5", "--calls", str(FEW[lesson.name])]
    ran = subprocess.run(command, cwd=tmp_path / lesson.name, env=ENVIRONMENT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
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
    network = shipped(lesson)[0]
    assert f"{sum(p.numel() for p in network.parameters()):,}" in text
    assert f"{lesson.name}, step {script(lesson.name).Config().steps}" in text
    assert f"noise       {len(network.sigmas)} levels:\n" in text
    printed = [float(word) for word in re.findall(r"sigma (\S+)", text.partition("levels:")[2])]
    assert printed == [float(f"{sigma:.4g}") for sigma in network.sigmas.tolist()]
    for name in ("width", "batch_size", "learning_rate"):
        assert re.search(rf"{name} +{getattr(script(lesson.name).Config(), name)}\n", text)


def test_info_may_be_read_in_part(lesson):
    """`python sample.py --info | head -1`: the reader is gone before the rest is printed."""
    command = [sys.executable, "-u", "sample.py", "--info", "--checkpoint", "pretrained.pt"]
    process = subprocess.Popen(
        command, cwd=ROOT / lesson.name, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
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
    torch.testing.assert_close(a[:3], b, rtol=0, atol=1e-3)  # other sums, for a batch of another size
    torch.testing.assert_close(a[2:], c, rtol=0, atol=1e-3)
    assert (a[0] - a[1]).abs().max() > 0.1
    pixels = tiles(tmp_path / "x.png", 3).reshape(-1, 28, 28)[:5]
    assert np.array_equal(pixels, (c[:, 0].clamp(0, 1) * 255).round().byte().numpy())


def test_more_images_than_are_drawn_at_once(lesson, tmp_path, monkeypatch):
    flags = ("--num", 5, "--output", tmp_path / "x.png", "--save-tensor")
    done(sample(lesson.name, *flags, tmp_path / "whole"))
    monkeypatch.setattr("common.play.AT_ONCE", 2)
    done(sample(lesson.name, *flags, tmp_path / "parts"))
    whole, parts = (torch.load(tmp_path / name, weights_only=True) for name in ("whole", "parts"))
    torch.testing.assert_close(whole, parts, rtol=0, atol=1e-3)


def test_the_shipped_network_draws_digits(tmp_path):
    """Not the judge's number, which needs a thousand: ink on a black background, in the middle of the picture."""
    done(sample("lesson_04_ncsnv2", "--num", 16, "--calls", 97, "--save-tensor", tmp_path / "a", "--output",
                tmp_path / "a.png"))  # fmt: skip
    images, digits = torch.load(tmp_path / "a", weights_only=True), common.data.load_images("mnist")[:1000] / 255
    for statistic in (torch.mean, torch.std):
        assert float(statistic(images)) == pytest.approx(float(statistic(digits)), rel=0.35)  # of 16
    assert images[:, :, :2].abs().max() < 0.1  # no digit reaches the edge


def test_gif_and_strip(lesson, tmp_path):
    flags = ("--num", 64, "--gif", tmp_path / "a.gif", "--strip", tmp_path / "s.png", "--output", tmp_path / "a.png")
    done(sample(lesson.name, *flags))
    frames = FEW[lesson.name] if lesson.name == "lesson_04_ncsnv2" else 10
    with Image.open(tmp_path / "a.gif") as gif:
        assert gif.n_frames == frames and gif.info["loop"] == 0
    assert (tmp_path / "a.gif").stat().st_size < 2_000_000
    strip, grid = tiles(tmp_path / "s.png", 8), tiles(tmp_path / "a.png", 8)
    assert len(strip) == 8 and np.array_equal(strip[:, -1], grid[0])  # the last moment is the sample


class Counting:
    """A score of zero with a lesson's noise scales, that counts its calls and remembers where it was asked first."""

    def __init__(self, sigmas):
        self.sigmas, self.calls, self.levels, self.first = sigmas, 0, [], None

    def __call__(self, x, i):
        self.calls, self.first = self.calls + 1, x if self.first is None else self.first
        self.levels.append(int(i[0]))
        return torch.zeros_like(x)


def counted(lesson, sampler, calls=None, **config):
    """The score after one use of the lesson's `draw`, and the frames."""
    module, (network, trained, _) = script(lesson.name, "sample"), shipped(lesson)
    score, trained = Counting(network.sigmas), SimpleNamespace(**{**vars(trained), **config})
    calls = calls or module.number_of_calls(network, trained, sampler)
    return score, list(module.draw(score, trained, (50, 1, 8, 8), SeededNoise(range(50)), sampler, calls))


def test_calls_decide_how_often_the_network_is_called(lesson):
    if lesson.name == "lesson_03_ncsn":
        assert [counted(lesson, "langevin", n)[0].calls for n in (10, 25)] == [10, 20]
    else:
        assert [counted(lesson, "langevin", n)[0].calls for n in (97, 200)] == [97, 193]
        assert [counted(lesson, "consistent", n)[0].calls for n in (3, 20, 97, 200)] == [3, 20, 97, 193]


def assert_start(lesson, score):
    """Lesson 3 starts from uniform noise in [0, 1], as the paper; lesson 4 from noise of the largest scale."""
    if lesson.name == "lesson_03_ncsn":
        assert 0 <= score.first.min() < 0.01 and 0.99 < score.first.max() <= 1
        assert float(score.first.std()) == pytest.approx(12**-0.5, rel=0.05)
    else:
        assert float(score.first.std()) == pytest.approx(float(score.sigmas[0]), rel=0.05)


def test_samples_start_from_what_the_first_step_expects(lesson):
    for sampler in script(lesson.name, "sample").SAMPLERS:
        score, _ = counted(lesson, sampler)
        assert_start(lesson, score)
        assert score.levels[0] == 0 and score.levels[-1] == len(score.sigmas) - 1


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


def test_a_consistent_step_goes_halfway_from_ddpms_to_the_guess_and_refills_the_noise():
    """With a score of zero the step adds only noise: what is missing of sigma_2 after (1 - eta) sigma_1.

    1 - eta is half of DDPM's, which is 1 / gamma^2.
    """
    score, frames = counted(SimpleNamespace(name="lesson_04_ncsnv2"), "consistent")
    sigma_1, sigma_2 = score.sigmas[:2].double().tolist()
    expected = sigma_1**2 + sigma_2**2 - (0.5 * (sigma_2 / sigma_1) ** 2 * sigma_1) ** 2
    assert float(frames[0].double().var()) == pytest.approx(expected, rel=0.05)


def test_completions_start_as_samples_do_and_in_lesson_4_end_with_the_denoising_step(lesson):
    module, (network, config, _) = script(lesson.name, "sample"), shipped(lesson)
    y, known, L = torch.rand(30, 1, 8, 8), torch.zeros(1, 1, 8, 8), len(network.sigmas)
    known[..., :4] = 1
    score = Counting(network.sigmas)
    made = module.fill_in(score, config, y, known, SeededNoise(range(30)), 2 * L + 1)
    assert_start(lesson, score)
    assert torch.equal(made[..., :4], y[..., :4]) and not torch.equal(made[..., 4:], y[..., 4:])
    assert score.levels[: 2 * L] == [n for n in range(L) for _ in range(2)]
    assert score.levels[2 * L :] == ([L - 1] if lesson.name == "lesson_04_ncsnv2" else [])


def test_fewer_langevin_steps_are_as_much_longer():
    """Lesson 3's T = 100 and epsilon = 2e-5: half the steps of twice the length, and none longer than sigma_L^2."""
    sigmas = geometric_noise_scales(1, 0.01, 10)
    step_size = lesson_03_ncsn.sampler.langevin_step_size
    sizes = {T: step_size(sigmas, T, 100, 2e-5) for T in (400, 100, 50, 20, 5)}
    assert sizes == pytest.approx({400: 2e-5, 100: 2e-5, 50: 4e-5, 20: 1e-4, 5: 1e-4})
    assert step_size(sigmas, 10, 100, 3e-4) == 3e-4  # a step that was asked for is not shortened


def test_the_default_number_of_calls(tmp_path):
    """Of lesson 3: 15 steps at each of 10 noise scales. Of lesson 4: one at each of 96, and one to denoise."""
    for lesson, calls in (("lesson_03_ncsn", 150), ("lesson_04_ncsnv2", 97)):
        flags = ("--checkpoint", ROOT / lesson / "pretrained.pt", "--num", 1, "--precision", "float32")
        assert f"/{calls}" in run_here(lesson, *flags, "--output", tmp_path / "x.png", name="sample").stderr


# Algorithm 2


@pytest.mark.parametrize("mask", ["left", "right", "top", "bottom", "center"])
def test_inpainting_keeps_the_known_pixels(lesson, mask, tmp_path):
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


def test_inpainting_with_a_mask_of_ones_own(tmp_path):
    pixels = np.full((28, 28), 255, np.uint8)
    pixels[3:9, 20:] = 0
    Image.fromarray(pixels).save(tmp_path / "mask.png")
    assert np.array_equal(read_mask(str(tmp_path / "mask.png"), 28, 28)[0, 0].numpy(), pixels / 255)


# Interpolation, nearest, denoise


def test_the_ends_of_an_interpolation_are_the_samples(lesson, tmp_path):
    done(sample(lesson.name, "--seed", 3, "--num", 4, "--output", tmp_path / "a.png"))
    done(sample(lesson.name, "--seed", 3, "--num", 2, "--interpolate", "--output", tmp_path / "i.png"))
    plain, rows = tiles(tmp_path / "a.png", 2).reshape(4, 28, 28), tiles(tmp_path / "i.png", 10)
    ends = np.array([rows[0, 0], rows[0, -1], rows[1, 0], rows[1, -1]])
    assert np.abs(ends.astype(int) - plain).max() <= 1  # of 255: other sums, for a batch of another size
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


def test_nearest(lesson, tmp_path):
    text = done(sample(lesson.name, "--nearest", "--num", 3, "--output", tmp_path / "n.png"))
    distances = [float(number) for number in re.findall(r"median distance (.*)", text)]
    assert len(distances) == 2 and 2 < distances[1] < 8  # test digits
    with Image.open(tmp_path / "n.png") as picture:
        assert picture.width > 300 and picture.height > 300


def test_denoise(lesson, tmp_path):
    """What the network believes is nearer to the digit than the noisy picture is, at every scale."""
    done(sample(lesson.name, "--denoise", "--num", 2, "--output", tmp_path / "d.png", "--save-tensor", tmp_path / "d"))
    done(sample(lesson.name, "--inpaint", "left", "--num", 2, "--output", tmp_path / "f.png", few=FEW_LANGEVIN))
    digits = torch.from_numpy(tiles(tmp_path / "f.png", 8)[:, :1]) / 255  # the same test digits
    guesses = torch.load(tmp_path / "d", weights_only=True).view(8, 2, 28, 28)
    errors = (guesses - digits[:, 0]).square().mean((1, 2, 3)).sqrt()
    sigmas = shipped(lesson)[0].sigmas
    some = torch.linspace(0, len(sigmas) - 1, 8).round().long().flip(0)
    assert (errors < sigmas[some]).all()  # sigma is how far the noisy picture is away


def test_denoise_a_picture_of_ones_own(lesson, tmp_path):
    Image.new("L", (28, 28)).save(tmp_path / "black.png")
    flags = ("--denoise", tmp_path / "black.png", "--output", tmp_path / "d.png", "--save-tensor", tmp_path / "d")
    done(sample(lesson.name, *flags))
    assert torch.load(tmp_path / "d", weights_only=True)[0].abs().max() < 0.1  # black, at the smallest noise scale


def test_denoise_is_tweedies_formula_at_the_last_scale(lesson):
    sigmas, x = geometric_noise_scales(3, 0.5, 4), torch.randn(2, 1, 4, 4)
    i = torch.tensor([0, 3])
    clean = lesson.sampler.tweedie(lambda x, i: -x / (1 + sigmas[i][:, None, None, None] ** 2), x, sigmas, i)
    torch.testing.assert_close(clean[0], x[0] / (1 + 9))  # the mean of N(0, 1) data, given x
    torch.testing.assert_close(clean[1], x[1] / (1 + 0.25))
    torch.testing.assert_close(denoise(lambda x, i: -x, x, sigmas), x * 0.75)


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


# What a person may get wrong


@pytest.mark.parametrize(
    "flags, expected",
    [
        ("--num 0", "--num must lie between 1 and "),
        ("--num -3", "--num must lie between 1 and "),
        ("--seed -1", "--seed must lie between 0 and "),
        ("--calls 0", "--calls must be greater than zero"),
        ("--calls 2", "--calls 2: .* needs at least "),
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
        ("--nearest --gif", "--gif and --strip show how plain samples come about: leave out --nearest"),
        ("--checkpoint {dir}/absent.pt", "there is no file .*absent.pt"),
        ("--checkpoint {dir}/text.png", "text.png is damaged, or not a file that these lessons wrote"),
    ],
)
def test_flags_that_cannot_be_used(lesson, flags, expected, tmp_path):
    Image.new("L", (14, 20)).save(tmp_path / "small.png")
    Image.new("L", (28, 28), 255).save(tmp_path / "white.png")
    (tmp_path / "text.png").write_text("text")
    before = sorted(path.name for path in tmp_path.iterdir())
    flags = flags.replace("{dir}", str(tmp_path)).split()
    if not {"--output", "--gif"} & set(flags):
        flags += ["--output", str(tmp_path / "x.png")]
    assert re.search(expected, line(sample(lesson.name, *flags)))
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize("flags", [("--inpaint", "left", "--nearest"), ("--sampler", "euler"), ("--numb", 3)])
def test_flags_that_argparse_refuses(lesson, flags):
    result = sample(lesson.name, *flags)
    assert result.status == 2 and "Traceback" not in result.stderr


def test_inpainting_with_another_sampler():
    assert "--inpaint follows langevin" in line(
        sample("lesson_04_ncsnv2", "--inpaint", "left", "--sampler", "consistent")
    )


def test_a_checkpoint_of_another_lesson_or_version(lesson, tmp_path):
    other = "lesson_04_ncsnv2" if lesson.name == "lesson_03_ncsn" else "lesson_03_ncsn"
    error = line(sample(lesson.name, "--checkpoint", ROOT / other / "pretrained.pt"))
    assert f"is a checkpoint of {other}, not of {lesson.name}; use the scripts in {other}/" in error
    save_checkpoint(tmp_path / "old.pt", lesson.name, config={})
    assert f"is of another version of {lesson.name}: it has no " in line(
        sample(lesson.name, "--checkpoint", tmp_path / "old.pt")
    )


# Other data: three channels, and folders of pictures


@pytest.fixture(scope="module")
def in_color(lesson, tmp_path_factory):
    folder = tmp_path_factory.mktemp("color")
    result = run_here(lesson.name, "--smoke", "--precision", "float32", "--dataset", "color_mnist", "--output", folder)
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
    result = run_here(lesson.name, "--smoke", "--precision", "float32", *flags)
    assert result.status == 0, result.stderr
    assert re.search(r"left out .*damaged\.png", result.stderr)
    return folder


def test_a_pretrained_checkpoint_is_made_from_a_run(lesson, in_color, tmp_path, monkeypatch):
    """Rounded to float16, the network draws the same pictures up to a grey level or two."""
    folder = tmp_path / lesson.name
    shutil.copytree(in_color, folder / "output")
    monkeypatch.setattr(sys, "argv", ["pretrained.py", str(folder)])
    common.pretrained.main()
    for name in ("pretrained.pt", "output/checkpoint.pt"):
        flags = ("--num", 1, "--save-tensor", tmp_path / Path(name).stem, "--output", tmp_path / "x.png")
        done(sample(lesson.name, "--checkpoint", folder / name, *flags, few=FEW_LANGEVIN))
    small, whole = (torch.load(tmp_path / name, weights_only=True) for name in ("pretrained", "checkpoint"))
    torch.testing.assert_close(small, whole, rtol=0, atol=2 / 255 * float(whole.abs().max()))
    assert 2 * (folder / "pretrained.pt").stat().st_size < (folder / "output" / "checkpoint.pt").stat().st_size
    monkeypatch.setattr(sys, "argv", ["pretrained.py"])
    with pytest.raises(LessonError, match="name the lesson's folder"):
        common.pretrained.main()


@pytest.mark.parametrize("verb", ["drawn", "inpaint right", "interpolate", "nearest", "denoise", "info"])
@pytest.mark.parametrize("kind", ["in_color", "from_a_folder"])
def test_everything_works_on_other_data(lesson, kind, verb, request, tmp_path):
    checkpoint = request.getfixturevalue(kind) / "checkpoint.pt"
    flags = () if verb == "drawn" else f"--{verb}".split()
    calls = ("--calls", 100) if lesson.name == "lesson_04_ncsnv2" else ()
    text = done(
        sample(lesson.name, "--checkpoint", checkpoint, "--num", 2, *flags, "--output", tmp_path / "x.png", *calls)
    )
    if verb == "info":
        assert f"images      {'3 x 28 x 28' if kind == 'in_color' else '1 x 16 x 16'}" in text
        return
    with Image.open(tmp_path / "x.png") as picture:
        assert picture.mode == "RGB" or verb != "drawn" or kind == "from_a_folder"
    if verb == "inpaint right" and kind == "in_color":
        rows, known = tiles(tmp_path / "x.png", 8), read_mask("right", 28, 28)[0, 0].bool().numpy()
        assert rows.shape[-1] == 3 and (rows[:, 2:, known] == rows[:, :1, known]).all()


def test_folders_that_cannot_be_trained_on(lesson, tmp_path):
    for folder, expected in ((tmp_path, "has no readable picture"), (tmp_path / "absent", "is not a folder")):
        result = run_here(lesson.name, "--smoke", "--images", folder, "--output", tmp_path / "output")
        assert expected in line(result)
    assert list(tmp_path.iterdir()) == []
