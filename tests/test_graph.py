"""A network that trains as a CUDA graph: what PyTorch is asked for and, on a GPU, that it trains the same."""

import copy
import warnings

import pytest
import torch

import common.run
from common.machine import train_as_graph
from tests.running import DIFFUSION, quick, read_checkpoint, script

on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU with CUDA")


class Doubles(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.factor = torch.nn.Parameter(torch.tensor(2.0))

    def forward(self, x, level):
        return self.factor * x + level[:, None]


@pytest.fixture
def recorded(monkeypatch):
    """What PyTorch was asked to record, by a stand-in whose graph adds 100."""
    recorded = []

    def make_graphed_callables(network, sample):
        plain = network.forward
        mode = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"), torch.is_autocast_cache_enabled()
        recorded.append((plain(*sample), sample, *mode))
        warnings.warn("The AccumulateGrad node's stream does not match", stacklevel=1)  # as PyTorch 2.10 and 2.11 do
        network.forward = lambda *inputs: plain(*inputs) + 100
        return network

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", make_graphed_callables)
    return recorded


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_first_call_with_gradients_is_recorded(recorded, precision):
    network, x, level = Doubles(), torch.arange(6.0).reshape(3, 2), torch.tensor([0.0, 1.0, 2.0])
    train_as_graph(network, precision)
    with torch.no_grad():
        assert torch.equal(network(x, level), 2 * x + level[:, None])
    assert not recorded
    for _ in range(2):
        assert torch.equal(network(x, level), 2 * x + level[:, None] + 100)
    [(value, sample, autocast, dtype, cache)] = recorded  # once
    assert torch.equal(value, 2 * x + level[:, None])  # of the network itself, not of a graph of it
    assert (autocast, dtype, cache) == (precision == "bfloat16", torch.bfloat16, False)
    for mine, theirs in zip((x, level), sample, strict=True):  # which the graph will write over
        assert torch.equal(mine, theirs) and mine.data_ptr() != theirs.data_ptr()
    assert torch.is_autocast_cache_enabled()


def test_calls_that_were_not_recorded_run_as_before(recorded):
    network, x, level = Doubles(), torch.ones(3, 2), torch.zeros(3)
    train_as_graph(network, "float32")
    network(x, level).sum().backward()
    with torch.no_grad():
        assert torch.equal(network(x, level), 2 * x)
    assert torch.equal(network(x[:2], level[:2]), 2 * x[:2])  # a graph has one shape
    assert torch.equal(network(x, level), 2 * x + 100)
    assert float(network.factor.grad) == 6
    assert list(network.state_dict()) == ["factor"]


@pytest.mark.lessons("lesson_03_ncsn", "lesson_09_improved_ddpm")
@pytest.mark.parametrize(
    "device, version, processes, used",
    [("cpu", "13.0", 1, 0), ("cuda", "13.0", 1, 1), ("cuda", "13.0", 2, 0), ("cuda", None, 1, 0), ("mps", None, 1, 0)],
)
def test_a_run_on_one_gpu_uses_it(lesson, tmp_path, monkeypatch, device, version, processes, used):
    seen = []

    class BeganError(Exception):
        pass

    def begin(run, *how, **parts):
        run.device = torch.device(device)
        monkeypatch.setattr(common.run.ranks, "world", lambda: processes)
        monkeypatch.setattr(torch.version, "cuda", version)  # None in PyTorch's build for AMD
        monkeypatch.setattr(common.run, "describe", lambda device: "a machine")
        real_begin(run, *how, **parts)
        assert seen == [(parts["network"], run.precision)] * used
        raise BeganError

    real_begin = common.run.Run.begin
    monkeypatch.setattr(common.run.Run, "begin", begin)
    monkeypatch.setattr(common.run, "train_as_graph", lambda *how: seen.append(how))
    with pytest.raises(BeganError):
        quick(lesson.name, "--output", tmp_path / "run")


@on_a_gpu
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_same_gradients(lesson, precision):
    """Outputs and gradients of a graph, of images that it was not recorded with, are the network's own."""
    config = script(lesson.name).Config(width=8)
    weights = {"sigmas": torch.tensor([3.0, 1.0, 0.3, 0.1], device="cuda"), "sigma_max": 3.0}
    plain = script(lesson.name, "sample").make_network(config, 1, weights).to("cuda")
    for parameter in plain.parameters():  # lesson 5's last layers start at zero
        parameter.data.add_(0.01 * torch.randn_like(parameter))
    graph = copy.deepcopy(plain)
    train_as_graph(graph, precision)
    for _ in range(3):
        x = torch.rand(4, 1, 28, 28, device="cuda")
        level = torch.randint(4, (4,), device="cuda")
        if lesson.name == "lesson_07_score_sde":
            level = level + 0.5  # of which the level is sigma
        for network in (plain, graph):
            with torch.autocast("cuda", torch.bfloat16, precision == "bfloat16"):
                out = network(x, level)
            network.out = out if torch.is_tensor(out) else torch.stack(out)
            network.zero_grad()
            network.out.square().mean().backward()
        limit = 0.02 if precision == "bfloat16" else 1e-3
        assert (plain.out - graph.out).norm() <= limit * plain.out.norm()
        mine, theirs = (torch.cat([p.grad.flatten() for p in n.parameters()]) for n in (graph, plain))
        assert (mine - theirs).norm() <= limit * theirs.norm() > 0


@on_a_gpu
@pytest.mark.lessons(*DIFFUSION)
def test_dropout_is_drawn_anew_in_each_step(lesson):
    config = script(lesson.name).Config(width=8, dropout=0.5)
    network = script(lesson.name, "sample").make_network(config, 1, {}).to("cuda").train()
    for parameter in network.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    train_as_graph(network, "float32")
    x, t = torch.rand(4, 1, 28, 28, device="cuda"), torch.arange(4, device="cuda")
    found = []
    for seed in (1, 1, 1, 2):  # the first call records as well
        torch.manual_seed(seed)
        out = network(x, t)
        found.append((out if torch.is_tensor(out) else torch.stack(out)).detach().clone())
    assert torch.allclose(found[1], found[2], rtol=1e-3, atol=1e-3)
    assert (found[2] - found[3]).norm() > 0.05 * found[3].norm()


@on_a_gpu
def test_the_same_training(lesson, tmp_path, monkeypatch):
    flags = "--device", "cuda", "--steps", 8, "--preview-every", 4
    assert quick(lesson.name, *flags, "--output", tmp_path / "graph").status == 0
    monkeypatch.setattr(common.run, "train_as_graph", lambda *how: None)
    assert quick(lesson.name, *flags, "--output", tmp_path / "plain").status == 0
    graph, plain = (read_checkpoint(tmp_path / name)["network"] for name in ("graph", "plain"))
    for name, weights in plain.items():
        assert torch.allclose(weights, graph[name], rtol=1e-2, atol=1e-2), name
