import math

import pytest
import torch

from lesson_03_ncsn.noise_scales import geometric_noise_scales
from lesson_04_ncsnv2.sampler import annealed_langevin_dynamics, denoise, langevin_step_size

pytestmark = pytest.mark.lessons("lesson_03_ncsn", "lesson_04_ncsnv2")

SIGMAS = geometric_noise_scales(1, 0.01, 10)


def column(points):
    """Points (B, D) as the images (B, D, 1, 1) that a sampler takes."""
    return points[:, :, None, None]


def last(frames):
    return list(frames)[-1]


def gaussian_score(sigmas):
    """The score of N(0, sigma_i^2 I): all data at the origin."""
    return lambda x, i: -x / sigmas[i][:, None, None, None] ** 2


class Recorder:
    """A score of zero that remembers what it was asked."""

    def __init__(self):
        self.calls = []

    def __call__(self, x, i):
        self.calls.append((x, i))
        return torch.zeros_like(x)


# The steps


def test_one_step_written_out(lesson):
    sigmas, epsilon = torch.tensor([2.0, 0.5]), 0.3
    x = torch.randn(4, 3, 2, 2)
    frames = lesson.sampler.annealed_langevin_dynamics(
        lambda x, i: torch.sin(x) * (i[:, None, None, None] + 1),
        x,
        sigmas,
        1,
        epsilon,
        torch.Generator().manual_seed(5),
    )
    generator = torch.Generator().manual_seed(5)
    for n, frame in enumerate(frames):
        alpha = [4.8, 0.3][n]  # epsilon sigma_i^2 / sigma_L^2
        if lesson.name == "lesson_04_ncsnv2":
            alpha = 2 * alpha  # the second paper's step with epsilon is the first paper's with 2 epsilon
        z = torch.randn(x.shape, generator=generator)
        x = x + alpha / 2 * torch.sin(x) * (n + 1) + math.sqrt(alpha) * z
        torch.testing.assert_close(frame, x)


@pytest.mark.parametrize("T", [1, 3])
def test_one_frame_for_each_scale_and_t_calls_for_each_frame(lesson, T):
    score, x = Recorder(), torch.rand(5, 3, 4, 6)
    start = x.clone()
    frames = []
    for n, frame in enumerate(lesson.sampler.annealed_langevin_dynamics(score, x, SIGMAS, T, 1e-5)):
        assert len(score.calls) == T * (n + 1)  # a frame comes as soon as its scale is done
        frames.append(frame)
    assert len(frames) == len(SIGMAS)
    assert all(frame.shape == (5, 3, 4, 6) and frame.dtype == torch.float32 for frame in frames)
    assert len({frame.sum().item() for frame in frames}) == len(SIGMAS)  # a frame is not written over by the next
    assert torch.equal(x, start)
    for call, (_, i) in enumerate(score.calls):
        assert i.dtype == torch.long
        assert i.tolist() == [call // T] * 5


def test_nothing_is_computed_before_the_first_frame_is_wanted(lesson):
    score = Recorder()
    frames = lesson.sampler.annealed_langevin_dynamics(score, torch.rand(2, 1, 4, 4), SIGMAS, 2, 1e-5)
    assert score.calls == []
    next(frames)
    assert len(score.calls) == 2


def test_sampling_keeps_no_graph_and_leaves_gradients_on_between_frames(lesson):
    weight = torch.ones((), requires_grad=True)
    frames = lesson.sampler.annealed_langevin_dynamics(lambda x, i: weight * x, torch.rand(2, 1, 4, 4), SIGMAS, 1, 1e-5)
    for frame in frames:
        assert not frame.requires_grad
        assert torch.is_grad_enabled()


def test_known_pixels_have_the_noise_of_each_scale(lesson):
    """All pixels known, all of them 0: what is left is the noise that was put on them, at every scale."""
    x, known = torch.zeros(400, 1, 4, 4), torch.ones(1, 1, 1, 1)
    frames = lesson.sampler.inpaint(Recorder(), x, known, x + 5, SIGMAS, 2, 1e-5)
    deviations = torch.stack([frame.std() for frame in frames])
    torch.testing.assert_close(deviations, SIGMAS, rtol=0.05, atol=0)


def test_completions_have_one_noise_at_each_scale_where_pixels_are_known_and_elsewhere_the_steps_of_algorithm_1(lesson):
    score, y, sigmas, T = Recorder(), torch.zeros(20_000, 1, 1, 2), torch.tensor([2.0, 1.0, 0.5]), 3
    frames = list(lesson.sampler.inpaint(score, y, torch.tensor([1.0, 0]).view(1, 1, 1, 2), y, sigmas, T, 0.1))
    variance = 0.0
    for n, frame in enumerate(frames):
        seen = [x[..., 0] for x, _ in score.calls[T * n + 1 : T * n + T]]
        assert all(torch.equal(x, frame[..., 0]) for x in seen)
        variance += T * 0.1 * float(sigmas[n] / 0.5) ** 2 * {"lesson_03_ncsn": 1, "lesson_04_ncsnv2": 2}[lesson.name]
        assert float(frame[..., 1].var()) == pytest.approx(variance, rel=0.05)


# Randomness


def test_same_generator_same_samples(lesson):
    def samples(seed):
        generator = torch.Generator().manual_seed(seed)
        x = torch.zeros(3, 1, 4, 4)
        return last(lesson.sampler.annealed_langevin_dynamics(gaussian_score(SIGMAS), x, SIGMAS, 2, 1e-5, generator))

    assert torch.equal(samples(1), samples(1))
    assert not torch.allclose(samples(1), samples(2))
    assert not torch.allclose(samples(1)[0], samples(1)[1])  # each image has its own noise


def test_a_generator_leaves_the_training_randomness_as_it_was(lesson):
    def sample(generator):
        before = torch.get_rng_state()
        x = torch.zeros(3, 1, 4, 4)
        last(lesson.sampler.annealed_langevin_dynamics(gaussian_score(SIGMAS), x, SIGMAS, 2, 1e-5, generator))
        return torch.equal(torch.get_rng_state(), before)

    assert sample(torch.Generator().manual_seed(3))
    assert not sample(None)  # without one the noise is torch's own


def test_completions_are_decided_by_their_generator_and_keep_no_graph(lesson):
    weight, y, known = torch.ones((), requires_grad=True), torch.rand(2, 1, 4, 4), torch.zeros(1, 1, 4, 4)
    known[..., :2] = 1
    score = lambda x, i: -weight * x
    how = y, known, y, SIGMAS, 2, 1e-5
    a, b, c = (last(lesson.sampler.inpaint(score, *how, torch.Generator().manual_seed(seed))) for seed in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c) and not a.requires_grad
    assert not lesson.sampler.tweedie(score, y, SIGMAS, torch.tensor([0, 9])).requires_grad
    if lesson.name == "lesson_04_ncsnv2":
        assert not last(lesson.sampler.consistent_annealed_sampling(score, y, SIGMAS, 1, 1e-4)).requires_grad


# The distribution it reaches


@pytest.mark.parametrize("a", [0.2, 0.8, 1.5])
def test_stationary_variance_at_every_scale(lesson, a):
    """On the score of N(0, sigma^2), with a = alpha / sigma^2, lesson 3 makes x into (1 - a/2) x + sqrt(a) sigma z:
    the variance goes to sigma^2 a / (1 - (1 - a/2)^2) = sigma^2 / (1 - a/4). Lesson 4 has half that alpha.
    """
    variance = {"lesson_03_ncsn": 1 / (1 - a / 4), "lesson_04_ncsnv2": 1 / (1 - a / 2)}[lesson.name]
    sigmas = torch.tensor([0.2, 0.1])
    x = torch.zeros(400_000, 1, 1, 1)
    generator = torch.Generator().manual_seed(0)
    frames = lesson.sampler.annealed_langevin_dynamics(gaussian_score(sigmas), x, sigmas, 60, a * 0.1**2, generator)
    for sigma, frame in zip(sigmas, frames, strict=True):
        # of 400 000 chains the variance is known to sqrt(2 / 400 000) = 0.2 % of itself
        assert (frame.var() / sigma**2).item() == pytest.approx(variance, rel=0.01)
        assert (frame.mean() / sigma).item() == pytest.approx(0, abs=0.01)


MODES = torch.tensor([[-5.0, -5.0], [5.0, 5.0]])
WEIGHTS = torch.tensor([0.2, 0.8])


def mixture_score(sigmas):
    """The score of 1/5 N((-5,-5), I) + 4/5 N((5,5), I) with noise of scale sigma_i."""

    def score(x, i):
        variance = (1 + sigmas[i] ** 2)[:, None]  # (B, 1)
        to_mode = MODES - x.flatten(1)[:, None]  # (B, 2 modes, 2)
        weight = (WEIGHTS.log() - to_mode.square().sum(2) / (2 * variance)).softmax(1)  # (B, 2 modes)
        return column((weight[:, :, None] * to_mode).sum(1) / variance)

    return score


def test_mixture_score_is_the_gradient_of_the_log_density():
    sigmas = torch.tensor([3.0, 0.5])
    x, i = column(8 * torch.randn(20, 2)).requires_grad_(), torch.arange(20) % 2
    spread = (1 + sigmas[i] ** 2).sqrt()
    modes = torch.distributions.Independent(
        torch.distributions.Normal(MODES, spread[:, None, None].expand(-1, 2, 2)), 1
    )
    mixture = torch.distributions.MixtureSameFamily(torch.distributions.Categorical(WEIGHTS.expand(20, 2)), modes)
    (expected,) = torch.autograd.grad(mixture.log_prob(x.flatten(1)).sum(), x)
    torch.testing.assert_close(mixture_score(sigmas)(x, i), expected, rtol=1e-4, atol=1e-4)


def weight_of_the_small_mode(lesson, sigmas, score, T, variance, chains=4000):
    """Langevin chains with epsilon = 0.1 from a uniform start in [-8, 8]^2, and the share that ends near (-5, -5)."""
    generator = torch.Generator().manual_seed(0)
    x = column(torch.rand(chains, 2, generator=generator) * 16 - 8)
    x = last(lesson.sampler.annealed_langevin_dynamics(score, x, sigmas, T, 0.1, generator)).flatten(1)
    nearest = torch.cdist(x, MODES).argmin(1)
    for mode in (0, 1):  # wherever the chains end, they lie around the modes as they should
        assert (x[nearest == mode].mean(0) - MODES[mode]).abs().max() < 0.2
        assert x[nearest == mode].var(0).tolist() == pytest.approx([variance] * 2, rel=0.2)
    return (nearest == 0).float().mean().item()


TOY = geometric_noise_scales(20, 1, 10)  # NCSN, App. B.1; the last adds noise of variance 1 to the modes


def test_annealed_langevin_finds_the_weights_of_the_modes(lesson):
    """In the paper's setting, T = 100, it nearly does: the modes part before the weights have settled at 0.2."""
    weight = weight_of_the_small_mode(lesson, TOY, mixture_score(TOY), T=100, variance=2)
    assert weight == pytest.approx(0.215, abs=0.025)  # 4000 chains know it to 0.0063


def test_annealed_langevin_with_more_steps_finds_them_within_the_statistical_error(lesson):
    weight = weight_of_the_small_mode(lesson, TOY, mixture_score(TOY), T=400, variance=2, chains=2000)
    assert weight == pytest.approx(0.2, abs=3 * math.sqrt(0.2 * 0.8 / 2000))


def test_plain_langevin_does_not(lesson):
    """Fig. 3: each chain stays in the mode nearest to its start, and the start knows nothing of the weights."""
    clean = mixture_score(torch.zeros(1))
    weight = weight_of_the_small_mode(lesson, torch.ones(1), clean, T=1000, variance=1)
    assert weight == pytest.approx(0.49, abs=0.03)


# Technique 4


def variance_ratio(gamma, r, T):
    """The variance of T steps at scale 1 on data at a point, from noise of scale gamma, one step at a time."""
    variance = gamma**2
    for _ in range(T):
        variance = (1 - r) ** 2 * variance + 2 * r
    return variance


@pytest.mark.parametrize(
    "sigma_1, L, T, printed",
    [
        (50, 232, 5, "6.2e-06"),  # CIFAR-10
        (90, 500, 5, "3.3e-06"),  # CelebA
        (190, 1086, 3, "1.8e-06"),  # LSUN, tower and bedroom
        (348, 2311, 3, "9e-07"),  # FFHQ
        (17, 96, 1, "1.45e-05"),  # from here on MNIST, which the paper does not have
        (17, 96, 3, "1.26e-05"),
        (17, 96, 5, "1.11e-05"),
        (17, 96, 10, "8.57e-06"),
    ],
)
def test_step_size_is_the_published_one(sigma_1, L, T, printed):
    epsilon = langevin_step_size(geometric_noise_scales(sigma_1, 0.01, L), T)
    assert isinstance(epsilon, float)
    digits = len(printed.split("e")[0].replace(".", "")) - 1
    assert f"{epsilon:.{digits}e}" == printed


@pytest.mark.parametrize("gamma", [1.01, 1.08, 1.67, 5.0])
@pytest.mark.parametrize("T", [1, 2, 5, 100])
def test_step_size_brings_the_variance_nearest_to_one(gamma, T):
    sigma_L = 0.02
    sigmas = sigma_L * gamma ** torch.arange(5, -1, -1)
    r = langevin_step_size(sigmas, T) / sigma_L**2
    nearest = variance_ratio(gamma, r, T)
    assert 1 < nearest < gamma**2
    for factor in (0.5, 0.9, 0.99, 1.01, 1.1, 1.5):
        assert abs(variance_ratio(gamma, factor * r, T) - 1) > abs(nearest - 1)


@pytest.mark.parametrize("T", [1, 3, 10])
def test_step_size_formula_against_chains(T):
    sigmas = geometric_noise_scales(17, 0.01, 96)
    sigma_i = sigmas[-1:]  # a ladder of the one scale that the chains come to
    gamma = (sigmas[-2] / sigmas[-1]).item()
    epsilon = langevin_step_size(sigmas, T)
    generator = torch.Generator().manual_seed(0)
    x = sigmas[-2] * torch.randn(1_000_000, 1, 1, 1, generator=generator)
    x = last(annealed_langevin_dynamics(gaussian_score(sigma_i), x, sigma_i, T, epsilon, generator))
    measured = (x.var() / sigma_i**2).item()
    # a million chains know it to 0.14 %; half of epsilon, which is lesson 3's step, is farther away
    expected = variance_ratio(gamma, epsilon / sigma_i.item() ** 2, T)
    assert measured == pytest.approx(expected, rel=0.004)
    assert variance_ratio(gamma, epsilon / sigma_i.item() ** 2 / 2, T) > expected * 1.005


@pytest.mark.parametrize("sigmas, T", [(SIGMAS, 0), (SIGMAS[:1], 1)])
def test_a_step_size_that_cannot_be_computed(sigmas, T):
    with pytest.raises(ValueError, match=f"needs T >= 1 and L >= 2, not {T} and {len(sigmas)}"):
        langevin_step_size(sigmas, T)


# The last step of lesson 4


def test_denoise_gives_the_posterior_mean_of_gaussian_data():
    mu, s, sigma_L = 0.3, 0.2, 0.1
    sigmas = torch.tensor([1.0, sigma_L])
    x = mu + torch.randn(6, 3, 4, 4)
    asked = []

    def score(x, i):
        asked.append(i)
        return -(x - mu) / (s**2 + sigmas[i][:, None, None, None] ** 2)

    expected = (s**2 * x + sigma_L**2 * mu) / (s**2 + sigma_L**2)  # Bayes: both means, weighted by their precisions
    torch.testing.assert_close(denoise(score, x, sigmas), expected)
    assert len(asked) == 1
    assert asked[0].dtype == torch.long
    assert asked[0].tolist() == [1] * 6


def test_denoise_keeps_no_graph():
    weight = torch.ones((), requires_grad=True)
    assert not denoise(lambda x, i: weight * x, torch.rand(2, 1, 4, 4), SIGMAS).requires_grad


def test_denoise_takes_away_the_noise_that_is_left():
    sigmas = torch.tensor([1.0, 0.1])
    clean = torch.randint(2, (2000, 1, 2, 2)) * 2.0 - 1  # every pixel is -1 or 1
    noisy = clean + 0.1 * torch.randn(clean.shape)
    denoised = denoise(lambda x, i: (torch.tanh(x / 0.1**2) - x) / 0.1**2, noisy, sigmas)
    assert (noisy - clean).std().item() == pytest.approx(0.1, rel=0.05)
    torch.testing.assert_close(denoised, clean, rtol=0, atol=1e-4)
