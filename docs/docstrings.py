"""A Griffe extension: docstrings as Markdown. What Sphinx marks as a role stays as code, examples are code blocks."""
import re
from typing import Any

import griffe


class Docstrings(griffe.Extension):
    """Rewrite the docstrings before they are parsed."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            text = re.sub(r":(?:class|func|meth|mod):`~?([^`]+)`", r"`\1`", obj.docstring.value)
            # Griffe knows the section "Examples" with its doctests, and takes "Example" for a plain admonition.
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)
