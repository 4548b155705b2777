"""Devices that no test machine has. Fake tensors know their device and compute nothing, so they find what would meet a
tensor of another device on a GPU; and a run in which no tensor of the device becomes float64, which MPS does not have,
and of whose operations MPS has each.
"""

import re
from functools import cache, partial
from pathlib import Path

import pytest
import torch
import torchgen
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._python_dispatch import TorchDispatchMode

from common.machine import InBatches, log_ndtr
from common.noise import SeededNoise, noise_like
from common.optimizer import Optimizer
from tests.running import DIFFUSION, ROOT, quick, read_checkpoint, run_here, script

CUDA = torch.device("cuda")
ENOUGH = 2.0  # what a number on the device is taken for where the code asks for it


@pytest.fixture
def fake(monkeypatch):
    """Tensors on a GPU that is not there. What they hold is not known, so each number that is asked for is ENOUGH."""
    for name in ("__float__", "item"):
        monkeypatch.setattr(torch.Tensor, name, lambda self: ENOUGH)
    for name in ("__int__", "__index__"):
        monkeypatch.setattr(torch.Tensor, name, lambda self: 1)
    monkeypatch.setattr(torch.Tensor, "__bool__", lambda self: True)
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: [ENOUGH] * len(self))

    def schedule(config):
        return torch.empty(config.T, dtype=torch.float64), torch.empty(config.T, dtype=torch.float64)

    for lesson in DIFFUSION:
        monkeypatch.setattr(script(lesson, "sample"), "schedule", schedule)  # whose tables stay on the CPU
    respaced = script("lesson_09_improved_ddpm", "sample").respaced_betas
    monkeypatch.setitem(respaced.__globals__, "checked", lambda betas: betas)  # of betas that hold nothing
    with FakeTensorMode(shape_env=ShapeEnv()):  # a shape may depend on what a mask holds
        yield


class OnTheGpu(torch.Generator):
    """Random numbers of a GPU that is not there."""

    device = CUDA


def on_the_gpu(tensor):
    assert tensor.device.type == "cuda" and tensor.dtype != torch.float64
    return tensor


def a_network(lesson, channels=1, **changes):
    """The lesson's network, made as train() makes it: on the CPU, of noise scales that are on the device."""
    config = script(lesson.name).Config(width=8, **changes)
    weights = {"sigmas": torch.empty(6, device=CUDA), "sigma_max": 2.0}
    network = script(lesson.name, "sample").make_network(config, channels, weights)
    moved(network)
    if hasattr(network, "sigma_max"):  # a number that network.to(CUDA) moves
        network.sigma_max = torch.empty((), device=CUDA)
    elif lesson.name not in DIFFUSION:
        assert network.sigmas.device.type == "cuda"
    return network, config


def moved(network):
    """What network.to(CUDA) does to the weights; it cannot do it with fake tensors."""
    for module in network.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = torch.nn.Parameter(torch.empty(parameter.shape, device=CUDA))
    return network


def noisy(channels=1):
    return torch.empty(4, channels, 28, 28, device=CUDA), torch.zeros(4, dtype=torch.long, device=CUDA)


def a_loss(lesson, network, x, t):
    """The lesson's loss for images x, with noise."""
    z = on_the_gpu(noise_like(x))
    if lesson.name in DIFFUSION:
        return lesson.loss.noise_prediction_loss(network, x, torch.empty(1000, dtype=torch.float64), t, z)
    if lesson.name == "lesson_07_score_sde":
        x = on_the_gpu(lesson.likelihood.dequantise(x))
        sigma = on_the_gpu(script(lesson.name).draw_noise_scales(4, 0.01, 10.0, 1.0, OnTheGpu()))
        return lesson.loss.denoising_score_matching_loss(network, x, sigma, z)
    i = on_the_gpu(script(lesson.name).draw_noise_scales(4, network.sigmas, 1.0, None))
    return lesson.loss.denoising_score_matching_loss(network, x, network.sigmas, i, z)


PAPER = {"patch": 1, "blocks": 2, "activation": "elu", "skip": False}
PAPERS = dict.fromkeys(DIFFUSION, {"patch": 1, "blocks": 2, "levels": 3, "dropout": 0.1})


@pytest.mark.parametrize("papers, channels", [(False, 1), (True, 3)])
def test_a_loss(lesson, fake, papers, channels):
    network, config = a_network(lesson, channels, **(PAPERS.get(lesson.name, PAPER) if papers else {}))
    for parameter in network.parameters():
        on_the_gpu(parameter)
    on_the_gpu(on_the_gpu(a_loss(lesson, network, *noisy(channels))).mean())


@pytest.mark.parametrize("papers, optimizer", [(False, "muon"), (True, "adam")])
def test_an_update(lesson, fake, papers, optimizer, monkeypatch):
    def fused_adam(*lists, fused, **how):  # a kernel, which fake tensors have no picture of
        assert fused and [len(tensors) for tensors in lists] == [len(lists[0])] * 4 + [0, len(lists[0])]
        for tensors in lists:
            for tensor in tensors:
                on_the_gpu(tensor)

    monkeypatch.setattr("common.optimizer.adam", fused_adam)
    monkeypatch.setattr("common.optimizer.bfloat16_speedup", lambda device: 2.0)
    network, config = a_network(lesson, **(PAPERS.get(lesson.name, PAPER) if papers else {}))
    train_mnist = script(lesson.name)
    for parameter in network.parameters():  # autograd itself would ask the GPU
        parameter.grad = torch.empty_like(parameter)
    torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
    Optimizer(network, optimizer).step(1e-3)
    if hasattr(train_mnist, "update_ema"):
        train_mnist.update_ema(network, network, 1, 0.9)


@pytest.mark.lessons("lesson_05_ddpm")
def test_timesteps(lesson, fake):
    assert on_the_gpu(script(lesson.name).draw_timesteps(4, 1000, OnTheGpu())).shape == (4,)


@pytest.mark.lessons("lesson_09_improved_ddpm")
@pytest.mark.parametrize("loss", ["hybrid_loss", "bound_term"])
@pytest.mark.parametrize("chooser", ["UniformTimesteps", "LossAwareTimesteps"])
def test_losses_and_choices_of_t_of_lesson_9(lesson, fake, loss, chooser):
    network, config = a_network(lesson)
    timesteps, (x, _) = getattr(script(lesson.name), chooser)(1000), noisy()
    t, weight = (on_the_gpu(tensor) for tensor in timesteps.draw(4, OnTheGpu()))
    betas = torch.empty(1000, dtype=torch.float64)
    found = getattr(lesson.loss, loss)(network, x, betas, t, on_the_gpu(noise_like(x)))
    on_the_gpu(weight * found)


@pytest.mark.lessons(*DIFFUSION)
def test_the_bound(lesson, fake):
    (network, _), (x, _) = a_network(lesson), noisy()
    bits = lesson.likelihood.bits_per_dim(network, x, torch.empty(3, dtype=torch.float64))
    assert on_the_gpu(bits).shape == (4, 4)  # four images; L_0, L_1, L_2 and the prior term


def test_each_sampler(lesson, fake, monkeypatch):
    module = script(lesson.name, "sample")
    if hasattr(module, "ancestral_eta"):
        monkeypatch.setattr(module, "ancestral_eta", lambda sigmas: 0.2)
        monkeypatch.setattr(module, "step_size_for_all_scales", lambda sigmas, T: 0.1)
        monkeypatch.setattr(lesson.sampler, "smallest_eta", lambda sigmas: 0.1)
    chains = lesson.name != "lesson_07_score_sde"
    network, config = a_network(lesson, **({"T": 7} if chains else {}))
    two = lesson.name == "lesson_09_improved_ddpm"  # outputs

    def forward(x, level):  # in place of the network, which has its own test
        assert on_the_gpu(level).shape == (len(x),)
        return (on_the_gpu(x), x) if two else on_the_gpu(x)

    monkeypatch.setattr(network, "forward", forward)
    batched = InBatches(network, "float32", batch_size=3)
    for sampler in module.SAMPLERS:
        frames = list(module.draw(batched, config, (4, 1, 28, 28), SeededNoise(range(4)), sampler, 7))
        assert len(frames) >= (6 if chains else 4)  # lesson 7: of two calls each
        for frame in frames:
            on_the_gpu(frame)


@pytest.mark.parametrize("device, sizes", [("cpu", [100, 100, 100, 100, 50]), ("cuda", [400, 50])])
def test_a_gpu_takes_more_images_at_once(fake, device, sizes):
    x, seen = torch.empty(450, 1, 4, 4, device=device), []
    InBatches(lambda x, level: seen.append(len(x)) or x, "float32")(x, x[:, 0, 0, 0])
    assert seen == sizes


def test_inpainting_and_denoising(lesson, fake, monkeypatch):
    module, (network, config), (x, _) = script(lesson.name, "sample"), a_network(lesson), noisy()
    monkeypatch.setattr(module, "step_size_for_all_scales", lambda sigmas, T: 0.1, raising=False)
    known = torch.empty(1, 1, 28, 28, device=CUDA)
    on_the_gpu(module.fill_in(network, config, x, known, SeededNoise(range(4)), 7))
    for tensor in module.noise_and_guess(network, config, x, torch.empty_like(x), 2):
        on_the_gpu(tensor)


@pytest.mark.lessons(*DIFFUSION)
def test_samples_that_share_a_latent(lesson, fake):
    """The lesson's other pictures need numbers that fake tensors do not have."""
    network, config = a_network(lesson)
    pairs = torch.empty(3, 2, 1, 28, 28, device=CUDA)
    images, columns = script(lesson.name, "sample").share_latent(network, config, 3, 1, 4, pairs)
    assert on_the_gpu(images).shape == (4 * 4, 1, 28, 28) and columns == 4


@pytest.mark.lessons("lesson_07_score_sde")
def test_latents_and_the_classifier_of_lesson_7(lesson, fake, monkeypatch):
    """Not its gradient, nor the likelihood: autograd itself would ask the GPU."""
    module, (network, config) = script(lesson.name, "sample"), a_network(lesson)
    for name in ("encode", "decode"):  # one step shows what 24 would
        monkeypatch.setattr(module, name, partial(getattr(module, name), steps=1))
    pairs = torch.empty(3, 2, 1, 28, 28, device=CUDA)
    for make in module.PICTURES.values():
        images, columns = make(network, config, 3, 1, 4, pairs)
        assert on_the_gpu(images).shape == (3 * columns, 1, 28, 28)
    classifier, (x, _) = moved(script(lesson.name, "classifier").NoisyDigitClassifier()), noisy()
    assert on_the_gpu(classifier(x, torch.empty(4, device=CUDA))).shape == (4, 10)


def test_fake_tensors_find_what_is_on_two_devices(fake):
    with pytest.raises(RuntimeError, match="device"):
        torch.empty(3, device=CUDA) + torch.empty(3)


class Operations(TorchDispatchMode):
    """Notes each operation that PyTorch is asked for, backwards too, and the kind of device of its first argument."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        schema = operation._schema
        name = f"{schema.name.removeprefix('aten::')}.{schema.overload_name}".removesuffix(".")
        self.seen.add((name, arguments[0].device.type if arguments and torch.is_tensor(arguments[0]) else None))
        return operation(*arguments, **(options or {}))


@cache
def kernels():
    """{operation: what PyTorch's own list says of it, which devices have it among that}."""
    text = (Path(torchgen.__file__).parent / "packaged/ATen/native/native_functions.yaml").read_text()
    return {part.partition("(")[0]: part for part in text.split("\n- func: ")[1:]}


def mps_has(operation):
    about = kernels()[operation]
    other = re.search(r"structured_delegate: (\S+)", about)  # which computes it
    return mps_has(other[1]) if other else "dispatch:" not in about or bool(re.search("MPS|Composite", about))


def test_a_logarithm_that_mps_lacks_is_computed_by_the_cpu():
    with FakeTensorMode():
        for device, by in (("mps", "cpu"), ("cuda", "cuda"), ("cpu", "cpu")):
            with Operations() as run:
                assert log_ndtr(torch.empty(3, device=device)).device.type == device
            assert ("special_log_ndtr", by) in run.seen


def test_no_tensor_of_the_device_becomes_float64_and_mps_has_each_operation(lesson, tmp_path, monkeypatch):
    """MPS has no float64. Here the CPU is the device, and only what `.cpu()` returned may become float64.

    What is made in float64, on the CPU, may stay it, but does not go to a device without a change.
    """
    double, cpu, to, on_the_cpu = torch.Tensor.double, torch.Tensor.cpu, torch.Tensor.to, {}

    def remembered(self):
        copy = cpu(self).clone()
        on_the_cpu[id(copy)] = copy
        return copy

    def refuse(self):
        assert self.dtype == torch.float64 or id(self) in on_the_cpu, "a tensor of the device becomes float64"
        return double(self)

    def refuse_to(self, *arguments, **options):
        copy = to(self, *arguments, **options)
        assert copy.dtype != torch.float64, "a tensor of the device becomes float64"
        return copy

    monkeypatch.setattr(torch.Tensor, "cpu", remembered)
    monkeypatch.setattr(torch.Tensor, "double", refuse)
    monkeypatch.setattr(torch.Tensor, "to", refuse_to)
    with Operations() as run:
        result = quick(lesson.name, "--steps", 4, "--preview-every", 2, "--output", tmp_path)
    assert result.status == 0, result.stderr
    flags = ("--checkpoint", tmp_path / "checkpoint.pt", "--num", 2, "--output", tmp_path / "x.png")
    for verb in ((), ("--inpaint", "left"), ("--denoise",), ("--interpolate",)):
        assert run_here(lesson.name, *flags, *verb, name="sample").status == 0
    names = {name for name, _ in run.seen}
    lacking = {name for name in names if not mps_has(name)}
    assert len(names) > 90 and lacking <= {"special_log_ndtr"}  # for which there is common.machine.log_ndtr
    source = "".join(path.read_text() for path in (ROOT / lesson.name).glob("*.py"))
    assert "special.log_ndtr" not in source


def test_a_run_goes_on_on_another_kind_of_device(lesson, tmp_path):
    """A generator's state has another size there: random numbers come anew from seed and step, and a line says so."""
    assert quick(lesson.name, "--seed", 5, "--output", tmp_path).status == 0
    checkpoint = read_checkpoint(tmp_path)
    assert checkpoint["device"] == "cpu"
    checkpoint |= {"device": "cuda", "generator": torch.zeros(16, dtype=torch.uint8)}
    torch.save(checkpoint, tmp_path / "checkpoint.pt")
    resumed = run_here(lesson.name, "--resume", "--steps", 6, "--output", tmp_path)
    assert resumed.status == 0, resumed.stderr
    line = "the run was on cuda: it goes on with other random numbers, from seed and step\n"
    assert resumed.stdout.count(line) == 1
    generator = torch.Generator().manual_seed(5 + 1_000_003 * 5)
    torch.randint(1000, (8,), generator=generator)
    if lesson.name == "lesson_07_score_sde":  # dequantises the images
        torch.randn(8, 1, 28, 28, generator=generator)
    torch.rand(1, generator=generator), torch.randn(8, 1, 28, 28, generator=generator)
    again = read_checkpoint(tmp_path)
    assert again["device"] == "cpu" and again["step"] == 6
    assert torch.equal(again["generator"], generator.get_state())
