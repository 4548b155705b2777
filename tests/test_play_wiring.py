"""What common/play.py puts together: what each flag hands to the functions of a lesson, and what becomes of the images.

No network runs: the lesson's functions are replaced by some that write down what they are given.
"""

import math
import re
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import common.play
from tests.running import ROOT, run_here, script, some_pictures

pytestmark = pytest.mark.lessons("lesson_05_ddpm")  # which has two samplers and pictures of its own
PICTURES = ("progress", "share-latent", "interpolate-images")
CALLS = 7


@pytest.fixture
def play(lesson, tmp_path, monkeypatch):
    """A function: flags of sample.py -> what the lesson's functions were given, the network's precision and its bar."""
    Image.linear_gradient("L").resize((28, 28)).save(tmp_path / "picture.png")
    seen = SimpleNamespace()

    def in_batches(network, precision, bar=None):
        seen.precision, seen.total = precision, getattr(bar, "total", None)
        return network

    def draw(network, config, shape, noise, sampler, calls):
        seen.images, seen.noise, seen.sampler, seen.calls = shape[0], noise.like(torch.empty(shape)), sampler, calls
        return iter([torch.rand(shape) for _ in range(3)])

    def fill_in(network, config, y, known, noise, calls):
        seen.images, seen.y, seen.noise, seen.calls = len(y), y.cpu(), noise.like(torch.empty(y.shape)), calls
        return y

    def noise_and_guess(network, config, x, z, k):
        seen.images, seen.y, seen.noise = len(x), x.cpu(), z.cpu()
        return x, x

    def picture(network, config, n, seed, calls, x):
        seen.images, seen.y, seen.seed, seen.calls = n, x.cpu(), seed, calls
        return x.flatten(0, 1), 2

    own = {name: picture for name in script(lesson.name, "sample").PICTURES}
    monkeypatch.setattr("common.play.InBatches", in_batches)
    monkeypatch.setattr("common.play.load_pictures", lambda data, split: some_pictures(data))  # not all 60 000
    monkeypatch.setattr("common.play.save_table", lambda *arguments: None)  # which takes long to draw

    def of(verb, *flags):
        vars(seen).clear()
        verb = verb.replace("picture.png", str(tmp_path / "picture.png")).split()
        calls = () if "--denoise" in verb else ("--calls", CALLS)
        files = "--checkpoint", ROOT / lesson.name / "pretrained.pt", "--output", tmp_path / "x.png"
        made = {"draw": draw, "fill_in": fill_in, "noise_and_guess": noise_and_guess, "PICTURES": own}
        result = run_here(lesson.name, *files, *calls, *verb, *flags, name="sample", **made)
        assert result.status == 0, result.stderr
        return SimpleNamespace(**vars(seen))

    return of


VERBS = ("", "--inpaint left", "--interpolate", "--nearest", "--denoise", *(f"--{name}" for name in PICTURES))


@pytest.mark.parametrize("verb", VERBS)
def test_pictures_that_are_not_finite_are_an_error_in_one_line(lesson, tmp_path, monkeypatch, verb):
    def not_finite(shape):
        return torch.cat([torch.rand(shape)[1:], torch.full(shape, math.inf)[:1]])

    monkeypatch.setattr("common.play.load_pictures", lambda data, split: some_pictures(data))
    made = {
        "draw": lambda network, config, shape, *how: iter([not_finite(shape)]),
        "fill_in": lambda network, config, y, *how: not_finite(y.shape),
        "noise_and_guess": lambda network, config, x, z, k: (x, not_finite(x.shape)),
        "PICTURES": {name: lambda *how: (not_finite((4, 1, 28, 28)), 2) for name in PICTURES},
    }
    files = "--checkpoint", ROOT / lesson.name / "pretrained.pt", "--output", tmp_path / "x.png"
    result = run_here(lesson.name, *files, "--num", 2, *verb.split(), name="sample", **made)
    assert result.status == 1
    assert re.match("error: the sampled images are not finite: .*--learning-rate", result.stderr.splitlines()[-1])
    assert not (tmp_path / "x.png").exists()


@pytest.mark.parametrize(
    "flag, name, save, rows", [("--gif", "a.gif", "save_gif", 10), ("--strip", "a.png", "save_strip", 8)]
)
def test_a_gif_or_a_strip_alone_shows_the_whole_way(play, tmp_path, monkeypatch, flag, name, save, rows):
    shapes = []
    monkeypatch.setattr(f"common.play.{save}", lambda frames, path: shapes.append([frame.shape for frame in frames]))
    play("--num 10", flag, tmp_path / name)
    assert shapes == [[(rows, 1, 28, 28)] * 3]


@pytest.mark.parametrize("verb", (*VERBS, "--denoise picture.png"))
def test_the_network_runs_in_the_precision_of_the_flag(play, verb):
    for precision in ("float32", "bfloat16"):
        assert play(verb, "--precision", precision).precision == precision


@pytest.mark.parametrize("verb", ["", "--interpolate", "--nearest"])
def test_images_are_drawn_by_the_sampler_of_the_flag(play, verb):
    assert [play(verb, "--sampler", sampler).sampler for sampler in ("ddim", "ancestral")] == ["ddim", "ancestral"]
    assert play(verb).sampler == "ddim"


@pytest.mark.parametrize("verb", VERBS)
def test_how_many_rows_there_are_if_nobody_says_and_how_many_calls_their_bar_counts(play, verb):
    seen, own = play(verb), verb.removeprefix("--") in PICTURES
    rows = {"": 64, "--denoise": 4}.get(verb, 8)
    assert seen.images == rows * {"--inpaint left": 6, "--interpolate": 10}.get(verb, 1)
    if verb == "--denoise":
        assert seen.total is None
    else:
        assert seen.calls == CALLS and seen.total == (None if own else CALLS * seen.images)


def stream(seed, shape=(1, 28, 28)):
    """The first noise of a seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "verb, num, images",
    [("", 3, 3), ("--nearest", 3, 3), ("--inpaint left", 2, 12), ("--denoise", 3, 3), ("--denoise picture.png", 0, 1)],
)
def test_image_k_has_the_noise_of_seed_plus_k(play, verb, num, images):
    for seed in (5, 60):
        noise = play(verb, "--seed", seed, *(("--num", num) if num else ())).noise
        assert torch.equal(noise, torch.stack([stream(seed + k) for k in range(images)]))


def test_the_two_ends_of_a_row_have_noise_of_their_own(play):
    noise = play("--interpolate", "--seed", 5, "--num", 2).noise.unflatten(0, (2, 10))
    ends = torch.stack([stream(seed) for seed in (5, 6, 7, 8)]).unflatten(0, (2, 2))
    torch.testing.assert_close(noise[:, [0, -1]], ends)


@pytest.mark.parametrize("verb", ["--inpaint left", "--denoise", *(f"--{name}" for name in PICTURES)])
def test_the_seed_chooses_the_test_pictures(play, verb):
    a, again, b = (play(verb, "--seed", seed, "--num", 3).y for seed in (5, 5, 6))
    assert torch.equal(a, again)
    digits = [{image.numpy().tobytes() for image in y.reshape(-1, 28, 28)} for y in (a, b)]
    assert len(digits[0]) == len(digits[1]) == (6 if verb.removeprefix("--") in PICTURES else 3)
    assert not digits[0] & digits[1]


def test_a_picture_of_ones_own_is_what_gets_the_noise(play):
    ramp = play("--denoise picture.png").y
    assert ramp.shape == (1, 1, 28, 28) and (ramp.diff(dim=2) > 0).all() and (ramp.diff(dim=3) == 0).all()


# Tables and grids


@pytest.fixture
def written(monkeypatch):
    """What save_table and save_grid are asked to write."""
    seen = SimpleNamespace()

    def table(images, path, rows, columns, captions=()):
        seen.images, seen.rows, seen.columns, seen.captions = images, rows, columns, captions

    def grid(images, path, columns=None, scale=None):
        seen.images, seen.columns = images, columns

    monkeypatch.setattr("common.play.save_table", table)
    monkeypatch.setattr("common.play.save_grid", grid)
    return seen


@pytest.fixture
def lesson_of_twenty_levels():
    """Noise of level k adds 100 + k to each pixel, and the guess is 200 + k more than the image."""
    return SimpleNamespace(
        noise_levels=lambda network, config: [f"level {k}" for k in range(20)],
        noise_and_guess=lambda network, config, x, z, k: (x + 100 + k, x + 200 + k),
    )


def test_each_column_of_denoising_has_the_name_of_its_noise_level(written, lesson_of_twenty_levels):
    """From the least noise on, with what the network makes of it below; the clean image is at the left of both."""
    y = torch.rand(3, 1, 4, 4)
    guesses = common.play.show_denoising(lesson_of_twenty_levels, None, None, y, 5, "float32", "x.png")
    levels = [19, 16, 14, 11, 8, 5, 3, 0]
    assert written.columns == ["clean", *(f"level\n{k}" for k in levels)]
    assert written.rows == ["with noise", "network's guess"] * 3
    noisy, guessed = written.images.view(3, 2, 9, 1, 4, 4).unbind(1)
    for row, more in ((noisy, 100), (guessed, 200)):
        assert torch.equal(row[:, 0], y)
        for column, k in enumerate(levels, start=1):
            assert torch.equal(row[:, column], y + more + k)
    assert torch.equal(guesses.view(8, 3, 1, 4, 4), guessed[:, 1:].transpose(0, 1))


def flat(*levels):
    """Pictures of 2 x 2 pixels, whose distance is twice that of their levels."""
    return torch.tensor(levels)[:, None, None, None].expand(-1, 1, 2, 2)


def test_below_each_image_is_its_nearest_training_image_and_between_them_the_distance(written, capsys):
    groups = {"sample": flat(0.95, 0.2, 0.5), "test image": flat(0.7, 0.1, 0.95)}
    common.play.show_nearest(groups, flat(0, 0.5, 1), "x.png")
    torch.testing.assert_close(written.images, flat(0.95, 0.2, 0.5, 1, 0, 0.5, 0.7, 0.1, 0.95, 0.5, 0, 1))
    assert written.rows == ["sample", "nearest\ntraining image", "test image", "nearest\ntraining image"]
    assert list(written.columns) == [""] * 3
    assert written.captions == ["", "", "", "0.10", "0.40", "0.00", "", "", "", "0.40", "0.20", "0.10"]
    assert capsys.readouterr().out == "samples: median distance 0.10\ntest images: median distance 0.20\n"


def test_of_many_images_each_is_beside_its_nearest_training_image(written):
    """In a grid of pairs: 40 samples, then 40 test images."""
    levels = torch.rand(2, 40)
    train = flat(*torch.linspace(0, 1, 11).tolist())
    groups = {"sample": flat(*levels[0].tolist()), "test image": flat(*levels[1].tolist())}
    common.play.show_nearest(groups, train, "x.png")
    assert written.columns % 2 == 0
    images, nearest = written.images[:, 0, 0, 0].view(80, 2).unbind(1)
    assert torch.equal(images, levels.flatten())
    torch.testing.assert_close(nearest, (10 * images).round() / 10)
