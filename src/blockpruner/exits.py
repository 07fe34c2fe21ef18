"""Every way a command can end but well: one message on stderr, and an exit code.

1 a bug of ours (traceback in a file), 2 bad input, 3 a check failed, 4 the machine lacks something, 5 the run folder is
busy or was begun otherwise, 130 Ctrl-C, 143 SIGTERM, 129 SIGHUP.
"""

import errno
import os
import shlex
import signal
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from blockpruner.console import say
from blockpruner.errors import BlockprunerError, is_out_of_memory, system_error

_MACHINE = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS)  # wherever it happens
_received = [signal.SIGINT]  # the last one gives the exit code; the first stands for a Ctrl-C that Python saw


@contextmanager
def errors_said() -> Iterator[None]:
    """Turn whatever ends the block early into a message and SystemExit; standard output is flushed in it."""
    try:
        yield
        sys.stdout.flush()
    except BlockprunerError as error:
        say(f"error: {error}")
        raise SystemExit(error.exit_code) from None
    except KeyboardInterrupt:
        say(f"interrupted\nresume with: {_command()}")
        raise SystemExit(128 + _received[-1]) from None
    except BrokenPipeError:  # the reader has seen enough
        _leave_output()
        raise SystemExit(0) from None
    except Exception as error:
        if is_out_of_memory(error):
            say("error: not enough memory\n  next: use a smaller --window, --dtype bfloat16, or a smaller model")
            raise SystemExit(4) from None
        if (number := system_error(error)) in _MACHINE:
            _leave_output()
            say(f"error: {os.strerror(number)}\n  next: free space, or write to another disk, then run it again")
            raise SystemExit(4) from None
        from blockpruner.artifacts import write_bytes

        file = Path(tempfile.gettempdir(), f"blockpruner-{os.getpid()}.txt")
        write_bytes(file, f"{_command()}\n{traceback.format_exc()}".encode())
        say(f"error: a bug in blockpruner; the traceback is in {file}\n  next: report it with that file")
        raise SystemExit(1) from None


def _leave_output() -> None:
    """What is left in the buffer must go somewhere when the process ends."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def catch_signals() -> None:
    """Let SIGTERM and SIGHUP interrupt like Ctrl-C, unless they are ignored, as nohup has it."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _interrupt)


def _interrupt(number: int, _frame: FrameType | None) -> None:
    _received.append(signal.Signals(number))
    raise KeyboardInterrupt


def _command() -> str:
    return shlex.join(["blockpruner", *sys.argv[1:]])
