"""Checkpoints: one file that holds all a run needs to go on, never half written, and read without running its code."""

import importlib
import sys
import zipfile
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch

from common.errors import LessonError
from common.files import atomic_write

ROOT = Path(__file__).resolve().parents[1]


def save_checkpoint(path: str | Path, lesson: str, **state) -> None:
    """Writes `state` (tensors, numbers, strings, and lists and dicts of them) to a file that names its lesson."""
    with atomic_write(path) as temporary:
        torch.save({"lesson": lesson, **state}, temporary)


def load_checkpoint(path: str | Path, lesson: str | None = None, needs: tuple = ()) -> dict:
    """A checkpoint, on the CPU. LessonError if it is missing, damaged, another lesson's, or without one of `needs`."""
    checkpoint = load_file(path)
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("lesson"), str):
        raise LessonError(f"{path} is not a checkpoint of these lessons; name one that train_mnist.py wrote")
    found = checkpoint["lesson"]
    if lesson not in (None, found):
        raise LessonError(f"{path} is a checkpoint of {found}, not of {lesson}; use the scripts in {found}/")
    missing = [key for key in needs if key not in checkpoint]
    if missing:
        raise LessonError(f"{path} is of another version of {found}: it has no {missing[0]}")
    return checkpoint


def load_file(path: str | Path):
    """What torch.save wrote to a file, on the CPU. LessonError if it is missing, damaged, or would run code."""
    if not Path(path).is_file():
        raise LessonError(f"there is no file {path}; train first, or name another one")
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip():  # torch.load does not look at the check sums
                raise ValueError("wrong check sum")
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise LessonError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:  # torch.load raises a different class for each way in which a file can be damaged
        raise LessonError(f"{path} is damaged, or not a file that these lessons wrote") from error


def load_weights(module: torch.nn.Module, weights: dict, path) -> None:
    """module.load_state_dict(weights), with one line that says so if the shapes or names do not fit."""
    try:
        module.load_state_dict(weights)
    except (RuntimeError, TypeError) as error:
        raise LessonError(f"the weights in {path} do not fit this network; was it made with other flags?") from error


def load_lesson(name: str) -> ModuleType:
    """A lesson's sample.py, of which `common` uses what `common.play` lists. LessonError if there is no such lesson.

    Another lesson may have been loaded before, with files of the same names.
    """
    if not name.isidentifier() or not (ROOT / name / "sample.py").is_file():
        raise LessonError(f"there is no folder {name} with a sample.py beside common/")
    sys.path.insert(0, str(ROOT / name))  # it imports the files beside it
    for path in (ROOT / name).glob("*.py"):
        sys.modules.pop(path.stem, None)
    return importlib.import_module("sample")


class MissingField(LessonError, AttributeError):  # noqa: N818
    """The configuration of a checkpoint has no such field: it is of another version of its lesson."""


class SavedConfig(SimpleNamespace):
    """The configuration of a checkpoint."""

    def __getattr__(self, name):
        raise MissingField(f"the checkpoint is of another version of its lesson: its configuration has no {name}")


def load_network(lesson: ModuleType, path: str | Path, device: torch.device) -> tuple:
    """The network that samples are drawn with, the configuration it was trained with, and the checkpoint at `path`."""
    found = load_checkpoint(path, lesson.LESSON, needs=(lesson.WEIGHTS, "config", "image_shape", "step"))
    weights = found[lesson.WEIGHTS]
    try:
        config = SavedConfig(**found["config"])
        network = lesson.make_network(config, found["image_shape"][0], weights)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise LessonError(f"{path} is of another version of {lesson.LESSON}") from error
    load_weights(network, weights, path)
    return network.to(device, memory_format=torch.channels_last).eval(), config, found
