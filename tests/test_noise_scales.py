import math
import statistics
import time

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from common.data import load_images
from lesson_04_ncsnv2.noise_scales import (
    geometric_noise_scales,
    largest_pairwise_distance,
    noise_scale_ratio,
    number_of_noise_scales,
)

pytestmark = pytest.mark.lessons("lesson_03_ncsn", "lesson_04_ncsnv2")

# The ladder


@given(sigma_L=st.floats(1e-4, 10), span=st.floats(1.01, 1e6), L=st.integers(2, 1000))
def test_ladder_is_geometric(lesson, sigma_L, span, L):
    sigma_1 = sigma_L * span
    sigmas = lesson.noise_scales.geometric_noise_scales(sigma_1, sigma_L, L)
    assert sigmas.shape == (L,)
    assert sigmas.dtype == torch.float32
    assert (sigmas[:-1] > sigmas[1:]).all()
    ratios = sigmas[:-1].double() / sigmas[1:].double()
    ratio = span ** (1 / (L - 1))
    torch.testing.assert_close(ratios, torch.full_like(ratios, ratio), rtol=3e-7, atol=0)
    assert sigmas[0].item() == pytest.approx(sigma_1, rel=1e-7)
    assert sigmas[-1].item() == pytest.approx(sigma_L, rel=1e-7)


def test_ladder_of_the_paper(lesson):
    sigmas = lesson.noise_scales.geometric_noise_scales(1, 0.01, 10)
    torch.testing.assert_close(sigmas, torch.tensor([0.01 ** (k / 9) for k in range(10)]), rtol=3e-7, atol=0)


@pytest.mark.parametrize(
    "arguments",
    [(1, 1, 10), (0.01, 1, 10), (1, 0, 10), (1, -0.1, 10), (1, 0.01, 1), (1, 0.01, 0)]
    + [(math.inf, 0.01, 10), (math.nan, 0.01, 10), (1, math.nan, 10)],
)
def test_ladder_refuses_what_is_no_ladder(lesson, arguments):
    with pytest.raises(ValueError, match="need sigma_1"):
        lesson.noise_scales.geometric_noise_scales(*arguments)


# Technique 1


def brute_force(images):
    x = images.flatten(1).double()
    return torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist").max().item()


@given(
    N=st.integers(1, 30),
    shape=st.tuples(st.integers(1, 4), st.integers(1, 6), st.integers(1, 6)),
    low=st.sampled_from([0.0, -1.0, -100.0, 1000.0]),
    levels=st.sampled_from([2, 3, 256]),
    seed=st.integers(0, 10**6),
)
def test_largest_distance_is_brute_force(N, shape, low, levels, seed):
    generator = torch.Generator().manual_seed(seed)
    images = (
        torch.randint(levels, (N, *shape), generator=generator) / (levels - 1) + low
    )  # few levels: duplicates, ties
    distance = largest_pairwise_distance(images)
    assert isinstance(distance, float)
    assert distance == pytest.approx(brute_force(images), rel=1e-6, abs=1e-12)


def many_images():
    """Sets that need several blocks of rows, each with its farthest pair somewhere else."""
    x = torch.rand(700, 1, 6, 6)
    loud = x * torch.linspace(0.01, 1, 700)[:, None, None, None]
    cluster = 0.9 + 0.1 * x
    cluster[:, :, :, 3:] = 0
    cluster[123] = 0
    cluster[123, :, :, 3:] = 0.2  # the quietest image, last in the order of norms, is the far one
    behind = 0.001 * x  # the farthest pair is number 257 and the last in the order of norms: (0, 2) and (1.3, 0)
    behind[:257, 0, 0, :2] = 2
    behind[257:, 0, 0, :2] = torch.tensor([0, 1.9])
    behind[123, 0, 0, :2] = torch.tensor([0.0, 2.0])
    behind[456, 0, 0, :2] = torch.tensor([1.3, 0.0])
    sparse = x * (torch.rand(700, 1, 6, 6) < 0.05)
    duplicates = x[torch.randint(5, (700,))]
    return {
        "even": x,
        "loud": loud,
        "cluster": cluster,
        "behind": behind,
        "sparse": sparse,
        "duplicates": duplicates,
        "centred": x - 0.5,
    }


@pytest.mark.parametrize("name", ["even", "loud", "cluster", "behind", "sparse", "duplicates", "centred"])
def test_largest_distance_with_many_images(name):
    images = many_images()[name]
    assert len(images) == 700
    assert largest_pairwise_distance(images) == pytest.approx(brute_force(images), rel=1e-6)


def test_largest_distance_of_images_that_hardly_differ():
    images = torch.rand(1, 1, 28, 28) + 1e-4 * torch.randn(20, 1, 28, 28)
    assert largest_pairwise_distance(images) == pytest.approx(brute_force(images), rel=1e-6)


def test_largest_distance_with_a_dark_frame_around_bright_pictures():
    images = 1000 + torch.rand(20, 1, 8, 8)
    images[:, :, :, 0] = 0
    assert largest_pairwise_distance(images) == pytest.approx(brute_force(images), rel=1e-6)


def test_largest_distance_by_hand():
    images = torch.tensor([[0.0, 0.0], [0.3, 0.0], [0.0, 0.4]]).reshape(3, 1, 1, 2)
    assert largest_pairwise_distance(images) == pytest.approx(0.5, rel=1e-6)
    assert largest_pairwise_distance(-images) == pytest.approx(0.5, rel=1e-6)


@pytest.mark.parametrize("value", [0.0, 0.5, -3.0, 1000.0])
@pytest.mark.parametrize("N", [1, 2, 300])
def test_largest_distance_of_equal_images_is_zero(N, value):
    assert largest_pairwise_distance(torch.full((N, 1, 4, 4), value)) == 0
    assert largest_pairwise_distance((value + torch.rand(1, 1, 4, 4)).repeat(N, 1, 1, 1)) == 0


def test_largest_distance_needs_an_image():
    with pytest.raises(ValueError, match="at least one image"):
        largest_pairwise_distance(torch.zeros(0, 1, 4, 4))


def test_largest_distance_leaves_the_images_alone():
    images = torch.randn(10, 1, 4, 4)
    copy = images.clone()
    largest_pairwise_distance(images)
    assert torch.equal(images, copy)


def test_largest_distance_on_mnist():
    images = load_images("mnist") / 255
    start = time.perf_counter()
    distance = largest_pairwise_distance(images)
    assert f"{distance:.4f}" == "16.8758"
    assert time.perf_counter() - start < 60


# Technique 2


@given(D=st.integers(5, 1_000_000), overlap=st.floats(0.01, 0.985))
def test_ratio_solves_its_equation(D, overlap):
    gamma = noise_scale_ratio(D, overlap)
    assert gamma > 1
    # Noise of scale 1 has the length sqrt(D) +- 1/sqrt(2). Of the lengths at the scale above, which lie around
    # gamma sqrt(D), this is the share that falls within 3 gamma of it, in units of the spread.
    shell = statistics.NormalDist(mu=math.sqrt(2 * D) * (1 - gamma))
    assert shell.cdf(3 * gamma) - shell.cdf(-3 * gamma) == pytest.approx(overlap, abs=1e-8)


def test_ratio_for_mnist_and_its_default_overlap():
    assert f"{noise_scale_ratio(784):.5f}" == "1.08197"
    assert noise_scale_ratio(784) == noise_scale_ratio(784, 0.5)


@given(D=st.integers(5, 100_000), more=st.integers(1, 1000), overlap=st.floats(0.05, 0.95))
def test_ratio_falls_with_dimension_and_with_overlap(D, more, overlap):
    assert noise_scale_ratio(D + more, overlap) < noise_scale_ratio(D, overlap)
    assert noise_scale_ratio(D, overlap + 0.01) < noise_scale_ratio(D, overlap)


@pytest.mark.parametrize("arguments", [(4, 0.5), (0, 0.5), (-784, 0.5), (784, 0), (784, -0.5), (784, 0.99), (784, 1.5)])
def test_ratio_refuses_what_has_no_solution(arguments):
    with pytest.raises(ValueError, match="Technique 2"):
        noise_scale_ratio(*arguments)


def test_number_of_scales_for_mnist():
    assert number_of_noise_scales(16.8758, 0.01, noise_scale_ratio(784)) == 96


@given(span=st.floats(1.01, 1e5), sigma_L=st.floats(1e-3, 1), gamma=st.floats(1.002, 4))
@example(span=1687.58, sigma_L=0.01, gamma=1.0819717)
def test_number_of_scales_is_the_smallest_that_keeps_the_ratio(span, sigma_L, gamma):
    def ratio(L):
        return math.exp(math.log(sigma_L * span / sigma_L) / (L - 1))

    L = number_of_noise_scales(sigma_L * span, sigma_L, gamma)
    assert L >= 2
    assert ratio(L) <= gamma * (1 + 1e-8)
    if L > 2:
        assert ratio(L - 1) > gamma
    sigmas = geometric_noise_scales(sigma_L * span, sigma_L, L)
    assert (sigmas[0] / sigmas[1]).item() == pytest.approx(ratio(L), rel=3e-7)


@given(gamma=st.floats(1.01, 3), sigma_L=st.floats(1e-3, 1), steps=st.integers(1, 30))
def test_number_of_scales_is_not_thrown_off_by_rounding(gamma, sigma_L, steps):
    assert number_of_noise_scales(sigma_L * gamma**steps, sigma_L, gamma) == steps + 1
