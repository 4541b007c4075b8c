"""Builds docs/reading.html from docs/reading.md: one file that opens from disk and loads nothing from a network.

    pip install -r requirements-dev.txt
    python -m docs            builds it (2 cores: some 3 minutes, most of them tuning)
    python -m docs --check    builds it and compares its code and values with the page that is checked in

The page runs: its code cells tune CoOp with and without MAO on the demo. Warnings are errors, and so are a lost figure
and an output that is only the name of an object.
"""

import base64
import html
import io
import json
import pathlib
import re
import sys
import tempfile

from PIL import Image

from harness.options import Parser

DOCS = pathlib.Path(__file__).parent
PAGE = DOCS / "reading.html"
SYMBOLS = {  # names in the code -> the symbol whose color they have
    "b": "b", "anchors": "b", "K": "K", "top_k": "K", "H": "H", "C": "C", "C_b": "C", "C_n": "C", "classnames": "C",
    "f": "f", "g": "g", "tau": "tau", "logit_scale": "tau", "classes": "H",
}  # fmt: skip
BARE = r"&lt;Figure size.*?&gt;|&lt;[\w.]+ object.*?&gt;|Traceback \(most recent call last\)"  # instead of an output
SMALLEST = 4000  # bytes of a PNG that shows something


def build(folder):
    """The page, built in a folder, as one string of HTML."""
    from sphinx.cmd.build import build_main  # comparing pages needs no Sphinx

    if build_main(["-q", "-W", "--keep-going", "-b", "json", str(DOCS), str(folder)]):
        sys.exit("docs/reading.md cannot be built")
    body = json.loads((folder / "reading.fjson").read_text())["body"]
    body = re.sub(r"<pre>.*?</pre>", colored, body, flags=re.S)
    sections = re.findall(r'<section id="([^"]+)">(?:\s*<span[^>]*></span>)*\s*<h2>(.*?)</h2>', body)
    contents = "".join(f'<a href="#{anchor}">{title}</a>' for anchor, title in sections)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>MAO: the paper and the code</title><style>{style()}</style></head>\n"
        f'<body><nav aria-label="Contents">{contents}</nav><main>{body}</main></body></html>\n'
    )


def style():
    """The page's style, KaTeX's with its fonts in it, and Pygments' colors for light windows and for dark ones."""
    from pygments.formatters import HtmlFormatter

    katex = (DOCS / "katex" / "katex.min.css").read_text()
    fonts = {path.name: base64.b64encode(path.read_bytes()).decode() for path in (DOCS / "katex" / "fonts").iterdir()}
    katex = re.sub(r"url\(fonts/([^)]+)\)", lambda m: f"url(data:font/woff2;base64,{fonts[m[1]]})", katex)
    light, dark = (HtmlFormatter(style=name).get_style_defs(".highlight") for name in ("default", "github-dark"))
    dark = f"@media screen and (prefers-color-scheme: dark) {{ {dark} }}"
    return "\n".join([(DOCS / "reading.css").read_text(), katex, light, dark])


def colored(block):
    """A block of code, a match, in which the symbols' names have their colors: in names and comments, not keywords."""

    def symbol(match):
        color = SYMBOLS.get(match[0])
        return f'<span class="sym-{color}">{match[0]}</span>' if color else match[0]

    name = r"(?<![\w&;#.~'])[A-Za-z_]+(?![\w;])"
    spans = r'(<span class="(?:n|c1|nf)">)([^<]*)</span>'
    return re.sub(spans, lambda m: f"{m[1]}{re.sub(name, symbol, m[2])}</span>", block[0])


def sources(page):
    """[(file, first line, [lines])] of every block of code in a page."""
    found = []
    for name, block in re.findall(r'caption-text">([^<]+)</span>.*?<pre>(.*?)</pre>', page, re.S):
        first = int(re.search(r'<span class="linenos">\s*(\d+)</span>', block)[1])
        code = re.sub(r'<span class="linenos">.*?</span>', "", block)
        found.append((name, first, html.unescape(re.sub(r"<[^>]+>", "", code)).rstrip("\n").split("\n")))
    return found


def values(page):
    """{name: value} of a page, as docs/live.py noted them."""
    return json.loads(re.search(r'<script type="application/json" id="values">(.*?)</script>', page, re.S)[1])


def is_empty(png):
    """Whether an image, the bytes of a PNG file, shows nothing: it is tiny, or has one color only."""
    return len(png) < SMALLEST or len(Image.open(io.BytesIO(png)).convert("RGB").getcolors(1) or []) == 1


def faults(page):
    """What is wrong with a page by itself: sentences."""
    found = [f"it shows {html.unescape(bare)} instead of an output" for bare in re.findall(BARE, page)]
    figures = [base64.b64decode(data) for data in re.findall(r'src="data:image/png;base64,([^"]+)"', page)]
    if len(figures) != values(page).get("figures"):
        found.append(f"it has {len(figures)} of {values(page).get('figures')} figures")
    return found + [f"figure {number} is empty" for number, png in enumerate(figures, 1) if is_empty(png)]


def differences(old, new):
    """What of a page that is checked in no longer holds: sentences. Values may differ by 5%, or by 3 points of 100."""
    found = [] if sources(old) == sources(new) else ["its code is not today's source"]
    then, now = values(old), values(new)
    for name in sorted(then.keys() | now.keys()):
        if name not in then or name not in now:
            found.append(f"'{name}' is only in one of the two pages")
        elif abs(then[name] - now[name]) > max(0.05 * abs(now[name]), 3 if abs(now[name]) > 20 else 1e-3):
            found.append(f"'{name}' was {then[name]} and is {now[name]}")
    return found


def main(arguments=None):
    """The command line of `python -m docs`. Returns 1 if the new page is wrong, or the one checked in out of date."""
    parser = Parser("docs", __doc__)
    parser.add_argument("--check", action="store_true", help="compare with docs/reading.html, and leave it as it is")
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        page = build(pathlib.Path(folder))
    found = faults(page)
    if args.check:
        old = PAGE.read_text()
        found += [f"{fault} (run python -m docs)" for fault in faults(old) + differences(old, page)]
    elif not found:
        PAGE.write_text(page)
        print(f"{PAGE}: {len(page) / 2**20:.2f} MB")
    for fault in found:
        print(f"docs/reading.html: {fault}", file=sys.stderr)
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
