"""What the command lines of the scripts have in common."""
import argparse
import difflib
import math
from typing import Any, NoReturn

from timm import is_model, list_models

from harness.errors import RunError


class Help(argparse.RawDescriptionHelpFormatter):
    """Says what a flag is where nobody gives it, unless its own text does or it is nothing."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        if any(action.default is nothing for nothing in (None, False, argparse.SUPPRESS)) or "default" in text:
            return text
        words = action.default if isinstance(action.default, list) else [action.default]
        return f"{text} (default: {' '.join(map(str, words))})" if words else text


class Parser(argparse.ArgumentParser):
    """Flags by their whole names, and errors of one line, as those of what comes after it."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=Help, **kwargs)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; --help lists the flags\n")


def not_empty(text: str) -> str:
    """Parse what a variable that is not set would leave empty."""
    if not text:
        raise argparse.ArgumentTypeError("must not be empty")
    return text


def positive(text: str) -> int:
    """Parse a count of at least 1."""
    try:
        count = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}") from None
    if count < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {count}")
    return count


def positive_number(text: str) -> float:
    """Parse a duration or a rate above 0."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {text!r}")
    return number


def check_models(names: list[str], flag: str = "--models") -> None:
    """Raise a :class:`RunError` that names the first of ``names`` that timm does not know, and those most like it."""
    for name in names:
        if not is_model(name):
            similar = difflib.get_close_matches(name, list_models(), n=3)
            raise RunError(f"{flag} {name} is not a timm model"
                           + (f"; did you mean {' or '.join(similar)}?" if similar else "")
                           + "; see timm.list_models('ran_*') and timm.list_models()")
