"""Sphinx's settings for docs/reading.md: `python -m docs` builds it. No network, neither to build nor to read."""

import importlib.util
import json
import pathlib

import quickjs
from docutils.nodes import SkipNode

project = "MAO: the paper and the code"
extensions = ["myst_nb", "sphinx_design"]
include_patterns = ["reading.md"]
root_doc = "reading"
html_theme = "basic"
html_copy_source = False
html_show_copyright = False
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 1200
nb_remove_code_source = True
pygments_style = "default"

# One color for each symbol, in equations, text and code: `SYMBOLS` in docs/__main__.py and docs/reading.css.
MACROS = {
    r"\vb": r"\htmlClass{sym-b}{b}",
    r"\vK": r"\htmlClass{sym-K}{K}",
    r"\vH": r"\htmlClass{sym-H}{H}",
    r"\vC": r"\htmlClass{sym-C}{\boldsymbol{C}}",
    r"\vf": r"\htmlClass{sym-f}{f}",
    r"\vg": r"\htmlClass{sym-g}{g}",
    r"\vtau": r"\htmlClass{sym-tau}{\tau}",
    r"\Cb": r"\htmlClass{sym-H}{\widetilde{\boldsymbol{C}}'_b}",
}


def katex():
    """A function (TeX, whether displayed) -> HTML: KaTeX by quickjs."""
    place = pathlib.Path(importlib.util.find_spec("sphinxcontrib.katex").origin).with_name("katex.min.js")
    context = quickjs.Context()
    context.eval(place.read_text())
    context.eval(f"var macros = {json.dumps(MACROS)};")
    return context.eval(
        "(function (tex, display) { return katex.renderToString(tex, {displayMode: display, trust: true, "
        "strict: false, macros: Object.assign({}, macros)}); })"
    )


def setup(app):
    render = katex()

    def inline(self, node):
        self.body.append(render(node.astext(), False))
        raise SkipNode

    def block(self, node):
        number = f'<span class="eqno">({node["label"]})</span>' if node.get("label") else ""
        self.body.append(f'<div class="equation">{render(node.astext(), True)}{number}</div>')
        raise SkipNode

    app.add_html_math_renderer("katex", (inline, None), (block, None))


html_math_renderer = "katex"
