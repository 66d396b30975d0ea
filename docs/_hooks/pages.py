"""Hooks of MkDocs for what the pages of this site have beyond plain Markdown.

- ```` ```python no-run ````, a block that the tests do not run, is shown like any other.
- CONTRIBUTING.md and CHANGELOG.md are pages too.
- Formulas, $...$ within a line and $$...$$ on lines by themselves, become MathML, so that no page
  needs a script or a network to typeset them. Browsers need a font for mathematics; the site has
  the one of ziamath for readers without one.
"""

import html
import importlib.resources
import re
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.structure.files import File

FORMULA = re.compile(
    r'<(?P<tag>span|div) class="arithmatex">\\[(\[](?P<tex>.*?)\\[)\]]</(?P=tag)>', re.DOTALL
)

# A name such as "tr" is an operator here, whose default spaces are too wide.
OPERATOR = re.compile(r"<mo>([A-Za-z]{2,})</mo>(<mo[^>]*>&#x00028;)?")
FONT = "STIXTwoMath-Regular.ttf"


# Pages of the site that lie at the top of the repository, and their links to other files there.
TOP = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
LINK = re.compile(r"\[([^\]]+)\]\((?!https?:)([^)]+)\)")


def on_files(files, config):
    """Add the font to the site, and the pages from the top of the repository."""
    root = Path(config.config_file_path).parent
    for name, page in TOP.items():
        text = LINK.sub(_link, (root / name).read_text())
        files.append(File.generated(config, page, content=text))
    with importlib.resources.as_file(importlib.resources.files("ziamath.fonts") / FONT) as path:
        files.append(File.generated(config, f"_assets/{FONT}", abs_src_path=str(path)))
    return files


def _link(link):
    text, target = link.groups()
    page = TOP.get(target, target.removeprefix("docs/"))
    return f"[{text}]({page})" if page != target else f"`{target}`"


def on_page_markdown(markdown, **_):
    """Show blocks that are not run as the others."""
    return re.sub(r"^(\s*`{3,}python) no-run$", r"\1", markdown, flags=re.MULTILINE)


def on_page_content(content, **_):
    """Replace each formula, which arithmatex has marked, by its MathML."""
    return FORMULA.sub(_typeset, content)


def _typeset(formula):
    display = "block" if formula["tag"] == "div" else "inline"
    mathml = OPERATOR.sub(_spaced, convert(html.unescape(formula["tex"]), display=display))
    return f'<{formula["tag"]} class="formula">{mathml}</{formula["tag"]}>'


def _spaced(operator):
    name, bracket = operator[1], operator[2] or ""
    after = "0" if bracket else "0.167em"
    return f'<mo lspace="0.167em" rspace="{after}">{name}</mo>{bracket}'
