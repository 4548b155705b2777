import importlib
import inspect
import io
import re

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from common.layers import ACTIVATIONS, average_pool5, channel_moments
from lesson_03_ncsn.noise_scales import geometric_noise_scales

pytestmark = pytest.mark.lessons("lesson_03_ncsn", "lesson_04_ncsnv2")

L = 10
SIGMAS = geometric_noise_scales(1, 0.01, L)


def network(lesson, seed=0, sigmas=SIGMAS, **arguments):
    torch.manual_seed(seed)
    return lesson.score_network.ScoreNetwork(sigmas, **{"width": 8, **arguments})


def noisy_images(B=L, channels=1, size=28):
    i = torch.arange(B) % L
    x = torch.rand(B, channels, size, size)
    return x + SIGMAS[i][:, None, None, None] * torch.randn_like(x), i


def relative_error(a, b):
    return ((a - b).norm() / b.norm()).item()


# Size and shape


def test_as_many_parameters_as_the_official_network(lesson):
    expected = {"lesson_03_ncsn": 7_638_657, "lesson_04_ncsnv2": 7_426_881}[lesson.name]
    model = lesson.score_network.ScoreNetwork(SIGMAS)
    assert sum(p.numel() for p in model.parameters()) == expected


@pytest.mark.lessons("lesson_03_ncsn", "lesson_04_ncsnv2", "lesson_07_score_sde")
def test_the_defaults_are_ncsns_network_for_mnist(lesson):
    given = inspect.signature(lesson.score_network.ScoreNetwork).parameters
    expected = {"channels": 1, "width": 64, "patch": 1, "blocks": 2, "activation": "elu", "skip": False}
    assert {name: given[name].default for name in expected} == expected


def feature_maps(model, size):
    """(channels, height) of what each stage and each refine block puts out, in the order in which they run."""
    shapes = []
    for module in [*(blocks[-1] for blocks in model.stages), *model.cascade]:
        module.register_forward_hook(lambda module, inputs, out: shapes.append((out.shape[1], out.shape[2])))
    model(torch.rand(1, 1, size, size), torch.tensor([0]))
    return shapes


def test_feature_maps_are_those_of_the_paper(lesson):
    assert [size for _, size in feature_maps(network(lesson), 28)] == [28, 14, 14, 14, 14, 14, 14, 28]
    assert [size for _, size in feature_maps(network(lesson, patch=2), 28)] == [14, 7, 7, 7, 7, 7, 7, 14]
    # an odd number of pixels is rounded up, so that the last row is not left out
    assert [size for _, size in feature_maps(network(lesson, patch=2), 18)] == [9, 5, 5, 5, 5, 5, 5, 9]


@pytest.mark.parametrize("blocks", [1, 2])
def test_feature_maps_are_those_in_the_comments(lesson, blocks):
    source = inspect.getsource(lesson.score_network.ScoreNetwork)
    comments = re.findall(r"# \(B, (2?)W, (\d+), (\d+)\)", source)
    assert len(comments) == 8
    stated = [(16 if twice else 8, int(height)) for twice, height, _ in comments]
    assert stated == feature_maps(network(lesson, width=8, blocks=blocks), 28)
    assert all(height == width for _, height, width in comments)


@settings(max_examples=20)
@given(
    half=st.tuples(st.integers(8, 32), st.integers(8, 32)),
    B=st.integers(1, 2),
    channels=st.integers(1, 4),
    width=st.integers(2, 6),
    patch=st.sampled_from([1, 2]),
    blocks=st.sampled_from([1, 2]),
    activation=st.sampled_from(sorted(ACTIVATIONS)),
)
def test_any_even_size_any_channels_any_width(lesson, half, B, channels, width, patch, blocks, activation):
    model = network(lesson, channels=channels, width=width, patch=patch, blocks=blocks, activation=activation)
    x = torch.rand(B, channels, 2 * half[0], 2 * half[1])
    score = model(x, torch.arange(B))
    assert score.shape == x.shape
    assert score.dtype == torch.float32
    assert score.isfinite().all()


def test_a_table_of_float64_gives_the_same_float32_score(lesson):
    x, i = noisy_images()
    one, other = (network(lesson, sigmas=table)(x, i) for table in (SIGMAS, SIGMAS.double()))
    assert other.dtype == torch.float32 and torch.equal(one, other)


@pytest.mark.lessons("lesson_07_score_sde")
def test_a_noise_scale_of_float64_gives_the_same_float32_score(lesson):
    x, i = noisy_images()
    torch.manual_seed(0)
    model = lesson.score_network.ScoreNetwork(width=8, skip=True)
    one, other = (model(x, sigma) for sigma in (SIGMAS[i], SIGMAS[i].double()))
    assert other.dtype == torch.float32 and torch.equal(one, other)


def test_patch_2_is_a_network_on_blocks_of_pixels(lesson):
    model = network(lesson, channels=3, patch=2)
    on_blocks = network(lesson, seed=1, channels=12, patch=1)
    on_blocks.load_state_dict(model.state_dict())
    x, i = torch.rand(2, 3, 20, 32), torch.tensor([0, 9])
    with torch.no_grad():
        expected = F.pixel_shuffle(on_blocks(F.pixel_unshuffle(x, 2), i), 2)
        torch.testing.assert_close(model(x, i), expected)


# The noise scale


def test_lesson_4_divides_by_sigma_and_lesson_3_is_told_it(lesson):
    model = network(lesson)
    x = torch.rand(1, 1, 28, 28).repeat(L, 1, 1, 1)
    with torch.no_grad():
        output = SIGMAS[:, None, None, None] * model(x, torch.arange(L))
    differences = [relative_error(output[n], output[0]) for n in range(1, L)]
    if lesson.name == "lesson_03_ncsn":
        assert min(differences) > 0.01
    else:
        assert max(differences) < 1e-6


def test_permuting_a_batch_permutes_the_output(lesson):
    model = network(lesson)
    x, i = noisy_images()
    order = torch.randperm(L)
    with torch.no_grad():
        together, permuted = model(x, i), model(x[order], i[order])
        alone = torch.cat([model(x[n : n + 1], i[n : n + 1]) for n in range(L)])
    assert not torch.equal(order, torch.arange(L))
    for score in (permuted[order.argsort()], alone):
        for n in range(L):
            assert relative_error(score[n], together[n]) < 1e-5


# Gradients


@pytest.mark.parametrize("patch", [1, 2])
@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_every_parameter_gets_a_gradient(lesson, patch, activation):
    model = network(lesson, channels=3, patch=patch, activation=activation)
    x, i = noisy_images(channels=3, size=16)
    lesson.loss.denoising_score_matching_loss(model, x, SIGMAS, i, torch.randn_like(x)).mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        # in lesson 3 the normalisations have a row of numbers for each noise scale, and each row is trained
        rows = parameter.grad if name.endswith(("alpha", "beta", "gamma")) else parameter.grad.flatten()[None]
        rows = rows.reshape(-1, rows.shape[-1])
        assert (rows.abs().amax(1) > 0).all(), name


def test_lesson_3_trains_only_the_rows_of_the_noise_scales_in_the_batch():
    from lesson_03_ncsn.score_network import ScoreNetwork

    model = ScoreNetwork(SIGMAS, width=4)
    model(torch.rand(2, 1, 16, 16), torch.tensor([3, 7])).square().sum().backward()
    touched = model.norm.gamma.grad.abs().amax(1) > 0
    assert touched.nonzero().flatten().tolist() == [3, 7]


def test_an_image_of_one_colour(lesson):
    model = network(lesson, patch=2)
    x = torch.tensor([0.0, 0.5, 100.0])[:, None, None, None].repeat(1, 1, 28, 28).requires_grad_()
    score = model(x, torch.tensor([0, 5, 9]))
    score.square().sum().backward()
    assert score.isfinite().all()
    assert x.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters())


# InstanceNorm++


def paper_instance_norm(x, gamma, alpha, beta):
    """App. A of NCSN, one image and one channel at a time, in float64; all parameters (B, C)."""
    images = []
    for n in range(len(x)):
        mu = torch.stack([x[n, k].sum() / x[n, k].numel() for k in range(x.shape[1])])
        m = mu.sum() / len(mu)
        v = ((mu - m).square().sum() / (len(mu) - 1) + 1e-5).sqrt()
        channels = []
        for k in range(x.shape[1]):
            s = ((x[n, k] - mu[k]).square().sum() / x[n, k].numel() + 1e-5).sqrt()
            channels.append(gamma[n, k] * (x[n, k] - mu[k]) / s + beta[n, k] + alpha[n, k] * (mu[k] - m) / v)
        images.append(torch.stack(channels))
    return torch.stack(images)


@pytest.mark.parametrize("offset", [0.0, 3.0])
def test_instance_norm_is_the_papers_formula(lesson, offset):
    B, C = 4, 5
    i = torch.tensor([2, 0, 9, 2])
    conditional = lesson.name == "lesson_03_ncsn"
    norm = lesson.score_network.InstanceNormPlusPlus(C, *[L] * conditional)
    with torch.no_grad():
        for parameter in norm.parameters():  # beta starts at zero, and all should be told apart
            parameter.copy_(torch.randn_like(parameter))
    x = torch.randn(B, C, 6, 8) * (0.5 + torch.rand(B, C, 1, 1)) + torch.randn(B, C, 1, 1) + offset
    x.requires_grad_()
    weight = torch.randn(B, C, 6, 8)

    y = norm(x, i) if conditional else norm(x)
    (y * weight).sum().backward()

    x64 = x.detach().double().requires_grad_()
    own = {name: parameter.detach().double().requires_grad_() for name, parameter in norm.named_parameters()}
    per_image = {name: p[i] if conditional else p.expand(B, C) for name, p in own.items()}
    y64 = paper_instance_norm(x64, **per_image)
    (y64 * weight).sum().backward()

    assert relative_error(y, y64) < 5e-5
    assert relative_error(x.grad, x64.grad) < 5e-5
    assert set(own) == {"gamma", "alpha", "beta"}
    for name, parameter in norm.named_parameters():
        assert relative_error(parameter.grad, own[name].grad) < 5e-5, name


@pytest.mark.parametrize("value", [0.0, 0.3, -5.0, 1000.0])
def test_instance_norm_of_a_constant(lesson, value):
    """No variation within a channel, nor between channels: what is left is beta, and nothing is divided by zero."""
    conditional = lesson.name == "lesson_03_ncsn"
    norm = lesson.score_network.InstanceNormPlusPlus(3, *[L] * conditional)
    x = torch.full((2, 3, 8, 8), value, requires_grad=True)
    y = norm(x, torch.tensor([0, 9])) if conditional else norm(x)
    y.square().sum().backward()
    torch.testing.assert_close(y, torch.zeros_like(y), rtol=0, atol=1e-3 * max(1, abs(value)))
    assert x.grad.isfinite().all()


def test_instance_norm_brings_the_means_of_the_channels_back(lesson):
    """Plain instance normalisation makes two images that differ in brightness alone the same; this one must not."""
    conditional = lesson.name == "lesson_03_ncsn"
    norm = lesson.score_network.InstanceNormPlusPlus(3, *[L] * conditional)
    x = torch.randn(1, 3, 8, 8)
    x = x - x.mean((2, 3), keepdim=True) + torch.tensor([[0.0, 1.0, 5.0], [5.0, 1.0, 0.0]])[:, :, None, None]
    y = norm(x, torch.tensor([0, 0])) if conditional else norm(x)
    # mean 2, unbiased variance 7: the means come back as alpha (mu - 2) / sqrt(7)
    alpha = norm.alpha[0] if conditional else norm.alpha
    mu = torch.tensor([[0.0, 1.0, 5.0], [5.0, 1.0, 0.0]])
    torch.testing.assert_close(y.mean((2, 3)), alpha * (mu - 2) / 7**0.5, rtol=1e-4, atol=1e-5)


# common.layers


def test_channel_moments_and_their_gradient():
    x = (1 + torch.randn(3, 4, 6, 8)).requires_grad_()
    mu, variance = channel_moments(x)
    assert mu.dtype == variance.dtype == torch.float32
    x64 = x.detach().double().requires_grad_()
    torch.testing.assert_close(mu, x64.mean((2, 3)).float())
    torch.testing.assert_close(variance, x64.var((2, 3), correction=0).float())
    weights = torch.randn(2, 3, 4)
    for weight_mu, weight_variance in (
        (weights[0], weights[1]),
        (weights[0], 0 * weights[1]),
        (0 * weights[0], weights[1]),
    ):
        (grad,) = torch.autograd.grad((weight_mu * mu + weight_variance * variance).sum(), x, retain_graph=True)
        total = weight_mu * x64.mean((2, 3)) + weight_variance * x64.var((2, 3), correction=0)
        (grad64,) = torch.autograd.grad(total.sum(), x64)
        torch.testing.assert_close(grad, grad64.float(), rtol=1e-5, atol=1e-6)


def test_channel_moments_gradient_is_the_numerical_one():
    """The moments are float32 by design, so the step is large; both are at most quadratic, which any step suits."""
    x = torch.randn(2, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(channel_moments, (x,), eps=1e-2, atol=1e-4)


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (5, 5), (7, 14)])
def test_average_pool_and_its_gradient(size):
    x = torch.randn(2, 3, *size, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 3, *size, dtype=torch.float64)
    padded = F.pad(x, (2, 2, 2, 2))
    expected = sum(padded[:, :, r : r + size[0], c : c + size[1]] for r in range(5) for c in range(5)) / 25
    y = average_pool5(x)
    torch.testing.assert_close(y, expected)
    (grad,), (expected_grad,) = (torch.autograd.grad((t * weight).sum(), x) for t in (y, expected))
    torch.testing.assert_close(grad, expected_grad)


def test_variance_is_never_negative():
    x = (1000 * torch.rand(2, 500, 1, 1)).expand(
        2, 500, 14, 14
    )  # the mean of x^2 minus that of x, squared, is rounding
    _, variance = channel_moments(x)
    assert (variance >= 0).all()


@pytest.mark.parametrize("offset, tolerance", [(0, 0.01), (1, 0.03), (3, 0.15)])
def test_channel_moments_in_bf16(offset, tolerance):
    x = (offset + torch.randn(8, 16, 14, 14)).bfloat16()
    mu, variance = channel_moments(x)
    assert mu.dtype == variance.dtype == torch.float32
    torch.testing.assert_close(mu, x.double().mean((2, 3)).float(), rtol=0.01, atol=0.005)
    torch.testing.assert_close(variance, x.double().var((2, 3), correction=0).float(), rtol=tolerance, atol=0)


TORCH_ACTIVATIONS = {"elu": torch.nn.ELU(), "relu": torch.nn.ReLU(), "silu": torch.nn.SiLU()}


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activation_is_torchs(name, dtype):
    special = torch.tensor([-1e30, -100.0, -20.0, -1.0, -1e-3, -1e-6, -0.0, 0.0, 1e-6, 1e-3, 1.0, 20.0, 100.0, 1e30])
    x = torch.cat([special, 3 * torch.randn(1000)]).to(dtype)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    weight = torch.randn(len(x)).to(dtype)
    y, expected = ACTIVATIONS[name](ours), TORCH_ACTIVATIONS[name](theirs)
    y.backward(weight)
    expected.backward(weight)
    tolerance = dict(rtol=1e-6, atol=1e-6) if dtype == torch.float32 else dict(rtol=0.01, atol=0.01)
    assert y.dtype == dtype
    torch.testing.assert_close(y, expected, **tolerance)
    torch.testing.assert_close(ours.grad, theirs.grad, **tolerance)
    assert torch.equal(ours, x)  # nothing is computed in place


def test_every_activation_has_its_counterpart_here():
    assert set(ACTIVATIONS) == set(TORCH_ACTIVATIONS)


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_activation_gradient_is_the_numerical_one(name):
    x = torch.linspace(-3, 3, 14, dtype=torch.float64, requires_grad=True)  # an even number: none is 0, relu's corner
    assert torch.autograd.gradcheck(ACTIVATIONS[name], (x,))


# The whole network


def reference(lesson, model, x, i, skip, patch=1):
    """The network of NCSN, App. A, and NCSNv2, App. A, written from the papers: 2W channels after the first stage,
    one average pooling, dilations 2 and 4, four refine blocks. Each number that could be wrong is spelled out here.
    """
    p = dict(model.named_parameters())
    told = lesson.name == "lesson_03_ncsn"
    act = {"relu": F.relu, "elu": F.elu}[model.act_name]

    def conv(h, name, dilation=1):
        size = p[f"{name}.weight"].shape[-1]
        padding = dilation if size == 3 else 0
        return F.conv2d(h, p[f"{name}.weight"], p.get(f"{name}.bias"), padding=padding, dilation=dilation)

    def norm(h, name):
        gamma, alpha, beta = (p[f"{name}.{k}"] for k in ("gamma", "alpha", "beta"))
        if told:
            gamma, alpha, beta = gamma[i], alpha[i], beta[i]
        else:
            gamma, alpha, beta = (each.expand(len(h), -1) for each in (gamma, alpha, beta))
        return paper_instance_norm(h, gamma, alpha, beta)

    def residual(h, name, dilation=1, down=False):
        inner = conv(act(norm(h, f"{name}.norm1")), f"{name}.conv1", dilation)
        inner = conv(act(norm(inner, f"{name}.norm2")), f"{name}.conv2", dilation)
        if down:
            inner, h = (F.avg_pool2d(t, 2) for t in (inner, h))
        if f"{name}.shortcut.weight" in p:
            h = conv(h, f"{name}.shortcut", dilation)
        return h + inner

    def unit(h, name, before):
        return conv(before(norm(h, f"{name}.norm") if told else h), f"{name}.conv")

    def units(h, name, n):
        for k in range(n):
            h = h + unit(unit(h, f"{name}.units.{k}.0", act), f"{name}.units.{k}.1", act)
        return h

    def refine(inputs, name, n_out=1):
        hs = [units(h, f"{name}.adapt.{k}", 2) for k, h in enumerate(inputs)]
        if len(hs) > 1:
            hs = [unit(h, f"{name}.fuse.{k}", lambda h: h) for k, h in enumerate(hs)]
            hs = [F.interpolate(h, hs[0].shape[2:], mode="bilinear", align_corners=True) for h in hs]
        h = path = act(sum(hs))
        for k in range(2):
            path = unit(path, f"{name}.pool.units.{k}", lambda h: F.avg_pool2d(h, 5, stride=1, padding=2))
            h = h + path
        return units(h, f"{name}.output", n_out)

    if skip:
        c = 1 / (0.2 + x.square().mean((1, 2, 3), keepdim=True)).sqrt()
        x = c * x
    h1 = residual(residual(conv(x, "first"), "stages.0.0"), "stages.0.1")
    h2 = residual(residual(h1, "stages.1.0", down=True), "stages.1.1")
    h3 = residual(residual(h2, "stages.2.0", 2), "stages.2.1", 2)
    h4 = residual(residual(h3, "stages.3.0", 4), "stages.3.1", 4)
    h = refine([h4], "cascade.0")
    h = refine([h3, h], "cascade.1")
    h = refine([h2, h], "cascade.2")
    h = refine([h1, h], "cascade.3", n_out=3)
    h = conv(act(norm(h, "norm")), "last")
    h = c * h - x if skip else h
    return h if told else h / SIGMAS.double()[i][:, None, None, None]


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("activation", ["relu", "elu"])
def test_the_network_is_the_papers(lesson, skip, activation):
    model = network(lesson, width=4, blocks=2, activation=activation, skip=skip).double()
    model.act_name = activation
    with torch.no_grad():
        for parameter in model.parameters():  # biases and shifts start at zero, and all should be told apart
            parameter.add_(0.1 * torch.randn_like(parameter))
    i = torch.tensor([0, 3, 9])
    x = (torch.rand(3, 1, 16, 16) + SIGMAS[i][:, None, None, None] * torch.randn(3, 1, 16, 16)).double()
    with torch.no_grad():
        torch.testing.assert_close(model(x, i).double(), reference(lesson, model, x, i, skip), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name, more", [("03_ncsn", [3]), ("04_ncsnv2", []), ("07_score_sde", [False])])
def test_the_weights_of_a_normalisation_start_near_one(name, more):
    """With a standard deviation of 0.02, as in the authors' code."""
    norm = importlib.import_module(f"lesson_{name}.score_network").InstanceNormPlusPlus(20_000, *more)
    for weights in (norm.gamma.detach(), norm.alpha.detach()):
        assert float(weights.mean()) == pytest.approx(1, abs=1e-3)
        assert float(weights.std()) == pytest.approx(0.02, rel=0.03)
    assert not norm.beta.any() and not torch.equal(norm.gamma, norm.alpha)


def test_lesson_3_starts_with_scores_as_large_as_they_have_to_be():
    """Ours: gamma and alpha of the last normalisation start at 1 / sigma_i, since a score is about that large."""
    from lesson_03_ncsn.score_network import ScoreNetwork

    norm = ScoreNetwork(SIGMAS, width=32).norm
    for parameter in (norm.gamma, norm.alpha):
        torch.testing.assert_close(parameter.mean(1) * SIGMAS, torch.ones(10), rtol=0.05, atol=0)


# Precision, saving


def test_bf16_is_close_to_float32(lesson):
    model = network(lesson, width=16)
    x, i = noisy_images()
    with torch.no_grad():
        score = model(x, i)
        with torch.autocast("cpu", torch.bfloat16):
            rough = model(x, i)
    assert rough.dtype == torch.float32
    errors = [relative_error(rough[n], score[n]) for n in range(L)]
    assert 1e-4 < min(errors)  # it did run in bf16
    assert max(errors) < 0.05


def test_gradients_in_bf16_are_close_to_float32(lesson):
    model = network(lesson, width=16, patch=2, activation="relu")
    x, i = noisy_images(24)
    z = torch.randn_like(x)
    grads = []
    for enabled in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = lesson.loss.denoising_score_matching_loss(model, x, SIGMAS, i, z).mean()
        loss.backward()
        assert loss.dtype == torch.float32
        assert all(p.grad.dtype == torch.float32 for p in model.parameters())
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert F.cosine_similarity(grads[0], grads[1], dim=0) > 0.98


def test_state_dict_round_trip(lesson):
    model = network(lesson, seed=1)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    copy = network(lesson, seed=2, sigmas=geometric_noise_scales(17, 0.01, L))
    x, i = noisy_images()
    with torch.no_grad():
        score = model(x, i)
        assert relative_error(copy(x, i), score) > 0.1
        copy.load_state_dict(torch.load(file, weights_only=True))
        assert torch.equal(copy(x, i), score)
    assert torch.equal(copy.sigmas, SIGMAS)  # the ladder is saved with the weights


def test_the_ladder_is_copied(lesson):
    sigmas = SIGMAS.clone()
    model = lesson.score_network.ScoreNetwork(sigmas, width=4)
    sigmas.zero_()
    assert torch.equal(model.sigmas, SIGMAS)
