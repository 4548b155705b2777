"""toy_2d.py, first_network.py and the pictures of lesson 3 in docs/figures.py: scores, weights of modes, whole runs."""

import math
import sys
from contextlib import nullcontext
from unittest.mock import MagicMock

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from tests import warm
from tests.running import ENVIRONMENT, ROOT, script

sys.path.append(str(ROOT / "docs"))

import figures

pytestmark = pytest.mark.lessons("lesson_03_ncsn")
LESSON = "lesson_03_ncsn"


@pytest.fixture(scope="module")
def toy():
    return script(LESSON, "toy_2d")


@pytest.mark.parametrize("variance", [1.0, 5.0])
def test_the_score_is_the_gradient_of_the_log_density(toy, variance):
    x = (8 * torch.rand(50, 2) - 4).requires_grad_()
    parts = [
        torch.distributions.MultivariateNormal(mean, variance * torch.eye(2)).log_prob(x) + weight.log()
        for weight, mean in zip(toy.WEIGHTS, toy.MEANS, strict=True)
    ]
    torch.stack(parts).logsumexp(0).sum().backward()
    torch.testing.assert_close(toy.true_score(x.detach()[:, :, None, None], variance).flatten(1), x.grad)


def test_the_data_has_the_weights_of_the_mixture(toy):
    x = toy.draw_data(20_000).flatten(1)
    small = x.sum(1) < 0
    assert float(small.float().mean()) == pytest.approx(0.2, abs=0.01)
    torch.testing.assert_close(x[small].mean(0), toy.MEANS[0], atol=0.1, rtol=0)
    torch.testing.assert_close(x[~small].std(0), torch.ones(2), atol=0.05, rtol=0)


def test_the_learned_score_is_right_near_the_data(toy, tmp_path):
    network = toy.learn_score(0.3, 1000)

    def true_score(x):
        return toy.true_score(x, 1 + 0.3**2)

    near, elsewhere = toy.show_error(network, true_score, tmp_path / "error.png")
    assert 0 < near < 0.1 and 0.1 < elsewhere < 1
    assert toy.show_error(true_score, true_score, tmp_path / "error.png") == (0, 0)
    zero = toy.show_error(torch.zeros_like, true_score, tmp_path / "error.png")
    assert zero == pytest.approx((1, 1))


@pytest.mark.parametrize("sigma", [0.5, 3.0])
def test_the_mean_arrow_is_sigma_squared_times_the_score_in_closed_form(toy, sigma):
    points, x = toy.draw_data(200_000).flatten(1), torch.tensor([4.0, 3.5])
    p = figures.posterior(x, points, sigma)
    assert float(p.sum()) == pytest.approx(1, abs=1e-4)
    mean_arrow = p @ (points - x)
    score = toy.true_score(x.view(1, 2, 1, 1), 1 + sigma**2).flatten()
    torch.testing.assert_close(mean_arrow, sigma**2 * score, atol=0.05, rtol=0)


def test_the_mean_arrow_of_a_few_points_is_sigma_squared_times_the_gradient_of_the_log_density():
    points, x = torch.randn(9, 2), torch.randn(2).requires_grad_()
    (-(points - x).square().sum(1) / (2 * 0.7**2)).logsumexp(0).backward()
    mean_arrow = figures.posterior(x.detach(), points, 0.7) @ (points - x.detach())
    torch.testing.assert_close(mean_arrow, 0.7**2 * x.grad)


def test_contours_come_from_the_density(toy):
    x = toy.grid(161, 12.0)  # the step is 0.15
    mass = toy.log_parts(x, 1.0).logsumexp(1).exp().sum() * 0.15**2
    assert float(mass) == pytest.approx(2 * torch.pi, rel=1e-3)  # its constant is left out


def test_chains_move_in_a_gif(toy, tmp_path):
    frames = [toy.draw_data(500) for _ in range(3)]
    toy.show_chains([("plain", "annealed")] * 3, frames, frames[::-1], tmp_path / "chains.gif")
    with Image.open(tmp_path / "chains.gif") as picture:
        assert picture.n_frames == 3 and picture.info["loop"] == 0  # for ever
        assert 700 < picture.width <= 730


def test_arrows_keep_their_direction_and_are_shorter_than_one(toy, tmp_path, monkeypatch):
    panel = MagicMock()
    monkeypatch.setattr(toy, "square", lambda *how: nullcontext(panel))
    toy.show_field(toy.true_score, "title", tmp_path / "x.png")
    x, y, u, v = panel.quiver.call_args.args
    s = toy.true_score(torch.stack([x, y], dim=1)[:, :, None, None]).flatten(1)
    torch.testing.assert_close(torch.stack([u, v], dim=1), s / (1 + s.norm(dim=1, keepdim=True)))
    assert s.norm(dim=1).max() > 3


def test_chains_of_the_toy_start_everywhere_and_follow_the_papers_noise_scales(toy, tmp_path, monkeypatch):
    """NCSN, App. B.1: uniform in [-8, 8]^2; 100 steps with epsilon 0.1 at each of ten scales from 20 to 1."""
    walks, keep = [], lambda score, x, *how: walks.append((score, x, *how)) or iter([x] * len(how[0]))
    monkeypatch.setattr(toy, "annealed_langevin_dynamics", keep)
    monkeypatch.setattr(toy, "square", lambda *how: nullcontext(MagicMock()))
    monkeypatch.setattr(toy, "show_chains", lambda *how: None)
    judged = []
    monkeypatch.setattr(toy, "show_error", lambda *how: judged.append(how) or (0, 0))
    monkeypatch.setattr(sys, "argv", ["toy_2d.py", "--steps", "1", "--num", "2000", "--output", str(tmp_path)])
    toy.main()
    scales = torch.ones(10), torch.logspace(math.log10(20), 0, 10)
    for (score, start, sigmas, steps, epsilon), expected in zip(walks, scales, strict=True):
        assert -8 <= start.min() < -7.9 and 7.9 < start.max() <= 8 and start.shape == (2000, 2, 1, 1)
        torch.testing.assert_close(sigmas, expected.repeat_interleave(len(sigmas) // 10))
        assert (len(sigmas) * steps, epsilon) == (10 * 100, 0.1)
        variance = 1 + 20**2 if score is walks[1][0] else 1.0  # of a part of the data, with noise of the first scale
        torch.testing.assert_close(score(start, torch.tensor([0])), toy.true_score(start, variance))
    torch.testing.assert_close(judged[0][1](start), toy.true_score(start, 1 + 0.3**2))


def run_script(name, *flags):
    return warm.run(name, *flags, cwd=ROOT / LESSON, env=ENVIRONMENT)


def test_toy_2d_finds_the_weights_that_the_readme_quotes(tmp_path):
    # 99 steps cannot be made in 5 parts, so that the GIF has 10 frames and not 50, which take long
    ran = run_script("toy_2d.py", "--steps", 20, "--num", 3000, "--T", 99, "--output", tmp_path)
    assert ran.status == 0, ran.stderr
    plain, annealed = (float(line.split(": ")[1].split("%")[0]) for line in ran.stdout.splitlines()[1:])
    assert 45 < plain < 52 and 18 < annealed < 25
    names = {path.stem for path in tmp_path.glob("*.png")}
    assert names == {f"toy_{name}" for name in ("true_score", "learned_score", "error", "langevin", "annealed")}
    with Image.open(tmp_path / "toy_langevin.gif") as picture:
        assert picture.n_frames == 10
    assert (tmp_path / "toy_langevin.gif").stat().st_size < 1_000_000


@pytest.mark.parametrize("name", ["lesson_03_denoising", "lesson_03_noise_scales", "lesson_04_line"])
def test_figures(name, tmp_path):
    figures.FIGURES[name](tmp_path / "figure.png")
    with Image.open(tmp_path / "figure.png") as picture:
        assert picture.width == 720
    assert (tmp_path / "figure.png").stat().st_size < 100_000


def test_the_share_in_the_small_mode_over_sigma_1(tmp_path, capsys):
    figures.FIGURES["lesson_04_sigma_1"](tmp_path / "figure.png", chains=2000, T=30)
    shares = [float(line.split(": ")[1].split("%")[0]) for line in capsys.readouterr().out.splitlines()[:-1]]
    assert len(shares) == 7 and 45 < shares[0] < 52 and shares[-1] < 35


def test_the_first_network_written_a_second_time():
    sigmas = torch.logspace(0, -2, 10)
    network = script(LESSON, "first_network").FirstScoreNetwork(sigmas, width=16, channels=4)
    p, x, i = dict(network.named_parameters()), torch.rand(3, 1, 28, 28), torch.tensor([0, 4, 9])
    conv = lambda h, name: F.conv2d(h, p[f"{name}.weight"], p[f"{name}.bias"], padding=1)
    linear = lambda h, k: h @ p[f"whole.{k}.weight"].T + p[f"whole.{k}.bias"]
    sigma = sigmas[i].view(3, 1, 1, 1)
    variance = 0.1 + sigma**2
    h, log_sigma = x / variance**0.5, sigma.log()
    whole = linear(F.silu(linear(F.silu(linear(torch.cat([h.flatten(1), log_sigma[:, 0, 0]], 1), 0)), 2)), 4)
    whole = whole.unflatten(1, (1, 28, 28))
    h = F.relu(conv(torch.cat([h, whole, log_sigma.expand(3, 1, 28, 28)], dim=1), "first"))
    h = h + F.relu(conv(h, "middle.0"))
    h = h + F.relu(conv(h, "middle.1"))
    expected = -x / variance + (whole + conv(h, "last")) * (0.1 / variance) ** 0.5 / sigma
    torch.testing.assert_close(network(x, i), expected, rtol=1e-4, atol=1e-4)


def test_first_network_trains_and_draws(tmp_path):
    ran = run_script("first_network.py", "--steps", 3, "--T", 1, "--output", tmp_path / "first.png")
    assert ran.status == 0, ran.stderr
    assert (tmp_path / "first.png").read_bytes().startswith(b"\x89PNG")


def test_first_network_is_trained_and_sampled_as_the_lesson_is(tmp_path, monkeypatch):
    """Pixels in [0, 1], ten noise scales from 1 to 0.01, and the paper's step size."""
    module, trained, sampled = script(LESSON, "first_network"), [], []
    loss_function = module.denoising_score_matching_loss

    def loss(network, x, sigmas, i, z):
        trained.append(x)
        return loss_function(network, x, sigmas, i, z)

    def langevin(network, x, *how):
        sampled.append((x, *how))
        return iter([x])

    monkeypatch.setattr(
        sys, "argv", ["first_network.py", "--steps", "3", "--T", "7", "--output", str(tmp_path / "x.png")]
    )
    monkeypatch.setattr(module, "denoising_score_matching_loss", loss)
    monkeypatch.setattr(module, "annealed_langevin_dynamics", langevin)
    module.main()
    for x in trained:
        assert x.shape == (64, 1, 28, 28) and x.min() == 0 and x.max() == 1
    assert len(trained) == 3 and not torch.equal(trained[0], trained[1])
    ((start, sigmas, T, epsilon),) = sampled
    assert start.shape == (64, 1, 28, 28) and 0 <= start.min() < 0.01 and 0.99 < start.max() <= 1
    torch.testing.assert_close(sigmas, torch.logspace(0, -2, 10), rtol=1e-5, atol=0)
    assert (T, epsilon) == (7, 2e-5)


def test_steps_of_the_first_network_are_of_one_gradient_each_and_of_a_rate_that_rises_and_falls(tmp_path, monkeypatch):
    module, seen, gradients = script(LESSON, "first_network"), [], []
    loss_function = module.denoising_score_matching_loss

    def loss(network, x, sigmas, i, z):
        value = loss_function(network, x, sigmas, i, z)
        gradients.append(torch.autograd.grad(value.mean(), list(network.parameters()), retain_graph=True))
        seen.extend(i.tolist())
        return value

    class Adam(torch.optim.Adam):
        rates = []

        def step(self, closure=None):
            for parameter, gradient in zip(self.param_groups[0]["params"], gradients[-1], strict=True):
                torch.testing.assert_close(parameter.grad, gradient)
            self.rates.append(self.param_groups[0]["lr"])
            return super().step(closure)

    monkeypatch.setattr(torch.optim, "Adam", Adam)
    monkeypatch.setattr(module, "denoising_score_matching_loss", loss)
    monkeypatch.setattr(module, "annealed_langevin_dynamics", lambda network, x, *how: iter([x]))
    monkeypatch.setattr(sys, "argv", ["first_network.py", "--steps", "4", "--output", str(tmp_path / "x.png")])
    module.main()
    assert Adam.rates == pytest.approx([0, 1e-3 * 1 / 50 * 3 / 4, 1e-3 * 2 / 50 * 2 / 4, 1e-3 * 3 / 50 * 1 / 4])
    assert set(seen) == set(range(10)) and len(seen) == 4 * 64


@pytest.mark.parametrize("name", ["toy_2d.py", "first_network.py"])
def test_an_output_that_cannot_be_written_is_said_before_the_work(name, tmp_path):
    (tmp_path / "file").write_text("in the way")
    ran = run_script(name, "--steps", 10**9, "--output", tmp_path / "file" / "x.png")
    assert ran.status == 1 and ran.stderr.startswith("error: cannot write ")


@pytest.mark.parametrize("name", ["toy_2d.py", "first_network.py"])
def test_a_number_of_steps_that_cannot_be_used(name, tmp_path):
    ran = run_script(name, "--steps", 0, "--output", tmp_path / "x")
    assert ran.status == 1 and ran.stderr == "error: --steps must be greater than zero, not 0\n"
    assert not (tmp_path / "x").exists()
