"""The U-Net of lesson 5: the paper's size, any size and number of channels, conditioned on t, and no dead parameter."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common.layers import GroupNorm
from lesson_05_ddpm.noise_network import NoiseNetwork, SelfAttention, timestep_embedding
from tests.running import DIFFUSION

pytestmark = pytest.mark.lessons("lesson_05_ddpm")
SMALL = {"width": 8, "levels": 2, "blocks": 1, "patch": 2}


def awake(network):
    """The network with weights in the layers that start at zero."""
    for parameter in network.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return network.eval()


def test_the_papers_network_for_cifar10_is_as_large_as_the_papers():
    """35.7 million (App. B); 35 746 307 by counting in the authors' code."""
    with torch.device("meta"):
        network = NoiseNetwork(channels=3)
    assert sum(p.numel() for p in network.parameters()) == 35_746_307
    attention = [module.qkv.in_channels for module in network.modules() if isinstance(module, SelfAttention)]
    assert len(attention) == 2 + 1 + 3 and set(attention) == {256}  # at 16x16, down and up, and in the middle


@pytest.mark.parametrize("levels, patch, expected", [(3, 1, {28, 14, 7}), (2, 2, {14, 7}), (4, 1, {28, 14, 7, 4})])
def test_28_pixels_stay_28_and_are_halved_on_the_way(levels, patch, expected):
    network = NoiseNetwork(width=8, levels=levels, blocks=1, patch=patch)
    sizes = set()
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda module, inputs, output: sizes.add(output.shape[2]))
    assert network(torch.randn(2, 1, 28, 28), torch.tensor([0, 999])).shape == (2, 1, 28, 28)
    assert sizes == expected


@pytest.mark.parametrize("size", [16, 18, 22, 32, 64])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_size_of_pictures_and_number_of_channels(size, channels):
    x = torch.randn(2, channels, size, size)
    for levels, patch in ((2, 2), (3, 1)):
        network = NoiseNetwork(channels, **{**SMALL, "levels": levels, "patch": patch})
        assert network(x, torch.tensor([1, 2])).shape == x.shape


@pytest.mark.parametrize("width", [8, 9, 18, 22, 33])
def test_every_width(width):
    for levels, patch in ((2, 2), (3, 1)):
        network = NoiseNetwork(width=width, levels=levels, blocks=1, patch=patch)
        assert network(torch.randn(2, 1, 16, 16), torch.tensor([0, 999])).shape == (2, 1, 16, 16)


def test_it_starts_with_a_prediction_of_zero_and_every_parameter_has_a_gradient_when_awake():
    x, t = torch.randn(3, 1, 28, 28), torch.tensor([0, 500, 999])
    network = NoiseNetwork(**SMALL)
    assert not network(x, t).any()
    awake(network)(x, t).square().sum().backward()
    assert [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_a_prediction_depends_on_its_own_image_and_t_only():
    network, x = awake(NoiseNetwork(**SMALL)), torch.randn(3, 1, 28, 28)
    t = torch.tensor([0, 500, 999])
    whole = network(x, t)
    torch.testing.assert_close(whole[1:2], network(x[1:2], t[1:2]), rtol=1e-4, atol=1e-5)
    assert (network(x[:1], t[1:2]) - whole[:1]).abs().max() > 0.01


def test_a_pixel_is_seen_everywhere():
    network, x, t = awake(NoiseNetwork(**SMALL)), torch.randn(1, 1, 28, 28, requires_grad=True), torch.tensor([300])
    network(x, t)[0, 0, 0, 0].backward()
    assert (x.grad != 0).all()


def test_dropout_is_off_where_it_is_evaluated():
    network, x, t = awake(NoiseNetwork(**SMALL, dropout=0.5)), torch.randn(2, 1, 28, 28), torch.tensor([1, 2])
    assert torch.equal(network(x, t), network(x, t))
    network.train()
    assert not torch.equal(network(x, t), network(x, t))


def test_the_embedding_of_t():
    """Sines, then cosines, of t at frequencies from 1 to 1/10 000, in equal ratios."""
    t = torch.tensor([0, 1, 37])
    found = timestep_embedding(t, 8)
    assert found.shape == (3, 8)
    for row, n in zip(found, t.tolist()):
        angles = [n / 10_000 ** (k / 3) for k in range(4)]
        expected = [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
        torch.testing.assert_close(row, torch.tensor(expected), rtol=0, atol=1e-5)


def test_attention_is_torchs():
    torch.manual_seed(0)
    layer, x = SelfAttention(16), torch.randn(2, 16, 5, 6)
    assert torch.equal(layer(x), x)  # it starts with a change of zero
    awake(layer)
    tokens = layer.norm(x).flatten(2).mT  # (B, H W, C)
    q, k, v = (tokens @ layer.qkv.weight[:, :, 0, 0].T + layer.qkv.bias).chunk(3, dim=2)
    mean = F.scaled_dot_product_attention(q, k, v) @ layer.out.weight[:, :, 0, 0].T + layer.out.bias
    torch.testing.assert_close(layer(x), x + mean.mT.unflatten(2, (5, 6)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_group_norm_is_torchs(dtype, tolerance):
    torch.manual_seed(0)
    ours, theirs = GroupNorm(4, 16), nn.GroupNorm(4, 16)
    for parameter in ours.parameters():
        nn.init.normal_(parameter)
    theirs.load_state_dict(ours.state_dict())
    x = (3 + 2 * torch.randn(3, 16, 6, 5)).to(dtype)
    a, b = x.clone().requires_grad_(), x.float().requires_grad_()
    w = torch.randn(3, 16, 6, 5)
    (ours(a).float() * w).sum().backward()
    (theirs(b) * w).sum().backward()
    torch.testing.assert_close(ours(a).float(), theirs(b), rtol=0, atol=10 * tolerance)
    torch.testing.assert_close(a.grad.float(), b.grad, rtol=0, atol=10 * tolerance)


def test_group_norm_of_what_hardly_differs_is_torchs():
    """Where the variance is a tenth of eps, and where it is zero."""
    x = 1e-3 * torch.randn(3, 16, 6, 5)
    torch.testing.assert_close(GroupNorm(4, 16)(x), nn.GroupNorm(4, 16)(x), rtol=1e-3, atol=1e-4)
    assert torch.equal(GroupNorm(4, 16)(0 * x), 0 * x)


def reference(network, x, t, levels, blocks, patch, scale_shift=False):
    """What the U-Net puts out, written a second time, with PyTorch's own norms and attention, from its weights by name.

    DDPM's (App. B, and the authors' code): at each resolution some residual blocks, whose results are all kept; a
    convolution with stride 2 leads down; two blocks are in the middle; on the way up, one block more takes what was
    kept, and the nearest pixels and a convolution lead to the next resolution. Attention is at
    the second one and in the middle.
    """
    p, silu = dict(network.named_parameters()), F.silu

    def linear(v, name):
        return v @ p[f"{name}.weight"].T + p[f"{name}.bias"]

    def conv(h, name, **how):
        return F.conv2d(h, p[f"{name}.weight"], p[f"{name}.bias"], padding=p[f"{name}.weight"].shape[2] // 2, **how)

    def norm(h, name):
        channels = h.shape[1]
        return F.group_norm(h, math.gcd(32, channels // 4), p[f"{name}.weight"], p[f"{name}.bias"])

    def block(h, name, attention):
        inner = conv(silu(norm(h, f"{name}.block.norm1")), f"{name}.block.conv1")
        of_t = linear(e, f"{name}.block.embed")[:, :, None, None]
        if scale_shift:
            scale, shift = of_t.split(inner.shape[1], dim=1)
            inner = norm(inner, f"{name}.block.norm2") * (1 + scale) + shift
        else:
            inner = norm(inner + of_t, f"{name}.block.norm2")
        through = conv(h, f"{name}.block.shortcut") if f"{name}.block.shortcut.weight" in p else h
        h = through + conv(silu(inner), f"{name}.block.conv2")
        if attention:
            q, k, v = conv(norm(h, f"{name}.attention.norm"), f"{name}.attention.qkv").flatten(2).mT.chunk(3, dim=2)
            h = h + conv(F.scaled_dot_product_attention(q, k, v).mT.unflatten(2, h.shape[2:]), f"{name}.attention.out")
        return h

    half = network.width // 2
    angles = t[:, None].double() * 10_000 ** (-torch.arange(half) / (half - 1))
    e = silu(linear(torch.cat([angles.sin(), angles.cos()], dim=1).to(x), "embedding.0"))
    e = silu(linear(e, "embedding.2"))
    h = conv(F.pixel_unshuffle(x, patch), "first")
    kept, down, up = [h], iter(range(100)), iter(range(100))
    for level in range(levels):
        if level:
            h = conv(h, f"down.{next(down)}", stride=2)
            kept.append(h)
        for _ in range(blocks):
            h = block(h, f"down.{next(down)}", attention=level == 1)
            kept.append(h)
    h = block(block(h, "middle.0", attention=True), "middle.1", attention=False)
    for level in reversed(range(levels)):
        for _ in range(blocks + 1):
            h = block(torch.cat([h, kept.pop()], dim=1), f"up.{next(up)}", attention=level == 1)
        if level:
            h = conv(F.interpolate(h, scale_factor=2, mode="nearest"), f"up.{next(up)}")
    assert not kept
    return F.pixel_shuffle(conv(silu(norm(h, "norm")), "last"), patch)


@pytest.mark.parametrize("levels, blocks, patch", [(2, 1, 2), (3, 2, 1), (4, 2, 1)])
def test_the_network_is_the_papers(levels, blocks, patch):
    network = NoiseNetwork(3, width=16, levels=levels, blocks=blocks, patch=patch)
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([3, 700])
    with torch.no_grad():
        for weights in network.parameters():
            weights.add_(0.05 * torch.randn_like(weights))
        expected = reference(network, x, t, levels, blocks, patch)
        torch.testing.assert_close(network(x, t), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.lessons(*DIFFUSION)
def test_groups_have_four_channels_or_more_and_are_32_at_most(lesson):
    groups = {channels: lesson.noise_network.norm(channels).num_groups for channels in (8, 32, 128, 256, 512)}
    assert groups == {8: 2, 32: 8, 128: 32, 256: 32, 512: 32}


@pytest.mark.lessons(*DIFFUSION)
def test_a_block_with_attention_changes_nothing_at_the_start(lesson):
    layer, x = lesson.noise_network.NoiseNetwork(**SMALL).middle[0], torch.randn(2, 16, 5, 5)
    assert isinstance(layer.attention, lesson.noise_network.SelfAttention)
    assert torch.equal(layer(x, torch.randn(2, 32)), x)


@pytest.mark.lessons(*DIFFUSION)
def test_dropout_is_of_single_numbers_that_the_second_convolution_takes(lesson):
    block, seen = lesson.noise_network.NoiseNetwork(**SMALL, dropout=0.25).middle[0].block, []
    block.conv2.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    x, e = torch.randn(4, 16, 7, 7), torch.randn(4, 32)
    for training in (False, True):
        block.train(training)(x, e)
    whole, rest = seen
    gone = rest == 0
    torch.testing.assert_close(rest, torch.where(gone, 0, whole / 0.75))
    assert float(gone.float().mean()) == pytest.approx(0.25, abs=0.03)
    assert not gone.all(3).all(2).any()  # of no channel all pixels
