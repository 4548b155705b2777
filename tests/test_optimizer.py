"""Adam and Muon: what each updates, and that a checkpoint of them goes on exactly."""

import copy

import pytest
import torch

from common.optimizer import Optimizer


def a_network(lesson, **options):
    network = lesson.score_network.ScoreNetwork(lesson.noise_scales.geometric_noise_scales(1, 0.1, 4), 1, 8, **options)
    return network.to(memory_format=torch.channels_last)


def gradients(network, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        parameter.grad = torch.empty_like(parameter).copy_(torch.randn(parameter.shape, generator=generator))


def test_adam_is_torchs(lesson):
    ours = a_network(lesson)
    theirs = copy.deepcopy(ours)
    optimizer, reference = Optimizer(ours, "adam", fused=True), torch.optim.Adam(theirs.parameters(), lr=1e-3)
    for seed in range(3):
        gradients(ours, seed), gradients(theirs, seed)
        optimizer.step(1e-3), reference.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_muon_makes_the_update_of_a_convolution_orthogonal(lesson):
    network = a_network(lesson)
    before = network.stages[0][0].conv1.weight.detach().clone()
    optimizer = Optimizer(network, "muon", fused=True)
    gradients(network, 0)
    optimizer.step(1.0)
    update = (network.stages[0][0].conv1.weight.detach() - before).permute(0, 2, 3, 1).flatten(1)
    singular_values = torch.linalg.svdvals(update / (0.2 * max(update.shape) ** 0.5))  # match_rms_adamw
    assert singular_values.min() > 0.6 and singular_values.max() < 1.3  # Newton-Schulz stops near 1


@pytest.mark.parametrize("name", ["adam", "muon"])
def test_every_parameter_is_updated_and_gradients_are_cleared(lesson, name):
    network = a_network(lesson)
    before = copy.deepcopy(network.state_dict())
    optimizer = Optimizer(network, name, fused=True)
    gradients(network, 0)
    optimizer.step(1e-2)
    for key, parameter in network.named_parameters():
        assert not torch.equal(parameter, before[key]), key
        assert parameter.grad is None, key


@pytest.mark.parametrize("name", ["adam", "muon"])
def test_state_goes_on_exactly(lesson, name):
    straight = a_network(lesson)
    stopped = copy.deepcopy(straight)
    a, b = Optimizer(straight, name, fused=True), Optimizer(stopped, name, fused=True)
    for seed in range(2):
        gradients(straight, seed), a.step(1e-3)
        gradients(stopped, seed), b.step(1e-3)
    resumed = copy.deepcopy(stopped)
    c = Optimizer(resumed, name, fused=True)
    c.load_state_dict(copy.deepcopy(b.state_dict()))
    gradients(straight, 2), a.step(1e-3)
    gradients(resumed, 2), c.step(1e-3)
    for p, q in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q)
