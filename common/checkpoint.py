"""Checkpoints: one file that holds all a run needs to go on, never half written, and read without running its code."""

import zipfile
from pathlib import Path

import torch

from common.errors import LessonError
from common.files import atomic_write


def save_checkpoint(path: str | Path, lesson: str, **state) -> None:
    """Writes `state` (tensors, numbers, strings, and lists and dicts of them) to a file that names its lesson."""
    with atomic_write(path) as temporary:
        torch.save({"lesson": lesson, **state}, temporary)


def load_checkpoint(path: str | Path, lesson: str, device="cpu", needs: tuple = ()) -> dict:
    """What `save_checkpoint` wrote, on `device`. LessonError if it is missing, damaged, another lesson's, or without
    one of the keys that the caller needs.
    """
    checkpoint = _read(Path(path), device)
    if not isinstance(checkpoint, dict) or "lesson" not in checkpoint:
        raise LessonError(f"{path} is not a checkpoint of these lessons; name one that train_mnist.py wrote")
    if checkpoint["lesson"] != lesson:
        found = checkpoint["lesson"]
        raise LessonError(f"{path} is a checkpoint of {found}, not of {lesson}; use the scripts in {found}/")
    missing = [key for key in needs if key not in checkpoint]
    if missing:
        raise LessonError(f"{path} is of another version of {lesson}: it has no {missing[0]}")
    return checkpoint


def _read(path, device):
    if not path.is_file():
        raise LessonError(f"there is no file {path}; train first, or name another one")
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip():  # torch.load does not look at the check sums
                raise ValueError("wrong check sum")
        return torch.load(path, map_location=device, weights_only=True)
    except OSError as error:
        raise LessonError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:  # torch.load raises a different class for each way in which a file can be damaged
        raise LessonError(f"{path} is damaged, or not a file that these lessons wrote") from error


def load_weights(module: torch.nn.Module, weights: dict, path) -> None:
    """module.load_state_dict(weights), with one line that says so if the shapes or names do not fit."""
    try:
        module.load_state_dict(weights)
    except RuntimeError as error:
        raise LessonError(f"the weights in {path} do not fit this network; was it made with other flags?") from error


def load_tensor(path: str | Path) -> torch.Tensor | None:
    """The tensor in a file, or None if the file holds something else. LessonError if it cannot be read."""
    found = _read(Path(path), "cpu")
    return found if isinstance(found, torch.Tensor) else None
