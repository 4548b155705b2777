"""toy_2d.py, first_network.py and the pictures of lesson 3 in docs/figures.py: scores, weights of modes, whole runs."""

import sys

import pytest
import torch
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
