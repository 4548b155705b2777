"""Consistent annealed sampling: the noise in x is exactly what the next step expects, which Algorithm 1's is not."""

import pytest
import torch

from lesson_04_ncsnv2.noise_scales import geometric_noise_scales
from lesson_04_ncsnv2.sampler import (
    ancestral_eta,
    annealed_langevin_dynamics,
    consistent_annealed_sampling,
    langevin_step_size,
    smallest_eta,
)

pytestmark = pytest.mark.lessons("lesson_04_ncsnv2")
SIGMAS = geometric_noise_scales(10, 0.01, 60)
GAMMA = float(SIGMAS[0] / SIGMAS[1])


def one_point(x, i):
    """The exact score when all data is one image, 0."""
    return -x / SIGMAS[i][:, None, None, None] ** 2


def deviations(sampler, T, epsilon):
    x = SIGMAS[0] * torch.randn(500, 1, 16, 16)
    return torch.stack([frame.std() for frame in sampler(one_point, x, SIGMAS, T, epsilon)])


@pytest.mark.parametrize("T", [1, 3])
@pytest.mark.parametrize("eta", [1 - 1 / GAMMA, 1 - 1 / GAMMA**2, 0.6, 1.0, 1 + 1 / GAMMA])
def test_noise_is_exactly_that_of_the_next_scale(T, eta):
    noise = deviations(consistent_annealed_sampling, T, eta * float(SIGMAS[-1]) ** 2)
    torch.testing.assert_close(noise[:-1], SIGMAS[1:], rtol=0.02, atol=0)
    assert noise[-1] == pytest.approx(float(SIGMAS[-1]), rel=0.02)


def test_algorithm_1_leaves_too_much_noise_at_every_scale():
    noise = deviations(annealed_langevin_dynamics, 1, langevin_step_size(SIGMAS, 1))
    assert (noise[10:] > 1.03 * SIGMAS[10:]).all()  # it starts with the right amount


def test_calls_frames_and_seed():
    calls = []

    def score(x, i):
        calls.append(i.tolist())
        return one_point(x, i)

    def frames(seed):
        generator = torch.Generator().manual_seed(seed)
        x = torch.ones(2, 3, 4, 4)
        return list(consistent_annealed_sampling(score, x, SIGMAS, 2, 0.3 * float(SIGMAS[-1]) ** 2, generator))

    first = frames(1)
    assert len(first) == len(SIGMAS) and first[0].shape == (2, 3, 4, 4)
    assert calls == [[n, n] for n in range(len(SIGMAS)) for _ in range(2)]
    assert torch.equal(first[-1], frames(1)[-1]) and not torch.equal(first[-1], frames(2)[-1])


@pytest.mark.parametrize("eta", [0.9 * (1 - 1 / GAMMA), 1 + 1.1 / GAMMA])
def test_steps_that_would_have_to_take_noise_back_are_refused(eta):
    with pytest.raises(ValueError, match="must lie between"):
        next(consistent_annealed_sampling(one_point, torch.ones(1, 1, 2, 2), SIGMAS, 1, eta * float(SIGMAS[-1]) ** 2))


def test_two_values_of_eta_are_the_steps_of_ddpm_and_ddim():
    """DDPM's posterior and DDIM's step are written here for x = x_0 + sigma z, from the clean image and the noise."""
    torch.manual_seed(0)
    sigmas = 10 * 0.9 ** torch.arange(5, dtype=torch.float64)
    x, x_0 = torch.randn(2, 1, 1, 4, 4, dtype=torch.float64)
    x = sigmas[0] * x
    score = lambda x, i: (x_0 - x) / sigmas[i][:, None, None, None] ** 2  # a network whose guess is always x_0
    a, b = sigmas[0] ** 2, sigmas[1] ** 2

    def one_step(eta):
        generator = torch.Generator().manual_seed(1)
        return next(consistent_annealed_sampling(score, x, sigmas, 1, eta * float(sigmas[-1]) ** 2, generator))

    almost = dict(rtol=1e-6, atol=1e-6)  # DDIM draws no noise but for the root of a rounding error
    fresh = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))  # the noise that one_step draws
    posterior_mean = (b * x + (a - b) * x_0) / a  # of x at sigma_2 given x at sigma_1 and x_0: two Gaussians multiplied
    posterior_std = (b * (a - b) / a).sqrt()
    torch.testing.assert_close(one_step(ancestral_eta(sigmas)), posterior_mean + posterior_std * fresh, **almost)
    noise = (x - x_0) / sigmas[0]
    torch.testing.assert_close(one_step(smallest_eta(sigmas)), x_0 + sigmas[1] * noise, **almost)


def test_the_largest_ratio_decides():
    sigmas = torch.tensor([8.0, 4.0, 1.0, 0.5])
    assert (smallest_eta(sigmas), ancestral_eta(sigmas)) == (1 - 1 / 4, 1 - 1 / 16)
