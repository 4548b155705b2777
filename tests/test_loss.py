import math

import pytest
import torch

from lesson_03_ncsn.noise_scales import geometric_noise_scales

pytestmark = pytest.mark.lessons("lesson_03_ncsn", "lesson_04_ncsnv2")

SIGMAS = geometric_noise_scales(1, 0.01, 10)


def zero(x, i):
    return torch.zeros_like(x)


def gaussian_score(s, sigmas=SIGMAS):
    """The score of data from N(0, s^2 I) with noise of scale sigma_i."""
    return lambda x, i: -x / (s**2 + sigmas[i][:, None, None, None] ** 2)


def two_point_score(sigmas=SIGMAS):
    """The score of data whose every pixel is -1 or 1 at random, with noise of scale sigma_i."""

    def score(x, i):
        variance = sigmas[i][:, None, None, None] ** 2
        return (torch.tanh(x / variance) - x) / variance

    return score


def loss_per_scale(lesson, score, x, sigmas=SIGMAS):
    """The mean loss at each noise scale, of all images with the same noise: (L,)."""
    z = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    loss = lesson.loss.denoising_score_matching_loss
    return torch.stack([loss(score, x, sigmas, torch.full((len(x),), n), z).mean() for n in range(len(sigmas))])


def test_by_hand(lesson):
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).reshape(2, 2, 1, 1)
    z = torch.tensor([[1.0, -1.0], [0.5, 2.0]]).reshape(2, 2, 1, 1)
    sigmas, i = torch.tensor([2.0, 0.5]), torch.tensor([1, 0])
    seen = {}

    def score(x_noisy, i):
        seen.update(x=x_noisy, i=i)
        return torch.tensor([[2.0, 4.0], [1.0, -1.0]]).reshape(2, 2, 1, 1)

    loss = lesson.loss.denoising_score_matching_loss(score, x, sigmas, i, z)
    # the first image has sigma 0.5: 1/2 ((1 + 1)^2 + (2 - 1)^2); the second 2: 1/2 ((2 + 0.5)^2 + (-2 + 2)^2)
    assert loss.tolist() == [2.5, 3.125]
    assert seen["x"].flatten(1).tolist() == [[1.5, 1.5], [4.0, 8.0]]
    assert seen["i"].tolist() == [1, 0]


def test_zero_network_has_half_the_dimension_at_every_scale(lesson):
    x = torch.rand(400, 1, 28, 28)
    z = torch.randn(x.shape)
    i = torch.arange(400) % 10
    loss = lesson.loss.denoising_score_matching_loss(zero, x, SIGMAS, i, z)
    torch.testing.assert_close(loss, z.square().sum((1, 2, 3)) / 2)
    # 1/2 |z|^2 has the standard deviation sqrt(392) = 20, so the mean of 400 is within 4 of 392
    assert loss_per_scale(lesson, zero, x).tolist() == pytest.approx([392] * 10, abs=4)


def test_network_whose_last_layer_is_zero_has_that_loss_too(lesson):
    network = lesson.score_network.ScoreNetwork(SIGMAS, width=4, patch=2, blocks=1)
    torch.nn.init.zeros_(network.last.weight)
    torch.nn.init.zeros_(network.last.bias)
    x, z, i = torch.rand(10, 1, 28, 28), torch.randn(10, 1, 28, 28), torch.arange(10)
    loss = lesson.loss.denoising_score_matching_loss(network, x, SIGMAS, i, z)
    torch.testing.assert_close(loss, z.square().sum((1, 2, 3)) / 2)


@pytest.mark.parametrize("s", [0.03, 0.3, 2.0])
def test_exact_score_of_gaussian_data(lesson, s):
    x = s * torch.randn(1000, 1, 28, 28)
    loss = loss_per_scale(lesson, gaussian_score(s), x)
    expected = 392 * s**2 / (s**2 + SIGMAS**2)
    # |.|^2 of D Gaussian numbers is known to sqrt(2 / D) of itself, and there are 1000 of them
    torch.testing.assert_close(loss, expected, rtol=4 * math.sqrt(2 / 784 / 1000), atol=0)


@pytest.mark.parametrize("data", ["gaussian", "two points"])
def test_the_true_score_has_the_least_loss(lesson, data):
    if data == "gaussian":
        x, score = 0.5 * torch.randn(2000, 1, 8, 8), gaussian_score(0.5)
    else:
        x, score = torch.randint(2, (2000, 1, 8, 8)) * 2.0 - 1, two_point_score()
    sigmas = SIGMAS[:4]  # 1 to 0.2: with less noise the two points leave no error at all

    def perturbed(by):
        return lambda x, i: score(x, i) + by(x) / sigmas[i][:, None, None, None]

    least = loss_per_scale(lesson, score, x, sigmas)
    for by in (torch.ones_like, torch.tanh, torch.sin, torch.cos, torch.zeros_like):
        for size in (0.1, -0.1):
            loss = loss_per_scale(lesson, perturbed(lambda x, by=by, size=size: size * by(x)), x, sigmas)
            # what a wrong score adds to the loss is half the mean square of its error, in units of 1 / sigma
            noisy = x + sigmas[:, None, None, None, None] * torch.randn(4, *x.shape)
            extra = (size * by(noisy)).square().sum((2, 3, 4)).mean(1) / 2
            torch.testing.assert_close(loss - least, extra, rtol=0, atol=0.05)
            assert by is torch.zeros_like or (loss > least).all()


def test_gradient_reaches_the_score_and_nothing_else(lesson):
    x, z, i = torch.rand(3, 1, 4, 4), torch.randn(3, 1, 4, 4), torch.tensor([0, 4, 9])
    slope = torch.tensor(-0.5, requires_grad=True)
    lesson.loss.denoising_score_matching_loss(lambda x, i: slope * x, x, SIGMAS, i, z).sum().backward()
    sigma_i = SIGMAS[i][:, None, None, None]
    noisy = x + sigma_i * z
    expected = ((sigma_i * -0.5 * noisy + z) * sigma_i * noisy).sum()  # the derivative, by hand
    torch.testing.assert_close(slope.grad, expected)


def test_float32_one_number_for_each_image(lesson):
    loss = lesson.loss.denoising_score_matching_loss(
        zero, torch.rand(7, 3, 16, 20), SIGMAS, torch.randint(10, (7,)), torch.randn(7, 3, 16, 20)
    )
    assert loss.shape == (7,)
    assert loss.dtype == torch.float32
