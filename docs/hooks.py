"""What MkDocs does to the pages: formulas become MathML, and nothing is fetched when a page is looked at."""
import re
from html import unescape
from typing import Any

from latex2mathml.converter import convert


def on_page_markdown(markdown: str, **_: Any) -> str:
    return re.sub(r"<!-- (begin|end) \S+ -->\n", "", markdown)  # marks of what scripts write


def on_page_content(html: str, **_: Any) -> str:
    """Turn what arithmatex marked as a formula into MathML, which browsers draw without a script."""
    def mathml(match: re.Match[str]) -> str:
        latex = unescape(match["latex"])
        if match["tag"] == "span":
            return convert(latex)
        return f'<div class="formula">{convert(latex, display="block")}</div>'

    formula = r'<(?P<tag>span|div) class="arithmatex">\\[(\[](?P<latex>.*?)\\[)\]]</(?P=tag)>'
    return re.sub(formula, mathml, html, flags=re.DOTALL)
