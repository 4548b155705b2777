"""toy_2d.py and first_network.py: the score of the mixture, the weights that samplers find, and whole runs."""

import subprocess
import sys

import pytest
import torch

from tests.running import ENVIRONMENT, ROOT, script

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


def test_the_learned_score_is_right_near_the_data(toy):
    network, x = toy.learn_score(0.1, 1000), toy.draw_data(500)
    with torch.no_grad():
        error = (network(x) - toy.true_score(x)).flatten(1).norm(dim=1)
    assert error.mean() < 0.6  # a score of zero is off by 1.25


def run_script(name, *flags):
    command = [sys.executable, name, *map(str, flags)]
    return subprocess.run(command, cwd=ROOT / LESSON, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)


def test_toy_2d_finds_the_weights_that_the_readme_quotes(tmp_path):
    ran = run_script("toy_2d.py", "--steps", 20, "--num", 3000, "--output", tmp_path)
    assert ran.returncode == 0, ran.stderr
    plain, annealed = (float(line.split(": ")[1].split("%")[0]) for line in ran.stdout.splitlines()[1:])
    assert 45 < plain < 52 and 18 < annealed < 25
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {f"toy_{name}.png" for name in ("true_score", "learned_score", "langevin", "annealed")}


def test_first_network_trains_and_draws(tmp_path):
    ran = run_script("first_network.py", "--steps", 3, "--T", 1, "--output", tmp_path / "first.png")
    assert ran.returncode == 0, ran.stderr
    assert (tmp_path / "first.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", ["toy_2d.py", "first_network.py"])
def test_a_number_of_steps_that_cannot_be_used(name, tmp_path):
    ran = run_script(name, "--steps", 0, "--output", tmp_path / "x")
    assert ran.returncode == 1 and ran.stderr == "error: --steps must be greater than zero, not 0\n"
    assert not (tmp_path / "x").exists()
