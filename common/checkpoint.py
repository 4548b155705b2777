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
    return unpack(checkpoint)


def pack(weights: dict) -> dict:
    """The tensors of a state_dict, smaller: those of two or more dimensions as 8-bit integers, the others as they are.

    Each output channel, weights[k], has a scale of its own: weights[k] is about int8[k] * scale[k], off by scale / 2 at
    most, which is 1/254 of the channel's largest weight.
    """

    def small(w):
        if w.ndim < 2:
            return w.clone()
        scale = w.abs().flatten(1).amax(1).clamp(min=1e-12) / 127  # (C_out,)
        whole = (w / scale.view(-1, *[1] * (w.ndim - 1))).round().to(torch.int8)
        return {"int8": whole, "scale": scale.clone()}

    return {name: small(w) for name, w in weights.items()}


def unpack(found):
    """`found`, with every tensor that `pack` made smaller, however deep in it, as a float32 tensor again."""
    if not isinstance(found, dict):
        return found
    if set(found) == {"int8", "scale"}:
        return found["int8"] * found["scale"].view(-1, *[1] * (found["int8"].ndim - 1))
    return {key: unpack(value) for key, value in found.items()}


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
