"""The one exception that a person who runs a lesson is meant to read."""

from contextlib import contextmanager


class LessonError(Exception):
    """Something a person passed in cannot be used. Its text, which `common.cli.run` prints, says what to do."""


@contextmanager
def usable(what: str):
    """Around a computation from what a person chose, or its checkpoint: its ValueError becomes a LessonError."""
    try:
        yield
    except (ValueError, KeyError) as error:
        raise LessonError(f"{what} cannot be made of these flags and data: {error}") from error
