"""docs/reading.html, the page that is checked in: its code is today's source, and it shows all of its figures.

CI builds it again and compares all its values (`python -m docs --check`); here the cheap ones are computed again.
"""

import importlib
import io
import re

import pytest
from conftest import PROJECT
from PIL import Image

from experiments import figures

docs = importlib.import_module("docs.__main__")
PAGE = docs.PAGE.read_text()


def test_each_block_of_code_is_todays_source():
    blocks = docs.sources(PAGE)
    assert len(blocks) >= 9 and {name for name, _, _ in blocks} >= {"mao.py", "sampler.py", "pseudolabel.py", "run.py"}
    for name, first, lines in blocks:
        source = (PROJECT / name).read_text().splitlines()[first - 1 : first - 1 + len(lines)]
        assert [line.strip() for line in lines] == [line.strip() for line in source], f"{name}: run python -m docs"


def test_the_page_is_one_file():
    assert len(PAGE) < 3 * 2**20 and "<script src" not in PAGE and "<link" not in PAGE
    loaded = re.findall(r'(?:src|url)(?:=|\()"?([^")]{1,40})', PAGE)
    assert loaded and all(address.startswith("data:") for address in loaded)


def test_live_values_come_out_again():
    batches, found = figures.Batches("demo"), docs.values(PAGE)
    for name, batch in (("hard", batches.hard), ("at random", batches.random)):
        names = [batches.task.base_names[label] for label in batches.labels[batch]]
        similarity = found[f"mean similarity of the batch, {name}"]
        assert similarity == pytest.approx(figures.mean_similarity(names), abs=1e-4)
    assert found["candidates, H"] == len(set(batches.labels[batches.hard].tolist()))


def test_a_page_out_of_date_is_found():
    assert docs.differences(PAGE, PAGE) == []
    other = PAGE.replace('"candidates, H": ', '"candidates, H": 9', 1).replace(">check_labels<", ">check<", 1)
    assert len(docs.differences(PAGE, other)) == 2


def test_the_page_shows_all_its_figures_and_a_lost_one_is_found():
    assert docs.values(PAGE)["figures"] == 8 and docs.faults(PAGE) == []
    image, white = re.search(r"<img [^>]*>", PAGE)[0], io.BytesIO()
    Image.new("RGB", (900, 900), "white").save(white, "PNG", compress_level=0)
    assert docs.is_empty(white.getvalue()) and docs.is_empty(b"")
    assert docs.faults(PAGE.replace(image, "", 1)) == ["it has 7 of 8 figures"]
    for bare in ("Figure size 836x242 with 1 Axes", "IPython.core.display.HTML object", "docs.live.Run object at 0x7f"):
        assert len(docs.faults(PAGE.replace(image, f"{image}<pre>&lt;{bare}&gt;</pre>", 1))) == 1, bare


def test_margin_notes_link_to_their_rows():
    rows = set(re.findall(r'<a id="([\w-]+)"></a>', (PROJECT / "docs/decisions.md").read_text()))
    linked = re.findall(r'href="decisions\.md(#?)([\w-]*)"', PAGE)
    assert len(linked) >= 9 and {row for _, row in linked} <= rows
