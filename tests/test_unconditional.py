"""The recursion of a network that is not conditioned on the noise level, against the samplers run with such a network.

The scripted network returns the direction of x with the size that noise of sigma_i should have: what Technique 3 leaves
of the exact score of data at one point, 0.
"""

import math

import pytest
import torch

from lesson_04_ncsnv2.noise_scales import geometric_noise_scales
from lesson_04_ncsnv2.sampler import (
    ancestral_eta,
    annealed_langevin_dynamics,
    consistent_annealed_sampling,
    denoise,
    langevin_step_size,
)
from lesson_04_ncsnv2.unconditional import noise_after_consistent, noise_after_langevin, step_size_for_all_scales

pytestmark = pytest.mark.lessons("lesson_04_ncsnv2")
SIGMAS = geometric_noise_scales(16.8758, 0.01, 96)  # what Techniques 1 and 2 compute for MNIST
SIGMA_L = 0.01


def column(sigmas, i):
    return sigmas[i][:, None, None, None]


def unit_size(x, i):
    return -x / x.square().mean().sqrt() / column(SIGMAS, i)


def exact(x, i):
    return -x / column(SIGMAS, i) ** 2


def noise(a=1.0):
    """One image of 90 000 pixels: its standard deviation is right to a quarter of a percent."""
    return a * SIGMAS[0] * torch.randn(1, 1, 300, 300)


@pytest.mark.parametrize("T", [1, 2, 3])
@pytest.mark.parametrize("score", [unit_size, exact])
@pytest.mark.parametrize("rule", [langevin_step_size, step_size_for_all_scales])
def test_the_recursion_is_what_algorithm_1_does(score, T, rule):
    torch.manual_seed(0)
    epsilon = rule(SIGMAS, T)
    *_, x = annealed_langevin_dynamics(score, noise(), SIGMAS, T, epsilon)
    expected = float(noise_after_langevin(SIGMAS, T, epsilon, conditional=score is exact))
    assert float(x.std()) / SIGMA_L == pytest.approx(expected, rel=0.02)
    if score is unit_size:  # the last step takes off one sigma_L, whatever there is
        assert float(denoise(score, x, SIGMAS).std()) / SIGMA_L == pytest.approx(abs(expected - 1), rel=0.03)


def test_with_technique_4_few_steps_fail_only_without_conditioning():
    """Derived once more, with scalars: the recursion in a plain loop."""
    gamma = (SIGMAS[0] / SIGMAS[-1]).item() ** (1 / 95)

    def end(T, r, conditional):
        a = 1.0
        for n in range(96):
            a *= gamma if n else 1
            for _ in range(T):
                a = math.sqrt(((1 - r) * a if conditional else a - r) ** 2 + 2 * r)
        return a

    for T, fails in ((1, True), (2, True), (3, False)):
        epsilon = langevin_step_size(SIGMAS, T)
        for conditional in (False, True):
            found = float(noise_after_langevin(SIGMAS, T, epsilon, conditional))
            assert found == pytest.approx(end(T, epsilon / SIGMA_L**2, conditional), rel=1e-3)
            assert (found > 10) == (fails and not conditional)


@pytest.mark.parametrize("T", [1, 2, 3, 10])
def test_the_step_for_all_levels_is_the_best_and_longer_than_technique_4(T):
    epsilon = step_size_for_all_scales(SIGMAS, T)
    best = float(noise_after_langevin(SIGMAS, T, epsilon))
    others = noise_after_langevin(SIGMAS, T, epsilon * torch.tensor([0.5, 0.9, 1.1, 1.5]))
    assert (others > best).all() and best < 1.5
    assert epsilon > langevin_step_size(SIGMAS, T)


@pytest.mark.parametrize("factor", [0.7, 1.5])
@pytest.mark.parametrize("score", [unit_size, exact])
def test_consistent_sampling_lets_an_excess_grow_below_ddpms_eta_without_conditioning(score, factor):
    torch.manual_seed(0)
    eta, a = factor * ancestral_eta(SIGMAS), 1.2
    frames = list(consistent_annealed_sampling(score, noise(a), SIGMAS, 1, eta * SIGMA_L**2))
    found = float(frames[-2].std()) / SIGMA_L  # the last step adds noise to stay at sigma_L
    assert found == pytest.approx(noise_after_consistent(SIGMAS, eta, a, conditional=score is exact), rel=0.02)
    assert (found > a) == (score is unit_size and factor < 1)


def test_the_limit_is_ddpms_eta():
    small = 1e-6
    eta = ancestral_eta(SIGMAS)
    assert noise_after_consistent(SIGMAS, eta + 0.01, 1 + small) - 1 < small
    assert noise_after_consistent(SIGMAS, eta - 0.01, 1 + small) - 1 > small
    assert noise_after_consistent(SIGMAS, eta, 1 + small) - 1 == pytest.approx(small, rel=0.01)


def test_what_it_cannot_compute_is_refused():
    for T, sigmas in ((0, SIGMAS), (1, SIGMAS[:1])):
        with pytest.raises(ValueError, match="needs T >= 1 and L >= 2"):
            step_size_for_all_scales(sigmas, T)
