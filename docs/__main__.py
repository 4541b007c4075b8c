"""Builds docs/reading.ipynb and docs/reading.html from docs/reading.md, both from one execution of its code.

    pip install -r requirements-dev.txt
    python -m docs            builds both (2 cores: some 3 minutes, most of them tuning)
    python -m docs --check    builds both, and compares code, values and figures with the files that are checked in

The notebook is for GitHub, Jupyter and Colab. The page is one file for the disk and the printer, which loads nothing
from a network; it also has the sections of other documents to which it links. In docs/reading.md a block "python" is a
code cell. A block "listing FILE FUNCTION" shows a function without its docstring, or the lines that its text names:
"first line ... last line", by how they start. A wrong listing or link is an error, and so are a lost figure and an
output that is only the name of an object.
"""

import ast
import base64
import functools
import html
import importlib.util
import io
import json
import pathlib
import re
import sys
import textwrap

import quickjs
from markdown_it import MarkdownIt
from mdit_py_plugins.anchors import anchors_plugin
from mdit_py_plugins.dollarmath import dollarmath_plugin
from mdit_py_plugins.footnote import footnote_plugin
from nbclient import NotebookClient
from nbformat import v4, writes
from PIL import Image
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

from harness.options import Parser

DOCS = pathlib.Path(__file__).parent
PAGE, NOTEBOOK = DOCS / "reading.html", DOCS / "reading.ipynb"
SYMBOLS = {  # names in the code -> the symbol whose color they have: one for each, in equations, text and code
    "b": "b", "anchors": "b", "K": "K", "top_k": "K", "H": "H", "C": "C", "C_b": "C", "C_n": "C", "classnames": "C",
    "f": "f", "g": "g", "tau": "tau", "logit_scale": "tau", "classes": "H",
}  # fmt: skip
TEX = {"vb": "b", "vK": "K", "vH": "H", "vC": r"\boldsymbol{C}", "vf": "f", "vg": "g", "vtau": r"\tau"}
TEX["vCb"] = r"\widetilde{\boldsymbol{C}}'_b"
BARE = r"(?:&lt;|<)(?:Figure size.*?|[\w.]+ object.*?)(?:&gt;|>)|Traceback \(most recent call last\)"  # for an output


def execute(text):
    """The notebook of docs/reading.md with the outputs of its code cells; its text cells are as in the file."""
    new_cell = v4.new_markdown_cell, v4.new_code_cell
    parts = enumerate(re.split(r"^```python\n(.*?)^```$", text, flags=re.M | re.S))
    cells = [new_cell[i % 2](part.strip(), id=f"cell-{i}") for i, part in parts if part.strip()]
    notebook = v4.new_notebook(cells=cells, metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}})
    NotebookClient(notebook, timeout=1200, record_timing=False, resources={"metadata": {"path": str(DOCS)}}).execute()
    for cell in cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.output_type != "stream"]  # progress
    return notebook


def build(notebook):
    """{path: text} of the two files, from an executed notebook."""
    body = "".join(map(cell_html, notebook.cells)) + markdown(appendices())
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = for_github(cell.source)
    sections = re.findall(r'<h2 id="([^"]+)">(.*?)</h2>', body)
    script = (DOCS / "reading.js").read_text()
    contents = "".join(f'<a href="#{anchor}">{title}</a>' for anchor, title in sections)
    page = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>MAO: the paper and the code</title><style>{style()}</style></head>\n"
        f'<body><nav aria-label="Contents">{contents}</nav><main>{body}</main><script>{script}</script></body></html>\n'
    )
    return {NOTEBOOK: writes(notebook) + "\n", PAGE: page}


# Code -----------------------------------------------------------------------------------------------------------------


def listing(name, function, chosen):
    """Two lists [(line number, line)] of a function: all of it, and what is shown, with "..." for lines left out.

    name: of a file. function: with its class, if it has one. chosen: lines of text, as the top of this file says.
    ValueError: a name or a line is not found exactly once.
    """
    lines = (DOCS.parent / name).read_text().splitlines()
    node = ast.parse("\n".join(lines))
    for part in function.split("."):
        (node,) = [inner for inner in node.body if getattr(inner, "name", "") == part]
    first, inner = min([node.lineno, *(wrapper.lineno for wrapper in node.decorator_list)]), node.body[0]
    whole = list(enumerate(textwrap.dedent("\n".join(lines[first - 1 : node.end_lineno])).split("\n"), first))
    shown = set(range(first, inner.lineno))
    for choice in chosen.splitlines():
        ends = [[n for n, line in whole if line.strip().startswith(text)] for text in choice.split(" ... ")]
        if [len(found) for found in ends] not in ([1], [1, 1]):
            raise ValueError(f"docs/reading.md: '{choice}' is not found, or twice, in {function} in {name}")
        shown |= set(range(ends[0][0], ends[-1][0] + 1))
    if not chosen:
        shown |= set(range(inner.end_lineno + 1 if ast.get_docstring(node) else inner.lineno, node.end_lineno + 1))
    rows = []
    for number, line in whole:
        if number in shown:
            rows.append((number, line))
        elif rows[-1][0]:
            rows.append(("", re.match(" *", line)[0] + "..."))
    return whole, rows


def listing_html(name, function, chosen):
    """A function as the page shows it: the lines chosen, and all of them a click away."""

    def block(rows):
        code = highlight("\n".join(line for _, line in rows), PythonLexer(), HtmlFormatter(nowrap=True))
        lines = (f'<span class="linenos">{n:>3}</span>{line}' for (n, _), line in zip(rows, colored(code).split("\n")))
        return '<pre class="highlight" tabindex="0">' + "\n".join(lines) + "</pre>"

    whole, rows = listing(name, function, chosen)
    return (
        f'<figure class="listing"><figcaption>{name} · {function}</figcaption>{block(rows)}'
        f"<details><summary>the whole function, {len(whole)} lines</summary>{block(whole)}</details></figure>\n"
    )


def colored(code):
    """Highlighted code in which the symbols' names have their colors: in names and comments, not in keywords."""
    name = rf"(?<![\w&;#.~'])({'|'.join(SYMBOLS)})(?![\w;])"
    spans = r'(<span class="(?:n|c1|nf)">)([^<]*)</span>'
    color = functools.partial(re.sub, name, lambda m: f'<span class="sym-{SYMBOLS[m[1]]}">{m[1]}</span>')
    return re.sub(spans, lambda m: f"{m[1]}{color(m[2])}</span>", code)


# Text -----------------------------------------------------------------------------------------------------------------


def for_github(text):
    """A text cell in the Markdown that GitHub and Colab show: plain TeX, code in blocks, no columns."""

    def code(match):
        name, function, chosen = match.groups()
        _, rows = listing(name, function, chosen)
        lines = "\n".join(line for _, line in rows)
        return f"**[{name} · `{function}`](../{name}#L{rows[0][0]})**\n\n```python\n{lines}\n```"

    text = re.sub(r"^```listing (\S+) (\S+)\n(.*?)^```$", code, text, flags=re.M | re.S)
    text = re.sub(r"^</?div.*\n?\n?", "", text, flags=re.M)
    text = re.sub(r"\$\$ \((\d+)\)", r"\\tag{\1} $$", text)
    return re.sub(rf"\\({'|'.join(TEX)})(?![A-Za-z])", lambda m: TEX[m[1]], text)


def appendices():
    """The documents' sections to which the page links, as Markdown, without their figures."""
    decisions, results = ((DOCS / name).read_text() for name in ("decisions.md", "results.md"))
    found = ["## Decisions", re.sub("^#", "##", decisions[decisions.index("\n## ") :], flags=re.M)]
    for title in ("The demo", "What the scores hide"):
        found.append(re.search(rf"^## {title}\n.*?(?=^## |\Z)", results, re.M | re.S)[0])
    return re.sub(r"^!\[.*\n(\*.*\n)?", "", "\n".join(found), flags=re.M)


def linked(match):
    """A link as the page has it: to a section of its own or to the web; of other files the page says only the name."""
    text, file, anchor = match.groups()
    if file.startswith("http"):
        return match[0]
    if file in ("decisions.md", "results.md", ""):
        return f"[{text}](#{anchor})"
    return f"{file.removeprefix('../')} · {text}"


def markdown(text):
    """Markdown as HTML, with equations and listings."""
    return renderer().render(re.sub(r"(?<!!)\[([^]]*)\]\(([^)#\s]*)#?([^)\s]*)\)", linked, text))


@functools.cache
def renderer():
    """Markdown's renderer, with KaTeX for equations, run by quickjs."""
    place = pathlib.Path(importlib.util.find_spec("sphinxcontrib.katex").origin).with_name("katex.min.js")
    macros = {rf"\{name}": rf"\htmlClass{{sym-{name[1:]}}}{{{tex}}}" for name, tex in TEX.items()}
    katex = quickjs.Context().eval(
        f"{place.read_text()}; var macros = {json.dumps(macros)}; "
        "(function (tex, display) { return katex.renderToString(tex, {displayMode: display, trust: true, "
        "strict: false, macros: Object.assign({}, macros)}); })"
    )

    def equation(self, tokens, i, options, env):
        number = f'<span class="eqno">({tokens[i].info})</span>' if tokens[i].info else ""
        return f'<div class="equation"><div tabindex="0">{katex(tokens[i].content, True)}</div>{number}</div>\n'

    def fence(self, tokens, i, options, env):
        kind, *where = tokens[i].info.split() or [""]
        return listing_html(*where, tokens[i].content) if kind == "listing" else self.fence(tokens, i, options, env)

    md = MarkdownIt("commonmark", {"html": True}).enable("table")
    md.use(dollarmath_plugin).use(footnote_plugin).use(anchors_plugin, max_level=3)
    md.add_render_rule("math_inline", lambda self, tokens, i, *_: katex(tokens[i].content, False))
    md.add_render_rule("math_block", equation)
    md.add_render_rule("math_block_label", equation)
    md.add_render_rule("fence", fence)
    return md


def cell_html(cell):
    """A cell as the page shows it: text, or the outputs of code without the code."""
    if cell.cell_type == "markdown":
        return markdown(cell.source)
    found = []
    for data in (output["data"] for output in cell.outputs):
        alt, values = html.escape(data["text/plain"]), json.dumps(data.get("application/json"), indent=0)
        if "image/png" in data:
            found.append(f'<img alt="{alt}" src="data:image/png;base64,{data["image/png"]}">')
        elif "application/json" in data:
            found.append(f'<script type="application/json" id="values">{values}</script>')
        else:
            found.append(data.get("text/html", f"<pre>{alt}</pre>"))
    return f'<div class="outputs">{"".join(found)}</div>\n' if found else ""


def style():
    """The page's style, KaTeX's with its fonts in it, and Pygments' colors for light windows and for dark ones."""
    katex = (DOCS / "katex" / "katex.min.css").read_text()
    fonts = {path.name: base64.b64encode(path.read_bytes()).decode() for path in (DOCS / "katex" / "fonts").iterdir()}
    katex = re.sub(r"url\(fonts/([^)]+)\)", lambda m: f"url(data:font/woff2;base64,{fonts[m[1]]})", katex)
    light, dark = (HtmlFormatter(style=name).get_style_defs(".highlight") for name in ("default", "github-dark"))
    dark = f"@media screen and (prefers-color-scheme: dark) {{ {dark} }}\n"
    return "\n".join([katex, light, dark, (DOCS / "reading.css").read_text()])


# Checks, of both files alike ------------------------------------------------------------------------------------------


def sources(text):
    """What a file shows of the code: [(file, line number, line)] of a page, the cells of a notebook."""
    if text.startswith("{"):
        return [cell["source"] for cell in json.loads(text)["cells"]]
    found = []
    for name, block in re.findall(r"<figcaption>(\S+) · .*?</figcaption>(.*?)</figure>", text, re.S):
        for number, line in re.findall(r'<span class="linenos">\s*(\d+)</span>(.*?)(?=\n|</pre>)', block):
            found.append((name, int(number), html.unescape(re.sub(r"<[^>]+>", "", line)).rstrip()))
    return found


def values(text):
    """{name: value} of a file, as docs/live.py noted them."""
    return json.loads(re.search(r'(?:id="values">|"application/json": )(\{.*?\})', text, re.S)[1])


def pictures(text):
    """The figures of a file, the bytes of PNG files."""
    return [base64.b64decode(data) for data in re.findall(r'image/png(?:;base64,|": ")([^"\\]+)', text)]


def is_empty(png):
    """Whether an image, the bytes of a PNG file, shows nothing: it has under 4,000 bytes, or one color only."""
    return len(png) < 4000 or len(Image.open(io.BytesIO(png)).convert("RGB").getcolors(1) or []) == 1


def faults(text):
    """What is wrong with a file by itself: sentences."""
    found = [f"it shows {html.unescape(bare)} instead of an output" for bare in re.findall(BARE, text)]
    found += ["a cell was not executed"] * text.count('"execution_count": null')
    found += [
        f"nothing has the anchor {link}" for link in re.findall(r'href="#([^"]+)"', text) if f'id="{link}"' not in text
    ]
    found += [f"it links to the file {file}" for file in re.findall(r'href="(?!#|https?:)([^"]*)"', text)]
    figures = pictures(text)
    if len(figures) != values(text).get("figures"):
        found.append(f"it has {len(figures)} of {values(text).get('figures')} figures")
    return found + [f"figure {number} is empty" for number, png in enumerate(figures, 1) if is_empty(png)]


def differences(old, new):
    """What of a file that is checked in no longer holds: sentences. Values may differ by 5%, or by 3 points of 100.

    A figure may not lose a fifth of its bytes.
    """
    found = [] if sources(old) == sources(new) else ["its code is not today's source"]
    if re.findall('id="decisions".*', old, re.S) != re.findall('id="decisions".*', new, re.S):
        found.append("its decisions and results are not today's")
    then, now = values(old), values(new)
    for name in sorted(then.keys() | now.keys()):
        if name not in then or name not in now:
            found.append(f"'{name}' is only in one of the two files")
        elif abs(then[name] - now[name]) > max(0.05 * abs(now[name]), 3 if abs(now[name]) > 20 else 1e-3):
            found.append(f"'{name}' was {then[name]} and is {now[name]}")
    for number, (before, after) in enumerate(zip(pictures(old), pictures(new)), 1):
        if len(after) < 0.8 * len(before):
            found.append(f"figure {number} is smaller than it was")
    return found


def main(arguments=None):
    """The command line of `python -m docs`. Exits with 1 if a file is wrong or out of date."""
    parser = Parser("docs", __doc__)
    parser.add_argument("--check", action="store_true", help="compare with the files in docs/, and leave them")
    args = parser.parse_args(arguments)
    found = []
    for path, text in build(execute((DOCS / "reading.md").read_text())).items():
        wrong = faults(text)
        if args.check:
            old = path.read_text()
            wrong += [f"{fault} (run python -m docs)" for fault in faults(old) + differences(old, text)]
        elif not wrong:
            path.write_text(text)
            print(f"{path}: {len(text) / 2**20:.2f} MB")
        found += [f"{path.name}: {fault}" for fault in wrong]
    sys.exit("\n".join(found) or None)


if __name__ == "__main__":
    main()
