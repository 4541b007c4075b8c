"""docs/reading.html, the page that is checked in: its code is today's source, and it asks no host for anything.

CI builds it anew and compares all its values (`python -m docs --check`); here the cheap ones are computed again.
"""

import importlib
import re

import numpy as np
import pytest
import settings
from conftest import PROJECT

import data
from mao import candidates
from sampler import HardNegativeSampler, minilm

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
    args = settings.parse(["--seed", "1"])
    task = data.task_of(vars(args))
    labels = [label for _, label, _ in task.base_train]
    sampler = HardNegativeSampler(labels, task.base_names, 4, 8, 1)
    batch = next(iter(sampler))
    e = minilm(task.base_names).double().numpy()
    e /= np.linalg.norm(e, axis=1, keepdims=True)
    anchor = labels[batch[0]]
    found = docs.values(PAGE)
    assert found["cosine of the last neighbor"] == pytest.approx(np.sort(e @ e[anchor])[-8], abs=1e-4)
    torch_labels = importlib.import_module("torch").tensor([labels[index] for index in batch])
    assert found["candidates, H"] == len(candidates(torch_labels)[0])
    assert found["candidates, H"] < len(torch_labels) == 32 or found["candidates, H"] == 32


def test_a_page_out_of_date_is_found():
    assert docs.differences(PAGE, PAGE) == []
    other = PAGE.replace("def </span>", "def  </span>", 1).replace('"candidates, H": ', '"candidates, H": 9', 1)
    assert other != PAGE and any("was" in text for text in docs.differences(PAGE, other))


def test_margin_notes_link_to_their_rows():
    rows = set(re.findall(r'<a id="([\w-]+)"></a>', (PROJECT / "docs/decisions.md").read_text()))
    linked = re.findall(r'href="decisions\.md(#?)([\w-]*)"', PAGE)
    assert len(linked) >= 9 and {row for _, row in linked} <= rows
