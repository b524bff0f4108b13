"""Ctrl-C while a script imports torch, which takes seconds: the process ends at once, without a traceback.

To be imported first of all. From :func:`raise_again` on Ctrl-C raises an exception, as Python has it.
"""
import contextlib
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# What asks a process to end; Windows has no hangups.
ENDING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


def end_at_once() -> None:
    """Let Ctrl-C end the process, if it runs a script of this folder and does not ignore it, as in a shell's `&`."""
    script = getattr(sys.modules["__main__"], "__file__", None)
    if script and Path(script).resolve().parent == Path(__file__).resolve().parents[1]:
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, signal.SIG_DFL)


def raise_again() -> None:
    """Undo :func:`end_at_once`."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextlib.contextmanager
def handled_by(handler: Any) -> Iterator[None]:
    """Have ``handler`` receive what asks the process to end, unless that is ignored: by nohup, or a shell's `&`."""
    before = {number: signal.signal(number, handler) for number in ENDING
              if signal.getsignal(number) is not signal.SIG_IGN}
    try:
        yield
    finally:
        for number, earlier in before.items():
            if earlier is not None:  # what did not come from Python cannot be put back by it
                signal.signal(number, earlier)


def all_as_ctrl_c() -> contextlib.AbstractContextManager[None]:
    """In it, whatever asks the process to end is a ``KeyboardInterrupt``, which ends its children too."""
    return handled_by(signal.default_int_handler)


end_at_once()
