"""The one error that the scripts show without a traceback, how they quote those of libraries, and how they end."""
import contextlib
import io
import os
import re
import sys
import textwrap
import time
from collections.abc import Iterator

from harness import ctrl_c


class RunError(Exception):
    """The command cannot be carried out; the message is one line that says what to do."""


def first_line(error: BaseException) -> str:
    """Return the first line of what a library says, cut between words if it is long, or the error's name."""
    lines = str(error).strip().splitlines()
    return textwrap.shorten(lines[0], 200, placeholder=" ...") if lines else repr(error)


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """End the process, where the block fails as commands do, with one line and no traceback.

    Of processes that train together the first speaks at once, and another if torchrun does not end it within three
    seconds: then the first had nothing to say.
    """
    ctrl_c.raise_again()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a name that the terminal cannot show ends no training
    try:
        yield
    except BrokenPipeError:  # whoever read the output has seen enough; nor shall what is left of it fail at the end
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        reason = _reason(error)
        if reason is None:
            raise
        rank = os.environ.get("RANK", "0")
        if rank != "0":
            time.sleep(3)
        print(f"error: {reason}" if rank == "0" else f"error in process {rank}: {reason}", file=sys.stderr, flush=True)
        sys.exit(2)


def _reason(error: Exception) -> str | None:
    """Return what to tell of an error, None if it is none that a command can help."""
    if isinstance(error, (RunError, OSError)):
        return str(error) or repr(error)
    if isinstance(error, RuntimeError) and re.search("out of memory|can't allocate memory", str(error)):
        return f"there is not enough memory, of which smaller batches take less ({first_line(error)})"
    return None
