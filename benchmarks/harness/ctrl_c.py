"""Ctrl-C while a script imports torch, which takes seconds: the process ends at once, without a traceback.

To be imported first of all. From :func:`raise_again` on Ctrl-C raises an exception, as Python has it.
"""
import signal
import sys
from pathlib import Path


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


end_at_once()
