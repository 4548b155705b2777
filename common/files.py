"""Writing a file so that nobody ever sees half of it."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from common.errors import LessonError

# torch.save does not raise OSError when the disk is full: its C++ writer raises RuntimeError with one of these words.
TORCH_WRITER = re.compile("PytorchStreamWriter|inline_container|file write|iostream error")


@contextmanager
def atomic_write(path: str | Path, replace: bool = True) -> Iterator[Path]:
    """Yield a temporary path in the same folder, and rename it to `path` if the block ends without an error.

    With `replace` False it is deleted instead. A reader sees the old file or the new one, and a write that fails leaves
    the old one alone. Missing folders are made. The temporary name ends in ".tmp", so that no search for "*.png" finds
    it; name the format when writing to it. Raises LessonError where the folder cannot be written or the disk is full.
    The block should do nothing but write.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()  # so that a folder that cannot be written is an OSError, whoever writes next
        yield temporary
        if replace:
            os.replace(temporary, path)
    except OSError as error:
        raise LessonError(f"cannot write {path}: {str(error).replace(str(temporary), str(path))}") from error
    except RuntimeError as error:
        if not TORCH_WRITER.search(str(error)):
            raise
        raise LessonError(f"cannot write {path}: torch could not write all of it; is the disk full?") from error
    finally:
        with suppress(OSError):  # it would hide the error that matters
            temporary.unlink()


class Claim:
    """Says that a folder is in use by this process, until `release` or its end. LessonError if another one uses it."""

    def __init__(self, folder: Path):
        self.path = folder / ".in_use"
        self.file = open(self.path, "w")
        try:
            if os.name == "nt":
                import msvcrt

                msvcrt.locking(self.file.fileno(), msvcrt.LK_NBLCK, 1)
            else:
                import fcntl

                fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            self.file.close()
            text = f"another run is writing to {folder}: wait for its end, or choose another --output"
            raise LessonError(text) from error
        except OSError:  # a network's file system that knows no locks
            pass

    def release(self) -> None:
        """Gives the folder back."""
        self.file.close()
        with suppress(OSError):
            self.path.unlink()


def check_writable(path: str | Path) -> None:
    """Raises LessonError if a file at `path` could not be written; makes missing folders, and changes nothing else."""
    if Path(path).is_dir():
        raise LessonError(f"cannot write {path}: it is a folder; name a file")
    with atomic_write(path, replace=False):  # nothing takes the place of what is there
        pass
