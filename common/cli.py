"""How a script meets a person: an error is one line, Ctrl-C lets a step finish, a log file gets a line now and then."""

import os
import signal
import sys
import time
from contextlib import contextmanager, suppress

from tqdm import tqdm

from common import ranks
from common.errors import LessonError

MEMORY = ("out of memory", "DefaultCPUAllocator", "Invalid buffer size")  # what PyTorch says on CUDA, CPU and MPS
LOST = ("closed by peer", "reset by peer", "gloo", "NCCL", "Broken pipe", "recvValue failed")
ENDS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class Stopped(Exception):  # noqa: N818
    """Leaves a training or its pictures before their end, because the person, or the bench, has asked for that."""


class StopRequest:
    """Turns Ctrl-C, SIGTERM or a closed terminal into `signal_number`, which the loop looks at; a second ends at once.

    A second one counts a second after the first: under torchrun a single Ctrl-C arrives twice.
    """

    def __init__(self):
        self.signal_number, self.since = 0, 0.0
        for number in ENDS:
            if number == signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN:  # nohup: the terminal may close
                signal.signal(number, self._remember)

    def _remember(self, number, frame):
        if not self.signal_number:
            self.signal_number, self.since = number, time.monotonic()
            if ranks.rank() == 0 and number == signal.SIGINT:
                with suppress(OSError):  # Ctrl-C has ended `tee`, too, which read it
                    os.write(2, b"\nfinishing the step, and saving; Ctrl-C again ends at once\n")
        elif time.monotonic() > self.since + 1:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    def __bool__(self):
        return self.signal_number > 0


def progress(total: int, unit: str, **how) -> tqdm:
    """A progress bar on a terminal; elsewhere, in a log file perhaps, a line now and then."""
    how |= {} if sys.stderr.isatty() else {"file": _Lines(), "mininterval": 10, "maxinterval": 10}
    return tqdm(total=total, unit=unit, unit_scale=True, **how)


class _Lines:
    """What tqdm writes, but each state of the bar a line of its own. That nobody reads them must not end a run."""

    def write(self, text):
        if text.strip():
            with suppress(OSError):
                sys.stderr.write(text.strip() + "\n")

    def flush(self):
        with suppress(OSError):
            sys.stderr.flush()


def run(main) -> None:
    """Calls `main()` and ends the program: a LessonError is one line and status 1, and so is a full memory."""
    sys.stdout, sys.stderr = (file or open(os.devnull, "w") for file in (sys.stdout, sys.stderr))  # closed in a service
    for file in (sys.stdout, sys.stderr):
        if hasattr(file, "reconfigure"):
            file.reconfigure(errors="backslashreplace")  # what the terminal cannot show must not end a run
    try:
        status = main()
        sys.stdout.flush()
        sys.exit(status)
    except BrokenPipeError:  # who reads what is printed, `| head` perhaps, has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except (LessonError, OSError) as error:  # OSError: a folder that may not be entered, a log on a full disk
        _fail(f"error: {error}")
    except (MemoryError, RuntimeError) as error:
        if is_out_of_memory(error):
            _fail("error: the memory is full; try a smaller --batch-size, --width or --num")
        if ranks.world() > 1 and any(word in str(error) for word in LOST):
            _fail("error: another process of this run has ended; go on from the last checkpoint with --resume")
        raise


@contextmanager
def by_product(name: str):
    """Around the writing of what is not worth a training: if it fails, a line says so, and the run goes on."""
    try:
        yield
    except Exception as error:  # a full disk, a file that is open elsewhere, a matplotlibrc of the person's own
        print(f"\nwarning: no {name}: {' '.join(str(error).split())}", file=sys.stderr)


def is_out_of_memory(error: Exception) -> bool:
    """Whether this is what PyTorch or Python raises when the memory is full."""
    return isinstance(error, MemoryError) or any(word in str(error) for word in MEMORY)


def _fail(line):
    """Prints one line and exits with 1. Of several processes with the same error only the first one's line appears."""
    if ranks.rank() > 0:  # torchrun ends the others as soon as one has failed: if rank 0 has, this one does not speak
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(2)
    sys.exit(line)
