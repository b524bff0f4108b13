"""Parts of pages that scripts write; the rest of the page is written by hand."""
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from harness.errors import RunError

BEGIN, END = "<!-- begin {} -->", "<!-- end {} -->"


def table(head: Sequence[str], align: str, rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table; ``align`` has an ``l`` or ``r`` for each column."""
    rule = ["--:" if side == "r" else "---" for side in align]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, rule, *rows))


def parts_of(text: str) -> list[str]:
    """Return the names of the parts that a page has, in its order."""
    return re.findall(BEGIN.format(r"(\S+)"), text)


def replace_part(page: Path, text: str, name: str, content: str) -> str:
    """Return the ``text`` of ``page`` with ``content`` between the marks of the part ``name``, which stay.

    Raises:
        RunError: The page does not have both marks once each, the first before the second.
    """
    begin, end = BEGIN.format(name), END.format(name)
    before, found_begin, rest = text.partition(begin)
    _, found_end, after = rest.partition(end)
    if not (found_begin and found_end) or text.count(begin) > 1 or text.count(end) > 1:
        raise RunError(f"{page} must have the lines '{begin}' and '{end}' once each; what a script writes goes between")
    return f"{before}{begin}\n\n{content}\n\n{end}{after}"
