"""Hooks of MkDocs for what the pages of this site have beyond plain Markdown.

- ```` ```python no-run ````, a block that the tests do not run, is shown like any other.
- Formulas, $...$ within a line and $$...$$ on lines by themselves, become MathML, so that no page
  needs a script or a network to typeset them.
"""

import html
import re

from latex2mathml.converter import convert

FORMULA = re.compile(
    r'<(?P<tag>span|div) class="arithmatex">\\[(\[](?P<tex>.*?)\\[)\]]</(?P=tag)>', re.DOTALL
)


def on_page_markdown(markdown, **_):
    """Show blocks that are not run as the others."""
    return re.sub(r"^(\s*`{3,}python) no-run$", r"\1", markdown, flags=re.MULTILINE)


def on_page_content(content, **_):
    """Replace each formula, which arithmatex has marked, by its MathML."""
    return FORMULA.sub(_typeset, content)


def _typeset(formula):
    display = "block" if formula["tag"] == "div" else "inline"
    mathml = convert(html.unescape(formula["tex"]), display=display)
    return f'<{formula["tag"]} class="formula">{mathml}</{formula["tag"]}>'
