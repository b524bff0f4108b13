"""The one error that the scripts show without a traceback, and how they quote those of libraries."""
import textwrap


class RunError(Exception):
    """The command cannot be carried out; the message is one line that says what to do."""


def first_line(error: BaseException) -> str:
    """Return the first line of what a library says, cut between words if it is long, or the error's name."""
    lines = str(error).strip().splitlines()
    return textwrap.shorten(lines[0], 200, placeholder=" ...") if lines else repr(error)
