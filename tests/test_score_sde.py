"""Lesson 7 without a trained network: everything it computes, on data whose answer is known in closed form.

Where all is linear, there is no need to measure a variance on many random numbers. Noise is made of signs in its place
(`Signs`): all draws are orthogonal and have exactly D for their squared norm, so that the mean square of the pixels is
the variance that a recursion says, to the last digit; also after a corrector, whose step depends on norms.
"""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import common.data
import lesson_07_score_sde.likelihood
import lesson_07_score_sde.sampler
from common.checkpoint import load_checkpoint
from common.errors import LessonError
from common.noise import SeededNoise
from common.ode import runge_kutta_4
from lesson_04_ncsnv2.sampler import ancestral_eta, consistent_annealed_sampling, smallest_eta
from lesson_04_ncsnv2.score_network import ScoreNetwork as ScoreNetworkOfLesson4
from lesson_05_ddpm.noise_schedule import alpha_bars, linear_betas
from lesson_05_ddpm.sampler import ancestral_sampling
from lesson_07_score_sde.likelihood import bits_per_dim, dequantise, log_likelihood, log_likelihood_terms, probe_like
from lesson_07_score_sde.loss import denoising_score_matching_loss
from lesson_07_score_sde.sampler import (
    PREDICTORS,
    consistent_sampling,
    correct,
    decode,
    denoise,
    encode,
    inpaint,
    predict,
    predictor_corrector,
    probability_flow,
)
from lesson_07_score_sde.score_network import E, InstanceNormPlusPlus, ScoreNetwork, log_sigma_embedding
from lesson_07_score_sde.sde import VE, VP, SubVP
from tests.running import ROOT, script

pytestmark = pytest.mark.lessons("lesson_07_score_sde")
SIGMA_MIN, SIGMA_MAX = 0.01, 17.0
SDES = {"ve": VE(SIGMA_MIN, SIGMA_MAX), "vp": VP(), "sub_vp": SubVP()}
LN2 = math.log(2)
every_sde = pytest.mark.parametrize("sde", SDES.values(), ids=SDES.keys())
almost = dict(rtol=1e-12, atol=1e-12)


def normal(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def numbers(*values):
    return torch.tensor(values, dtype=torch.float64)


def images_of(values):
    """(B,) as images of one pixel."""
    return values[:, None, None, None]


def last(frames):
    *_, x = frames
    return x


def geometric(sigma_max, sigma_min, N):
    return torch.logspace(math.log10(sigma_max), math.log10(sigma_min), N, dtype=torch.float64)


def ladder(sde, N):
    """N noise scales of an SDE from SIGMA_MAX to SIGMA_MIN at even times, and the factor m at each."""
    t = torch.linspace(*sde.time(numbers(SIGMA_MAX, SIGMA_MIN)).tolist(), N, dtype=torch.float64)
    return t, sde.noise_scale(t), sde.mean_factor(t)


def gaussian_score(mu, s):
    """The exact score (x, sigma) of VE for data N(mu, s^2)."""
    return lambda x, sigma: -(x - mu) / (s**2 + images_of(sigma) ** 2)


def curved(x, sigma):
    """No score of anything: not linear in x, another one at each sigma, and each image has its own."""
    return -torch.tanh(x + images_of(sigma.log())) / images_of(sigma)


class Signs:
    """In place of noise_like: the k-th draw is a Walsh function in each channel, +1 or -1, none of them twice.

    They are rows of Sylvester's matrix: orthogonal, and orthogonal to the constant one, which comes first (`take`).
    """

    def __init__(self, rows):
        self.table = torch.ones(1, 1, dtype=torch.float64)
        while len(self.table) < rows:
            self.table = torch.cat([torch.cat([self.table, self.table], 1), torch.cat([self.table, -self.table], 1)])
        self.k = 0

    def take(self, columns=1):
        """(1, 1, rows, columns)."""
        self.k += columns
        assert self.k <= len(self.table), "all signs are used up"
        return self.table[self.k - columns : self.k].T[None, None]

    def __call__(self, x, generator=None):
        return self.take(x.shape[3])


class Recorded:
    """In place of noise_like: the same list of tensors for each sampler that is given one."""

    def __init__(self, count, shape):
        self.left = iter(normal(count, *shape, seed=5))

    def __call__(self, x, generator=None):
        return next(self.left)


def noise_from(monkeypatch, source, lesson="lesson_07_score_sde"):
    monkeypatch.setattr(f"{lesson}.sampler.noise_like", source)


class Watched:
    """A score that writes down what it is asked."""

    def __init__(self, score):
        self.score, self.x, self.sigma = score, [], []

    def __call__(self, x, sigma):
        self.x.append(x.clone())
        self.sigma.append(sigma.tolist())
        return self.score(x, sigma)


# The three SDEs

TIMES = torch.linspace(0.02, 1, 50, dtype=torch.float64)


def slope(function, t, h=1e-5):
    return (function(t + h) - function(t - h)) / (2 * h)


@every_sde
def test_f_and_g_are_those_that_lead_to_the_mean_and_the_deviation(sde):
    """d(mean)/dt = f and d(variance)/dt = 2 (m'/m) variance + g^2, with m' by differences."""
    t = TIMES[:-1]
    relative = slope(sde.mean_factor, t) / sde.mean_factor(t)
    x = normal(len(t), 2, 3, 3)
    torch.testing.assert_close(sde.drift(x, t), images_of(relative) * x, rtol=1e-7, atol=1e-9)
    g_squared = slope(lambda t: sde.std(t) ** 2, t) - 2 * relative * sde.std(t) ** 2
    torch.testing.assert_close(sde.diffusion(t) ** 2, g_squared, rtol=1e-7, atol=1e-7)


def test_ve_goes_from_the_smallest_noise_scale_to_the_largest_by_equal_factors():
    sde = VE(0.02, 5.0)
    torch.testing.assert_close(sde.std(numbers(0, 0.25, 0.5, 1)), numbers(0.02, 0.02 * 250**0.25, 0.1**0.5, 5.0))
    assert torch.equal(sde.mean_factor(TIMES), torch.ones_like(TIMES))
    assert torch.equal(sde.drift(normal(50, 1, 2, 2), TIMES), torch.zeros(50, 1, 2, 2, dtype=torch.float64))


def test_vp_keeps_the_variance_and_sub_vp_has_the_square_of_its_variance():
    vp, sub = VP(), SubVP()
    torch.testing.assert_close(vp.std(TIMES) ** 2 + vp.mean_factor(TIMES) ** 2, torch.ones_like(TIMES))
    torch.testing.assert_close(sub.std(TIMES), vp.std(TIMES) ** 2)
    assert torch.equal(sub.mean_factor(TIMES), vp.mean_factor(TIMES))
    assert (sub.std(TIMES) < vp.std(TIMES)).all() and (sub.diffusion(TIMES) < vp.diffusion(TIMES)).all()
    tiny = numbers(1e-12)  # 1 - exp(-B) has lost all its digits there: B is 1e-13
    torch.testing.assert_close(vp.std(tiny) ** 2, numbers(1e-13), rtol=1e-9, atol=0)
    torch.testing.assert_close(sub.std(tiny), numbers(1e-13), rtol=1e-9, atol=0)
    torch.testing.assert_close(sub.diffusion(tiny) ** 2, numbers(2e-14), rtol=1e-9, atol=0)


@pytest.mark.parametrize("ends", [(0.1, 20.0), (0.5, 3.0)])
def test_big_b_is_the_integral_of_beta(ends):
    sde = VP(*ends)
    assert sde.beta(numbers(0, 0.5, 1)).tolist() == pytest.approx([ends[0], sum(ends) / 2, ends[1]])
    for t in (0.1, 0.5, 1.0):
        grid = torch.linspace(0, t, 1001, dtype=torch.float64)
        assert float(sde.B(numbers(t))) == pytest.approx(float(torch.trapezoid(sde.beta(grid), grid)), rel=1e-9)
        chain = torch.log1p(-sde.beta(grid[1:]) * t / 1000).sum() / 2  # of DDPM: the product of sqrt(1 - beta_i)
        assert math.log(sde.mean_factor(numbers(t))) == pytest.approx(float(chain), rel=0.02)
    assert (VP().beta_min, VP().beta_max) == (0.1, 20.0)


@every_sde
def test_the_noise_scale_is_that_of_x_over_m_and_time_finds_it_again(sde):
    torch.testing.assert_close(sde.noise_scale(TIMES), sde.std(TIMES) / sde.mean_factor(TIMES))
    torch.testing.assert_close(sde.time(sde.noise_scale(TIMES)), TIMES, **almost)
    if type(sde) is VP:
        torch.testing.assert_close(sde.noise_scale(TIMES), sde.B(TIMES).expm1().sqrt())
    if type(sde) is SubVP:
        torch.testing.assert_close(sde.noise_scale(TIMES), 2 * torch.sinh(sde.B(TIMES) / 2))


@given(st.floats(0.01, 1), st.floats(1.01, 100), st.floats(0.001, 100))
def test_time_with_any_constants(least, ratio, sigma):
    for sde in (VE(least, least * ratio), VP(least, least * ratio), SubVP(least, least * ratio)):
        found = sde.noise_scale(sde.time(numbers(sigma)))
        assert float(found) == pytest.approx(sigma, rel=1e-9)


@every_sde
def test_the_score_by_change_of_variables_is_that_of_gaussian_data(sde):
    mu, s = 0.5, 0.3
    t = numbers(0.05, 0.1, 0.3, 0.5)
    x, m, v = normal(4, 2, 3, 3), sde.mean_factor(t), sde.mean_factor(t) ** 2 * s**2 + sde.std(t) ** 2
    expected = -(x - images_of(m) * mu) / images_of(v)
    torch.testing.assert_close(sde.score(gaussian_score(mu, s))(x, t), expected, **almost)


@pytest.mark.parametrize("make, said", [
    (lambda: VE(0, 1), "VE needs 0 < sigma_min < sigma_max, not 0 and 1"),
    (lambda: VE(1.0, 1.0), "not 1.0 and 1.0"), (lambda: VE(2, 1), "not 2 and 1"), (lambda: VE(0.1, math.inf), "inf"),
    (lambda: VE(0.1, math.nan), "nan"), (lambda: VE(-1, 1), "not -1 and 1"),
    (lambda: VP(0, 20), "^VP needs 0 < beta_min < beta_max, not 0 and 20"), (lambda: VP(2, 1), "not 2 and 1"),
    (lambda: VP(1, 1), "not 1 and 1"), (lambda: VP(0.1, math.inf), "inf"), (lambda: VP(math.nan, 1), "nan"),
    (lambda: SubVP(-1, 20), "^SubVP needs 0 < beta_min < beta_max, not -1 and 20"),
])  # fmt: skip
def test_constants_that_no_sde_can_have(make, said):
    with pytest.raises(ValueError, match=said):
        make()


# Predictors and corrector, on Gaussian data


class Chain:
    """Mean and variance of x through the steps of a sampler, for data N(mu, s^2): by regression and by the SDE."""

    def __init__(self, sde, t, mu, s, mean, variance):
        self.sde, self.t, self.mu, self.s, self.mean, self.variance = sde, t, mu, s, mean, variance

    def at(self, n):
        t = self.t[n : n + 1]
        m, std = float(self.sde.mean_factor(t)), float(self.sde.std(t))
        return m, std, m**2 * self.s**2 + std**2

    def move(self, shift, A, fresh):
        """x <- shift + A x + noise of variance `fresh`."""
        self.mean, self.variance = shift + A * self.mean, A**2 * self.variance + fresh

    def predict(self, predictor, n):
        m, std, v = self.at(n - 1)
        m_next, std_next, _ = self.at(n)
        a = m / m_next
        missing = std**2 - (a * std_next) ** 2  # forwards, x is a x' + noise of this variance
        if predictor == "reverse_diffusion":  # x - (a - 1) x + missing s
            A = 2 - a - missing / v
            self.move(missing / v * m * self.mu, A, missing)
        elif predictor == "ancestral":  # x' given x and the clean image, at the mean of the clean image given x
            clean_slope = m * self.s**2 / v
            regression = a * std_next**2 / std**2
            A = regression + (m_next - regression * m) * clean_slope
            self.move((m_next - A * m) * self.mu, A, std_next**2 - regression * a * std_next**2)
        elif predictor == "ode":  # x - (a - 1) x + missing s / 2, and nothing fresh
            self.move(missing / (2 * v) * m * self.mu, 2 - a - missing / (2 * v), 0.0)
        else:  # f dt with the mean of m'/m over the step, g^2 dt with the relative change of std / m
            fade = math.log(m / m_next)
            g_squared = 2 * std**2 * math.log(std / m * m_next / std_next)
            A = 1 - fade - g_squared / v
            self.move(g_squared / v * m * self.mu, A, g_squared)

    def correct(self, n, r):
        m, _, v = self.at(n)
        score_square = (self.variance + (self.mean - m * self.mu) ** 2) / v**2  # mean over the pixels
        epsilon = 2 * (r / math.sqrt(score_square)) ** 2
        A = 1 - epsilon / v
        self.move((1 - A) * m * self.mu, A, 2 * epsilon)


@every_sde
@pytest.mark.parametrize("predictor", PREDICTORS)
@pytest.mark.parametrize("corrector_steps, r", [(0, 0.0), (1, 0.16), (2, 0.3)])
def test_mean_and_variance_of_every_sampler(monkeypatch, sde, predictor, corrector_steps, r):
    N, mu, s = 40, 0.4, 0.3
    t, sigmas, ms = ladder(sde, N)
    noise = Signs(256)
    noise.take()  # the constant is what the mean is made of
    chain = Chain(sde, t, mu, s, 0.0, float(ms[0] * sigmas[0]) ** 2)
    noise_from(monkeypatch, noise)
    frames = predictor_corrector(
        gaussian_score(mu, s), ms[0] * sigmas[0] * noise.take(), sigmas, predictor, corrector_steps, r, None, ms
    )
    for n, x in enumerate(frames, 1):
        chain.predict(predictor, n)
        for _ in range(corrector_steps):
            chain.correct(n, r)
        assert float(x.mean()) == pytest.approx(chain.mean, rel=1e-9, abs=1e-12)
        assert float(x.var(unbiased=False)) == pytest.approx(chain.variance, rel=1e-9)
    assert n == N - 1 and noise.k == 2 + (N - 1) * ((predictor != "ode") + corrector_steps)


@pytest.mark.parametrize("predictor", PREDICTORS)
def test_without_mean_factors_the_sde_is_ve(monkeypatch, predictor):
    _, sigmas, ones = ladder(SDES["ve"], 20)
    x = []
    for ms in (None, ones):
        noise_from(monkeypatch, Recorded(40, (2, 1, 3, 3)))
        x.append(last(predictor_corrector(curved, 17 * normal(2, 1, 3, 3), sigmas, predictor, mean_factors=ms)))
    assert torch.equal(*x)


def test_euler_maruyama_of_ve_is_the_plain_step_in_t(monkeypatch):
    """x + g^2 s dt + g sqrt(dt) z, with g of the SDE, and its variance."""
    sde, N, s = SDES["ve"], 60, 0.3
    t = torch.linspace(1, 0, N + 1, dtype=torch.float64)
    variance = SIGMA_MAX**2
    for time in t[:-1]:
        g_squared = float(sde.diffusion(time)) ** 2 / N
        variance = (1 - g_squared / (s**2 + float(sde.std(time)) ** 2)) ** 2 * variance + g_squared
    noise = Signs(64)
    noise_from(monkeypatch, noise)
    x = last(predictor_corrector(gaussian_score(0, s), SIGMA_MAX * noise.take(), sde.std(t), "euler_maruyama", 0))
    assert float(x.square().mean()) == pytest.approx(variance, rel=1e-9)


@every_sde
@pytest.mark.parametrize("predictor", PREDICTORS)
def test_a_small_step_is_one_of_the_reverse_sde(monkeypatch, sde, predictor):
    """To first order dx = (f - g^2 s) dt + g dw backwards, or (f - g^2 s / 2) dt: in dt, and in its root."""
    dt = 1e-6
    x, score = normal(1, 1, 3, 3), gaussian_score(0.5, 0.3)
    for time in (0.1, 0.4, 0.7):
        t = numbers(time, time - dt)
        sigmas, ms = sde.noise_scale(t), sde.mean_factor(t)
        noise_from(monkeypatch, lambda x, generator: torch.zeros_like(x))
        change = (predict(predictor, score, x, sigmas, ms) - x) / dt
        now, share = t[:1], 0.5 if predictor == "ode" else 1  # the ODE: half of the score, no noise
        reverse = sde.drift(x, now) - share * sde.diffusion(now) ** 2 * sde.score(score)(x, now)
        torch.testing.assert_close(change, -reverse, rtol=1e-3, atol=1e-4)
        noise_from(monkeypatch, lambda x, generator: torch.ones_like(x))
        fresh = predict(predictor, lambda x, sigma: torch.zeros_like(x), torch.zeros_like(x), sigmas, ms)
        expected = (predictor != "ode") * sde.diffusion(now).expand_as(x)
        torch.testing.assert_close(fresh / dt**0.5, expected, rtol=1e-4, atol=0)


@every_sde
@pytest.mark.parametrize("predictor", PREDICTORS)
def test_with_more_steps_the_variance_comes_to_that_of_the_data(monkeypatch, sde, predictor):
    errors = []
    for N in (126, 251, 501):
        t, sigmas, ms = ladder(sde, N)
        noise, s = Signs(512), 0.3
        noise_from(monkeypatch, noise)
        start = (ms[0] * (s**2 + sigmas[0] ** 2).sqrt()) * noise.take()  # the exact marginal
        x = last(predictor_corrector(gaussian_score(0, s), start, sigmas, predictor, 0, mean_factors=ms))
        ratio = float((x / ms[-1]).square().mean()) / (s**2 + SIGMA_MIN**2)
        errors.append(ratio - 1)
    assert abs(errors[-1]) < 0.06 and errors[0] / errors[1] > 1.75 and errors[1] / errors[2] > 1.85
    if predictor != "euler_maruyama":
        assert (errors[-1] < 0) == (predictor == "ancestral")  # it puts in too little noise, the other one too much


def test_ancestral_is_algorithm_2_of_ddpm(monkeypatch):
    """On its discrete ladder, with the same noise: lesson 5's x_t is m times an image with noise of scale sigma_t."""
    betas = linear_betas(200, 5e-4, 0.1)
    abars, shape = alpha_bars(betas), (2, 1, 4, 4)
    sigma = ((1 - abars) / abars).sqrt()
    network = lambda x_t, t: -images_of(sigma[t]) * curved(x_t / images_of(abars[t]).sqrt(), sigma[t])  # predicts noise
    noise_from(monkeypatch, Recorded(199, shape), "lesson_05_ddpm")
    theirs = list(ancestral_sampling(network, normal(*shape), betas, "small", clip=False))
    noise_from(monkeypatch, Recorded(199, shape))
    ours = list(predictor_corrector(curved, normal(*shape), sigma.flip(0), "ancestral", 0,
                                    mean_factors=abars.sqrt().flip(0)))  # fmt: skip
    assert len(ours) == 199
    for x, y in zip(ours, theirs[:-1]):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-10)
    torch.testing.assert_close(denoise(curved, ours[-1] / abars[0].sqrt(), sigma[0]), theirs[-1], rtol=0, atol=1e-10)


def test_two_etas_of_lesson_4_are_ancestral_and_euler(monkeypatch):
    sigmas, shape = geometric(10, 0.1, 40), (2, 1, 4, 4)
    by_index = lambda x, i: curved(x, sigmas[i])

    def of_lesson_4(eta, noise):
        noise_from(monkeypatch, noise, "lesson_04_ncsnv2")
        epsilon = eta * float(sigmas[-1]) ** 2
        return list(consistent_annealed_sampling(by_index, 10 * normal(*shape), sigmas, 1, epsilon))[:-1]

    noise_from(monkeypatch, Recorded(39, shape))
    ours = list(predictor_corrector(curved, 10 * normal(*shape), sigmas, "ancestral", 0))
    theirs = of_lesson_4(ancestral_eta(sigmas), Recorded(40, shape))
    assert len(ours) == len(theirs) == 39
    torch.testing.assert_close(torch.stack(ours), torch.stack(theirs), rtol=0, atol=1e-12)

    ours = list(probability_flow(curved, 10 * normal(*shape), sigmas, "euler"))
    # What noise eta = 1 - 1/gamma adds is the root of a rounding error, 1e-8: left out here
    theirs = of_lesson_4(smallest_eta(sigmas), lambda x, generator: torch.zeros_like(x))
    torch.testing.assert_close(torch.stack(ours), torch.stack(theirs), rtol=0, atol=1e-12)

    for eta in (0.3, None):
        noise_from(monkeypatch, Recorded(39, shape))
        ours = list(consistent_sampling(curved, 10 * normal(*shape), sigmas, eta))
        theirs = of_lesson_4((1 + 3 * ancestral_eta(sigmas)) / 4 if eta is None else eta, Recorded(40, shape))
        assert len(ours) == len(theirs) == 39
        torch.testing.assert_close(torch.stack(ours), torch.stack(theirs), rtol=0, atol=1e-12)


def test_consistent_sampling_at_its_smallest_eta_is_eulers_and_keeps_no_graph():
    x, weight = 10 * normal(2, 1, 4, 4), torch.ones((), requires_grad=True)
    for N in (5, 9, 15):
        sigmas = geometric(10, 0.1, N)
        expected = last(probability_flow(curved, x, sigmas, "euler"))
        made = last(consistent_sampling(lambda x, sigma: weight * curved(x, sigma), x, sigmas, smallest_eta(sigmas)))
        torch.testing.assert_close(made, expected, rtol=0, atol=1e-5)
        assert not made.requires_grad


# One point


def test_what_noise_is_left_around_one_point(monkeypatch):
    """Ancestral, Euler and Heun leave exactly sigma. Reverse diffusion leaves gamma sigma in the end, and before that

    a ratio q with q' = q / gamma^4 + gamma^2 - 1 when the noise's variance is q sigma^2: q - gamma^2 falls by gamma^2.
    The predictor "ode" multiplies noise by (1 + 1 / gamma^2) / 2, not by 1 / gamma: by cosh(ln gamma) more each time.
    """
    L = 60
    sigmas = geometric(SIGMA_MAX, SIGMA_MIN, L)
    gamma, point = float(sigmas[0] / sigmas[1]), gaussian_score(0.0, 0.0)

    def left(sampler):
        noise = Signs(64)
        noise_from(monkeypatch, noise)
        frames = sampler(SIGMA_MAX * noise.take())
        return torch.stack([x.square().mean().sqrt() for x in frames]) / sigmas[1:]

    exact = torch.ones(L - 1, dtype=torch.float64)
    torch.testing.assert_close(left(lambda x: predictor_corrector(point, x, sigmas, "ancestral", 0)), exact)
    torch.testing.assert_close(left(lambda x: probability_flow(point, x, sigmas, "euler")), exact)
    torch.testing.assert_close(left(lambda x: probability_flow(point, x, sigmas, "heun")), exact)
    n = torch.arange(1, L, dtype=torch.float64)
    ode = left(lambda x: predictor_corrector(point, x, sigmas, "ode", 0))
    torch.testing.assert_close(ode, math.cosh(math.log(gamma)) ** n, **almost)
    q = gamma**2 + (1 - gamma**2) * gamma ** (-2 * n)
    reverse = left(lambda x: predictor_corrector(point, x, sigmas, "reverse_diffusion", 0))
    torch.testing.assert_close(reverse, q.sqrt(), **almost)
    assert float(reverse[-1]) == pytest.approx(gamma, rel=1e-5)

    def flow_of_the_paper(x):  # Euler's steps in sigma^2, not in sigma
        for sigma, following in itertools.pairwise(sigmas):
            x = x + (sigma**2 - following**2) / 2 * point(x, sigma.expand(1))
            yield x

    torch.testing.assert_close(left(flow_of_the_paper), math.cosh(math.log(gamma)) ** n, **almost)
    assert math.cosh(math.log(gamma)) ** (L - 1) > 1.5


# The corrector alone


@pytest.mark.parametrize("r", [0.05, 0.16, 0.5])
@pytest.mark.parametrize("m", [1.0, 0.3])
def test_the_corrector_leaves_1_plus_r_squared_of_the_variance(monkeypatch, r, m):
    """v q <- v q': q' = (1 - 2 r^2 / q)^2 q + 4 r^2 / q, which is q at 1 + r^2 only."""
    sigma, s = numbers(0.7)[0], 0.4
    v, factor, noise = m**2 * (s**2 + 0.7**2), numbers(m)[0], Signs(128)
    noise_from(monkeypatch, noise)
    at_rest = math.sqrt((1 + r**2) * v) * noise.take()
    for _ in range(5):
        at_rest = correct(gaussian_score(0, s), at_rest, sigma, factor, r)
    assert float(at_rest.square().mean()) == pytest.approx((1 + r**2) * v, rel=1e-12)
    x, q = math.sqrt(3 * v) * noise.take(), 3.0
    for _ in range(100):
        x = correct(gaussian_score(0, s), x, sigma, factor, r)
        q = (1 - 2 * r**2 / q) ** 2 * q + 4 * r**2 / q
    assert float(x.square().mean()) / v == pytest.approx(q, rel=1e-12)
    assert 1 + r**2 <= q < 3 and (r < 0.1 or q == pytest.approx(1 + r**2, rel=0.02))


def test_the_step_along_the_score_is_r_times_as_long_as_the_fresh_noise(monkeypatch):
    """Each image has its own step, if the length of the noise is sqrt(D), however different the images are."""
    x = normal(3, 2, 4, 4) * images_of(numbers(0.01, 1, 300))
    sigma, one, sign = numbers(0.5)[0], numbers(1)[0], torch.ones_like(x)
    noise_from(monkeypatch, lambda x, generator: torch.zeros_like(x))
    along = correct(curved, x, sigma, one, 0.16) - x
    noise_from(monkeypatch, lambda x, generator: sign)
    fresh = correct(curved, x, sigma, one, 0.16) - x - along
    torch.testing.assert_close(along.flatten(1).norm(dim=1), 0.16 * fresh.flatten(1).norm(dim=1))
    score = curved(x, sigma.expand(3))
    torch.testing.assert_close(along / along.flatten(1).norm(dim=1)[:, None, None, None],
                               score / score.flatten(1).norm(dim=1)[:, None, None, None])  # fmt: skip


def test_picture_k_does_not_depend_on_the_others():
    sigmas = geometric(3, 0.1, 6)
    start = normal(3, 1, 4, 4) * images_of(numbers(0.01, 3, 100))
    run = lambda x, seeds: last(predictor_corrector(curved, x, sigmas, generator=SeededNoise(seeds)))
    together = run(start, [3, 4, 5])
    for k in range(3):
        torch.testing.assert_close(run(start[k : k + 1], [3 + k]), together[k : k + 1], **almost)


# Who is asked what, and when


@pytest.mark.parametrize("corrector_steps", [0, 1, 2])
@pytest.mark.parametrize("predictor", PREDICTORS)
def test_first_the_predictor_then_the_corrector_at_the_new_noise_scale(monkeypatch, predictor, corrector_steps):
    sde, N, r = SubVP(), 5, 0.2
    _, sigmas, ms = ladder(sde, N)
    score, shape, draws = Watched(curved), (2, 1, 3, 3), (N - 1) * (1 + corrector_steps)
    noise_from(monkeypatch, Recorded(draws, shape))
    start = normal(*shape)
    frames = list(predictor_corrector(score, start, sigmas, predictor, corrector_steps, r, None, ms))
    assert len(frames) == N - 1
    told = [[n - 1] + [n] * corrector_steps for n in range(1, N)]
    assert score.sigma == [[float(sigmas[n])] * 2 for n in itertools.chain(*told)]

    noise_from(monkeypatch, Recorded(draws, shape))
    x, asked = start, []
    for n in range(1, N):
        asked.append(x / ms[n - 1])
        x = predict(predictor, curved, x, sigmas[n - 1 : n + 1], ms[n - 1 : n + 1])
        for _ in range(corrector_steps):
            asked.append(x / ms[n])
            x = correct(curved, x, sigmas[n], ms[n], r)
        assert torch.equal(frames[n - 1], x)
    assert len(score.x) == draws and torch.equal(torch.stack(score.x), torch.stack(asked))


def test_one_corrector_step_of_r_0_16_after_reverse_diffusion_if_nothing_is_said(monkeypatch):
    sigmas, results = geometric(3, 0.1, 6), []
    for more in ((), ("reverse_diffusion", 1, 0.16)):
        noise_from(monkeypatch, Recorded(10, (2, 1, 3, 3)))
        results.append(last(predictor_corrector(curved, normal(2, 1, 3, 3), sigmas, *more)))
    assert torch.equal(*results)


def test_hold_is_called_after_each_step_with_the_index_of_the_noise_scale(monkeypatch):
    score, seen = Watched(curved), []

    def hold(x, n):
        seen.append(n)
        return torch.full_like(x, len(seen))

    frames = list(predictor_corrector(score, normal(1, 1, 2, 2), geometric(3, 0.1, 4), corrector_steps=2, hold=hold))
    assert seen == [1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert [float(x.mean()) for x in frames] == [3, 6, 9]
    assert [float(x.mean()) for x in score.x[1:]] == list(range(1, 9))  # each step starts at what was held


def test_the_ode_asks_once_or_twice_for_each_step():
    sigmas, x = geometric(3, 0.1, 5), normal(2, 1, 3, 3)
    for method, told in (("euler", [0, 1, 2, 3]), ("heun", [0, 1, 1, 2, 2, 3, 3, 4])):
        score = Watched(curved)
        frames = list(probability_flow(score, x, sigmas, method))
        assert len(frames) == 4 and score.sigma == [[float(sigmas[n])] * 2 for n in told]
    default, heun = (last(probability_flow(curved, x, sigmas, *how)) for how in ((), ("heun",)))
    assert torch.equal(default, heun)
    for way in (encode, decode):
        score = Watched(curved)
        way(score, x, 0.1, 3.0)
        assert len(score.sigma) == 4 * 24
        ends = score.sigma[0][0], score.sigma[-1][0]
        assert ends == pytest.approx((0.1, 3.0) if way is encode else (3.0, 0.1))


def test_the_last_step_to_no_noise_at_all_is_eulers():
    """The score of one point, -(x - p) / sigma^2: from any noise scale, Euler's step to 0 comes to the point."""
    point, sigmas = normal(1, 1, 3, 3), numbers(2, 1, 0.5, 0)
    score = lambda x, sigma: -(x - point) / images_of(sigma) ** 2
    *_, before, x = probability_flow(score, point + 2 * normal(2, 1, 3, 3), sigmas)
    torch.testing.assert_close(x, point.expand_as(x), rtol=0, atol=1e-12)
    assert (before - point).abs().max() > 0.1


def test_unknown_names():
    x, sigmas = normal(1, 1, 2, 2), geometric(3, 0.1, 4)
    with pytest.raises(
        ValueError,
        match="predictor is one of reverse_diffusion, ancestral, euler_maruyama, ode, not 'ddim'",
    ):
        next(predictor_corrector(curved, x, sigmas, "ddim"))
    with pytest.raises(ValueError, match='method is "euler" or "heun", not \'rk45\''):
        next(probability_flow(curved, x, sigmas, "rk45"))


def test_samplers_keep_no_graph():
    weight, x, sigmas = torch.ones((), requires_grad=True), torch.rand(2, 1, 4, 4), geometric(3, 0.1, 4).float()
    score = lambda x, sigma: -weight * x
    made = [last(predictor_corrector(score, x, sigmas)), last(probability_flow(score, x, sigmas)),
            encode(score, x, 0.1, 3.0, 2), decode(score, x, 0.1, 3.0, 2), denoise(score, x, sigmas[0]),
            log_likelihood(score, x, 0.1, 3.0, 2)]  # fmt: skip
    assert not any(result.requires_grad for result in made)


# The ODE


@pytest.mark.parametrize("method, order", [("euler", 1), ("heun", 2)])
def test_order_of_the_ode_steps(method, order):
    """On N(mu, s^2): x - mu is multiplied by the ratio of the deviations."""
    mu, s, x = 0.5, 0.3, 17 * normal(3, 1, 2, 2)
    expected = mu + math.sqrt((s**2 + SIGMA_MIN**2) / (s**2 + SIGMA_MAX**2)) * (x - mu)
    errors = []
    for N in (101, 201, 401):
        made = last(probability_flow(gaussian_score(mu, s), x, geometric(SIGMA_MAX, SIGMA_MIN, N), method))
        errors.append(float((made - expected).norm()))
    assert errors[-1] < 0.05 and [a / b for a, b in itertools.pairwise(errors)] == pytest.approx(
        [2**order] * 2, rel=0.05
    )


def test_encoding_a_gaussian_multiplies_it_and_decoding_divides_it_again():
    mu, s, x = 0.5, 0.3, normal(3, 1, 2, 2)
    scale = math.sqrt((s**2 + SIGMA_MAX**2) / (s**2 + SIGMA_MIN**2))
    errors = []
    for steps in (24, 48, 96):
        z = encode(gaussian_score(mu, s), x, SIGMA_MIN, SIGMA_MAX, steps)
        errors.append(float((z - mu - scale * (x - mu)).norm()))
    assert errors[0] < 0.05 and [a / b for a, b in itertools.pairwise(errors)] == pytest.approx([16, 16], rel=0.15)
    torch.testing.assert_close(decode(gaussian_score(mu, s), z, SIGMA_MIN, SIGMA_MAX, 96), x, rtol=0, atol=1e-5)
    assert torch.equal(encode(gaussian_score(mu, s), x, SIGMA_MIN, SIGMA_MAX),
                       encode(gaussian_score(mu, s), x, SIGMA_MIN, SIGMA_MAX, 24))  # fmt: skip


def test_runge_kutta_4():
    """One step multiplies the solution of y' = y by the start of the exponential series; y' = 3 t^2 is exact."""
    h, y = 0.3, numbers(2.0, -1.0)
    series = 1 + h + h**2 / 2 + h**3 / 6 + h**4 / 24
    torch.testing.assert_close(runge_kutta_4(lambda y, t: y, y, numbers(0, h)), y * series, **almost)
    uneven = numbers(0.5, 0.6, 1.5, 1.0, 2.0)  # backwards for once
    torch.testing.assert_close(runge_kutta_4(lambda y, t: 3 * t**2, numbers(0.125), uneven), numbers(8), **almost)
    asked = []
    runge_kutta_4(lambda y, t: asked.append(float(t)) or y, y, numbers(0, 1, 3))
    assert asked == [0, 0.5, 0.5, 1, 1, 2, 2, 3]


@pytest.mark.parametrize("slope, solution", [
    (lambda y, t: y, lambda t: math.exp(t)),
    (lambda y, t: y * torch.cos(t), lambda t: math.exp(math.sin(t))),
    (lambda y, t: -t * y**2, lambda t: 1 / (1 + t**2 / 2)),
])  # fmt: skip
def test_runge_kutta_4_is_of_order_4(slope, solution):
    errors = []
    for steps in (20, 40, 80):
        y = runge_kutta_4(slope, numbers(1.0), torch.linspace(0, 2, steps + 1, dtype=torch.float64))
        errors.append(abs(float(y) - solution(2.0)))
    assert errors[0] < 1e-3 and [a / b for a, b in itertools.pairwise(errors)] == pytest.approx([16, 16], rel=0.15)


def test_denoise_is_the_mean_of_the_clean_image():
    mu, s, sigma = 0.3, 0.2, numbers(0.5)[0]
    x = mu + normal(4, 1, 3, 3)
    expected = (s**2 * x + 0.5**2 * mu) / (s**2 + 0.5**2)  # both means, weighted by their precisions
    score = Watched(gaussian_score(mu, s))
    torch.testing.assert_close(denoise(score, x, sigma), expected, **almost)
    assert score.sigma == [[0.5] * 4]


# A mixture in one dimension

MODES, WIDTH = numbers(-1, 1), 0.3  # equal halves


def log_density(x, sigma):
    v = WIDTH**2 + sigma**2
    return torch.logsumexp(-((x[:, None] - MODES) ** 2) / (2 * v), 1) - math.log(2) - 0.5 * math.log(2 * math.pi * v)


def cdf(x, sigma):
    return torch.special.ndtr((x[:, None] - MODES) / math.sqrt(WIDTH**2 + sigma**2)).mean(1)


def posteriors(x, sigma):
    """log p(mode | x, sigma), (B, 2), by Bayes' rule; x (B, 1, 1, 1), sigma (B,)."""
    v = (WIDTH**2 + sigma**2)[:, None]
    return torch.log_softmax(-((x.flatten(1) - MODES) ** 2) / (2 * v), 1)


def mixture_score(x, sigma):
    weighted_mode = (posteriors(x, sigma).exp() * MODES).sum(1)
    return -(x - images_of(weighted_mode)) / images_of(WIDTH**2 + sigma**2)


def quantile(p, sigma):
    """The x below which the noisy mixture has probability p, by bisection."""
    low, high = torch.full_like(p, -100), torch.full_like(p, 100)
    for _ in range(100):
        middle = (low + high) / 2
        below = cdf(middle, sigma) < p
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return middle


POINTS = numbers(-1.5, -0.9, -0.2, 0.1, 0.5, 1.2)


def test_in_one_dimension_the_ode_maps_quantiles_to_quantiles():
    expected = quantile(cdf(POINTS, SIGMA_MIN), SIGMA_MAX)
    z = encode(mixture_score, images_of(POINTS), SIGMA_MIN, SIGMA_MAX, 150)
    torch.testing.assert_close(z, images_of(expected), rtol=0, atol=2e-5)
    back = decode(mixture_score, z, SIGMA_MIN, SIGMA_MAX, 150)
    torch.testing.assert_close(back, images_of(POINTS), rtol=0, atol=1e-5)
    rough = encode(mixture_score, images_of(POINTS), SIGMA_MIN, SIGMA_MAX)  # 24 steps
    torch.testing.assert_close(rough / SIGMA_MAX, images_of(expected) / SIGMA_MAX, rtol=0, atol=2e-3)
    heun = last(probability_flow(mixture_score, z, geometric(SIGMA_MAX, SIGMA_MIN, 400)))
    torch.testing.assert_close(heun, images_of(POINTS), rtol=0, atol=5e-3)


def test_the_log_density_of_a_mixture():
    latent = quantile(cdf(POINTS, SIGMA_MIN), SIGMA_MAX)
    prior, divergence = log_likelihood_terms(mixture_score, images_of(POINTS), SIGMA_MIN, SIGMA_MAX, 150)
    normal_density = -(latent**2) / (2 * SIGMA_MAX**2) - 0.5 * math.log(2 * math.pi * SIGMA_MAX**2)
    torch.testing.assert_close(prior, normal_density, rtol=0, atol=1e-5)
    exact = log_density(POINTS, SIGMA_MIN)
    torch.testing.assert_close(divergence, exact - log_density(latent, SIGMA_MAX), rtol=0, atol=1e-5)
    grid = torch.linspace(-4, 4, 801, dtype=torch.float64)
    p = log_likelihood(mixture_score, images_of(grid), SIGMA_MIN, SIGMA_MAX, 60).exp()
    assert float(torch.trapezoid(p, grid)) == pytest.approx(1, abs=1e-3)  # it is a density


# Likelihood


def test_both_terms_of_the_likelihood_of_a_gaussian():
    mu, s, D = 0.5, 0.3, 12
    x = mu + s * normal(5, 3, 2, 2)
    v_0, v_T = s**2 + SIGMA_MIN**2, s**2 + SIGMA_MAX**2
    latent = mu + math.sqrt(v_T / v_0) * (x - mu)
    prior, divergence = log_likelihood_terms(gaussian_score(mu, s), x, SIGMA_MIN, SIGMA_MAX, 100)
    expected = torch.distributions.Normal(0.0, SIGMA_MAX).log_prob(latent).sum(dim=(1, 2, 3))
    torch.testing.assert_close(prior, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(divergence, torch.full_like(divergence, D / 2 * math.log(v_T / v_0)), rtol=0, atol=1e-5)
    total = log_likelihood(gaussian_score(mu, s), x, SIGMA_MIN, SIGMA_MAX, 100)
    torch.testing.assert_close(total, prior + divergence, rtol=0, atol=1e-9)  # for every probe the same
    exact = torch.distributions.Normal(mu, math.sqrt(v_0)).log_prob(x).sum(dim=(1, 2, 3))
    assert (total - exact).abs().max() < 0.05 * D  # the rest is that the latent is not quite N(0, sigma_max^2)


@pytest.mark.parametrize("c", [0.0, 2.0])
def test_the_likelihood_by_a_score_that_does_not_look_at_the_image(c):
    """Along dx = -sigma c dsigma all images move alike, by c (sigma_min^2 - sigma_max^2) / 2, and nothing spreads."""
    x = normal(2, 1, 3, 3)
    log_p = log_likelihood(lambda x, sigma: torch.full_like(x, c), x, SIGMA_MIN, SIGMA_MAX, 400)
    latent = x + c * (SIGMA_MIN**2 - SIGMA_MAX**2) / 2
    expected = torch.distributions.Normal(0.0, SIGMA_MAX).log_prob(latent).sum(dim=(1, 2, 3))
    torch.testing.assert_close(log_p, expected, rtol=1e-6, atol=0)


def test_signs_are_an_exact_probe_of_isotropic_data():
    x = normal(1, 1, 3, 3).expand(200, 1, 3, 3).contiguous()
    prior, divergence = log_likelihood_terms(gaussian_score(0.5, 0.3), x, SIGMA_MIN, SIGMA_MAX, 24)
    for term in (prior, divergence):
        torch.testing.assert_close(term, term[:1].expand(200), **almost)
    # 24 steps are Simpson's rule for the integral of sigma^2 / (s^2 + sigma^2) d ln sigma
    assert float(divergence[0]) == pytest.approx(
        4.5 * math.log((0.09 + SIGMA_MAX**2) / (0.09 + SIGMA_MIN**2)), abs=1e-4
    )


def test_the_probe_of_two_correlated_pixels():
    """Covariance 0.09 [[1, 0.8], [0.8, 1]]: its eigenvectors are (1, 1) and (1, -1), which are also the probes.

    Along each the integral of the derivative is j = ln(v_T / v_0) / 2, so e^T J e is 2 j, and their mean is the trace.
    """
    covariance = 0.09 * numbers([1, 0.8], [0.8, 1])

    def score(x, sigma):
        return -torch.linalg.solve(covariance + sigma[0] ** 2 * torch.eye(2, dtype=torch.float64), x.mT).mT

    plus, minus = (0.5 * math.log((v + SIGMA_MAX**2) / (v + SIGMA_MIN**2)) for v in (0.09 * 1.8, 0.09 * 0.2))
    x, seed = normal(1, 1, 1, 2).expand(2000, 1, 1, 2), torch.Generator().manual_seed(3)
    _, found = log_likelihood_terms(score, x, SIGMA_MIN, SIGMA_MAX, 60, seed)
    e = probe_like(x, torch.Generator().manual_seed(3))
    equal = e[:, 0, 0, 0] == e[:, 0, 0, 1]
    torch.testing.assert_close(found, torch.where(equal, 2 * plus, 2 * minus).double(), rtol=0, atol=1e-5)
    assert float(found.mean()) == pytest.approx(plus + minus, abs=4 * (minus - plus) / math.sqrt(2000))
    assert float(found.var()) == pytest.approx((minus - plus) ** 2, rel=0.01)


def test_probes_are_signs_with_equal_odds():
    e = probe_like(torch.empty(100, 1, 10, 10))
    assert e.shape == (100, 1, 10, 10) and set(e.flatten().tolist()) == {-1.0, 1.0}
    assert float(e.mean()) == pytest.approx(0, abs=0.04)
    again = [probe_like(torch.empty(2, 1, 5, 5), torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(again[0], again[1]) and not torch.equal(again[0], again[2])


def test_one_probe_for_the_whole_way_and_24_steps_of_4_calls(monkeypatch):
    draws, real = [], lesson_07_score_sde.likelihood.noise_like
    monkeypatch.setattr(lesson_07_score_sde.likelihood, "noise_like", lambda *a: draws.append(a) or real(*a))
    score = Watched(curved)
    log_likelihood(score, normal(3, 1, 2, 2), 0.1, 3.0)
    assert len(draws) == 1 and draws[0][0].shape == (3, 1, 2, 2)
    assert len(score.sigma) == 4 * 24
    middle = math.exp(math.log(0.1) + math.log(30) / 48)
    assert score.sigma[0] == pytest.approx([0.1] * 3) and score.sigma[-1] == pytest.approx([3.0] * 3)
    assert score.sigma[1] == pytest.approx([middle] * 3)


def test_the_likelihood_of_an_image_is_its_own():
    x = normal(3, 1, 2, 2)
    run = lambda x, seeds: log_likelihood(curved, x, 0.1, 3.0, 6, SeededNoise(seeds))
    together = run(x, [3, 4, 5])
    for k in range(3):
        torch.testing.assert_close(run(x[k : k + 1], [3 + k]), together[k : k + 1], **almost)
    assert torch.equal(log_likelihood(curved, x, 0.1, 3.0, generator=torch.Generator().manual_seed(0)),
                       log_likelihood(curved, x, 0.1, 3.0, 24, torch.Generator().manual_seed(0)))  # fmt: skip


@pytest.mark.parametrize("sigma", [0.01, 0.003])
def test_the_floor_of_a_point(sigma):
    """At the point itself there is no higher density; noise of scale sigma, as it is, costs 1/2 nat a pixel more."""
    D = 64
    x = torch.cat([torch.zeros(1, 1, D, 1), sigma * Signs(D).take()]).double()
    bits = bits_per_dim(log_likelihood(gaussian_score(0, 0), x, sigma, SIGMA_MAX, 300), D)
    floor = math.log2(256 * sigma * math.sqrt(2 * math.pi))
    assert bits.tolist() == pytest.approx([floor, floor + 0.5 * math.log2(math.e)], abs=1e-5)
    v = numbers(0.0, 1e-6, 1e-3, 0.1)  # data that are not quite a point have more bits, not less
    assert bool((0.5 * torch.log2(2 * math.pi * (v + sigma**2)) + 8 >= floor - 1e-12).all())


def test_bits_per_dim():
    assert torch.equal(bits_per_dim(numbers(0, 0), 784), numbers(8, 8))  # uniform on [0, 1]
    log_p = 5 * math.log(256 / 16)  # uniform on 16 of 256 grey levels: 4 bits, in five pixels
    assert float(bits_per_dim(numbers(log_p), 5)) == pytest.approx(4, rel=1e-12)
    assert float(bits_per_dim(numbers(-2 * LN2), 1)) == pytest.approx(10, rel=1e-12)


def test_dequantised_pixels_fill_their_256th_of_the_range():
    levels = torch.arange(256, dtype=torch.float64)
    images = (levels / 255).repeat(400, 1)[:, None, None]
    x = dequantise(images)
    assert x.min() >= 0 and x.max() <= 1
    u = 256 * x - levels
    assert u.min() > -1e-9 and u.max() < 1 + 1e-9
    counts = torch.histc(u.flatten(), 20, 0, 1)
    assert (counts / u.numel() - 0.05).abs().max() < 5 * math.sqrt(0.05 / u.numel())
    assert float(u.mean()) == pytest.approx(0.5, abs=0.005) and float(u.var()) == pytest.approx(1 / 12, rel=0.01)
    made = [dequantise(images, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(made[0], made[1]) and not torch.equal(made[0], made[2])


# Inpainting


def run_inpainting(monkeypatch, sigmas, predictor, corrector_steps, r, rho, y):
    """(mean, variance) of the second of two correlated pixels, the first of which is y: of a picture of 1024 pairs."""
    covariance = numbers([1, rho], [rho, 1])

    def score(x, sigma):
        return -torch.linalg.solve(covariance + sigma[0] ** 2 * torch.eye(2, dtype=torch.float64), x.mT).mT

    noise, known = Signs(1024), numbers([1, 0])[None, None]
    ones = noise.take()
    noise_from(monkeypatch, noise)
    given = torch.cat([y * ones, 100 * ones], dim=3)  # what is not known must not count
    x = last(inpaint(score, given, known, sigmas[0] * noise.take(2), sigmas, predictor, corrector_steps, r))
    torch.testing.assert_close(x[..., 0].mean(), numbers(y)[0], **almost)
    torch.testing.assert_close(x[..., 0].std(unbiased=False), sigmas[-1], **almost)
    return float(x[..., 1].mean()), float(x[..., 1].var(unbiased=False))


def inpainting_recursion(sigmas, predictor, corrector_steps, r, rho, y):
    """The same by mean and covariance of the pair."""
    covariance, one = numbers([1, rho], [rho, 1]), torch.eye(2, dtype=torch.float64)
    mean, spread = numbers(y, 0), sigmas[0] ** 2 * one

    def step(length, fresh, sigma, goal):
        A = one - length * torch.linalg.inv(covariance + sigma**2 * one)
        m, C = A @ mean, A @ spread @ A.T + fresh * one
        return numbers(y, float(m[1])), torch.diag(torch.stack([goal**2, C[1, 1]]))  # the first is drawn afresh

    for sigma, goal in itertools.pairwise(sigmas):
        missing = sigma**2 - goal**2
        fresh = missing * (goal / sigma) ** 2 if predictor == "ancestral" else missing
        mean, spread = step(missing, fresh, sigma, goal)
        for _ in range(corrector_steps):
            inverse = torch.linalg.inv(covariance + goal**2 * one)
            square = torch.trace(inverse @ (spread + torch.outer(mean, mean)) @ inverse)
            epsilon = 2 * r**2 * 2 / square
            mean, spread = step(epsilon, 2 * epsilon, goal, goal)
    return float(mean[1]), float(spread[1, 1])


@pytest.mark.parametrize("predictor", ["reverse_diffusion", "ancestral"])
def test_inpainting_is_right_with_a_corrector_and_wrong_without(monkeypatch, predictor):
    """Two unit normal pixels of correlation 0.9, the first known to be 1: the second has mean 0.9, variance 0.19."""
    rho, y, sigmas = 0.9, 1.0, geometric(50, 0.01, 80)
    made = []
    for corrector_steps in (0, 1, 2):
        how = sigmas, predictor, corrector_steps, 0.16, rho, y
        made.append(run_inpainting(monkeypatch, *how))
        assert made[-1] == pytest.approx(inpainting_recursion(*how), rel=1e-9)
    error = [abs(mean - rho * y) for mean, _ in made]
    assert error[0] > 0.2 and error[2] < error[1] < error[0] / 3
    assert made[0][1] > 1.4 * (1 - rho**2) and made[2][1] == pytest.approx(1 - rho**2, rel=0.1)


def test_inpainting_with_its_defaults_and_seeds(monkeypatch):
    y, known, sigmas = torch.rand(2, 1, 4, 4), torch.zeros(1, 1, 4, 4), geometric(3, 0.1, 6).float()
    known[..., :2] = 1
    run = lambda *how, seed=1: last(
        inpaint(curved, y, known, torch.ones_like(y), sigmas, *how, generator=torch.Generator().manual_seed(seed))
    )
    assert torch.equal(run(), run("reverse_diffusion", 1, 0.16)) and not torch.equal(run(), run(seed=2))
    assert (run() - y)[..., :2].abs().max() < 5 * 0.1
    score = Watched(curved)
    frames = list(inpaint(score, y, known, torch.ones_like(y), sigmas))
    assert len(frames) == 5 and len(score.sigma) == 10
    start = (score.x[0] - y)[..., :2]  # also the start has noise of the first scale where y is known
    assert 0.5 < float(start.std()) / 3 < 1.7 and torch.equal(score.x[0][..., 2:], torch.ones(2, 1, 4, 2))


# A digit to order


def guided_score(*how):
    return script("lesson_07_score_sde", "classifier").guided_score(*how)


SIGMAS = numbers(0.1, 0.5, 1, 2, 0.3, 1.5)


@pytest.mark.parametrize("digit", [0, 1, torch.tensor([0, 1, 1, 0, 1, 0])])
def test_with_an_exact_classifier_the_guided_score_is_that_of_the_class(digit):
    x = images_of(POINTS)
    modes = images_of(MODES[torch.as_tensor(digit).expand(6)])
    of_class = -(x - modes) / images_of(WIDTH**2 + SIGMAS**2)
    with torch.no_grad():  # as the samplers do
        torch.testing.assert_close(guided_score(mixture_score, posteriors, digit)(x, SIGMAS), of_class, **almost)
        base = mixture_score(x, SIGMAS)
        assert torch.equal(guided_score(mixture_score, posteriors, digit, 0.0)(x, SIGMAS), base)
        more = guided_score(mixture_score, posteriors, digit, 2.5)(x, SIGMAS)
    torch.testing.assert_close(more, base + 2.5 * (of_class - base), **almost)
    assert not x.requires_grad and not more.requires_grad


def test_a_classifier_that_does_not_look_at_the_image_changes_nothing():
    x, sigma = images_of(numbers(0.5)), numbers(2)
    even = lambda x, sigma: torch.full((len(x), 10), -math.log(10), dtype=x.dtype)
    assert torch.equal(guided_score(mixture_score, even, 1)(x, sigma), mixture_score(x, sigma))


def test_a_classifier_of_clean_images_is_wrong_by_far():
    clean = lambda x, sigma: posteriors(x, torch.zeros_like(sigma))
    x, sigma = images_of(numbers(0.5)), numbers(2)
    noisy = guided_score(mixture_score, posteriors, 1)(x, sigma) - mixture_score(x, sigma)
    blind = guided_score(mixture_score, clean, 1)(x, sigma) - mixture_score(x, sigma)
    assert float(noisy) > 100 * float(blind) > 0


def test_guided_samples_are_of_the_class(monkeypatch):
    score, x = guided_score(mixture_score, posteriors, 1), SIGMA_MAX * normal(300, 1, 1, 1)
    made = last(probability_flow(score, x, geometric(SIGMA_MAX, SIGMA_MIN, 60)))
    assert float(made.mean()) == pytest.approx(1, abs=0.1) and float(made.std()) == pytest.approx(WIDTH, rel=0.2)


def test_the_classifier_of_noisy_digits():
    classifier = script("lesson_07_score_sde", "classifier").NoisyDigitClassifier(width=8)
    x, sigma = torch.rand(3, 1, 28, 28), torch.tensor([0.01, 1.0, 15.0])
    log_p = classifier(x, sigma)
    assert log_p.shape == (3, 10) and log_p.dtype == torch.float32
    torch.testing.assert_close(log_p.exp().sum(1), torch.ones(3))
    torch.testing.assert_close(classifier(x[1:2], sigma[1:2]), log_p[1:2])  # no image counts for another
    assert not torch.allclose(classifier(x, sigma.flip(0)), log_p)
    log_p[:, 0].sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in classifier.parameters())
    seen = []
    classifier.convs[0].register_forward_hook(lambda module, inputs, out: seen.append(inputs[0]))
    classifier(0.3**0.5 * torch.ones(1, 1, 28, 28), torch.tensor([0.7**0.5]))
    torch.testing.assert_close(seen[0], torch.full_like(seen[0], 0.3**0.5))  # 0.3 + sigma^2 is 1


def test_the_classifier_says_before_its_training_that_it_cannot_be_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("output").write_text("in the way")
    module = script("lesson_07_score_sde", "classifier")
    monkeypatch.setattr(module, "NoisyDigitClassifier", None)
    with pytest.raises(LessonError, match="cannot write output/"):
        module.train()


def test_the_classifier_is_trained_on_training_digits_and_can_be_loaded(tmp_path, monkeypatch, capsys):
    """Digits and labels of the training, of which there are 300 here; it is tried on 50 others."""
    monkeypatch.chdir(tmp_path)
    module, used, made = script("lesson_07_score_sde", "classifier"), [], []
    some, noisy_digits = {"train": slice(300), "test": slice(50)}, module.noisy_digits
    for name in ("load_images", "load_labels"):
        load = getattr(common.data, name)
        few = lambda dataset, split="train", load=load: load(dataset, split)[some[split]]
        monkeypatch.setattr(module, name, few)

    def noisy(images, labels, generator, n):
        used.append((images, labels))
        return noisy_digits(images, labels, generator, n)

    class Classifier(module.NoisyDigitClassifier):
        def __init__(self):
            super().__init__()
            made.append(self)

    monkeypatch.setattr(module, "noisy_digits", noisy)
    monkeypatch.setattr(module, "NoisyDigitClassifier", Classifier)
    monkeypatch.setattr(module, "STEPS", 2)
    module.train()
    assert len(used) == 2 and capsys.readouterr().out.count(" % of the test digits are recognised\n") == 5
    for images, labels in used:
        assert torch.equal(images, common.data.load_images("mnist")[:300])
        assert torch.equal(labels, common.data.load_labels("mnist")[:300])
    loaded = module.load_classifier().state_dict()
    for name, weights in made[0].state_dict().items():
        torch.testing.assert_close(loaded[name], weights, rtol=1e-3, atol=1e-6)  # in half precision


def test_the_classifier_that_comes_with_the_lesson_knows_noisy_test_digits(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where nobody has made another one
    x, labels = (load("mnist", "test")[:500] for load in (common.data.load_images, common.data.load_labels))
    x = x / 255 + 0.1 * torch.randn(x.shape)
    log_p = script("lesson_07_score_sde", "classifier").load_classifier()(x, torch.full((500,), 0.1))
    assert (log_p.argmax(1) == labels).float().mean() > 0.9


def test_the_classifier_written_a_second_time():
    classifier = script("lesson_07_score_sde", "classifier").NoisyDigitClassifier(width=8)
    p = dict(classifier.named_parameters())
    x, sigma = torch.rand(3, 1, 28, 28), torch.tensor([0.01, 1.0, 15.0])
    with torch.no_grad():
        for weights in p.values():
            weights.add_(0.1 * torch.randn_like(weights))
        told = torch.stack([sigma.log() / 4, sigma.log().tanh()], dim=1)
        h = x / (0.3 + images_of(sigma) ** 2).sqrt()
        for k in range(3):
            h = F.conv2d(h, p[f"convs.{k}.weight"], p[f"convs.{k}.bias"], stride=2, padding=1)
            h = F.group_norm(h, 8, p[f"norms.{k}.weight"], p[f"norms.{k}.bias"])
            h = F.silu(h + (told @ p[f"embed.{k}.weight"].T + p[f"embed.{k}.bias"])[:, :, None, None])
        h = F.silu(h.flatten(1) @ p["hidden.weight"].T + p["hidden.bias"])
        expected = (h @ p["classes.weight"].T + p["classes.bias"]).log_softmax(1)
        torch.testing.assert_close(classifier(x, sigma), expected, rtol=1e-4, atol=1e-4)


def test_the_training_of_the_classifier_goes_down_in_half_a_cosine_over_all_noise_scales(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module, seen, rates = script("lesson_07_score_sde", "classifier"), [], []
    for name in ("load_images", "load_labels"):
        load = getattr(common.data, name)
        monkeypatch.setattr(module, name, lambda *which, load=load: load(*which)[:50])
    noisy_digits = module.noisy_digits

    def noisy(*how):
        seen.append(noisy_digits(*how))
        return seen[-1]

    class Optimizer(module.Optimizer):
        def __init__(self, network, name):
            super().__init__(network, name)
            self.network, self.name = network, name

        def step(self, rate):
            x, sigma, labels = seen[-1]
            right = self.network(x, sigma)[torch.arange(len(x)), labels].mean()
            gradient = torch.autograd.grad(-right, list(self.network.parameters()))
            for mine, g in zip(self.network.parameters(), gradient, strict=True):
                torch.testing.assert_close(mine.grad, g, rtol=1e-3, atol=1e-6)
            rates.append((self.name, rate))
            super().step(rate)

    monkeypatch.setattr(module, "noisy_digits", noisy)
    monkeypatch.setattr(module, "Optimizer", Optimizer)
    monkeypatch.setattr(module, "STEPS", 3)
    module.train()
    assert [name for name, _ in rates] == ["adam"] * 3
    assert [rate for _, rate in rates] == pytest.approx([2e-3, 1.5e-3, 0.5e-3])
    sigma = torch.cat([sigma for _, sigma, _ in seen])
    assert len(sigma) == 3 * 128 and sigma.min() < SIGMA_MIN and sigma.max() > SIGMA_MAX  # wherever samplers go


def test_noisy_digits_have_scales_that_are_even_in_their_logarithm():
    module, n = script("lesson_07_score_sde", "classifier"), 40
    images = torch.arange(10, dtype=torch.uint8)[:, None, None, None].expand(10, 1, 28, 28) * 20
    x, sigma, labels = module.noisy_digits(images, torch.arange(10), torch.Generator().manual_seed(0), n)
    part = n * (sigma / module.SIGMA_MIN).log() / math.log(module.SIGMA_MAX / module.SIGMA_MIN)
    assert part.floor().tolist() == list(range(n)) and (part - part.floor()).std() < 1e-3
    noise = (x - images_of(labels) * 20 / 255) / images_of(sigma)
    torch.testing.assert_close(noise.flatten(1).std(dim=1), torch.ones(n), rtol=0, atol=0.1)
    assert noise.flatten(1).mean(1).abs().max() < 0.15 and len(set(labels.tolist())) > 5


# The loss


def test_the_loss_is_equation_7():
    x, z, sigma = normal(3, 2, 2, 2), normal(3, 2, 2, 2, seed=1), numbers(0.1, 1, 5)
    found = denoising_score_matching_loss(curved, x, sigma, z)
    for k in range(3):
        noisy = x[k] + sigma[k] * z[k]
        s = -torch.tanh(noisy + sigma[k].log()) / sigma[k]
        expected = 0.5 * sum(float(sigma[k] * a + b) ** 2 for a, b in zip(s.flatten(), z[k].flatten()))
        assert float(found[k]) == pytest.approx(expected, rel=1e-12)
    assert found.shape == (3,)


def test_the_loss_of_zero_of_the_noise_and_of_the_best_network():
    """Half of the dimensions; none; and s^2 / (s^2 + sigma^2) of the half for N(0, s^2), averaged over ln sigma."""
    signs, s, D, B = Signs(64), 0.3, 64, 400
    signs.take()
    x, z = (signs.take().expand(B, 1, D, 1) for _ in range(2))
    a, b = math.log(SIGMA_MIN), math.log(SIGMA_MAX)
    sigma = (a + (b - a) * (torch.arange(B, dtype=torch.float64) + 0.5) / B).exp()
    zero = denoising_score_matching_loss(lambda x, sigma: torch.zeros_like(x), x, sigma, z)
    torch.testing.assert_close(zero, torch.full_like(zero, D / 2), **almost)
    told = denoising_score_matching_loss(lambda x, sigma: -z / images_of(sigma), x, sigma, z)
    torch.testing.assert_close(told, torch.zeros_like(told), **almost)
    best = denoising_score_matching_loss(gaussian_score(0, s), s * x, sigma, z)
    torch.testing.assert_close(best, D / 2 * s**2 / (s**2 + sigma**2), **almost)
    # s^2 / (s^2 + e^2u) du is d(u - ln(s^2 + e^2u) / 2)
    mean = (b - a - 0.5 * math.log((s**2 + SIGMA_MAX**2) / (s**2 + SIGMA_MIN**2))) / (b - a)
    assert float(best.mean()) == pytest.approx(D / 2 * mean, rel=1e-5)


def test_the_loss_of_the_score_of_a_mixture_is_the_smallest():
    """By quadrature over clean images and noise: 1/2 - sigma^2 / 2 E s^2, and more for any other function."""
    nodes, weights = (torch.tensor(values) for values in np.polynomial.hermite_e.hermegauss(60))
    weights = weights / weights.sum()
    clean = (MODES[:, None] + WIDTH * nodes).flatten()  # 2 modes x 60
    x, z = clean.repeat_interleave(60), nodes.repeat(120)
    weight = (weights.repeat(2)[:, None] / 2 * weights).flatten()
    for sigma in (0.3, 1.0, 3.0):
        scale = torch.full_like(x, sigma)
        grid = torch.linspace(-30, 30, 20_001, dtype=torch.float64)
        s = mixture_score(images_of(grid), torch.full_like(grid, sigma)).flatten()
        fisher = float(torch.trapezoid(log_density(grid, sigma).exp() * s**2, grid))
        scores = (lambda x, sigma, k=k: k * mixture_score(x, sigma) for k in (1.0, 0.99, 1.01))
        losses = [denoising_score_matching_loss(score, images_of(x), scale, images_of(z)) for score in scores]
        best, less, more = (float(weight @ loss) for loss in losses)
        assert best == pytest.approx(0.5 - sigma**2 * fisher / 2, abs=1e-6)
        assert less > best and more > best


def test_the_gradient_of_the_loss_reaches_the_network():
    network = ScoreNetwork(width=4, patch=2, blocks=1, sigma_max=SIGMA_MAX)
    x = torch.rand(2, 1, 16, 16)
    loss = denoising_score_matching_loss(network, x, torch.tensor([0.1, 3.0]), torch.randn_like(x))
    loss.mean().backward()
    assert network.last.weight.grad.abs().sum() > 0 and network.first.weight.grad.abs().sum() > 0


# The network


def network_of(seed=0, **arguments):
    torch.manual_seed(seed)
    return ScoreNetwork(**{"width": 8, "blocks": 1, "sigma_max": SIGMA_MAX, **arguments})


def with_embedding(network):
    """Weights that are zero at the start, as a training would have moved them."""
    for module in network.modules():
        if isinstance(module, InstanceNormPlusPlus):
            torch.nn.init.normal_(module.embed.weight, std=0.1)
    return network


def test_the_embedding_of_log_sigma():
    sigma = torch.tensor([0.001, 0.3, 1.0, 17.0])
    e = log_sigma_embedding(sigma)
    expected = [
        [f(k / 4 * math.log(s)) for f in (math.sin, math.cos) for k in range(1, 17)] for s in sigma.double().tolist()
    ]
    assert e.shape == (4, E) == (4, 32)
    torch.testing.assert_close(e, torch.tensor(expected), rtol=0, atol=2e-5)


def test_the_weights_of_lesson_4_fit_an_unconditioned_network():
    found = load_checkpoint(ROOT / "lesson_04_ncsnv2" / "pretrained.pt", "lesson_04_ncsnv2")
    options = {name: found["config"][name] for name in ("width", "patch", "blocks", "activation", "skip")}
    weights = {name: w.float() for name, w in found["ema"].items()}
    sigmas = weights["sigmas"]
    theirs = ScoreNetworkOfLesson4(sigmas, **options)
    theirs.load_state_dict(weights)
    ours = ScoreNetwork(**options, conditional=False, sigma_max=sigmas[0])
    assert float(ours.sigma_max) == float(sigmas[0])
    ours.load_state_dict({**{k: w for k, w in weights.items() if k != "sigmas"}, "sigma_max": sigmas[0]})
    i = torch.arange(0, len(sigmas), 8)
    x = torch.rand(len(i), 1, 28, 28) + images_of(sigmas[i]) * torch.randn(len(i), 1, 28, 28)
    with torch.no_grad():
        torch.testing.assert_close(ours(x, sigmas[i]), theirs(x, i), rtol=1e-6, atol=0)
        torch.testing.assert_close(ours(x, sigmas[i] * 3) * 3, theirs(x, i), rtol=1e-6, atol=0)  # 1 / sigma and no more


@pytest.mark.parametrize("skip", [False, True])
def test_with_more_blocks_an_unconditioned_network_is_that_of_lesson_4(skip):
    """As with --paper. Lesson 4's is the paper's by a test of its own."""
    sigmas, options = torch.tensor([9.0, 0.5]), {"width": 8, "patch": 1, "blocks": 3, "activation": "elu", "skip": skip}
    theirs = ScoreNetworkOfLesson4(sigmas, **options)
    ours = ScoreNetwork(**options, conditional=False, sigma_max=9.0)
    with torch.no_grad():
        for weights in theirs.parameters():
            weights.add_(0.1 * torch.randn_like(weights))
        theirs_by_name = {name: w for name, w in theirs.state_dict().items() if name != "sigmas"}
        ours.load_state_dict({**theirs_by_name, "sigma_max": sigmas[0]})
        x, i = torch.rand(2, 1, 16, 16), torch.arange(2)
        torch.testing.assert_close(ours(x, sigmas), theirs(x, i), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("channels, patch", [(1, 1), (1, 2), (3, 1), (3, 2)])
def test_a_conditioned_network(channels, patch, skip):
    network = with_embedding(network_of(channels=channels, patch=patch, skip=skip))
    x, sigma = torch.rand(3, channels, 20, 16), torch.tensor([0.01, 0.7, 10.0])
    s = network(x, sigma)
    assert s.shape == x.shape and s.dtype == torch.float32 and s.isfinite().all()
    torch.testing.assert_close(network(x[1:2], sigma[1:2]), s[1:2], rtol=1e-4, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        low = network(x, sigma)
    assert low.dtype == torch.float32 and float((low - s).detach().norm() / s.detach().norm()) < 0.05
    s.square().sum().backward()
    without = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == []


def test_sigma_is_more_than_a_divisor():
    """Pixels of 0 and 1 under noise scales this small are the same input in both copies: only the embedding differs."""
    network = network_of()
    x = torch.randint(2, (2, 1, 16, 16)).float()
    both = lambda: [sigma * network(x, torch.full((2,), sigma)).detach() for sigma in (0.02, 0.1)]
    torch.testing.assert_close(*both())
    with_embedding(network)
    a, b = both()
    assert float((a - b).norm() / a.norm()) > 0.02


@pytest.mark.parametrize("skip", [False, True])
def test_what_the_layers_see(skip):
    """The image, with a skip over the deviation that it should have; and its noise at full size, cut off at 4 sigma."""
    network, seen = network_of(skip=skip, patch=2), []
    network.first.register_forward_hook(lambda module, inputs, out: seen.append(inputs[0]))
    network.last.register_forward_hook(lambda module, inputs, out: torch.zeros_like(out))
    x, sigma = 2 * torch.randn(2, 1, 16, 16), torch.tensor([0.5, 10.0])
    s = network(x, sigma)
    scale = images_of(sigma)
    c = 1 / (0.3 + scale**2).sqrt() if skip else torch.ones_like(scale)
    cut = torch.maximum(torch.minimum(x / scale, torch.tensor(4.0)), torch.tensor(-4.0)) / 4
    assert (cut == 1).any() and (cut == -1).any()
    for p, q in itertools.product((0, 1), (0, 1)):  # channels: the image in its four places, and then the noise
        torch.testing.assert_close(seen[0][:, 2 * p + q], (c * x)[:, 0, p::2, q::2])
        torch.testing.assert_close(seen[0][:, 4 + 2 * p + q], cut[:, 0, p::2, q::2])
    torch.testing.assert_close(s, -c * x / scale if skip else torch.zeros_like(x))  # if the layers say 0


def test_the_embedding_moves_the_three_weights_of_a_normalisation():
    norm, x, e = InstanceNormPlusPlus(6, True), torch.randn(2, 6, 5, 5), torch.randn(2, E)
    assert norm.embed.weight.abs().sum() == 0  # an untrained network is not conditioned
    torch.nn.init.normal_(norm.embed.weight, std=0.1)
    change = e @ norm.embed.weight.T + norm.embed.bias
    gamma, alpha, beta = (w + change[:, 6 * k : 6 * k + 6] for k, w in enumerate((norm.gamma, norm.alpha, norm.beta)))
    mu, sd = x.mean((2, 3)), (x.var((2, 3), unbiased=False) + 1e-5).sqrt()
    of_means = (mu - mu.mean(1, keepdim=True)) / (mu.var(1, keepdim=True) + 1e-5).sqrt()
    per_channel = lambda w: w[:, :, None, None]
    expected = per_channel(gamma / sd) * (x - per_channel(mu)) + per_channel(beta + alpha * of_means)
    torch.testing.assert_close(norm(x, e), expected, rtol=1e-4, atol=1e-5)
    plain = InstanceNormPlusPlus(6, False)
    assert {name for name, _ in plain.named_parameters()} == {"gamma", "alpha", "beta"}


@pytest.mark.parametrize("size", [(15, 16), (16, 17)])
def test_odd_sizes_are_refused(size):
    with pytest.raises(ValueError, match="even height and width, not "):
        network_of()(torch.rand(1, 1, *size), torch.ones(1))


# The noise scales of the training


def drawn(B, focus, seed=0, least=0.001, most=SIGMA_MAX):
    draw = script("lesson_07_score_sde").draw_noise_scales
    return draw(B, least, most, focus, torch.Generator().manual_seed(seed))


def test_without_a_focus_noise_scales_are_even_in_their_logarithm():
    B = 50
    for seed in range(5):
        sigma = drawn(B, 0.0, seed).double()
        part = B * (SIGMA_MAX / sigma).log() / math.log(SIGMA_MAX / 0.001)
        torch.testing.assert_close(part.floor(), torch.arange(B).double())  # one in each B-th part
        torch.testing.assert_close(part - part.floor(), (part - part.floor()).mean().expand(B), rtol=0, atol=2e-3)
    firsts = torch.stack([B * (SIGMA_MAX / drawn(B, 0.0, seed)[0]).log() for seed in range(300)])
    firsts = firsts / math.log(SIGMA_MAX / 0.001)
    assert float(firsts.mean()) == pytest.approx(0.5, abs=0.07) and float(firsts.var()) == pytest.approx(
        1 / 12, rel=0.2
    )


@pytest.mark.parametrize("focus", [0.7, 0.05, 5.0])
def test_with_a_focus_their_density_is_the_documented_one(focus):
    """0.15 + exp(-0.3 ln^2(sigma / focus)) over ln sigma has its integral in terms of the error function."""

    def integral(log_sigma):
        t = log_sigma - math.log(focus)
        return 0.15 * t + math.sqrt(math.pi / 0.3) / 2 * torch.erf(math.sqrt(0.3) * t)

    B = 2000
    sigma = drawn(B, focus).double()
    ends = integral(numbers(0.001, SIGMA_MAX).log())
    share = (ends[1] - integral(sigma.log())) / (ends[1] - ends[0])
    u = B * share - torch.arange(B)
    assert u.min() > -0.05 and u.max() < 1.05 and u.std() < 0.02
    assert sigma.min() >= 0.001 * (1 - 1e-5) and sigma.max() <= SIGMA_MAX * (1 + 1e-5)


def test_a_single_noise_scale_and_its_range():
    many = torch.cat([drawn(1, 0.7, seed, 0.5, 0.6) for seed in range(200)])
    assert many.min() >= 0.5 * (1 - 1e-6) and many.max() <= 0.6 * (1 + 1e-6)
    assert many.min() < 0.505 and many.max() > 0.595
