"""Where a measurement comes from: the columns command, machine and date of the CSV files beside the figures."""

import csv
import functools
import shlex
import sys
from datetime import date
from pathlib import Path

from common.errors import LessonError
from common.files import atomic_write
from common.machine import choose_device, describe

COLUMNS = ("command", "machine", "date")


def origin(*name: str) -> tuple[str, str, str]:
    """Command, machine and day (ISO) of what this process measures now; name: the experiment's, if it has one."""
    return command(*name), machine(), date.today().isoformat()


def command(*name: str) -> str:
    """What measures `name` again: this script and its flags, without other names, and without where to write."""
    words = sys.argv[1:]
    words, flags = iter(words[[*(word.startswith("-") for word in words), True].index(True) :]), []
    for word in words:
        if word in ("--csv", "--output"):
            next(words, None)  # and what follows
        elif word != "--again" and not word.startswith(("--csv=", "--output=")):
            flags.append(word)
    return shlex.join(["python", f"docs/{Path(sys.argv[0]).name}", *name, *flags])


def check_place(path: Path, own: bool) -> None:
    """LessonError if what a self-test or a person's `own` network measures would go among the published numbers."""
    if own and path.resolve().parent == Path(__file__).resolve().parent:
        raise LessonError(f"{path} has what the lessons' own networks measured: add another --output, or --csv")


def check_gray_digits(path: str | Path, checkpoint: dict) -> None:
    """LessonError if a checkpoint is not of the gray digits that all measurements are made with."""
    config = checkpoint["config"]
    if config["images"] or config["dataset"] != "mnist":
        raise LessonError(f"{path} was trained on {config['images'] or config['dataset']}: name one of mnist's digits")


def read(path: Path, columns: tuple[str, ...]) -> list[list[str]]:
    """The lines of a CSV file, the names of its columns first; nothing but those if there is no such file.

    LessonError if it has other columns.
    """
    lines = list(csv.reader(path.read_text().splitlines())) if path.is_file() else [list(columns)]
    if lines[:1] != [list(columns)]:
        raise LessonError(f"{path} needs the columns {', '.join(columns)}, in this order")
    return lines


def write(path: Path, lines: list[list]) -> None:
    """Writes what `read` returned, and more, to a CSV file: all of it, or nothing."""
    with atomic_write(path) as temporary, open(temporary, "w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(lines)


@functools.cache
def machine() -> str:
    """What this process runs on. Once: a training may set its own number of threads."""
    return describe(choose_device())
