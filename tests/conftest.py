"""What several test files share: the lessons that have the same interface, and random numbers that never change."""

import copy
import gc
import importlib
import os
from pathlib import Path
from types import SimpleNamespace

import hypothesis
import pytest
import torch

import common.checkpoint
import common.data

ROOT = Path(__file__).resolve().parents[1]
PURE = (
    "noise_scales",
    "noise_schedule",
    "sde",
    "score_network",
    "noise_network",
    "loss",
    "sampler",
    "likelihood",
)  # no scripts
LESSONS = tuple(sorted(path.parent.name for path in ROOT.glob("lesson_*/train_mnist.py")))

if "PYTEST_XDIST_WORKER" in os.environ:  # `pytest -n 2`: a core for each
    torch.set_num_threads(1)

hypothesis.settings.register_profile("the same every time", derandomize=True, deadline=None, max_examples=40)
hypothesis.settings.load_profile("the same every time")


@pytest.fixture(scope="session", autouse=True)
def files_are_read_once():
    """Each file of MNIST takes up to half a second, a checkpoint a tenth, and tests ask for them hundreds of times."""
    unpack, unpacked = common.data._mnist_file, {}
    load, loaded = common.checkpoint.load_file, {}

    def once(name, header):
        file = common.data.MNIST_DIR / name  # a test may have its own
        if file not in unpacked:
            unpacked[file] = unpack(name, header)
        return unpacked[file]

    def load_once(path):
        if not Path(path).is_file():
            return load(path)
        about = Path(path).stat()
        file = Path(path), about.st_ino, about.st_mtime_ns, about.st_size  # a test may have written it again
        if file not in loaded:
            loaded[file] = load(path)
        return copy.deepcopy(loaded[file])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common.data, "_mnist_file", once)
        patch.setattr(common.checkpoint, "load_file", load_once)
        yield


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


def pytest_generate_tests(metafunc):
    """A test that asks for `lesson` runs for each of them, or for those that @pytest.mark.lessons names."""
    if "lesson" in metafunc.fixturenames:
        mark = metafunc.definition.get_closest_marker("lessons")
        metafunc.parametrize("lesson", mark.args if mark else LESSONS, indirect=True, scope="session")


@pytest.hookimpl(tryfirst=True)  # before pytest looks at -k
def pytest_collection_modifyitems(items):
    """`pytest -k lesson_07` also runs the tests that name lesson 7 with @pytest.mark.lessons, or in what they do."""
    for item in items:
        mark = item.get_closest_marker("lessons")
        if "lesson" not in item.fixturenames:
            words = [word.partition("/")[0] for word in item.function.__code__.co_consts if isinstance(word, str)]
            item.extra_keyword_matches.update(mark.args if mark else set(words) & set(LESSONS))


@pytest.fixture(scope="session")
def lesson(request):
    """lesson.name is the folder's, and lesson.sampler the module sampler.py in it."""
    files = (path for path in (ROOT / request.param).glob("*.py") if path.stem in PURE)
    modules = {path.stem: importlib.import_module(f"{request.param}.{path.stem}") for path in files}
    return SimpleNamespace(name=request.param, **modules)


def pytest_collection_finish():
    """What has been imported stays: the collector of garbage need not look at it again and again."""
    gc.collect()
    gc.freeze()
