"""What several test files share: the lessons that have the same interface, and random numbers that never change."""

import importlib
import os
from pathlib import Path
from types import SimpleNamespace

import hypothesis
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
LESSONS = tuple(sorted(path.parent.name for path in ROOT.glob("lesson_*/train_mnist.py")))

if "PYTEST_XDIST_WORKER" in os.environ:  # `pytest -n 2`: a core for each
    torch.set_num_threads(1)

hypothesis.settings.register_profile("the same every time", derandomize=True, deadline=None, max_examples=40)
hypothesis.settings.load_profile("the same every time")


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture(params=LESSONS, scope="session")
def lesson(request):
    """A test that asks for this runs once for each lesson: lesson.sampler is the module lesson_0x/sampler.py."""
    modules = ("noise_scales", "score_network", "loss", "sampler")
    return SimpleNamespace(
        name=request.param, **{name: importlib.import_module(f"{request.param}.{name}") for name in modules}
    )
