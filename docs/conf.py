"""Sphinx's settings for docs/reading.md: `python -m docs` builds it. No network, neither to build nor to read."""

import importlib.util
import json
import pathlib

import quickjs
from docutils.nodes import SkipNode

extensions = ["myst_nb", "sphinx_design"]
include_patterns = ["reading.md"]
root_doc = "reading"
html_permalinks = False
html_math_renderer = "katex"
myst_enable_extensions = ["colon_fence", "dollarmath"]
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 1200
nb_output_stderr = "remove"
nb_remove_code_source = True

# One color for each symbol, in equations, text and code: `SYMBOLS` in docs/__main__.py and docs/reading.css.
TEX = {"b": "b", "K": "K", "H": "H", "C": r"\boldsymbol{C}", "f": "f", "g": "g", "tau": r"\tau"}
MACROS = {rf"\v{name}": rf"\htmlClass{{sym-{name}}}{{{tex}}}" for name, tex in TEX.items()}
MACROS[r"\Cb"] = r"\htmlClass{sym-H}{\widetilde{\boldsymbol{C}}'_b}"


def katex():
    """A function (TeX, whether displayed) -> HTML: KaTeX, run by quickjs."""
    place = pathlib.Path(importlib.util.find_spec("sphinxcontrib.katex").origin).with_name("katex.min.js")
    context = quickjs.Context()
    context.eval(f"{place.read_text()}; var macros = {json.dumps(MACROS)};")
    return context.eval(
        "(function (tex, display) { return katex.renderToString(tex, {displayMode: display, trust: true, "
        "strict: false, macros: Object.assign({}, macros)}); })"
    )


def setup(app):
    render = katex()

    def visit(self, node):
        formula = render(node.astext(), node.tagname == "math_block")
        number = f'<span class="eqno">({node["label"]})</span>' if node.get("label") else ""
        self.body.append(formula if node.tagname == "math" else f'<div class="equation">{formula}{number}</div>')
        raise SkipNode

    app.add_html_math_renderer("katex", (visit, None), (visit, None))
