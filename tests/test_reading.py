"""docs/reading.html and docs/reading.ipynb as they are checked in: their code is today's, and they show all figures.

CI builds both again and compares all values (`python -m docs --check`); here the cheap ones are computed again.
"""

import importlib
import io
import json
import re

import nbformat
import pytest
from conftest import PROJECT
from PIL import Image

docs = importlib.import_module("docs.__main__")
PAGE, NOTEBOOK = docs.PAGE.read_text(), docs.NOTEBOOK.read_text()
BOTH = pytest.mark.parametrize("text", [PAGE, NOTEBOOK], ids=["page", "notebook"])


def test_each_line_of_code_is_todays_source():
    lines = docs.sources(PAGE)
    assert {name for name, _, _ in lines} >= {"mao.py", "sampler.py", "pseudolabel.py", "run.py"} and len(lines) > 200
    for name, number, line in lines:
        source = (PROJECT / name).read_text().splitlines()[number - 1]
        assert line.strip() == source.strip(), f"{name}:{number}: run python -m docs"


def test_a_listing_shows_the_lines_that_its_text_names():
    whole, rows = docs.listing("sampler.py", "nearest_classes", "for rows ... cosine = e\nreturn")
    assert [line.strip()[:6] for _, line in rows] == ["@torch", "def ne", "...", "for ro", "cosine", "...", "return"]
    shown = docs.listing_html("sampler.py", "nearest_classes", "return")
    assert len(whole) > 15 and '"""' in shown.split("<details>")[1]
    for wrong in ("no such line", "e = ... return", "cosine"):  # missing, twice, twice
        with pytest.raises(ValueError, match="nearest_classes in sampler.py"):
            docs.listing("sampler.py", "nearest_classes", wrong)


def test_the_notebook_is_executed_plain_markdown_with_todays_code():
    notebook = nbformat.reads(NOTEBOOK, 4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1)) and len(NOTEBOOK) < 3 * 2**20
    assert "google.colab" in code[0].source and not code[0].outputs and all(cell.outputs for cell in code[1:])
    text = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    today = re.split(r"^```python\n.*?^```$", (PROJECT / "docs/reading.md").read_text(), flags=re.M | re.S)
    assert text == [docs.for_github(part.strip()) for part in today if part.strip()], "run python -m docs"
    text = "\n".join(text)
    assert not re.search(r"htmlClass|\\v[bKHCfg]\b|<div|:::|listing ", text) and r"\tag{6} $$" in text
    for file in re.findall(r"\]\((?!http)([^)#]+)", re.sub("```.*?```", "", text, flags=re.S)):
        assert (PROJECT / "docs" / file).is_file(), file


def test_the_page_is_one_file():
    assert len(PAGE) < 3 * 2**20 and "<script src" not in PAGE and "<link" not in PAGE
    loaded = re.findall(r'(?:src|url)(?:=|\()"?([^")]{1,40})', PAGE)
    assert loaded and all(address.startswith("data:") for address in loaded)


def test_a_page_or_notebook_out_of_date_is_found():
    assert docs.values(NOTEBOOK) == docs.values(PAGE) and docs.pictures(NOTEBOOK) == docs.pictures(PAGE)
    for text, code in ((PAGE, ">check_labels<"), (NOTEBOOK, "check_labels(")):
        other = text.replace('"candidates, H": ', '"candidates, H": 9', 1)
        other = other.replace(code, code.replace("check", "che"), 1)
        assert docs.differences(text, text) == [] and len(docs.differences(text, other)) == 2


@BOTH
def test_all_figures_are_shown_and_a_fault_is_found(text):
    assert docs.values(text)["figures"] == 9 and docs.faults(text) == []
    data = re.search(r'image/png(?:;base64,|": ")([^"\\]+)', text)[1]
    figure, white, small = Image.open(io.BytesIO(docs.pictures(text)[0])), io.BytesIO(), io.BytesIO()
    Image.new("RGB", (900, 900), "white").save(white, "PNG", compress_level=0)
    assert docs.is_empty(white.getvalue()) and docs.is_empty(b"")
    assert docs.faults(text.replace("image/png", "image/svg", 1)) == ["it has 8 of 9 figures"]
    figure.resize((figure.width // 2, figure.height // 2)).save(small, "PNG")
    smaller = text.replace(data, docs.base64.b64encode(small.getvalue()).decode(), 1)
    assert docs.differences(text, smaller) == ["figure 1 is smaller than it was"]
    for bare in (
        "<Figure size 836x242 with 1 Axes>",
        "<IPython.core.display.HTML object>",
        "<docs.live.Run object at 0x7f>",
    ):
        assert len(docs.faults(text + bare)) == len(docs.faults(text + docs.html.escape(bare))) == 1, bare


def test_a_link_to_nothing_or_to_a_file_is_found():
    rows = set(re.findall(r'<a id="([\w-]+)"></a>', (PROJECT / "docs/decisions.md").read_text()))
    assert len(rows & set(re.findall(r'href="#([\w-]+)"', PAGE))) >= 9
    for wrong in ("#nowhere", "results.md", "../mao.py"):
        assert len(docs.faults(f'{PAGE}<a href="{wrong}">')) == 1
    assert json.loads(NOTEBOOK)["nbformat"] == 4
