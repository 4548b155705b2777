"""The one exception that a person who runs a lesson is meant to read."""

from contextlib import contextmanager


class LessonError(Exception):
    """Something a person passed in cannot be used. Its text, which `common.cli.run` prints, says what to do."""


@contextmanager
def usable(what: str):
    """Around a computation from what a person chose: its ValueError becomes a LessonError."""
    try:
        yield
    except ValueError as error:
        raise LessonError(f"{what} cannot be made of these flags and data: {error}") from error
