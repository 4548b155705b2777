"""The command line of every script: flags made from the fields of a frozen dataclass, errors as one line, Ctrl-C."""

import argparse
import dataclasses
import inspect
import os
import re
import shlex
import signal
import sys

from common.errors import LessonError


def field_comments(config_class) -> dict[str, str]:
    """The comment behind each field in the source of a dataclass, {field name: comment}; it is the flag's help."""
    source = inspect.getsource(config_class)
    return dict(re.findall(r"^    (\w+): [^#\n]+#\s*(.+)$", source, re.MULTILINE))


def parse_config(config_class, presets: dict[str, dict], arguments=None):
    """Reads flags: (configuration, set of the fields that were named, whether to resume, whether to overwrite).

    Each field `batch_size: int = 64  # why` becomes `--batch-size`, with its comment and default in --help; each key of
    `presets` becomes a flag (`--paper`, `--smoke`) that changes several defaults at once; what the key
    "paper on cifar10" holds is added to --paper with --dataset cifar10. A flag that is unknown or cannot be read as the
    field's type ends the program with status 2.
    """
    comments = field_comments(config_class)
    parser = argparse.ArgumentParser(
        description=inspect.getmodule(config_class).__doc__.split("\n")[0], allow_abbrev=False
    )
    earlier = parser.add_mutually_exclusive_group()
    earlier.add_argument("--resume", action="store_true", help="go on from the checkpoint in the output folder")
    earlier.add_argument("--overwrite", action="store_true", help="replace an earlier run in the output folder")
    preset = parser.add_mutually_exclusive_group()
    for name, changes in presets.items():
        if " on " not in name:
            more = {key.partition(" on ")[2]: presets[key] for key in presets if key.startswith(f"{name} on ")}
            listed = _listed(changes) + "".join(f"; on {key}: {_listed(value)}" for key, value in more.items())
            preset.add_argument(f"--{name}", action="store_const", const=name, dest="preset", help=listed)
    for field in dataclasses.fields(config_class):
        kind = type(field.default)
        how = (
            {"action": argparse.BooleanOptionalAction}
            if kind is bool
            else {"type": kind, "metavar": kind.__name__.upper()}
        )
        shown = f"{comments[field.name]} (default: {field.default})".replace("%", "%%")
        parser.add_argument(_flag(field.name), default=None, help=shown, **how)
    flags = vars(parser.parse_args(arguments))
    resume, overwrite, preset = flags.pop("resume"), flags.pop("overwrite"), flags.pop("preset")
    named = {name: value for name, value in flags.items() if value is not None}
    dataset = named.get("dataset", getattr(config_class, "dataset", None))
    changes = {**presets.get(preset, {}), **presets.get(f"{preset} on {dataset}", {})}
    return config_class(**{**changes, **named}), set(named) | set(changes), resume, overwrite


def _listed(changes):
    return ", ".join(f"{key} {value}" for key, value in changes.items())


def _flag(name):
    return "--" + name.replace("_", "-")


def check_choice(config, name: str, choices) -> None:
    """Raises LessonError, one line that lists them, unless the field `name` of `config` is one of `choices`."""
    if getattr(config, name) not in choices:
        raise LessonError(f"{_flag(name)} {getattr(config, name)}: choose one of {', '.join(map(str, choices))}")


def check_positive(config, *names: str) -> None:
    """Raises LessonError for the first of the named fields of `config` that is not above zero."""
    for name in names:
        if not getattr(config, name) > 0:  # not `<= 0`, which lets nan through
            raise LessonError(f"{_flag(name)} must be greater than zero, not {getattr(config, name)}")


def check_range(config, name: str, low: float, high: float) -> None:
    """Raises LessonError unless low <= the field `name` of `config` <= high."""
    if not low <= getattr(config, name) <= high:
        raise LessonError(f"{_flag(name)} must lie between {low} and {high}, not {getattr(config, name)}")


class StopRequest:
    """Turns the first Ctrl-C or SIGTERM into `signal_number`, which the loop looks at; the second one ends at once."""

    def __init__(self):
        self.signal_number = 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._remember)

    def _remember(self, number, frame):
        self.signal_number = number
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_DFL)

    def __bool__(self):
        return self.signal_number > 0

    def exit_status(self, what_happened: str) -> int:
        """Prints what happened and how to go on; returns the exit status of a program that the signal ended."""
        script = shlex.join(word for word in sys.argv if word not in ("--resume", "--overwrite"))
        print(f"{what_happened}; go on with: python {script} --resume", flush=True)
        return 128 + self.signal_number


def run(main):
    """Calls `main()`. A LessonError becomes one line on standard error and exit status 1; so does a full memory."""
    try:
        status = main()
        sys.stdout.flush()
        sys.exit(status)
    except BrokenPipeError:  # who reads what is printed, `| head` perhaps, has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except LessonError as error:
        sys.exit(f"error: {error}")
    except (MemoryError, RuntimeError) as error:
        words = ("out of memory", "DefaultCPUAllocator")  # what PyTorch says on a GPU, and on a CPU
        if not isinstance(error, MemoryError) and not any(word in str(error) for word in words):
            raise
        sys.exit("error: the memory is full; try a smaller --batch-size or --width")
