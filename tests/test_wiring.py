"""What train_mnist.py puts together: each piece is tested elsewhere; here, that the loop uses it, and with what.

A short run of each lesson, with pieces that write down what they are given.
"""

import copy
import csv
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

import common.run
from common.config import learning_rate
from common.noise import SeededNoise
from tests.running import DIFFUSION, loss_of, quick, read_checkpoint, script, some_images
from tests.test_train import DENOISED

STEPS, B = 12, 8
NEW_LADDER = {
    "lesson_03_ncsn": ("--sigma-1", 2, "--sigma-L", 0.5, "--L", 7, "--T", 3),
    "lesson_04_ncsnv2": (),
    "lesson_05_ddpm": ("--T", 60, "--beta-1", 0.002, "--beta-T", 0.3),
    "lesson_07_score_sde": ("--N", 7),
    "lesson_09_improved_ddpm": ("--T", 60),
}
MORE = {
    "lesson_03_ncsn": ("--focus", 0.4),
    "lesson_04_ncsnv2": ("--focus", 0.4, "--ema-decay", 0.4, "--overlap", 0.2, "--T", 2, "--sigma-L", 0.5),
    "lesson_05_ddpm": ("--ema-decay", 0.4),
    "lesson_07_score_sde": ("--focus", 0.4, "--ema-decay", 0.4, "--sigma-min", 0.02, "--sigma-L", 0.5),
    "lesson_09_improved_ddpm": ("--ema-decay", 0.4, "--lambda-vlb", 0.01),
}
NUMBERS = ("--decay", "cosine", "--warmup", 4, "--clip", 1e-3, "--learning-rate", 2e-3, "--seed", 3)
CLIPPED = dict.fromkeys(DIFFUSION, 1)  # numbers for which --clip is the length of a gradient; of the others, per pixel


class Written:
    """What a run did."""

    def __init__(self):
        self.losses, self.rates, self.gradients, self.draws, self.emas, self.scales, self.where = ([] for _ in range(7))
        self.start = self.zero_loss = None  # a copy of the network before the first step; what the run compares with


def spy(lesson, folder, *flags):
    """A run of STEPS steps with previews after 5 and 10, and what was written down."""
    module, seen = script(lesson.name), Written()
    loss_name, loss_function = loss_of(lesson)

    def loss(network, x, *how):
        value = loss_function(network, x, *how)
        table, i, z, *_ = how if len(how) > 2 else (None, *how)  # lesson 7 has no table, and i is a noise scale
        autocast = torch.is_autocast_enabled("cpu")
        seen.losses.append({"x": x, "table": table, "i": i, "z": z, "value": value.detach(), "autocast": autocast})
        return value

    class Optimizer(module.Optimizer):
        def __init__(self, network, name):
            super().__init__(network, name)
            self.network, seen.start, seen.optimizer = network, copy.deepcopy(network), name

        def step(self, rate):
            seen.rates.append(rate)
            seen.gradients.append([p.grad.clone() for p in self.network.parameters()])
            super().step(rate)

    def draw(network, config, shape, generator, sampler, calls):
        seen.draws.append((network, config, shape, generator, sampler, calls))
        return iter([torch.full(shape, (k + len(seen.draws)) / 10) for k in range(3)])

    def draw_levels(*arguments):
        i = module_draw(*arguments)
        seen.scales.append((arguments, i))
        return i

    def update_ema(ema, network, step, decay):
        seen.emas.append((step, decay, len(seen.rates)))
        module_ema(ema, network, step, decay)

    draw_name = "draw_timesteps" if lesson.name in DIFFUSION else "draw_noise_scales"
    module_draw, module_ema = getattr(module, draw_name, None), getattr(module, "update_ema", None)
    pieces = {loss_name: loss, "Optimizer": Optimizer, "draw": draw}
    pieces |= {draw_name: draw_levels} if module_draw else {}  # lesson 9 has a class for it
    pieces |= {"update_ema": update_ema} if module_ema else {}
    record = common.run.Run.record

    def recorded(self, loss, where, weight=None):
        seen.where.append((loss, where))
        seen.zero_loss = self.zero_loss
        record(self, loss, where, weight)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common.run.Run, "record", recorded)
        flags = ("--steps", STEPS, "--preview-every", 5, *NEW_LADDER[lesson.name], *flags, "--output", folder)
        result = quick(lesson.name, *flags, samples=64, **pieces)
    assert result.status == 0, result.stderr
    assert len(seen.losses) == len(seen.rates) == len(seen.where) == STEPS
    seen.config = module.Config(**json.loads((folder / "config.json").read_text()))
    return seen


@pytest.fixture(scope="module")
def seen(lesson, tmp_path_factory):
    """A run with numbers that are no defaults."""
    folder = tmp_path_factory.mktemp(lesson.name)
    seen = spy(lesson, folder, *NUMBERS, *MORE[lesson.name])
    seen.folder = folder
    return seen


def all_steps(seen, name):
    return torch.cat([loss[name] for loss in seen.losses])


def test_images_are_between_0_and_1_in_lessons_5_and_9_from_minus_1_on_and_in_lesson_7_dequantised(lesson, seen):
    x = all_steps(seen, "x")
    if lesson.name in DIFFUSION:
        assert x.min() == -1
        x = (x + 1) / 2
    if lesson.name == "lesson_07_score_sde":  # anywhere in the interval of its gray level, and new each time
        part = 256 * x - (256 * x).floor()
        assert float(part.mean()) == pytest.approx(0.5, abs=0.01)
        assert float(part.std()) == pytest.approx(12**-0.5, abs=0.01)
        assert not torch.equal(part[:B], part[B : 2 * B])
        x = (256 * x).floor() / 255
    assert x.shape == (STEPS * B, 1, 28, 28) and x.dtype == torch.float32
    assert x.min() >= 0 and 0.95 < x.max() <= 1 and 0.05 < x.mean() < 0.25
    digits = {image.numpy().tobytes() for image in some_images("mnist")}
    assert all((image * 255).round().byte().numpy().tobytes() in digits for image in x)
    assert len({image.numpy().tobytes() for image in x}) > STEPS * B / 2  # not the same again and again


def test_noise_is_standard_normal_and_new_in_each_step(seen):
    z = all_steps(seen, "z")
    assert z.shape == (STEPS * B, 1, 28, 28)
    assert float(z.mean()) == pytest.approx(0, abs=0.01) and float(z.std()) == pytest.approx(1, abs=0.01)
    assert not torch.equal(z[:B], z[B : 2 * B])


@pytest.mark.lessons("lesson_03_ncsn", "lesson_04_ncsnv2")
def test_noise_scales_are_those_of_the_flags_and_the_data(lesson, seen):
    config = seen.config
    if lesson.name == "lesson_03_ncsn":
        expected = lesson.noise_scales.geometric_noise_scales(2, 0.5, 7)
    else:
        images = some_images("mnist").flatten(1).double() / 255
        sigma_1 = float(torch.cdist(images, images).max())
        gamma = lesson.noise_scales.noise_scale_ratio(784, 0.2)
        L = math.ceil(1 + math.log(sigma_1 / 0.5) / math.log(gamma))
        expected = torch.logspace(math.log10(sigma_1), math.log10(0.5), L)
    for loss in seen.losses:
        torch.testing.assert_close(loss["table"], expected, rtol=1e-5, atol=0)
    assert seen.scales[0][0][0] == B and seen.scales[0][0][2] == config.focus == 0.4
    for (arguments, drawn), loss in zip(seen.scales, seen.losses, strict=True):
        assert torch.equal(arguments[1], loss["table"]) and torch.equal(drawn, loss["i"])
    i = all_steps(seen, "i")
    assert i.min() == 0 and i.max() == len(expected) - 1


@pytest.mark.lessons("lesson_07_score_sde")
def test_noise_scales_of_lesson_7_are_those_of_the_flags_and_the_data(seen):
    images = some_images("mnist").flatten(1).double() / 255
    sigma_max = float(torch.cdist(images, images).max())
    assert float(seen.start.sigma_max) == pytest.approx(sigma_max, rel=1e-6)
    for ((batch_size, low, high, focus, _), drawn), loss in zip(seen.scales, seen.losses, strict=True):
        assert (batch_size, low, focus) == (B, 0.02, 0.4) and high == pytest.approx(sigma_max, rel=1e-6)
        assert loss["table"] is None and torch.equal(drawn, loss["i"])
    sigma = all_steps(seen, "i")
    assert 0.02 <= sigma.min() < 0.04 and sigma_max / 2 < sigma.max() <= sigma_max * 1.0001
    assert len(sigma.unique()) == STEPS * B  # no ladder


@pytest.mark.lessons("lesson_05_ddpm")
def test_timesteps_and_their_schedule_are_those_of_the_flags(seen):
    """T = 60 steps, of which each batch has one in each 16th part."""
    expected, abar = [], 1.0
    for k in range(60):
        abar *= 1 - (0.002 + (0.3 - 0.002) * k / 59)
        expected.append(abar)
    for ((batch_size, T, _), drawn), loss in zip(seen.scales, seen.losses, strict=True):
        assert (batch_size, T) == (B, 60) and torch.equal(drawn, loss["i"])
        assert loss["table"].dtype == torch.float64 and loss["table"].tolist() == pytest.approx(expected, rel=1e-9)
    t = all_steps(seen, "i").view(STEPS, B)
    assert ((t - torch.arange(B) * 60 / B).sub(60 / B / 2).abs() <= 60 / B / 2 + 1).all()
    assert len(set(t[:, 0].tolist())) > 1  # not the same in each step


@pytest.mark.lessons("lesson_07_score_sde")
def test_pictures_that_are_nearer_than_the_smallest_scale_of_the_samplers_are_refused(lesson, tmp_path):
    near = lambda images: 0.6 * 255
    result = quick(lesson.name, "--sigma-L", 0.7, "--output", tmp_path, largest_pairwise_distance=near)
    assert result.status == 1 and "VE needs 0 < sigma_min < sigma_max, not 0.7 and 0.6" in result.stderr


@pytest.mark.lessons("lesson_04_ncsnv2")
def test_technique_2_counts_all_channels(tmp_path):
    module, dimensions = script("lesson_04_ncsnv2"), []
    ratio = module.noise_scale_ratio
    flags = ("--dataset", "color_mnist", "--output", tmp_path)
    count = lambda D, overlap: dimensions.append(D) or ratio(D, overlap)
    result = quick("lesson_04_ncsnv2", *flags, noise_scale_ratio=count)
    assert dimensions == [3 * 28 * 28]
    assert result.stderr.count("looking for the largest distance between two of 1000 pictures\n") == 1


def first_gradient(lesson, seen):
    """The gradient of the mean loss in the first step, written out, and its norm."""
    first = seen.losses[0]
    x, z, i = first["x"], first["z"], first["i"]
    level = (i if first["table"] is None else first["table"][i])[:, None, None, None]
    if lesson.name == "lesson_05_ddpm":
        noise = seen.start((level.sqrt() * x + (1 - level).sqrt() * z).float(), i)
        loss = (noise - z).square().mean((1, 2, 3))
    elif lesson.name == "lesson_09_improved_ddpm":
        loss = lesson.loss.hybrid_loss(seen.start, x, first["table"], i, z, seen.config.lambda_vlb)
    else:
        loss = 0.5 * (level * seen.start(x + level * z, i) + z).square().sum((1, 2, 3))
    gradient = torch.autograd.grad(loss.mean(), list(seen.start.parameters()))
    return gradient, torch.stack([g.norm() for g in gradient]).norm()


def test_the_gradient_is_clipped(lesson, seen):
    gradient, norm = first_gradient(lesson, seen)
    length = 1e-3 * CLIPPED.get(lesson.name, 784)
    assert norm > length  # or nothing would be clipped
    for mine, g in zip(seen.gradients[0], gradient, strict=True):
        torch.testing.assert_close(mine, g * length / norm, rtol=1e-3, atol=1e-5 * length)
    for step in seen.gradients:
        assert torch.stack([g.norm() for g in step]).norm() < length * 1.001


def test_the_gradient_is_that_of_the_mean_loss(lesson, tmp_path):
    seen = spy(lesson, tmp_path, "--clip", "inf", "--optimizer", "adam")
    assert seen.optimizer == "adam"
    gradient, norm = first_gradient(lesson, seen)
    for mine, g in zip(seen.gradients[0], gradient, strict=True):
        torch.testing.assert_close(mine, g, rtol=1e-3, atol=1e-5 * float(norm))


def test_the_learning_rate_is_that_of_the_step(seen):
    assert seen.rates == [learning_rate(step, seen.config) for step in range(1, STEPS + 1)]
    assert seen.rates[0] < seen.rates[3] == max(seen.rates) and seen.rates[-1] < 0.1 * max(seen.rates)
    assert seen.optimizer == "muon"


def test_losses_and_their_noise_levels_are_recorded(lesson, seen):
    table, chain = seen.losses[0]["table"], lesson.name in DIFFUSION
    ends = 0.02, float(getattr(seen.start, "sigma_max", 1))  # of lesson 7
    L = 100 if table is None else len(table)

    def place(i):  # among L levels, from the noisiest on
        if table is None:
            return L * (ends[1] / i).log() / math.log(ends[1] / ends[0])
        return L - i - 0.5 if chain else i + 0.5

    for (loss, where), used in zip(seen.where, seen.losses, strict=True):
        assert torch.equal(loss.detach(), used["value"])
        torch.testing.assert_close(where * L, place(used["i"]), rtol=1e-5, atol=1e-3)
    header, first, *_ = csv.reader(open(seen.folder / "metrics.csv"))
    losses, i = torch.cat([used["value"] for used in seen.losses[:10]]), all_steps(seen, "i")[: 10 * B]
    assert float(first[1]) == pytest.approx(float(losses.mean()), rel=1e-5)
    for k, name in enumerate(header[2:]):
        high, low = (float(word) for word in name.removeprefix("t " if chain else "sigma ").split(" to "))
        if table is None:  # two neighbours have a gap between them, in which a noise scale may be
            names = [ends[1] * (ends[0] / ends[1]) ** (n / 99) for n in (20 * k, 20 * k + 19)]
            assert (high, low) == pytest.approx(names, rel=1e-3)
            inside = (place(i) >= 20 * k) & (place(i) < 20 * k + 20)
        else:
            level = i + 1 if chain else table[i]
            inside = (level <= high * 1.001) & (level >= low * 0.999)
        assert float(first[2 + k]) == pytest.approx(float(losses[inside].mean()), rel=1e-5)


def test_a_network_that_returns_zero_has_the_loss_that_the_run_compares_with(lesson, seen):
    """The mean of z^2 for lessons 5 and 9, half of the sum of z^2 over the pixels for the others, where E[z^2] = 1."""
    assert seen.zero_loss == (1 if lesson.name in DIFFUSION else 28 * 28 / 2)


def test_averaged_weights_are_updated_after_each_step_and_drawn_from(lesson, seen):
    networks = [network.network for network, *_ in seen.draws]
    checkpoint = read_checkpoint(seen.folder)
    if lesson.name != "lesson_03_ncsn":
        assert seen.emas == [(step, 0.4, step) for step in range(1, STEPS + 1)]  # after so many of the optimiser
        weights = checkpoint["ema"]
        assert not torch.equal(weights["last.weight"], checkpoint["network"]["last.weight"])
    else:
        weights = checkpoint["network"]
    for network in networks:
        assert torch.equal(network.state_dict()["last.weight"], weights["last.weight"])


def test_pictures_are_drawn_as_the_lesson_says(lesson, seen):
    """Two previews and the last pictures: which sampler, how many calls, whose noise."""
    L = len(getattr(seen.start, "sigmas", ()))
    if lesson.name == "lesson_03_ncsn":
        how = [("langevin", 3 * L)] * 3
    elif lesson.name in DIFFUSION:
        how = [("ddim", 50)] * 2 + [("ancestral", 60)]
    elif lesson.name == "lesson_07_score_sde":
        how = [("consistent", 6 + 1)] * 2 + [("predictor_corrector", 2 * 6 + 1)]
    else:
        how = [("consistent", L + 1)] * 2 + [("langevin", 2 * L + 1)]
    assert [tuple(draw[4:]) for draw in seen.draws] == how
    for network, config, shape, generator, *_ in seen.draws:
        assert network.precision == "float32" and config == seen.config and shape == (64, 1, 28, 28)
        assert torch.equal(generator.like(torch.empty(shape)), SeededNoise(range(3, 67)).like(torch.empty(shape)))


def test_the_last_frames_become_the_pictures(lesson, seen):
    def level(name):
        with Image.open(seen.folder / name) as picture:
            return round(int(np.asarray(picture)[10, 10]) / 255, 1)

    assert level("samples_step_000005.png") == 0.3 and level("samples_step_000010.png") == 0.4
    assert level("samples.png") == 0.5
    if lesson.name in DENOISED:
        assert level("samples_before_denoising.png") == 0.4
    with Image.open(seen.folder / "trajectory.gif") as gif:
        assert gif.n_frames == 3
        shades = []
        for k in range(3):
            gif.seek(k)
            shades.append(round(gif.convert("L").getpixel((10, 10)) / 255, 1))
        assert shades == [0.3, 0.4, 0.5]  # the sample comes last


def test_the_network_runs_in_the_precision_of_the_flag(lesson, seen, tmp_path):
    """In bfloat16 it learns nearly the same, and its weights stay float32."""
    in_bfloat16 = spy(lesson, tmp_path, *NUMBERS, *MORE[lesson.name], "--precision", "bfloat16")
    for run, precision in ((seen, "float32"), (in_bfloat16, "bfloat16")):
        assert {loss["autocast"] for loss in run.losses} == {precision == "bfloat16"}
        assert {network.precision for network, *_ in run.draws} == {run.config.precision} == {precision}
    weights = read_checkpoint(tmp_path)["network"].values()
    assert all(weight.dtype == torch.float32 and weight.isfinite().all() for weight in weights)
    a, b = (float(all_steps(run, "value").mean()) for run in (seen, in_bfloat16))
    assert a == pytest.approx(b, rel=0.02) and a != b


@pytest.mark.lessons("lesson_05_ddpm")
def test_dropout_is_in_the_loss_and_not_in_the_pictures(lesson, tmp_path):
    """Twice the same loss, and twice the same samples: only the loss differs, also after pictures have been drawn."""
    module, losses, pictures = script(lesson.name), [], []
    loss_function, draw_function = module.noise_prediction_loss, module.draw

    def loss(*arguments):
        a, b = (loss_function(*arguments) for _ in range(2))
        losses.append(torch.equal(a, b))
        return a

    def draw(network, config, shape, generator, sampler, calls):
        a, b = (list(draw_function(network, config, shape, SeededNoise(range(16)), sampler, calls)) for _ in range(2))
        pictures.append(torch.equal(a[-1], b[-1]))
        return iter(a)

    flags = ("--steps", 6, "--preview-every", 2, "--dropout", 0.3, "--no-clip-x-0", "--output", tmp_path)
    assert quick(lesson.name, *flags, noise_prediction_loss=loss, draw=draw).status == 0
    assert losses[2:] == [False] * 4 and pictures == [True] * 4  # a new network returns zero, with any dropout


@pytest.mark.lessons("lesson_07_score_sde")
def test_the_pictures_of_a_training_follow_the_samplers_of_its_flags(lesson, tmp_path):
    """The last ones: the chosen SDE, predictor and corrector, and a network that is not told the noise scale."""
    module, seen = script(lesson.name, "sample"), []

    def walk(score, x, sigmas, *how):
        seen.append((score.network, sigmas, how))
        return iter([x] * 3)

    flags = ("--sde", "vp", "--predictor", "ancestral", "--no-corrector", "--r", 0.3, "--no-conditional")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "predictor_corrector", walk)
        result = quick(lesson.name, *flags, "--output", tmp_path, draw=module.draw)
    assert result.status == 0, result.stderr
    ((network, sigmas, (predictor, corrector_steps, r, _, factors)),) = seen
    assert (predictor, corrector_steps, r) == ("ancestral", 0, 0.3) and len(sigmas) == 4
    torch.testing.assert_close(sigmas, (factors**-2 - 1).sqrt(), rtol=1e-4, atol=0)  # so that variances add up to 1
    assert not any("embed" in name for name in network.state_dict())
    assert network.state_dict()["first.weight"].shape[1] == 2**2  # no magnified copy of the pixels


@pytest.mark.lessons("lesson_04_ncsnv2", "lesson_05_ddpm", "lesson_07_score_sde", "lesson_09_improved_ddpm")
def test_a_short_memory_and_a_long_one_learn_the_same_and_draw_different_pictures(lesson, tmp_path):
    folders = [tmp_path / decay for decay in ("0", "0.995")]
    for folder in folders:
        assert quick(lesson.name, "--ema-decay", folder.name, "--output", folder).status == 0
    a, b = (read_checkpoint(folder) for folder in folders)
    assert all(torch.equal(a["network"][name], b["network"][name]) for name in a["network"])
    assert all(torch.equal(a["network"][name], a["ema"][name]) for name in a["network"])
    assert (folders[0] / "samples.png").read_bytes() != (folders[1] / "samples.png").read_bytes()


@pytest.mark.lessons("lesson_03_ncsn", "lesson_04_ncsnv2")
def test_paper_is_the_papers(lesson):
    """NCSN: Sec. 5 and App. B.2. NCSNv2: App. B.2, with lesson 3's width, since it has no run on MNIST."""
    module = script(lesson.name)
    steps, rate = {"lesson_03_ncsn": (200_000, 1e-3), "lesson_04_ncsnv2": (300_000, 1e-4)}[lesson.name]
    config = module.Config(**module.PRESETS["paper"])
    assert (config.steps, config.batch_size, config.learning_rate) == (steps, 128, rate)
    assert (config.optimizer, config.warmup, config.decay, config.clip) == ("adam", 0, "constant", float("inf"))
    assert (config.width, config.blocks, config.patch, config.activation) == (64, 2, 1, "elu")
    assert config.skip is False and config.focus == 0
    assert module.PRESETS["paper on cifar10"] == {"width": 128}
    if lesson.name == "lesson_03_ncsn":
        assert (config.sigma_1, config.sigma_L, config.L, config.T, config.epsilon) == (1, 0.01, 10, 100, 2e-5)
    else:
        assert (config.sigma_L, config.overlap, config.T, config.ema_decay) == (0.01, 0.5, 5, 0.999)


@pytest.mark.lessons("lesson_07_score_sde")
def test_paper_is_the_papers_in_lesson_7(lesson):
    """App. C and H, and the authors' code, whose gradients have length 1 at most; lesson 4's network."""
    module = script(lesson.name)
    config = module.Config(**module.PRESETS["paper"])
    assert (config.steps, config.batch_size, config.learning_rate, config.ema_decay) == (1_300_000, 128, 2e-4, 0.999)
    assert (config.optimizer, config.warmup, config.decay, config.clip) == ("adam", 5000, "constant", 1 / 784)
    assert (config.width, config.blocks, config.patch, config.activation) == (64, 2, 1, "elu")
    assert config.skip is False and config.focus == 0 and config.conditional is True
    assert (config.sigma_L, config.N, config.r) == (0.01, 1000, 0.16)
    assert (config.sde, config.predictor, config.corrector) == ("ve", "reverse_diffusion", True)
    cifar10 = module.PRESETS["paper on cifar10"]
    assert cifar10["width"] == 128 and cifar10["clip"] == 1 / 3 / 32**2
    assert module.PRESETS["paper on color_mnist"] == {"clip": 1 / 3 / 28**2}


@pytest.mark.lessons("lesson_05_ddpm")
def test_paper_is_the_papers_in_lesson_5(lesson):
    """Sec. 4 and App. B; variance "large" and the clip of the gradient are the authors' code's."""
    module = script(lesson.name)
    config = module.Config(**module.PRESETS["paper"])
    assert (config.steps, config.batch_size, config.learning_rate, config.ema_decay) == (800_000, 128, 2e-4, 0.9999)
    assert (config.optimizer, config.warmup, config.decay, config.clip) == ("adam", 5000, "constant", 1.0)
    assert (config.width, config.levels, config.blocks, config.patch, config.dropout) == (128, 3, 2, 1, 0.0)
    assert (config.T, config.beta_1, config.beta_T) == (1000, 1e-4, 0.02)
    assert config.variance == "large" and config.clip_x_0 is True
    assert module.PRESETS["paper on cifar10"] == {"levels": 4, "dropout": 0.1}


@pytest.mark.lessons("lesson_09_improved_ddpm")
def test_paper_is_the_papers_in_lesson_9(lesson):
    """Sec. 3 and App. A; three levels, of which the last is 7 x 7, since 28 pixels are not halved as often as 32."""
    module = script(lesson.name)
    config = module.Config(**module.PRESETS["paper"])
    assert (config.steps, config.batch_size, config.learning_rate, config.ema_decay) == (500_000, 128, 1e-4, 0.9999)
    assert (config.optimizer, config.warmup, config.decay, config.clip) == ("adam", 0, "constant", float("inf"))
    assert (config.width, config.levels, config.blocks, config.patch, config.dropout) == (128, 3, 3, 1, 0.0)
    assert (config.T, config.schedule, config.objective, config.lambda_vlb) == (4000, "cosine", "hybrid", 0.001)
    assert (config.timesteps, config.scale_shift, config.variance) == ("uniform", True, "learned")
    assert module.PRESETS["paper on cifar10"] == {"levels": 4, "dropout": 0.3}
