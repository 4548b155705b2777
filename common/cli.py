"""How a script ends: an error is one line, and Ctrl-C in a training lets the step finish."""

import os
import signal
import sys
import time

from common import ranks
from common.errors import LessonError

MEMORY = ("out of memory", "DefaultCPUAllocator", "Invalid buffer size")  # what PyTorch says on CUDA, CPU and MPS
LOST = ("closed by peer", "reset by peer", "gloo", "NCCL", "Broken pipe", "recvValue failed")


class StopRequest:
    """Turns Ctrl-C or SIGTERM into `signal_number`, which the loop looks at; a second one later ends at once.

    "Later" means a second after the first: under torchrun a single Ctrl-C arrives twice.
    """

    def __init__(self):
        self.signal_number, self.since = 0, 0.0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._remember)

    def _remember(self, number, frame):
        if not self.signal_number:
            self.signal_number, self.since = number, time.monotonic()
        elif time.monotonic() > self.since + 1:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    def __bool__(self):
        return self.signal_number > 0


def run(main) -> None:
    """Calls `main()` and ends the program: a LessonError is one line and status 1, and so is a full memory."""
    try:
        status = main()
        sys.stdout.flush()
        sys.exit(status)
    except BrokenPipeError:  # who reads what is printed, `| head` perhaps, has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except LessonError as error:
        _fail(f"error: {error}")
    except (MemoryError, RuntimeError) as error:
        if is_out_of_memory(error):
            _fail("error: the memory is full; try a smaller --batch-size, --width or --num")
        if ranks.world() > 1 and any(word in str(error) for word in LOST):
            _fail("error: another process of this run has ended; go on from the last checkpoint with --resume")
        raise


def is_out_of_memory(error: Exception) -> bool:
    """Whether this is what PyTorch or Python raises when the memory is full."""
    return isinstance(error, MemoryError) or any(word in str(error) for word in MEMORY)


def _fail(line):
    """Prints one line and exits with 1. Of several processes with the same error only the first one's line appears."""
    if ranks.rank() > 0:  # torchrun ends the others as soon as one has failed: if rank 0 has, this one does not speak
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(2)
    sys.exit(line)
