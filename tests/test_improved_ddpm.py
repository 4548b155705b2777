"""Lesson 9 without a network: schedules, the learned variance, its loss and its samplers on data N(mu, s^2).

There x_t has the variance v_t = abar_t s^2 + 1 - abar_t, and the true step back has the variance beta_t v_{t-1} / v_t.
"""

import copy
import math
from types import SimpleNamespace

import pytest
import torch

from lesson_05_ddpm import likelihood as likelihood_5
from lesson_05_ddpm import noise_schedule as noise_schedule_5
from lesson_05_ddpm import sampler as sampler_5
from lesson_09_improved_ddpm import likelihood as likelihood_9
from lesson_09_improved_ddpm import loss as loss_9
from lesson_09_improved_ddpm.likelihood import bits_per_dim
from lesson_09_improved_ddpm.loss import (
    bound_term,
    hybrid_loss,
    learned_log_variance,
    noise_prediction_loss,
    variational_term,
)
from lesson_09_improved_ddpm.noise_network import NoiseNetwork
from lesson_09_improved_ddpm.noise_schedule import (
    alpha_bars,
    cosine_betas,
    linear_betas,
    posterior,
    respaced_betas,
    spaced_timesteps,
)
from lesson_09_improved_ddpm.sampler import ancestral_sampling, ddim_sampling, inpaint
from lesson_09_improved_ddpm.timestep_sampler import LossAwareTimesteps, UniformTimesteps
from tests.running import quick, read_checkpoint, script
from tests.test_ddpm import expected_terms, gray_levels, whole_bound
from tests.test_noise_network import reference

pytestmark = pytest.mark.lessons("lesson_09_improved_ddpm")
NINE = "lesson_09_improved_ddpm"
LINEAR, COSINE = linear_betas(1000), cosine_betas(1000)
MU, S, ABAR_1 = 0.3, 0.5, float(1 - LINEAR[0])


def normal(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def last(frames):
    *_, x = frames
    return x


def true_variance(betas, s=S):
    """beta_t v_{t-1} / v_t, (T,)."""
    abar = torch.cat([torch.ones(1, dtype=torch.float64), (1 - betas).cumprod(0)])
    v = abar * s**2 + 1 - abar
    return betas * v[:-1] / v[1:]


def best_v(betas, s=S):
    """The v (T,) of the true variance: how far its logarithm lies between those of beta_tilde and beta."""
    low = posterior(betas)[2].clone()
    low[0] = low[1]
    return (true_variance(betas, s) / low).log() / (betas / low).log()


def gaussian_network(betas, mu=MU, s=S, v=None, told=None):
    """The exact noise prediction and, unless v is given, the exact v. told: what t each entry of betas goes by."""
    abars, best = (1 - betas).cumprod(0), best_v(betas, s) if v is None else torch.full_like(betas, v)
    index = {int(t): k for k, t in enumerate(range(len(betas)) if told is None else told)}

    def network(x_t, t):
        k = torch.tensor([index[n] for n in t.tolist()])
        abar = abars[k][:, None, None, None]
        eps = (1 - abar).sqrt() * (x_t - abar.sqrt() * mu) / (abar * s**2 + 1 - abar)
        return eps, best[k][:, None, None, None].expand_as(x_t).to(x_t)

    return network


# Schedules


def test_the_cosine_schedule():
    for T in (100, 1000, 4000):
        betas = cosine_betas(T)
        assert betas.dtype == torch.float64 and betas.shape == (T,) and betas.max() <= 0.999
        f = lambda t, T=T: math.cos((t / T + 0.008) / 1.008 * math.pi / 2) ** 2  # Eq. 17
        for t in (1, T // 4, T // 2, T - 1):
            assert float(alpha_bars(betas)[t - 1]) == pytest.approx(f(t) / f(0), rel=1e-9)
        assert betas[-1] == 0.999 and (betas[:-1] < 0.999).all()  # the last beta alone is cut
    assert math.sqrt(COSINE[0]) < 1 / 127.5  # what s = 0.008 is for: the first noise is below one gray level's bin
    with pytest.raises(ValueError, match="T = 0"):
        cosine_betas(0)


def test_the_linear_schedule_of_other_T_ends_in_as_much_noise_and_is_refused_where_a_beta_is_1():
    """Sec. 3.2: betas times 1000 / T, so that what is left of the image stays the same."""
    schedule = script(NINE, "sample").schedule
    config = SimpleNamespace(T=1000, schedule="linear")
    left = float(schedule(config)[1][-1])
    assert torch.equal(schedule(config)[0], LINEAR)
    for T in (250, 4000):
        config.T = T
        betas, abars = schedule(config)
        assert len(betas) == T and float(betas[0]) == pytest.approx(0.1 / T)
        assert math.log(float(abars[-1])) == pytest.approx(math.log(left), rel=0.05)
    config.T = 20  # 1000 / 20 times 0.02 is 1
    with pytest.raises(ValueError, match="beta_20 = 1"):
        schedule(config)


def test_kept_timesteps_have_both_ends_and_are_evenly_spaced():
    assert spaced_timesteps(1000, 10).tolist() == [0, 111, 222, 333, 444, 555, 666, 777, 888, 999]
    assert torch.equal(spaced_timesteps(50, 50), torch.arange(50))
    for T, K in ((1000, 100), (1000, 25), (4000, 250)):
        kept = spaced_timesteps(T, K)
        assert kept.shape == (K,) and kept[0] == 0 and kept[-1] == T - 1
        assert set(kept.diff().tolist()) <= {(T - 1) // (K - 1), (T - 1) // (K - 1) + 1}
    for K in (1, 1001):
        with pytest.raises(ValueError, match=f"not {K}"):
            spaced_timesteps(1000, K)


@pytest.mark.parametrize("betas", [LINEAR, COSINE], ids=["linear", "cosine"])
def test_a_chain_with_some_of_the_timesteps_has_the_same_abar_there(betas):
    kept = spaced_timesteps(1000, 37)
    torch.testing.assert_close(alpha_bars(respaced_betas(betas, kept)), alpha_bars(betas)[kept], rtol=1e-9, atol=1e-15)
    torch.testing.assert_close(respaced_betas(betas, torch.arange(1000)), betas, rtol=1e-9, atol=1e-15)


def test_posterior_and_refusals_are_lesson_5s():
    for betas in (LINEAR, COSINE):
        for ours, theirs in zip(posterior(betas), noise_schedule_5.posterior(betas), strict=True):
            assert torch.equal(ours, theirs)
    for first, said in ((0.0, "beta_1 = 0"), (-0.1, "beta_1 = -0.1"), (math.nan, "beta_1 = nan")):
        with pytest.raises(ValueError, match=said):
            linear_betas(10, first)


# The learned variance


def test_v_goes_from_beta_tilde_to_beta_on_a_logarithmic_scale():
    t = torch.tensor([1, 10, 500])
    low, high = posterior(LINEAR)[2][t], LINEAR[t]
    for v, expected in ((0, low), (1, high), (0.5, (low * high).sqrt()), (-1, low**2 / high)):
        found = learned_log_variance(torch.full((3, 1, 2, 2), v, dtype=torch.float64), LINEAR, t).exp()
        torch.testing.assert_close(found, expected[:, None, None, None].expand(3, 1, 2, 2))
    first = learned_log_variance(torch.zeros(1, 1, 1, 1, dtype=torch.float64), LINEAR, torch.tensor([0])).exp()
    assert float(first) == pytest.approx(float(posterior(LINEAR)[2][1]))  # beta_tilde_2, for beta_tilde_1 is 0


def test_the_true_variance_lies_between_and_tends_to_the_datas_at_the_noisy_end():
    for betas in (LINEAR, COSINE):
        v = best_v(betas)
        assert (v > 0).all() and (v < 1).all()
        assert float(v[-200]) == pytest.approx(S**2, abs=0.02) and v[1] > 0.99


# The losses


@pytest.mark.parametrize("s", [S, 0.1])
def test_the_best_v_has_the_smallest_bound(s):
    t, x_0, eps = torch.randint(1, 400, (300,)), MU + s * normal(300, 1, 6, 6), normal(300, 1, 6, 6, seed=1)
    best = variational_term(gaussian_network(LINEAR, s=s), x_0, LINEAR, t, eps).mean()
    for shift in (-0.3, 0.3):
        exact = gaussian_network(LINEAR, s=s)
        worse = lambda x_t, t, exact=exact, shift=shift: (exact(x_t, t)[0], exact(x_t, t)[1] + shift)
        assert variational_term(worse, x_0, LINEAR, t, eps).mean() > best


def test_the_bounds_gradient_moves_v_and_not_the_noise_prediction():
    eps, v = (torch.full((4, 1, 3, 3), n, dtype=torch.float64, requires_grad=True) for n in (0.1, 0.4))
    network = lambda x_t, t: (eps, v)
    x_0, t = MU + S * normal(4, 1, 3, 3), torch.tensor([0, 1, 50, 999])
    variational_term(network, x_0, LINEAR, t, normal(4, 1, 3, 3, seed=1)).sum().backward()
    assert eps.grad is None and (v.grad != 0).all() and v.grad.isfinite().all()
    v.grad = None
    bound_term(network, x_0, LINEAR, t, normal(4, 1, 3, 3, seed=1)).sum().backward()
    assert (eps.grad != 0).any() and eps.grad.isfinite().all()  # in the objective vlb both move


def test_hybrid_is_l_simple_and_lambda_times_the_whole_bound():
    """The factor T: over uniform t, the mean of lambda T L_t is lambda (L_0 + ... + L_{T-1})."""
    betas = linear_betas(25, 0.004, 0.8)
    network, x_0 = gaussian_network(betas), (MU + S * normal(400, 1, 6, 6)).clamp(-1, 1)
    t, eps = torch.arange(400) % 25, normal(400, 1, 6, 6, seed=2)  # every t as often
    simple = noise_prediction_loss(network, x_0, alpha_bars(betas), t, eps)
    terms = bits_per_dim(network, x_0, betas, clip=False, generator=torch.Generator().manual_seed(1))
    for lambda_ in (0.001, 1.0):
        found = hybrid_loss(network, x_0, betas, t, eps, lambda_).mean()
        expected = simple.mean() + lambda_ * terms[:, :-1].sum(1).mean()
        assert float(found) == pytest.approx(float(expected), rel=0.02)
    assert float(terms[:, :-1].sum(1).mean()) > 1  # so that the term is seen


def test_hybrid_calls_the_network_once():
    calls = []
    exact = gaussian_network(LINEAR)
    network = lambda x_t, t: calls.append(t) or exact(x_t, t)
    hybrid_loss(network, normal(2, 1, 3, 3), LINEAR, torch.tensor([0, 700]), normal(2, 1, 3, 3, seed=1))
    assert len(calls) == 1


@pytest.mark.parametrize("v, variance", [(0.0, "small"), (1.0, "large")])
def test_terms_are_lesson_5s_where_v_is_0_or_1(v, variance):
    """But for L_0 with beta, for which lesson 5 has beta_tilde_2."""
    x_0, noise = normal(3, 1, 4, 4).clamp(-1, 1), lambda: torch.Generator().manual_seed(3)
    betas = linear_betas(30, 0.01, 0.4)
    network = gaussian_network(betas, v=v)
    ours = bits_per_dim(network, x_0, betas, generator=noise())
    fixed = bits_per_dim(network, x_0, betas, generator=noise(), variance=variance)
    theirs = likelihood_5.bits_per_dim(lambda x, t: network(x, t)[0], x_0, betas, variance, generator=noise())
    torch.testing.assert_close(ours[:, 1:], theirs[:, 1:], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(fixed, theirs, rtol=1e-9, atol=1e-12)
    if v == 0:
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_one_term_of_the_loss_is_that_of_the_bound(monkeypatch):
    monkeypatch.setattr("lesson_09_improved_ddpm.likelihood.noise_like", lambda x, generator: torch.full_like(x, 0.6))
    betas, x_0 = linear_betas(20, 0.01, 0.4), normal(2, 1, 3, 3).clamp(-1, 1)
    network = gaussian_network(betas, v=0.3)
    whole = bits_per_dim(network, x_0, betas, clip=False)
    for n in (0, 1, 19):
        found = bound_term(network, x_0, betas, torch.full((2,), n), torch.full_like(x_0, 0.6))
        torch.testing.assert_close(found, whole[:, n], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("betas", [LINEAR, COSINE, cosine_betas(4000)], ids=["linear", "cosine", "cosine 4000"])
def test_with_the_true_variance_the_bound_is_the_information_in_x_1(betas):
    """L_1 + ... + L_{T-1} + L_T = I(x_0; x_1) + KL(q(x_T) | N(0, 1)), and no other variance has as little."""
    abar, (c1, _, beta_tilde) = (1 - betas).cumprod(0), posterior(betas)
    error = S**2 * (1 - abar) / (abar * S**2 + 1 - abar)  # Var(x_0 | x_t)
    bits = lambda sigma2: (0.5 * ((sigma2 / beta_tilde).log() - 1 + (beta_tilde + c1**2 * error) / sigma2))[1:].sum()
    information = 0.5 * math.log(S**2 / float(error[0]))
    v_T = float(abar[-1]) * S**2 + 1 - float(abar[-1])
    m_T = math.sqrt(abar[-1]) * MU
    prior = 0.5 * (float(abar[-1]) * (S**2 + MU**2 - 1) - math.log1p(-float(abar[-1])))  # E[L_T]
    assert float(bits(true_variance(betas))) + prior == pytest.approx(
        information + 0.5 * (v_T + m_T**2 - 1 - math.log(v_T)), rel=1e-6
    )
    assert bits(beta_tilde) > bits(true_variance(betas)) < bits(betas)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("T", [1000, 4000])
def test_with_the_true_variance_the_bound_is_the_entropy_and_the_prior_term(schedule, T):
    """Of pixels with 256 levels, by likelihood.py itself; a fixed variance costs what it has to (at T = 1000).

    With cosine 4000 the first step is narrower than a level, which the decoder's bell does not know: 0.06 bits.
    """
    x_0, p = gray_levels(0.2, 64, 1, 8, 8)
    betas = linear_betas(T, 0.1 / T, 20 / T) if schedule == "linear" else cosine_betas(T)
    small = posterior(betas)[2].clone()
    small[0] = small[1]
    variances = {"learned": true_variance(betas, 0.2)}
    variances |= {"small": small, "large": torch.cat([small[:1], betas[1:]])} if T == 1000 else {}
    expected = {variance: whole_bound(0.2, p, betas, table) for variance, table in variances.items()}
    entropy = float(torch.special.entr(p).sum()) / math.log(2)
    assert entropy < expected["learned"] < entropy + (0.06 if (schedule, T) == ("cosine", 4000) else 0.013)
    assert T == 4000 or expected["small"] > entropy + 0.4
    for variance, bits in expected.items():
        found = bits_per_dim(gaussian_network(betas, 0, 0.2), x_0, betas, clip=False, variance=variance,
                             generator=torch.Generator().manual_seed(0))  # fmt: skip
        assert float(found.mean(0).sum()) == pytest.approx(bits, abs=0.07)


def test_a_certain_pixel_wants_a_variance_below_beta_tilde():
    """x_0 = -1, at the first step: the smaller the variance, the more of the bell is in the pixel's bin."""
    x_0, t = torch.full((1, 1, 2, 2), -1.0, dtype=torch.float64), torch.tensor([0])
    costs = []
    for v in (1.0, 0.0, -1.0, -4.0):
        network = lambda x_t, t, v=v: ((x_t + math.sqrt(ABAR_1)) / math.sqrt(1 - ABAR_1), torch.full_like(x_t, v))
        costs.append(float(variational_term(network, x_0, LINEAR, t, normal(1, 1, 2, 2))))
    assert costs == sorted(costs, reverse=True) and costs[-1] < 0.1 < 0.5 < costs[1]
    for v, cost in zip((1.0, 0.0), costs):  # half of the bell, and what is within half a bin of its middle
        sigma = math.sqrt(LINEAR[0] if v else posterior(LINEAR)[2][1])
        assert cost == pytest.approx(-math.log2(0.5 * (1 + math.erf(1 / 255 / sigma / math.sqrt(2)))), rel=1e-6)


def test_the_bound_of_a_respaced_chain_is_that_of_its_betas():
    """And the network is told the original timesteps."""
    kept = spaced_timesteps(1000, 20)
    betas, x_0 = respaced_betas(LINEAR, kept), normal(2, 1, 3, 3).clamp(-1, 1)
    noise = lambda: torch.Generator().manual_seed(5)
    whole = bits_per_dim(gaussian_network(betas), x_0, betas, clip=False, generator=noise())
    told = bits_per_dim(gaussian_network(betas, told=kept), x_0, betas, kept, clip=False, generator=noise())
    assert torch.equal(whole, told) and whole.shape == (2, 21)


def test_what_a_certain_black_pixel_must_cost():
    """x_0 = -1 and a perfect network: the half of the bell inside the bin, and the mismatch of a fixed variance."""
    x_0, beta_tilde = torch.full((1, 1, 2, 2), -1.0, dtype=torch.float64), posterior(COSINE)[2]
    L_0 = -math.log2(0.5 * (1 + math.erf(1 / 255 / math.sqrt(2 * beta_tilde[1]))))
    mismatch = (0.5 * ((COSINE / beta_tilde).log() - 1 + beta_tilde / COSINE) / math.log(2))[1:].sum()
    for variance, expected in (("small", L_0), ("large", L_0 + float(mismatch))):
        network = gaussian_network(COSINE, -1, 0.0, v=0.0)
        found = float(bits_per_dim(network, x_0, COSINE, variance=variance)[0, :-1].sum())  # without the prior
        assert found == pytest.approx(expected, rel=1e-6)
        assert round(expected, 2) == {"small": 0.32, "large": 0.76}[variance]  # as on the page


@pytest.mark.parametrize("module", [loss_9, likelihood_9])
def test_the_decoder_is_lesson_5s_in_both_tails_and_at_both_edges(module):
    x, mean = torch.tensor([-1, -1 / 255, 1 / 255, 1]), torch.tensor([-1.2, -0.9, -0.3, 0.002, 0.3, 0.9, 1.2])
    pairs = [pair.double().flatten() for pair in torch.meshgrid(x, mean, indexing="ij")]
    found = module.discretised_log_likelihood(*pairs, torch.tensor(0.02))
    assert found.min() < -1000 and found.isfinite().all()
    torch.testing.assert_close(found, likelihood_5.discretised_log_likelihood(*pairs, torch.tensor(0.02)))


# Sampling


def variance_left(betas, fresh, s=S):
    """The variance at the end of the chain, by the recursion of lesson 5's tests."""
    abar = [1.0, *(1 - betas).cumprod(0).tolist()]
    v, V = [a * s**2 + 1 - a for a in abar], 1.0
    for t in range(len(betas), 0, -1):
        A = math.sqrt(1 - float(betas[t - 1])) * v[t - 1] / v[t]
        V = A**2 * V + (float(fresh[t - 1]) if t > 1 else 0)
    return V


@pytest.mark.parametrize("schedule", [LINEAR, COSINE], ids=["linear", "cosine"])
@pytest.mark.parametrize("K", [1000, 250, 100, 50, 25, 10])
def test_the_variance_of_a_chain_with_few_steps(schedule, K):
    """Small leaves too little, large too much, the true one what belongs there, whatever K."""
    kept = spaced_timesteps(1000, K)
    betas = respaced_betas(schedule, kept)
    network = gaussian_network(betas, told=kept)
    left = {}
    for variance, fresh in (("small", posterior(betas)[2]), ("learned", true_variance(betas)), ("large", betas)):
        x = last(ancestral_sampling(network, normal(800, 1, 4, 4), betas, kept, clip=False, variance=variance,
                                    generator=torch.Generator().manual_seed(1)))  # fmt: skip
        left[variance] = variance_left(betas, fresh)
        assert float(x.var()) == pytest.approx(left[variance], rel=0.03)
        assert float(x.mean()) == pytest.approx(MU, abs=0.02)
    assert left["small"] < left["learned"] < left["large"]
    assert left["learned"] == pytest.approx(S**2, rel=0.001)


@pytest.mark.parametrize("K", [250, 100, 50, 25])
def test_the_v_of_the_fine_chain_is_nearly_right_for_the_coarse_one(K):
    """What respacing relies on: v, and not the variance, carries over. The variance itself would be far too small."""
    kept = spaced_timesteps(1000, K)
    betas = respaced_betas(LINEAR, kept)
    low = posterior(betas)[2].clone()
    low[0] = low[1]
    v = best_v(LINEAR)[kept]
    left = variance_left(betas, (v * betas.log() + (1 - v) * low.log()).exp())
    assert left == pytest.approx(S**2, rel=0.02 if K >= 50 else 0.12)
    assert variance_left(betas, true_variance(LINEAR)[kept]) < K / 1000 * 2 * S**2
    exact = gaussian_network(betas, told=kept)
    network = lambda x_t, t: (exact(x_t, t)[0], best_v(LINEAR)[t][:, None, None, None].expand_as(x_t))
    x = last(ancestral_sampling(network, normal(1500, 1, 4, 4), betas, kept, clip=False,
                                generator=torch.Generator().manual_seed(1)))  # fmt: skip
    assert float(x.var()) == pytest.approx(left, rel=0.03)


def test_fixed_variances_and_ddim_are_lesson_5s(monkeypatch):
    noise = [normal(2, 1, 4, 4, seed=k) for k in range(40)]
    x, kept = normal(2, 1, 4, 4, seed=77), torch.arange(20)
    betas = linear_betas(20, 0.01, 0.4)
    eps = lambda x_t, t: torch.tanh(x_t + 0.1 * t[:, None, None, None])
    network = lambda x_t, t: (eps(x_t, t), torch.full_like(x_t, 0.7))
    for module in ("lesson_05_ddpm", "lesson_09_improved_ddpm"):
        monkeypatch.setattr(f"{module}.sampler.noise_like", lambda x, generator: noise[int(1000 * x.abs().sum()) % 40])
    for variance in ("small", "large"):
        ours = list(ancestral_sampling(network, x, betas, kept, variance=variance))
        theirs = list(sampler_5.ancestral_sampling(eps, x, betas, variance))
        torch.testing.assert_close(ours[0], theirs[0], rtol=0, atol=1e-12)
    ours = list(ddim_sampling(network, x, alpha_bars(betas), kept))
    theirs = list(sampler_5.ddim_sampling(eps, x, alpha_bars(betas), kept))
    torch.testing.assert_close(ours[-1], theirs[-1], rtol=0, atol=1e-12)


def test_ddim_with_eta_1_and_completions_of_nothing_are_algorithm_2_with_the_small_variance(monkeypatch):
    """With the same noise z in each step."""
    x, z, kept = normal(2, 1, 4, 4), normal(2, 1, 4, 4, seed=1), spaced_timesteps(1000, 15)
    monkeypatch.setattr("lesson_09_improved_ddpm.sampler.noise_like", lambda x, generator: z)
    network = lambda x_t, t: (torch.tanh(x_t + 0.01 * t[:, None, None, None]), torch.full_like(x_t, 0.7))
    expected = last(ancestral_sampling(network, x, respaced_betas(LINEAR, kept), kept, variance="small"))
    ddim = last(ddim_sampling(network, x, alpha_bars(LINEAR), kept, eta=1.0))
    filled = last(inpaint(network, z, torch.zeros(1, 1, 1, 1), x, alpha_bars(LINEAR), kept))
    torch.testing.assert_close(ddim, expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(filled, expected, rtol=0, atol=1e-9)


def test_the_network_is_told_the_original_t_and_the_last_step_adds_no_noise():
    seen, kept = [], spaced_timesteps(1000, 4)
    network = lambda x_t, t: seen.append(t.tolist()) or (torch.zeros_like(x_t), torch.ones_like(x_t))
    betas = respaced_betas(LINEAR, kept)
    frames = list(ancestral_sampling(network, normal(2, 1, 2, 2), betas, kept, clip=False))
    assert seen == [[999, 999], [666, 666], [333, 333], [0, 0]]
    torch.testing.assert_close(frames[-1], frames[-2] / (1 - betas[0]).sqrt())
    with pytest.raises(ValueError, match="learned"):
        next(ancestral_sampling(network, normal(1, 1, 2, 2), betas, kept, variance="free"))


def test_the_bound_needs_two_steps_and_a_known_variance():
    x_0, two = torch.zeros(1, 1, 2, 2), LINEAR[:2]
    for betas, variance in ((LINEAR[:1], "small"), (two, "free")):
        with pytest.raises(ValueError, match="the bound needs"):
            bits_per_dim(gaussian_network(two), x_0, betas, variance=variance)
    assert bits_per_dim(gaussian_network(two), x_0, two).shape == (1, 3)


# Which t


def test_uniform_timesteps():
    t, weights = UniformTimesteps(1000).draw(64, torch.Generator().manual_seed(0))
    assert t.dtype == torch.long and (t // (1000 / 64)).long().tolist() == list(range(64)) and (weights == 1).all()


def after_ten(losses):
    """The sampler of len(losses) timesteps that has seen these losses ten times."""
    sampler = LossAwareTimesteps(len(losses))
    for _ in range(10):
        sampler.update(torch.arange(len(losses)), losses)
    return sampler


def test_uniform_until_every_t_has_ten_losses():
    sampler = LossAwareTimesteps(4)
    for k in range(10):
        assert torch.equal(sampler.probabilities(), torch.full((4,), 0.25, dtype=torch.float64))
        sampler.update(torch.arange(4 if k < 9 else 3), torch.tensor([1.0, 2, 3, 4])[: 4 if k < 9 else 3])
    assert sampler.probabilities()[0] == 0.25
    sampler.update(torch.tensor([3]), torch.tensor([4.0]))
    p = torch.tensor([1.0, 2, 3, 4]) / 10
    torch.testing.assert_close(sampler.probabilities().float(), 0.999 * p + 0.001 / 4)


def test_losses_of_zero_are_all_alike():
    t, weights = after_ten(torch.zeros(4)).draw(8, torch.Generator().manual_seed(0))
    assert t.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    torch.testing.assert_close(weights, torch.ones(8))


def test_only_the_last_ten_losses_count():
    sampler = after_ten(torch.ones(3))
    for _ in range(10):
        sampler.update(torch.tensor([0, 1, 2]), torch.tensor([3.0, 1.0, 1.0]))
    torch.testing.assert_close(sampler.probabilities(), 0.999 * torch.tensor([0.6, 0.2, 0.2]).double() + 0.001 / 3)


def test_the_weighted_loss_is_unbiased_and_less_noisy():
    losses = torch.logspace(0, -4, 50)
    sampler, generator = after_ten(losses), torch.Generator().manual_seed(0)
    assert float(sampler.probabilities().sum()) == pytest.approx(1) and sampler.probabilities().min() >= 0.001 / 50
    draws = [sampler.draw(64, generator) for _ in range(2000)]
    t, weights = (torch.cat(each) for each in zip(*draws))
    shares = t.bincount(minlength=50) / len(t)
    torch.testing.assert_close(shares, sampler.probabilities().float(), rtol=0.05, atol=2e-4)
    torch.testing.assert_close(weights, 1 / (50 * sampler.probabilities()[t]).float())
    weighted = weights * losses[t]
    assert float(weighted.mean()) == pytest.approx(float(losses.mean()), rel=0.01)
    assert weighted.std() < 0.1 * losses.std()  # with p ~ L it would be zero, but for the thousandth


def test_importance_sampling_makes_the_bound_of_a_normal_pixel_a_hundred_times_less_noisy():
    """The second moment of the estimate of the sum of all L_t from one t; L_1 of a decoder of 256 levels."""
    error = S**2 * (1 - ABAR_1) / (ABAR_1 * S**2 + 1 - ABAR_1)
    sigma2 = float(posterior(LINEAR)[2][1])
    first = (0.5 * math.log(2 * math.pi * sigma2) + error / (2 * sigma2) + math.log(127.5)) / math.log(2)
    L = torch.cat([torch.tensor([first]), expected_terms(MU, S, LINEAR, "large")])
    timesteps = LossAwareTimesteps(1000)
    for _ in range(10):
        timesteps.update(torch.arange(1000), L)
    p = timesteps.probabilities()
    uniform, importance = 1000 * L.square().sum(), (L.square() / p).sum()
    assert round(float(uniform / importance), -1) == 110  # as on the page
    assert float(importance / L.sum() ** 2) == pytest.approx(1, abs=0.01)  # hardly any noise is left


def test_the_history_goes_on_after_a_resume():
    sampler = after_ten(torch.linspace(0.1, 2, 20))
    other = LossAwareTimesteps(20)
    other.load_state_dict(sampler.state_dict())
    for each in (sampler, other):
        each.update(torch.tensor([4]), torch.tensor([9.0]))
    assert torch.equal(sampler.probabilities(), other.probabilities())
    with pytest.raises(ValueError, match="history"):
        LossAwareTimesteps(30).load_state_dict(sampler.state_dict())


def test_what_is_loaded_is_a_copy():
    state = after_ten(torch.ones(3)).state_dict()
    sampler = LossAwareTimesteps(3)
    sampler.load_state_dict(state)
    sampler.update(torch.tensor([0]), torch.tensor([5.0]))
    assert (state["losses"] == 1).all() and (state["count"] == 10).all()


# The network


@pytest.mark.parametrize("scale_shift", [True, False])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_network_returns_noise_and_v(scale_shift, channels):
    network = NoiseNetwork(channels, width=8, levels=2, blocks=1, patch=2, scale_shift=scale_shift)
    x = torch.randn(2, channels, 20, 20)
    eps, v = network(x, torch.tensor([0, 999]))
    assert eps.shape == v.shape == x.shape and eps.dtype == v.dtype == torch.float32
    assert not eps.any() and (v == 0.5).all()  # the start: half-way between both variances
    for parameter in network.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    eps, v = network(x, torch.tensor([0, 999]))
    (eps.square().sum() + v.square().sum()).backward()
    assert [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("scale_shift", [True, False])
@pytest.mark.parametrize("levels, blocks, patch", [(2, 1, 2), (3, 3, 1)])
def test_the_network_is_lesson_5s_with_two_outputs(levels, blocks, patch, scale_shift):
    network = NoiseNetwork(3, width=16, levels=levels, blocks=blocks, patch=patch, scale_shift=scale_shift)
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([3, 700])
    with torch.no_grad():
        for weights in network.parameters():
            weights.add_(0.05 * torch.randn_like(weights))
        expected = reference(network, x, t, levels, blocks, patch, scale_shift)
        found = torch.cat([network(x, t)[0], 2 * network(x, t)[1] - 1], dim=1)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def test_the_default_network_is_ddpms_for_cifar10_without_dropout():
    """35 746 307 parameters (test_noise_network.py), and three more channels of the last convolution, for v."""
    with torch.device("meta"):
        network = NoiseNetwork(channels=3, scale_shift=False)
    assert sum(p.numel() for p in network.parameters()) == 35_746_307 + 3 * (128 * 9 + 1)
    assert {layer.p for layer in network.modules() if isinstance(layer, torch.nn.Dropout)} == {0.0}


# Training and sampling put together


@pytest.mark.parametrize("objective", ["simple", "hybrid", "vlb"])
def test_a_step_is_that_of_the_objective_and_the_weights(objective, tmp_path):
    """The losses get digits in [-1, 1], new noise and the schedule; the gradient is that of the weighted mean."""
    functions = {"simple": noise_prediction_loss, "hybrid": hybrid_loss, "vlb": bound_term}
    module, T, seen = script(NINE), 50, SimpleNamespace(losses=[], gradients=[], updates=[])

    def spied(loss):
        def called(network, *arguments):
            value = loss(network, *arguments)
            seen.losses.append((loss, arguments, value.detach()))
            return value

        return called

    class Chosen(UniformTimesteps):
        def draw(self, B, generator=None):
            t, _ = super().draw(B, generator)
            return t, torch.arange(B) / 4.0

        def update(self, t, losses):
            seen.updates.append((t, losses))

    class Optimizer(module.Optimizer):
        def __init__(self, network, name):
            super().__init__(network, name)
            for parameter in network.parameters():  # or many of them would have no gradient yet
                if not parameter.any():
                    torch.nn.init.normal_(parameter, std=0.1)
            self.network, seen.start = network, copy.deepcopy(network)

        def step(self, rate):
            seen.gradients.append([p.grad.clone() for p in self.network.parameters()])
            super().step(rate)

    names = {name: spied(getattr(module, name)) for name in ("noise_prediction_loss", "hybrid_loss", "bound_term")}
    flags = ("--objective", objective, "--lambda-vlb", 0.5, "--T", T, "--clip", "inf", "--output", tmp_path)
    result = quick(NINE, *flags, **names, UniformTimesteps=Chosen, Optimizer=Optimizer)
    assert result.status == 0, result.stderr
    assert len(seen.losses) == len(seen.updates) == 5
    expected = getattr(module, functions[objective].__name__)
    for (loss, (x_0, table, t, eps, *more), value), (told, losses) in zip(seen.losses, seen.updates, strict=True):
        assert loss is expected and more == ([0.5] if objective == "hybrid" else [])
        betas = cosine_betas(T)
        torch.testing.assert_close(table, alpha_bars(betas) if objective == "simple" else betas)
        assert x_0.min() == -1 and 0.9 < x_0.max() <= 1 and float(eps.std()) == pytest.approx(1, abs=0.05)
        assert torch.equal(told, t) and torch.equal(losses, value)
    assert not torch.equal(seen.losses[0][1][3], seen.losses[1][1][3])
    _, arguments, _ = seen.losses[0]
    gradient = torch.autograd.grad((torch.arange(8) / 4 * expected(seen.start, *arguments)).mean(),
                                   list(seen.start.parameters()))  # fmt: skip
    norm = float(torch.stack([g.norm() for g in gradient]).norm())
    for mine, g in zip(seen.gradients[0], gradient, strict=True):
        torch.testing.assert_close(mine, g, rtol=1e-3, atol=1e-5 * norm)


@pytest.mark.parametrize("objective, line", [("simple", 1.0), ("hybrid", 1.0), ("vlb", math.nan)])
def test_the_log_has_the_loss_that_is_minimised_and_where_a_zero_network_would_be(objective, line, tmp_path):
    """Importance sampling draws large terms more often: without their weights the mean would jump as it begins."""

    class Sixteenth(LossAwareTimesteps):
        def draw(self, B, generator=None):
            t, weight = super().draw(B, generator)
            return t, weight / 16

    plotted, losses = [], []
    for chooser in (LossAwareTimesteps, Sixteenth):
        flags = (
            "--objective",
            objective,
            "--timesteps",
            "importance",
            "--steps",
            1,
            "--output",
            tmp_path,
            "--overwrite",
        )
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("common.run.TrainingLog.write", lambda log, folder, reference: plotted.append(reference))
            assert quick(NINE, *flags, LossAwareTimesteps=chooser).status == 0
        log = read_checkpoint(tmp_path)["log"]["recent"][0][1]
        losses.append(log[:, [0, 2]])  # the loss, and its weight
    torch.testing.assert_close(losses[1], losses[0] / torch.tensor([1, 16]))
    assert (losses[0][:, 1] == 1).all()  # it is uniform yet
    assert plotted[0] == line or math.isnan(plotted[0]) and math.isnan(line)


def test_a_resume_goes_on_with_the_history_of_importance_sampling(tmp_path):
    """With four timesteps and batches of 16, it is uniform no longer when the run stops."""
    flags = ("--objective", "vlb", "--timesteps", "importance", "--batch-size", 16)
    assert quick(NINE, *flags, "--steps", 8, "--output", tmp_path / "straight").status == 0
    assert quick(NINE, *flags, "--steps", 4, "--output", tmp_path / "halves").status == 0
    assert read_checkpoint(tmp_path / "halves")["timesteps"]["count"].min() >= 10
    result = quick(NINE, "--resume", "--batch-size", 16, "--steps", 8, "--output", tmp_path / "halves")
    assert result.status == 0, result.stderr
    straight, halves = (read_checkpoint(tmp_path / name) for name in ("straight", "halves"))
    assert straight["timesteps"]["count"].sum() == 8 * 16
    for part in ("network", "ema", "timesteps"):
        for name, values in straight[part].items():
            assert torch.equal(values, halves[part][name]), name


def test_samples_of_a_shorter_chain_have_the_variance_of_the_flag():
    """v = 0 is the small variance and v = 1 the large one; the network is told the timesteps that are kept."""
    module, found, told = script(NINE, "sample"), {}, []
    config = SimpleNamespace(T=40, schedule="cosine", clip_x_0=True)
    for v in (0.0, 1.0):

        class Network(torch.nn.Linear):
            def forward(self, x, t, v=v):
                told.append(int(t[0]))
                return torch.tanh(x), torch.full_like(x, v)

        for config.variance in ("learned", "small", "large"):
            noise = torch.Generator().manual_seed(1)
            found[v, config.variance] = last(module.draw(Network(1, 1), config, (2, 1, 4, 4), noise, "ancestral", 5))
    assert told == 6 * [39, 29, 20, 10, 0]
    noise, kept = torch.Generator().manual_seed(1), torch.tensor([0, 10, 20, 29, 39])
    x, betas = torch.randn(2, 1, 4, 4, generator=noise), respaced_betas(cosine_betas(40), kept)
    x = last(ancestral_sampling(Network(1, 1), x, betas, kept, generator=noise))
    torch.testing.assert_close(found[1.0, "learned"], (x + 1) / 2)
    assert torch.equal(found[0.0, "learned"], found[0.0, "small"])
    assert torch.equal(found[1.0, "learned"], found[1.0, "large"])
    assert not torch.allclose(found[0.0, "small"], found[0.0, "large"])
