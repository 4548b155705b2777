"""The one exception that a person who runs a lesson is meant to read."""


class LessonError(Exception):
    """Something a person passed in cannot be used. Its text is one line that says what is wrong and what to do.

    `common.cli.main` prints the line and exits with status 1; nothing else catches it.
    """
