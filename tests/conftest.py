"""What the tests share: a small EuroSAT, images, and the command line on them."""

import functools
import json
import os
import pathlib
import re
import runpy
import shutil
import sys

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before PyTorch comes: workers share the cores

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

import sampler
from harness.clips import DEMO_SHA256
from harness.layouts import EUROSAT_NAMES

PROJECT = pathlib.Path(__file__).parent.parent
SMALL = "--clip demo --shots 4 --epochs 4 --workers 0"
encode_once = functools.cache(lambda names, minilm=sampler.minilm: minilm(list(names)))  # opening MiniLM takes longest


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory):
    """Keeps the features of tests away from the user's own."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


def draw(path, seed=0, **options):
    """An image of noise; its folder is made where it does not exist."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (40, 50, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, **options)


def make_eurosat(root):
    """A small EuroSAT in CoOp's layout, real JPEGs: 10 classes, 6 training and 2 test images each. Returns --root."""
    folder, rng, split = root / "eurosat", np.random.default_rng(0), {"train": [], "val": [], "test": []}
    for label, (directory, name) in enumerate(EUROSAT_NAMES.items()):
        (folder / "2750" / directory).mkdir(parents=True)
        for number in range(8):
            path = f"{directory}/{directory}_{number + 1}.jpg"
            pixels = np.clip(rng.normal(20 * label, 30, (64, 64, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / "2750" / path)
            split["train" if number < 6 else "test"].append([path, label, name])
    (folder / "split_zhou_EuroSAT.json").write_text(json.dumps(split))
    return root


@pytest.fixture
def eurosat(tmp_path):
    """The --root of a small EuroSAT."""
    return make_eurosat(tmp_path / "datasets")


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs a script as a user types it: command("run.py --shots 2", path) -> (exit code, stdout, stderr)."""

    def run(line, *words):
        script, *first = line.split()
        monkeypatch.setattr(sys, "argv", [script, *first, *map(str, words)])
        monkeypatch.setattr(sampler, "minilm", lambda names: encode_once(tuple(names)))
        code = 0
        try:
            runpy.run_path(str(PROJECT / script), run_name="__main__")
        except SystemExit as end:
            code = end.code or 0
        output = capsys.readouterr()
        return code, output.out, output.err

    return run


@pytest.fixture
def tune(eurosat, command, tmp_path):
    """tune("--method mao", ...) runs a small job on the small EuroSAT: (code, stdout, stderr, folder of runs)."""

    def run(options="", *words, out="runs"):
        line = f"run.py --dataset eurosat {SMALL} {options}"
        return *command(line, "--root", eurosat, "--out", tmp_path / out, *words), tmp_path / out

    return run


def lines(folder):
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def read(folder, name):
    """The content of a JSON file that a run left."""
    return json.loads((folder / f"{name}.json").read_text())


def table(out):
    """The rows of the printed table, and the lines under it: lists of words."""
    return [line.split() for line in out.splitlines() if re.match("zero-shot|CoOp|MaPLe|PromptSRC|All", line)]


def succeeds(found):
    """What a command printed and left, without its exit code, which must be 0: (stdout, stderr, ...)."""
    assert found[0] == 0, found[2]
    return found[1:]


def refuses(found, *messages):
    """Asserts that a command ended with exit code 2, nothing on stdout, and one sentence that contains the messages."""
    code, out, err, *_ = found
    last = err.replace("\r", "\n").splitlines()[-1]
    assert code == 2 and out == "" and "Traceback" not in err and ".py: " in last[:12], found
    assert all(str(text) in last for text in messages), (messages, last)


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """A folder to work in: prompts run/new.safetensors, names.txt, an image 1.png and a broken one."""
    monkeypatch.chdir(tmp_path)
    draw(tmp_path / "new" / "1.png")
    shutil.copy("new/1.png", "1.png")
    (tmp_path / "names.txt").write_text("a\nb\n")
    (tmp_path / "twice.txt").write_text("a\nb\na\n")
    (tmp_path / "broken.png").write_bytes(b"no PNG")
    (tmp_path / "run").mkdir()
    header = {"mao": json.dumps({"backbone": "coop", "settings": {}, "clip": "demo", "clip_sha256": DEMO_SHA256})}
    safetensors.torch.save_file({"ctx": torch.zeros(4, 128)}, "run/new.safetensors", header)
    return tmp_path
