"""The numbers of a run: those that all lessons share, and flags made from the fields of a dataclass and their types."""

import argparse
import inspect
import json
import math
import os
import re
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Literal, get_args, get_origin, get_type_hints

from common import ranks
from common.errors import LessonError


@dataclass(frozen=True)
class RunConfig:
    """How a run is done, whatever the paper. A lesson's Config adds the paper's numbers, and may have other defaults.

    The type of a field says what it may be: one of the values of a Literal, a number in the range of an
    Annotated[type, low, high], any other number if it is greater than zero.
    """

    dataset: Literal["mnist", "color_mnist", "fashion_mnist", "cifar10"] = "mnist"  # ours: the papers have larger ones
    images: str = ""  # ours: a folder of pictures to train on in place of the data set
    image_size: Literal[tuple(range(16, 65, 2))] = 32  # ours: pictures of a folder are cut square, to so many pixels
    channels: Literal[1, 3] = 3  # ours: pictures of a folder become gray (1) or RGB (3)
    steps: int = 5000  # ours: what two CPU cores with bf16 do in eight to eleven minutes
    minutes: Annotated[float, 0, 10**6] = 0.0  # ours: if not 0, as many steps as fit into so many minutes here
    batch_size: int = 64  # ours: more, noisier steps in the same time; the papers have 128
    optimizer: Literal["adam", "muon"] = "muon"  # ours: learns more from as many images; the papers have adam
    learning_rate: float = 3e-3  # ours: for Muon, with warm-up and decay
    warmup: Annotated[int, 0, 10**9] = 100  # ours: steps in which the learning rate rises from 0; papers: 0 or 5000
    decay: Literal["cosine", "constant"] = "cosine"  # ours: the learning rate falls to 0 at the end; papers: constant
    clip: float = 0.1  # ours: longer gradients of the loss per pixel are shortened; --paper has what each paper does
    preview_every: int = 500  # ours: steps between pictures of what the network has learned
    seed: Annotated[int, 0, 2**63 - 1] = 0  # ours: the same seed gives the same run on the same machine
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # ours: CUDA, then MPS, then the CPU
    precision: Literal["auto", "float32", "bfloat16"] = "auto"  # ours: bfloat16 where it is clearly faster
    output: str = "output"  # ours: the folder for everything that a run writes

    def check(self) -> None:
        """Raises LessonError, one line that says what to do, for the first field that no run can use."""
        for name, kind in get_type_hints(type(self), include_extras=True).items():
            value, flag, expected = getattr(self, name), flag_of(name), type(getattr(type(self), name))
            if type(value) is not expected and not (expected is float and type(value) is int):
                raise LessonError(f"{flag} {value}: not a number or word of the right kind ({expected.__name__})")
            if get_origin(kind) is Literal:
                check_choice(flag, value, get_args(kind))
            elif expected in (int, float):
                check_range(flag, value, *getattr(kind, "__metadata__", ()))
        if not self.output:
            raise LessonError("--output: name a folder")


def learning_rate(step: int, config: RunConfig) -> float:
    """The learning rate of step 1, ..., config.steps: a linear warm-up, then constant or half a cosine down to 0."""
    rise = min(1.0, step / max(1, config.warmup))
    fall = 1.0 if config.decay == "constant" else 0.5 * (1 + math.cos(math.pi * (step - 1) / config.steps))
    return config.learning_rate * rise * fall


def parse_config(config_class, presets: dict[str, dict], arguments=None) -> tuple:
    """Reads flags: (configuration, set of the fields that were named, whether to resume, whether to overwrite).

    Each field `batch_size: int = 64  # why` becomes `--batch-size`, with its comment and default in --help; each key of
    `presets` becomes a flag (`--paper`, `--smoke`) that changes several defaults at once; what the key
    "paper on cifar10" holds is added to --paper with --dataset cifar10. `--config PATH` takes the numbers of an earlier
    run, but for its folder. A flag beside them wins. What argparse cannot read ends the program with status 2.
    """
    usage = "%(prog)s [--FLAG VALUE ...], with the flags that --help lists"
    description = (inspect.getmodule(config_class).__doc__ or "").split("\n")[0]  # python -OO has none
    parser = argparse.ArgumentParser(description=description, usage=usage, allow_abbrev=False)
    if ranks.rank() > 0:
        parser.error = lambda message: sys.exit(2)  # rank 0 says it
    earlier, start = parser.add_mutually_exclusive_group(), parser.add_mutually_exclusive_group()
    earlier.add_argument("--resume", action="store_true", help="go on from the checkpoint in the output folder")
    earlier.add_argument("--overwrite", action="store_true", help="replace an earlier run in the output folder")
    start.add_argument("--config", metavar="PATH", help="a new run with the numbers in a run's config.json")
    texts = {name: ", ".join(f"{k} {v}" for k, v in changes.items()) for name, changes in presets.items()}
    for name in (name for name in presets if " on " not in name):
        more = [f"; {key.removeprefix(name).strip()}: {texts[key]}" for key in presets if key.startswith(f"{name} on ")]
        text = texts[name] + "".join(more)
        start.add_argument(f"--{name}", action="store_const", const=name, dest="preset", help=text)
    comments, kinds = field_comments(config_class), get_type_hints(config_class)
    for field in fields(config_class):
        kind, choices = type(field.default), get_args(kinds[field.name]) or None
        shape = "|".join(map(str, choices)) if choices and len(choices) < 6 else kind.__name__.upper()
        how = {"type": os.path.expanduser if kind is str else kind, "choices": choices, "metavar": shape}
        how = {"action": argparse.BooleanOptionalAction} if kind is bool else how
        shown = f"{comments[field.name]} (default: {field.default})".replace("%", "%%")
        parser.add_argument(flag_of(field.name), default=None, help=shown, **how)
    flags = vars(parser.parse_args(arguments))
    resume, overwrite, preset, path = (flags.pop(name) for name in ("resume", "overwrite", "preset", "config"))
    if resume and path:
        parser.error("--config starts a new run: leave out --resume, which goes on with an earlier one")
    named = {name: value for name, value in flags.items() if value is not None}
    dataset = named.get("dataset", config_class.dataset)
    changes = {**presets.get(preset, {}), **presets.get(f"{preset} on {dataset}", {})}
    if path:  # never beside a preset
        changes = _read(os.path.expanduser(path), config_class)
    values = {**changes, **named}
    if values.get("images") and isinstance(values["images"], str):  # a resume and sample.py find it from anywhere then
        values["images"] = os.path.abspath(os.path.expanduser(values["images"]))
    return config_class(**values), set(values), resume, overwrite


def _read(path, config_class):
    """The numbers of an earlier run, but for where it wrote."""
    try:
        found = dict(json.loads(Path(path).read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise LessonError(f"--config {path}: not a config.json that a run wrote ({error})") from error
    unknown = sorted({*map(str, found)} - {field.name for field in fields(config_class)})
    if unknown:
        raise LessonError(f"--config {path} is of another lesson or version: it has {', '.join(unknown)}")
    return {name: value for name, value in found.items() if name != "output"}


def field_comments(config_class) -> dict[str, str]:
    """The comment behind each field in the source of a dataclass and its bases, {field: comment}: the flag's help."""
    sources = [inspect.getsource(each) for each in config_class.__mro__[-2::-1]]
    return dict(re.findall(r"^    (\w+): .+?  #\s*(.+)$", "\n".join(sources), re.MULTILINE))


def flag_of(name: str) -> str:
    """The flag of a field: --batch-size for batch_size."""
    return "--" + name.replace("_", "-")


def check_choice(flag: str, value, choices) -> None:
    """Raises LessonError, one line that lists them, unless `value` is one of `choices`."""
    if value not in choices:
        raise LessonError(f"{flag} {value}: choose one of {', '.join(map(str, choices))}")


def check_range(flag: str, value: float, low: float | None = None, high: float = math.inf) -> None:
    """Raises LessonError unless low <= value <= high; without bounds, unless value > 0."""
    if low is None and not value > 0:  # not `<= 0`, which lets nan through
        raise LessonError(f"{flag} must be greater than zero, not {value}")
    if low is not None and not low <= value <= high:
        raise LessonError(f"{flag} must lie between {low} and {high}, not {value}")
