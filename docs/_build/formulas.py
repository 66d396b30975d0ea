"""A hook of MkDocs that typesets formulas as MathML, so that no page needs a script or a network.

Write $...$ within a line, and $$...$$ on lines by themselves.
"""

import html
import re

from latex2mathml.converter import convert

FORMULA = re.compile(
    r'<(?P<tag>span|div) class="arithmatex">\\[(\[](?P<tex>.*?)\\[)\]]</(?P=tag)>', re.DOTALL
)


def on_page_content(content, **_):
    """Replace each formula of a page, which arithmatex has marked, by its MathML."""
    return FORMULA.sub(_typeset, content)


def _typeset(formula):
    display = "block" if formula["tag"] == "div" else "inline"
    mathml = convert(html.unescape(formula["tex"]), display=display)
    return f'<{formula["tag"]} class="formula">{mathml}</{formula["tag"]}>'
