"""Adam and Muon: what each updates, and that a checkpoint of them goes on exactly."""

import copy

import pytest
import torch

from common.optimizer import WEIGHT_DECAY, Optimizer, orthogonal
from tests.running import DIFFUSION


def a_network(lesson, width=8):
    if lesson.name in DIFFUSION:
        network = lesson.noise_network.NoiseNetwork(1, width, levels=2, blocks=1, patch=2)
    elif lesson.name == "lesson_07_score_sde":
        network = lesson.score_network.ScoreNetwork(1, width)
    else:
        sigmas = lesson.noise_scales.geometric_noise_scales(1, 0.1, 4)
        network = lesson.score_network.ScoreNetwork(sigmas, 1, width)
    return network.to(memory_format=torch.channels_last)


def wide(network):
    """The weights of the first 3x3 convolution that is Muon's."""
    return next(p for p in network.parameters() if p.ndim == 4 and min(p.shape[:2]) > 4 and p.shape[2] == 3)


def gradients(network, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        parameter.grad = torch.empty_like(parameter).copy_(torch.randn(parameter.shape, generator=generator))


def test_adam_is_torchs(lesson):
    """Bit by bit, at a learning rate that changes."""
    ours = a_network(lesson)
    theirs = copy.deepcopy(ours)
    optimizer, reference = Optimizer(ours, "adam"), torch.optim.Adam(theirs.parameters(), fused=True)
    for seed in range(3):
        gradients(ours, seed), gradients(theirs, seed)
        reference.param_groups[0]["lr"] = 1e-3 * (seed + 1)
        optimizer.step(1e-3 * (seed + 1)), reference.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_muon_is_torchs(lesson, dtype):
    """Three steps, against PyTorch's own, which is given each convolution as a matrix and computes in bfloat16."""
    network = a_network(lesson)
    before = copy.deepcopy(network.state_dict())
    optimizer = Optimizer(network, "muon")
    optimizer.dtype = dtype
    kernels = {name: p for name, p in network.named_parameters() if p.ndim == 4 and min(p.shape[:2]) > 4}
    matrices = {name: torch.nn.Parameter(p.detach().flatten(1)) for name, p in kernels.items()}
    theirs = torch.optim.Muon(matrices.values(), lr=0.01, weight_decay=WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw")
    for seed in range(3):
        gradients(network, seed)
        for name, matrix in matrices.items():
            matrix.grad = kernels[name].grad.flatten(1)
        optimizer.step(0.01), theirs.step()
    assert sum(len(weights) for weights in optimizer.groups.values()) == len(kernels) > 20
    for name, matrix in matrices.items():
        a, b = kernels[name].detach().flatten(1) - before[name].flatten(1), matrix.detach() - before[name].flatten(1)
        assert (a - b).norm() < 0.03 * b.norm(), name


@pytest.mark.lessons("lesson_03_ncsn", "lesson_04_ncsnv2", "lesson_05_ddpm")
def test_the_narrow_convolutions_from_and_to_pixels_are_adams(lesson):
    network = a_network(lesson)
    theirs = copy.deepcopy(network)
    optimizer, reference = Optimizer(network, "muon"), torch.optim.Adam(theirs.parameters(), lr=1e-3)
    gradients(network, 0), gradients(theirs, 0)
    optimizer.step(1e-3), reference.step()
    torch.testing.assert_close(network.first.weight, theirs.first.weight)
    torch.testing.assert_close(network.last.weight, theirs.last.weight)
    for a, b in zip(network.norm.parameters(), theirs.norm.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    assert not torch.allclose(wide(network), wide(theirs), atol=1e-6)


@pytest.mark.parametrize("shape", [(3, 8, 72), (2, 72, 8), (1, 16, 16)])
def test_orthogonal_keeps_the_directions_and_evens_out_their_sizes(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    U, S, V = torch.linalg.svd(x, full_matrices=False)
    made = U.mT @ orthogonal(x) @ V.mT  # diagonal, if the directions are kept
    values = torch.diagonal(made, dim1=1, dim2=2)
    torch.testing.assert_close(made, torch.diag_embed(values), rtol=0, atol=1e-4)
    assert 0.5 < values.min() and values.max() < 1.3  # Newton-Schulz stops near 1


def test_a_small_gradient_is_made_as_large_as_any_and_none_stays_none():
    x = torch.randn(3, 8, 72, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(orthogonal(1e-5 * x), orthogonal(x), rtol=1e-4, atol=1e-5)
    assert torch.equal(orthogonal(0 * x), 0 * x)


def test_muon_is_for_convolutions_from_five_channels_to_five_on():
    network = torch.nn.Sequential(torch.nn.Conv2d(4, 5, 3), torch.nn.Conv2d(5, 5, 3), torch.nn.Conv2d(5, 4, 3))
    ((only,),) = Optimizer(network, "muon").groups.values()
    assert only is network[1].weight and Optimizer(network, "adam").groups == {}


@pytest.mark.parametrize("name", ["adam", "muon"])
def test_the_layout_of_the_weights_does_not_matter(lesson, name):
    one = a_network(lesson)
    other = copy.deepcopy(one).to(memory_format=torch.contiguous_format)
    assert not wide(one).is_contiguous() and wide(other).is_contiguous()
    a, b = Optimizer(one, name), Optimizer(other, name)
    for seed in range(2):
        gradients(one, seed), gradients(other, seed)
        a.step(1e-2), b.step(1e-2)
    for (key, p), q in zip(one.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, msg=key)


def test_muon_computes_in_what_is_faster_here(lesson, monkeypatch):
    for speedup, dtype in ((0.3, torch.float32), (1.1, torch.float32), (2.0, torch.bfloat16)):
        monkeypatch.setattr("common.optimizer.bfloat16_speedup", lambda device, speedup=speedup: speedup)
        assert Optimizer(a_network(lesson), "muon").dtype == dtype


def test_all_processes_compute_in_what_is_faster_for_the_first(monkeypatch):
    monkeypatch.setattr("common.optimizer.bfloat16_speedup", lambda device: 2.0)
    monkeypatch.setattr("common.ranks.agreed", lambda value: not value)  # rank 0 has found the contrary
    assert Optimizer(torch.nn.Conv2d(8, 8, 3), "muon").dtype == torch.float32


def test_momentum_of_other_weights_is_refused(lesson):
    ours, wider = (Optimizer(a_network(lesson, width=width), "muon") for width in (8, 10))
    with pytest.raises(ValueError):
        ours.load_state_dict(wider.state_dict())


def test_weight_decay_bounds_what_muon_lets_grow():
    """With the same gradient at each step, a weight w comes to rest where w / 2 is as large as Muon's update."""
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Conv2d(8, 16, 3), torch.nn.InstanceNorm2d(16, affine=True))
    optimizer = Optimizer(network, "muon")
    optimizer.dtype = torch.float32
    gradient = torch.randn(16, 8, 3, 3)
    for _ in range(1000):
        for parameter in network.parameters():
            parameter.grad = torch.zeros_like(parameter)
        network[0].weight.grad = gradient.clone()
        optimizer.step(0.05)
    update = 0.2 * 72**0.5 * orthogonal(gradient.flatten(1)[None])[0]
    torch.testing.assert_close(network[0].weight.detach().flatten(1), -2 * update, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["adam", "muon"])
def test_every_parameter_is_updated_and_gradients_are_cleared(lesson, name):
    network = a_network(lesson)
    before = copy.deepcopy(network.state_dict())
    optimizer = Optimizer(network, name)
    gradients(network, 0)
    optimizer.step(1e-2)
    for key, parameter in network.named_parameters():
        assert not torch.equal(parameter, before[key]), key
        assert parameter.grad is None, key


@pytest.mark.parametrize("name", ["adam", "muon"])
def test_state_goes_on_exactly(lesson, name):
    straight = a_network(lesson)
    stopped = copy.deepcopy(straight)
    a, b = Optimizer(straight, name), Optimizer(stopped, name)
    for seed in range(2):
        gradients(straight, seed), a.step(1e-3)
        gradients(stopped, seed), b.step(1e-3)
    resumed = copy.deepcopy(stopped)
    c = Optimizer(resumed, name)
    c.load_state_dict(copy.deepcopy(b.state_dict()))
    gradients(straight, 2), a.step(1e-3)
    gradients(resumed, 2), c.step(1e-3)
    for p, q in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q)
