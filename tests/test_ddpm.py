"""Lesson 5 without a network: schedule, loss, samplers and bound on data whose answer is known in closed form.

Data N(mu, s^2): x_t is N(sqrt(abar_t) mu, v_t) with v_t = abar_t s^2 + 1 - abar_t, and what a perfect network would say
is known. The recursions of mean and variance below are derived from that, and independently of the lesson's code.
"""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lesson_04_ncsnv2.sampler import ancestral_eta, consistent_annealed_sampling, smallest_eta
from lesson_05_ddpm.likelihood import bits_per_dim, discretised_log_likelihood, prior_term, terms
from lesson_05_ddpm.loss import noise_prediction_loss, noisy_image
from lesson_05_ddpm.noise_schedule import alpha_bars, linear_betas, posterior
from lesson_05_ddpm.sampler import ancestral_sampling, clean_image, ddim_sampling, inpaint
from tests.running import DIFFUSION

pytestmark = pytest.mark.lessons("lesson_05_ddpm")
BETAS = linear_betas(1000)
ABARS = alpha_bars(BETAS)
LN2 = math.log(2)


def gaussian_network(mu, s, betas=BETAS):
    """The exact noise prediction for data N(mu, s^2): E[eps | x_t] = sqrt(1 - abar) (x_t - sqrt(abar) mu) / v."""
    abars = alpha_bars(betas)

    def network(x_t, t):
        abar = abars[t][:, None, None, None]
        v = abar * s**2 + 1 - abar
        return (1 - abar).sqrt() * (x_t - abar.sqrt() * mu) / v

    return network


def normal(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def last(frames):
    *_, x = frames
    return x


# The schedule


def test_the_papers_schedule():
    assert BETAS.dtype == ABARS.dtype == torch.float64 and len(BETAS) == 1000
    assert BETAS[0] == 1e-4 and float(BETAS[-1]) == pytest.approx(0.02, rel=1e-12)
    assert BETAS.diff().std() < 1e-15  # evenly spaced
    assert float(1 - ABARS[0]) == pytest.approx(1e-4, rel=1e-12)  # what float32 tables lose
    product = 1.0
    for beta in BETAS.tolist():
        product *= 1 - beta
    assert float(ABARS[-1]) == pytest.approx(product, rel=1e-12) and 4.0e-5 < product < 4.1e-5


@pytest.mark.parametrize("arguments, said", [
    ((1000, 0.0), "beta_1 = 0 of T = 1000"), ((1000, 1e-4, 1.0), "beta_1000 = 1"), ((10, -0.1), "beta_1 = -0.1"),
    ((20, 2e-3, 1.5), "beta_14 = "), ((0,), "T = 0"), ((5, math.nan), "beta_1 = nan"),
])  # fmt: skip
def test_a_schedule_that_no_chain_can_have(arguments, said):
    with pytest.raises(ValueError, match=said):
        linear_betas(*arguments)


@given(st.integers(2, 300), st.floats(1e-5, 0.01), st.floats(0.011, 0.9))
def test_the_posterior_is_that_of_bayes_rule(T, beta_1, beta_T):
    """q(x_{t-1} | x_t, x_0) from the joint normal distribution of x_{t-1} and x_t given x_0: a regression."""
    betas = linear_betas(T, beta_1, beta_T)
    abar, (c1, c2, beta_tilde) = alpha_bars(betas), posterior(betas)
    before = torch.cat([torch.ones(1, dtype=torch.float64), abar[:-1]])
    covariance = (1 - betas).sqrt() * (1 - before)  # x_t = sqrt(alpha) x_{t-1} + noise
    slope = covariance / (1 - abar)
    torch.testing.assert_close(c2, slope, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(c1, before.sqrt() - slope * abar.sqrt(), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(beta_tilde, (1 - before) - slope * covariance, rtol=1e-5, atol=1e-9)
    assert (c1[0], c2[0], beta_tilde[0]) == (1, 0, 0)
    assert (beta_tilde <= betas).all()
    torch.testing.assert_close(c1 + c2 * abar.sqrt(), before.sqrt(), rtol=1e-9, atol=0)


# The loss


def test_the_loss_of_networks_whose_answer_is_known():
    """Zero: 1. The noise itself: 0. The best for N(0.3, 0.5^2): abar s^2 / v, by the variance of eps given x_t."""
    t, eps, x = torch.randint(1000, (400,)), normal(400, 1, 16, 16), 0.3 + 0.5 * normal(400, 1, 16, 16, seed=1)
    zero = noise_prediction_loss(lambda x_t, t: torch.zeros_like(x_t), x, ABARS, t, eps)
    assert zero.shape == (400,) and float(zero.mean()) == pytest.approx(1, abs=0.01)
    torch.testing.assert_close(noise_prediction_loss(lambda x_t, t: eps, x, ABARS, t, eps), torch.zeros_like(zero))
    for n in (0, 99, 499, 999):
        t = torch.full((400,), n)
        v = float(ABARS[n]) * 0.25 + 1 - float(ABARS[n])
        found = noise_prediction_loss(gaussian_network(0.3, 0.5), x, ABARS, t, eps).mean()
        assert float(found) == pytest.approx(float(ABARS[n]) * 0.25 / v, rel=0.02)


def test_a_noisy_image_is_the_chain_of_small_steps_taken_at_once():
    """Mean and variance of x_t by going through q(x_t | x_{t-1}) one step after the other."""
    mean, variance = 0.7, 0.0
    for beta in BETAS[:250].tolist():
        mean, variance = math.sqrt(1 - beta) * mean, (1 - beta) * variance + beta
    x, t = torch.full((2000, 1, 8, 8), 0.7, dtype=torch.float64), torch.full((2000,), 249)
    x_t = noisy_image(x, ABARS, t, normal(2000, 1, 8, 8))
    assert float(x_t.mean()) == pytest.approx(mean, abs=0.01) and float(x_t.var()) == pytest.approx(variance, rel=0.02)
    exact = noisy_image(x, ABARS, t, torch.ones_like(x))
    assert float(exact[0, 0, 0, 0]) == pytest.approx(mean + math.sqrt(variance), rel=1e-12)


# Sampling


def chain_of(mu, s, betas, variance):
    """Mean and variance after all steps, by a recursion: a step takes d to A d, A = sqrt(alpha_t) v_{t-1} / v_t."""
    m, V, abar = 0.0, 1.0, [1.0]
    for beta in betas.tolist():
        abar.append(abar[-1] * (1 - beta))
    v = [a * s**2 + 1 - a for a in abar]
    for t in range(len(betas), 0, -1):
        beta = float(betas[t - 1])
        A = math.sqrt(1 - beta) * v[t - 1] / v[t]
        fresh = {"small": beta * (1 - abar[t - 1]) / (1 - abar[t]), "large": beta}[variance] if t > 1 else 0.0
        m = math.sqrt(abar[t - 1]) * mu + A * (m - math.sqrt(abar[t]) * mu)
        V = A**2 * V + fresh
    return m, V


@pytest.mark.parametrize("variance", ["small", "large"])
@pytest.mark.parametrize("T, beta_1, beta_T", [(1000, 1e-4, 0.02), (100, 1e-3, 0.2), (10, 0.01, 0.9)])
def test_the_variance_of_a_whole_chain(variance, T, beta_1, beta_T):
    """Against the recursion; 24 000 chains, whose variance is known to 0.9 %."""
    betas = linear_betas(T, beta_1, beta_T)
    network, shape = gaussian_network(0.3, 0.5, betas), (1500, 1, 4, 4)
    x = last(ancestral_sampling(network, normal(*shape), betas, variance, clip=False,
                                generator=torch.Generator().manual_seed(1)))  # fmt: skip
    m, V = chain_of(0.3, 0.5, betas, variance)
    assert float(x.mean()) == pytest.approx(m, abs=0.01) and float(x.var()) == pytest.approx(V, rel=0.03)


def test_small_leaves_too_little_variance_and_large_too_much_and_more_steps_leave_less_of_an_error():
    small, large = ([chain_of(0.3, 0.5, linear_betas(T, 0.1 / T, 20 / T), v)[1] for T in (1000, 100, 25)]
                    for v in ("small", "large"))  # fmt: skip
    assert small[2] < small[1] < small[0] < 0.25 < large[0] < large[1] < large[2]


def test_one_step_from_the_exact_marginal():
    """Any sigma^2 gives A^2 v_t + sigma^2; only beta_t v_{t-1} / v_t, between small and large, gives v_{t-1}."""
    n, mu, s, draws = 499, 0.3, 0.5, (4000, 1, 8, 8)
    v, before = (float(a) * s**2 + 1 - float(a) for a in (ABARS[n], ABARS[n - 1]))
    x_t = math.sqrt(ABARS[n]) * mu + math.sqrt(v) * normal(*draws)
    for variance, fresh in (("small", posterior(BETAS)[2][n]), ("large", BETAS[n])):
        steps = ancestral_sampling(gaussian_network(mu, s), x_t, BETAS[: n + 1], variance, clip=False)
        x = next(steps)
        A = math.sqrt(1 - BETAS[n]) * before / v
        assert float(x.var()) == pytest.approx(A**2 * v + float(fresh), rel=0.01)
        assert float(x.mean()) == pytest.approx(math.sqrt(ABARS[n - 1]) * mu, abs=0.01)
    true = float(BETAS[n]) * before / v
    assert A**2 * v + true == pytest.approx(before, rel=1e-12)
    assert float(posterior(BETAS)[2][n]) < true < float(BETAS[n])


@pytest.mark.parametrize("variance", ["small", "large"])
def test_a_point_is_reached_exactly(variance):
    x = last(ancestral_sampling(gaussian_network(0.3, 0.0), normal(5, 1, 4, 4), BETAS, variance, clip=False))
    torch.testing.assert_close(x, torch.full_like(x, 0.3), rtol=0, atol=1e-9)


def test_the_form_of_algorithm_2_and_that_with_x_0_are_equal_without_the_clip(monkeypatch):
    x, eps, z = normal(2, 1, 4, 4), normal(2, 1, 4, 4, seed=1), normal(2, 1, 4, 4, seed=2)
    for n in (1, 10, 500, 999):
        beta, abar = float(BETAS[n]), float(ABARS[n])
        paper = (x - beta / math.sqrt(1 - abar) * eps) / math.sqrt(1 - beta) + math.sqrt(beta) * z
        monkeypatch.setattr("lesson_05_ddpm.sampler.noise_like", lambda x, generator: z)
        ours = next(ancestral_sampling(lambda x_t, t: eps, x, BETAS[: n + 1], "large", clip=False))
        torch.testing.assert_close(ours, paper, rtol=1e-9, atol=1e-9)


def test_the_clip_holds_the_guess_where_images_are():
    x = 3 * normal(4, 1, 4, 4)
    for n in (0, 500, 999):
        inside = clean_image(x, ABARS[n], torch.zeros_like(x), clip=True)
        assert inside.abs().max() == 1
        assert clean_image(x, ABARS[n], torch.zeros_like(x), clip=False).abs().max() > 1
    zero = lambda x_t, t: torch.zeros_like(x_t)
    assert last(ancestral_sampling(zero, x, BETAS)).abs().max() <= 1 + 1e-12
    assert last(ddim_sampling(zero, x, ABARS, torch.arange(0, 1000, 50))).abs().max() <= 1 + 1e-12
    # A network that says zero multiplies the start by 1 / sqrt(abar_T) = 157: what is called "variance explodes"
    wild = last(ddim_sampling(zero, x, ABARS, torch.arange(0, 1000), clip=False))
    torch.testing.assert_close(wild, x / ABARS[-1].sqrt())


def test_an_unknown_variance():
    with pytest.raises(ValueError, match="small"):
        next(ancestral_sampling(gaussian_network(0, 1), normal(1, 1, 2, 2), BETAS, "fixedlarge"))


def test_each_step_calls_the_network_with_its_t_and_the_last_one_adds_no_noise():
    seen = []

    def network(x_t, t):
        seen.append(t.tolist())
        return torch.zeros_like(x_t)

    betas = linear_betas(7, 0.01, 0.3)
    frames = list(ancestral_sampling(network, normal(2, 1, 2, 2), betas, "large", clip=False))
    assert seen == [[n, n] for n in range(6, -1, -1)] and len(frames) == 7
    torch.testing.assert_close(frames[-1], frames[-2] / (1 - betas[0]).sqrt())
    seen.clear()
    assert len(list(ddim_sampling(network, normal(2, 1, 2, 2), alpha_bars(betas), torch.tensor([0, 3, 6])))) == 3
    assert seen == [[6, 6], [3, 3], [0, 0]]


def curved(x, t):
    """Not linear, and not the same at each t: what a network could say."""
    return torch.tanh(x + 0.01 * t[:, None, None, None])


class Recorded:
    """Noise that is made once: the k-th time it is asked, the k-th of its tensors."""

    def __init__(self, count, shape):
        self.noise, self.k = normal(count, *shape), -1

    def __call__(self, x, generator=None):
        self.k += 1
        return self.noise[self.k]


def test_ddim_with_eta_1_is_algorithm_2(monkeypatch):
    betas = linear_betas(200, 5e-4, 0.1)
    results = []
    for sampler in (
        lambda x: ancestral_sampling(curved, x, betas, "small", clip=True),
        lambda x: ddim_sampling(curved, x, alpha_bars(betas), torch.arange(200), eta=1.0, clip=True),
    ):
        monkeypatch.setattr("lesson_05_ddpm.sampler.noise_like", Recorded(200, (2, 1, 4, 4)))
        results.append(last(sampler(normal(2, 1, 4, 4, seed=3))))
    torch.testing.assert_close(*results, rtol=0, atol=1e-11)


@pytest.mark.parametrize("eta", ["ddpm", "ddim"])
def test_the_bridge_to_lesson_4(monkeypatch, eta):
    """y = x / sqrt(abar) has noise sigma = sqrt((1 - abar) / abar); in y, Algorithm 2 is consistent annealed sampling.

    Its eta is 1 - sigma_{t-1}^2 / sigma_t^2 at each step, and DDIM's 1 - sigma_{t-1} / sigma_t. Lesson 4's last step is
    the denoising one, this lesson's is that of t = 1.
    """
    betas = linear_betas(300, 5e-4, 0.05)
    abars, shape = alpha_bars(betas), (2, 1, 4, 4)
    sigmas = ((1 - abars) / abars).sqrt().flip(0)  # (T,), descending
    x, noise = normal(*shape, seed=3), normal(299, *shape)
    y = x / abars[-1].sqrt()
    score = lambda y, n: -curved(y * abars[n].sqrt(), torch.full((2,), n)) / sigmas[299 - n]
    for k in range(299):  # one step of lesson 4 at a time: eta changes from step to step
        pair = sigmas[k : k + 2]
        choice = {"ddpm": ancestral_eta, "ddim": smallest_eta}[eta](pair)
        step = lambda y, i, k=k: score(y, 299 - k) if i[0] == 0 else torch.zeros_like(y)
        monkeypatch.setattr("lesson_04_ncsnv2.sampler.noise_like", lambda y, generator=None, k=k: noise[k])
        y = next(consistent_annealed_sampling(step, y, pair, 1, choice * float(pair[1]) ** 2))
    y = y + sigmas[-1] ** 2 * score(y, 0)  # lesson 4's denoising step
    monkeypatch.setattr("lesson_05_ddpm.sampler.noise_like", Recorded(300, shape))
    if eta == "ddpm":
        ours = last(ancestral_sampling(curved, x, betas, "small", clip=False))
    else:
        ours = last(ddim_sampling(curved, x, abars, torch.arange(300), clip=False))
    torch.testing.assert_close(ours, y, rtol=0, atol=1e-12 * float(y.abs().max()))


def test_ddim_carries_a_gaussian_over_exactly():
    """In the limit of many steps it is an ODE, whose map takes x_T - sqrt(abar_T) mu times s / sqrt(v_T)."""
    x = normal(50, 1, 4, 4)
    found = last(ddim_sampling(gaussian_network(0.3, 0.5), x, ABARS, torch.arange(1000), clip=False))
    v = float(ABARS[-1]) * 0.25 + 1 - float(ABARS[-1])
    expected = 0.3 + 0.5 / math.sqrt(v) * (x - math.sqrt(ABARS[-1]) * 0.3)
    torch.testing.assert_close(found, expected, rtol=0, atol=0.02)


def test_inpainting_keeps_what_is_known_and_fills_in_the_rest():
    y, known = torch.full((500, 1, 4, 4), 0.9, dtype=torch.float64), torch.zeros(1, 1, 4, 4, dtype=torch.float64)
    known[..., :2] = 1
    steps = torch.arange(0, 1000, 5)
    made = last(inpaint(gaussian_network(0.3, 0.1), y, known, normal(500, 1, 4, 4), ABARS, steps))
    assert torch.equal(made[..., :2], y[..., :2])
    kept = torch.cat([torch.ones(1, dtype=torch.float64), ABARS[steps]])
    mean, variance = chain_of(0.3, 0.1, 1 - kept[1:] / kept[:-1], "small")  # pixels are independent: as without y
    assert float(made[..., 2:].mean()) == pytest.approx(mean, abs=0.01)
    assert float(made[..., 2:].var()) == pytest.approx(variance, rel=0.05)


@pytest.mark.lessons(*DIFFUSION)
def test_known_pixels_have_the_noise_of_each_t(lesson):
    def zero(x_t, t):
        eps = torch.zeros_like(x_t)
        return eps if lesson.name == "lesson_05_ddpm" else (eps, eps)

    y, known, kept = torch.full((400, 1, 8, 8), 0.7, dtype=torch.float64), torch.ones(1, 1, 1, 1), [0, 100, 300, 700]
    frames = lesson.sampler.inpaint(zero, y, known, normal(400, 1, 8, 8), ABARS, torch.tensor(kept))
    for x, abar in zip(frames, [*(float(ABARS[t]) for t in (300, 100, 0)), 1.0], strict=True):
        assert float(x.mean()) == pytest.approx(0.7 * math.sqrt(abar), abs=0.03)
        assert float(x.std()) == pytest.approx(math.sqrt(1 - abar), rel=0.03, abs=1e-9)


@pytest.mark.lessons(*DIFFUSION)
def test_samplers_and_the_bound_are_decided_by_their_generator_and_keep_no_graph(lesson):
    weight = torch.ones((), requires_grad=True)

    def network(x_t, t):
        eps = weight * torch.tanh(x_t)
        return eps if lesson.name == "lesson_05_ddpm" else (eps, eps)

    x, betas, kept, known = normal(2, 1, 4, 4), linear_betas(10, 0.01, 0.4), torch.arange(10), torch.zeros(1, 1, 4, 4)
    known[..., :2] = 1
    sampler, abars = lesson.sampler, alpha_bars(betas)
    chain = (betas,) if lesson.name == "lesson_05_ddpm" else (betas, kept)

    def made(seed, **how):
        how["generator"] = torch.Generator().manual_seed(seed)
        yield last(sampler.ancestral_sampling(network, x, *chain, **how))
        yield last(sampler.ddim_sampling(network, x, abars, kept, eta=1.0, **how))
        yield next(sampler.inpaint(network, x, known, x, abars, kept, **how))[..., :2]
        yield last(sampler.inpaint(network, x, known, x, abars, kept, **how))
        yield lesson.likelihood.bits_per_dim(network, x.clamp(-1, 1), betas, **how)

    for a, b, c in zip(made(1), made(1, clip=True), made(2), strict=True):
        assert torch.equal(a, b) and not torch.equal(a, c) and not a.requires_grad
    start = last(sampler.ddim_sampling(network, x, abars, kept))
    assert torch.equal(start, last(sampler.ddim_sampling(network, x, abars, kept, eta=0.0)))


# The bound


def kl(m1, v1, m2, v2):
    """KL of N(m1, v1) from N(m2, v2) by quadrature, in nats."""
    x = torch.linspace(-12, 12, 200_001, dtype=torch.float64) * math.sqrt(v1) + m1
    ln1, ln2 = (-((x - m) ** 2) / (2 * v) - 0.5 * math.log(2 * math.pi * v) for m, v in ((m1, v1), (m2, v2)))
    return float(torch.trapezoid(ln1.exp() * (ln1 - ln2), x))


def test_the_256_probabilities_of_the_decoder_sum_to_1():
    levels = (torch.arange(256, dtype=torch.float64) / 127.5 - 1)[:, None]
    means, total = torch.tensor([-1.3, -1, -0.4, 0.003, 0.99, 1.2], dtype=torch.float64), 0
    for sigma in (0.005, 0.1, 1.0):
        total = discretised_log_likelihood(levels, means, torch.tensor(sigma)).exp().sum(0)
        torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-12)


def test_the_decoder_by_erf_and_far_out():
    """Where erf is exact enough, it is the same; 30 standard deviations out, where erf gives ln 0, Mills' ratio is."""
    Phi = lambda u: 0.5 * (1 + math.erf(u / math.sqrt(2)))
    x, mean, sigma = 2 * 127 / 255 - 1, 0.02, 0.03
    expected = math.log(Phi((x + 1 / 255 - mean) / sigma) - Phi((x - 1 / 255 - mean) / sigma))
    found = discretised_log_likelihood(torch.tensor(x, dtype=torch.float64), torch.tensor(mean), sigma)
    assert float(found) == pytest.approx(expected, rel=1e-6)
    for mean in (-0.6, 0.6):  # both tails
        x, sigma = torch.tensor(2 * 127 / 255 - 1, dtype=torch.float64), 0.02
        near = (abs(mean - float(x)) - 1 / 255) / sigma  # the nearer edge of the bin, in standard deviations
        mills = -(near**2) / 2 - math.log(near * math.sqrt(2 * math.pi))
        assert float(discretised_log_likelihood(x, torch.tensor(mean), sigma)) == pytest.approx(mills, rel=1e-3)
    edge = torch.tensor([-1.0, 1.0])
    assert discretised_log_likelihood(edge, 1.2 * edge, 0.01).abs().max() < 1e-12  # a mean beyond the edge: certain


def test_the_prior_term():
    for T, x in ((100, 0.5), (1000, -1.0)):
        abar = float(alpha_bars(linear_betas(T))[-1])
        expected = kl(math.sqrt(abar) * x, 1 - abar, 0, 1) / LN2
        found = prior_term(torch.full((1, 1, 2, 2), x), alpha_bars(linear_betas(T))[-1])
        assert float(found) == pytest.approx(expected, rel=1e-4, abs=1e-12)


@pytest.mark.parametrize("variance", ["small", "large"])
def test_each_term_is_the_kl_of_what_happened_from_what_was_expected(variance, monkeypatch):
    betas = linear_betas(20, 0.01, 0.3)
    (c1, c2, beta_tilde), abars = posterior(betas), alpha_bars(betas)
    monkeypatch.setattr("lesson_05_ddpm.likelihood.noise_like", lambda x, generator: torch.full_like(x, 0.8))
    x_0 = torch.full((1, 1, 1, 1), 0.4, dtype=torch.float64)
    found = bits_per_dim(gaussian_network(0.1, 0.5, betas), x_0, betas, variance, clip=False)[0]
    assert found.shape == (21,)
    for n in (1, 5, 19):
        x_t = math.sqrt(abars[n]) * 0.4 + math.sqrt(1 - abars[n]) * 0.8
        v = float(abars[n]) * 0.25 + 1 - float(abars[n])
        guess = 0.1 + math.sqrt(abars[n]) * 0.25 * (x_t - math.sqrt(abars[n]) * 0.1) / v
        sigma2 = float(beta_tilde[n] if variance == "small" else betas[n])
        means = (float(c1[n]) * x + float(c2[n]) * x_t for x in (0.4, guess))
        expected = kl(next(means), float(beta_tilde[n]), next(means), sigma2) / LN2
        assert float(found[n]) == pytest.approx(expected, rel=1e-4)


def expected_terms(mu, s, betas, variance):
    """Means over data N(mu, s^2) of L_1, ..., L_{T-1} in bits with the best network, of error c1^2 Var(x_0 | x_t)."""
    abars, (c1, _, beta_tilde) = alpha_bars(betas), posterior(betas)
    error = s**2 * (1 - abars) / (abars * s**2 + 1 - abars)
    sigma2 = beta_tilde if variance == "small" else betas
    return (0.5 * ((sigma2 / beta_tilde).log() - 1 + (beta_tilde + c1**2 * error) / sigma2) / LN2)[1:]


@pytest.mark.parametrize("variance", ["small", "large"])
def test_the_bound_on_gaussian_data(variance):
    x_0 = 0.3 + 0.1 * normal(300, 1, 8, 8)
    found = bits_per_dim(gaussian_network(0.3, 0.1), x_0, BETAS, variance, clip=False,
                         generator=torch.Generator().manual_seed(0)).mean(0)  # fmt: skip
    expected = expected_terms(0.3, 0.1, BETAS, variance)
    torch.testing.assert_close(found[1:-1].sum(), expected.sum(), rtol=0.01, atol=0)
    torch.testing.assert_close(found[[2, 20, 200]], expected[[1, 19, 199]], rtol=0.05, atol=0)


def gray_levels(s, *shape):
    """Pixels of 256 gray levels in [-1, 1], nearly N(0, s^2), and the probability (256,) of each level."""
    levels = torch.linspace(-1, 1, 256, dtype=torch.float64)
    p = torch.softmax(-(levels**2) / (2 * s**2), dim=0)
    some = torch.multinomial(p, math.prod(shape), True, generator=torch.Generator().manual_seed(3))
    return levels[some].view(shape), p


def whole_bound(s, p, betas, variances):
    """The bound of a perfect network on gray_levels, by the chain rule: entropy + KL_T + ... + KL_1.

    KL_T is that of q(x_T) from N(0, 1), KL_t that of the true step back from the model's, both with the same mean; at
    t = 1 it is that of the levels behind x_1 from the decoder's, by quadrature over x_1. variances (T,) of the model.
    """
    abar = torch.cat([torch.ones(1, dtype=torch.float64), (1 - betas).cumprod(0)])
    v = abar * s**2 + 1 - abar
    ratio = betas * v[:-1] / v[1:] / variances  # of the true variance to the model's
    steps = 0.5 * (ratio - 1 - ratio.log())[1:].sum()
    last = 0.5 * (v[-1] - 1 - v[-1].log())
    x_1 = torch.linspace(-8, 8, 4001, dtype=torch.float64)[:, None] * v[1].sqrt()
    levels, a = torch.linspace(-1, 1, 256, dtype=torch.float64), abar[1].sqrt()
    joint = p * torch.exp(-((x_1 - a * levels) ** 2) / (2 * (1 - abar[1])))
    joint /= joint.sum()
    decoder = torch.distributions.Normal(a * s**2 * x_1 / v[1], variances[0].sqrt())
    edges = torch.cat([torch.tensor([-math.inf]), (levels[1:] + levels[:-1]) / 2, torch.tensor([math.inf])])
    q = decoder.cdf(edges).diff(dim=1).clamp(min=1e-300)
    first = torch.special.entr(joint.sum(1)).sum() - torch.special.entr(joint).sum() - (joint * q.log()).sum()
    return float(torch.special.entr(p).sum() + last + steps + first) / LN2


@pytest.mark.parametrize("variance, excess", [("small", 0.74), ("large", 0.13)])
def test_the_bound_is_the_entropy_and_what_the_variances_cost(variance, excess):
    x_0, p = gray_levels(0.2, 300, 1, 8, 8)
    beta_tilde = posterior(BETAS)[2].clone()
    beta_tilde[0] = beta_tilde[1]
    sigma2 = beta_tilde if variance == "small" else torch.cat([beta_tilde[:1], BETAS[1:]])
    found = bits_per_dim(gaussian_network(0, 0.2), x_0, BETAS, variance, clip=False,
                         generator=torch.Generator().manual_seed(0)).mean(0)  # fmt: skip
    expected = whole_bound(0.2, p, BETAS, sigma2)
    assert float(found.sum()) == pytest.approx(expected, abs=0.03)
    assert expected - float(torch.special.entr(p).sum()) / LN2 == pytest.approx(excess, abs=0.01)


def test_with_the_true_variance_the_bound_is_the_entropy_plus_the_prior_term():
    """The true reverse variance is beta_t v_{t-1} / v_t. For data N(0, 1) it is beta_t: "large" is exact.

    So L_1 + ... + L_{T-1} is the mutual information of x_0 and x_1, and with the entropy of x_0 given x_1 that is all.
    """
    abar_1 = float(ABARS[0])
    information = 0.5 * math.log2(1 / (1 - abar_1))  # s = 1: v_1 = 1, Var(x_0 | x_1) = 1 - abar_1
    total = float(expected_terms(0, 1, BETAS, "large").sum())
    prior = 0.5 * float(ABARS[-1] * (1 - 1) - torch.log1p(-ABARS[-1])) / LN2
    assert total + prior == pytest.approx(information, rel=1e-4)
    assert float(expected_terms(0, 1, BETAS, "small").sum()) > total  # every other choice costs more


def test_a_certain_black_pixel_costs_what_the_fixed_variances_must():
    """x_0 = -1 and a perfect network: only the mismatch of the variances, and the half of the bell inside the bin."""
    x_0 = torch.full((2, 1, 3, 3), -1.0, dtype=torch.float64)
    beta_tilde = posterior(BETAS)[2]
    L_0 = -math.log2(0.5 * (1 + math.erf(1 / 255 / math.sqrt(2 * beta_tilde[1]))))
    excess = (0.5 * ((BETAS / beta_tilde).log() - 1 + beta_tilde / BETAS) / LN2)[1:].sum()
    for variance, rest in (("small", 0.0), ("large", float(excess))):
        found = bits_per_dim(gaussian_network(-1, 0.0), x_0, BETAS, variance)
        torch.testing.assert_close(found[:, 0], torch.full((2,), L_0, dtype=torch.float64), rtol=1e-6, atol=0)
        assert float(found[0, 1:-1].sum()) == pytest.approx(rest, abs=1e-6)


def test_rate_and_distortion_lie_on_shannons_curve():
    """Data N(0, 1) and the large variance, which is exact: what x_T, ..., x_t have cost is 1/2 log2(1 / distortion)."""
    x_0 = normal(400, 1, 8, 8)
    rate = float(prior_term(x_0, ABARS[-1]).mean())
    generator = torch.Generator().manual_seed(0)
    found = terms(gaussian_network(0, 1), x_0, BETAS, "large", clip=False, generator=generator)
    for n, (L, error) in zip(reversed(range(1000)), found, strict=True):
        if n in (500, 100, 10, 1):
            distortion = 1 - float(ABARS[n])  # Var(x_0 | x_t)
            assert float(error.mean()) == pytest.approx(distortion, rel=0.05)
            assert rate == pytest.approx(-0.5 * math.log2(distortion), rel=0.02)
        rate += float(L.mean())


def test_the_bound_needs_two_steps_and_a_known_variance():
    for betas, variance in ((BETAS[:1], "small"), (BETAS, "learned")):
        with pytest.raises(ValueError, match="the bound needs"):
            bits_per_dim(gaussian_network(0, 1), torch.zeros(1, 1, 2, 2), betas, variance)
    assert bits_per_dim(gaussian_network(0, 1, BETAS[:2]), torch.zeros(1, 1, 2, 2), BETAS[:2]).shape == (1, 3)
