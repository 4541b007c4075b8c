"""Builds docs/reading.html from docs/reading.md: one file that opens from disk and asks no host for anything.

    pip install -r requirements.txt -r docs/requirements.txt
    python -m docs            builds it (2 cores: some 3 minutes, most of them tuning)
    python -m docs --check    builds it and compares its code and values with the page that is checked in

The page runs: its code cells tune CoOp with and without MAO on the demo. Warnings are errors.
"""

import argparse
import base64
import html
import json
import pathlib
import re
import sys
import tempfile

DOCS = pathlib.Path(__file__).parent
PAGE = DOCS / "reading.html"
SYMBOLS = {  # names in the code -> the symbol whose color they have
    "b": "b", "anchors": "b", "K": "K", "top_k": "K", "H": "H", "C": "C", "C_b": "C", "C_n": "C", "classnames": "C",
    "f": "f", "g": "g", "tau": "tau", "logit_scale": "tau", "classes": "H",
}  # fmt: skip


def built(folder):
    """The page, built in a folder, as one string of HTML."""
    from sphinx.cmd.build import build_main  # of docs/requirements.txt; comparing pages needs none of it

    code = build_main(["-q", "-W", "--keep-going", "-b", "html", str(DOCS), str(folder)])
    if code:
        sys.exit(code)
    text = (folder / "reading.html").read_text()
    ends = r'<div class="clearer"></div>\s*</div>\s*</div>\s*</div>\s*<div class="sphinxsidebar"'
    body = re.search(rf'role="main">(.*?){ends}', text, re.S)[1]
    body = re.sub(r'<a class="headerlink".*?</a>', "", body)
    body = re.sub(r'(<img [^>]*)src="([^"]+)"', lambda m: f'{m[1]}src="{embedded(folder / m[2])}"', body)
    body = re.sub(r"<pre>.*?</pre>", lambda m: colored(m[0]), body, flags=re.S)
    style = "\n".join([(DOCS / "reading.css").read_text(), katex_style(), pygments_style()])
    sections = re.findall(r'<section id="([^"]+)">(?:\s*<span[^>]*></span>)*\s*<h2>(.*?)</h2>', body)
    contents = "".join(f'<a href="#{anchor}">{title}</a>' for anchor, title in sections)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>MAO: the paper and the code</title><style>{style}</style></head>\n"
        f'<body><nav aria-label="Contents">{contents}</nav><main>{body}</main></body></html>\n'
    )


def embedded(path):
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"


def katex_style():
    """KaTeX's style with its fonts in it."""
    style = (DOCS / "katex" / "katex.min.css").read_text()

    def font(match):
        return f"url(data:font/woff2;base64,{base64.b64encode((DOCS / 'katex' / match[1]).read_bytes()).decode()})"

    return re.sub(r"url\((fonts/[^)]+)\)", font, style)


def pygments_style():
    """Pygments' colors for light windows, and those for dark ones."""
    from pygments.formatters import HtmlFormatter

    light = HtmlFormatter(style="default").get_style_defs(".highlight")
    dark = HtmlFormatter(style="github-dark").get_style_defs(".highlight")
    return f"{light}\n@media screen and (prefers-color-scheme: dark) {{ {dark} }}"


def colored(block):
    """A block of code in which the symbols' names have their colors. Names and comments alone, not keywords."""

    def span(match):
        def word(found):
            symbol = SYMBOLS.get(found[0])
            return f'<span class="sym-{symbol}">{found[0]}</span>' if symbol else found[0]

        return match[1] + re.sub(r"(?<![\w&;#.~'])[A-Za-z_]+(?![\w;])", word, match[2]) + "</span>"

    return re.sub(r'(<span class="(?:n|c1|nf)">)([^<]*)</span>', span, block)


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


def differences(old, new):
    """What of a page that is checked in no longer holds: sentences. Values may differ by 5%, or by 3 points of 100."""
    found = []
    if sources(old) != sources(new):
        found.append("its code is not today's source")
    then, now = values(old), values(new)
    for name in sorted(then.keys() | now.keys()):
        if name not in then or name not in now:
            found.append(f"'{name}' is in one of them alone")
        elif abs(then[name] - now[name]) > max(0.05 * abs(now[name]), 3 if abs(now[name]) > 20 else 1e-3):
            found.append(f"'{name}' was {then[name]} and is {now[name]}")
    return found


def main():
    """The command line of `python -m docs`. Exit code 1: the page that is checked in is out of date."""
    parser = argparse.ArgumentParser("docs", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with docs/reading.html, and leave it as it is")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        page = built(pathlib.Path(folder))
    if not args.check:
        PAGE.write_text(page)
        print(f"{PAGE}: {len(page) / 2**20:.2f} MB")
        return
    found = differences(PAGE.read_text(), page)
    for difference in found:
        print(f"docs/reading.html: {difference}: run python -m docs", file=sys.stderr)
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
