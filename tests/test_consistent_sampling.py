"""Consistent annealed sampling: the noise in x is exactly what the next step expects, which Algorithm 1's is not."""

import pytest
import torch

from lesson_04_ncsnv2.noise_scales import geometric_noise_scales
from lesson_04_ncsnv2.sampler import annealed_langevin_dynamics, consistent_annealed_sampling, langevin_step_size

SIGMAS = geometric_noise_scales(10, 0.01, 60)
GAMMA = float(SIGMAS[0] / SIGMAS[1])


def one_point(x, i):
    """The exact score when all data is one image, 0."""
    return -x / SIGMAS[i][:, None, None, None] ** 2


def deviations(sampler, T, epsilon):
    x = SIGMAS[0] * torch.randn(500, 1, 16, 16)
    return torch.stack([frame.std() for frame in sampler(one_point, x, SIGMAS, T, epsilon)])


@pytest.mark.parametrize("T", [1, 3])
@pytest.mark.parametrize("eta", [1 - 1 / GAMMA, 1 - 1 / GAMMA**2, 0.6, 1.0])
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


@pytest.mark.parametrize("eta", [0.9 * (1 - 1 / GAMMA), 1.1])
def test_steps_that_would_have_to_take_noise_back_are_refused(eta):
    with pytest.raises(ValueError, match="must lie between"):
        next(consistent_annealed_sampling(one_point, torch.ones(1, 1, 2, 2), SIGMAS, 1, eta * float(SIGMAS[-1]) ** 2))
