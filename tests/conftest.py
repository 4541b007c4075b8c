import json
import os
import pathlib
import runpy
import sys

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before PyTorch comes: workers share the cores

import numpy as np
import pytest
from PIL import Image

import layouts

PROJECT = pathlib.Path(layouts.__file__).parent


@pytest.fixture
def eurosat(tmp_path):
    """A small EuroSAT in CoOp's layout, real JPEGs: 10 classes, 6 training and 2 test images each. Returns --root."""
    folder = tmp_path / "datasets" / "eurosat"
    rng = np.random.default_rng(0)
    split = {"train": [], "val": [], "test": []}
    for label, (directory, name) in enumerate(layouts.EUROSAT_NAMES.items()):
        (folder / "2750" / directory).mkdir(parents=True)
        for number in range(8):
            path = f"{directory}/{directory}_{number + 1}.jpg"
            pixels = np.clip(rng.normal(20 * label, 30, (64, 64, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / "2750" / path)
            split["train" if number < 6 else "test"].append([path, label, name])
    (folder / "split_zhou_EuroSAT.json").write_text(json.dumps(split))
    return folder.parent


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs a script as a user types it: command("run.py", "--shots", 2) -> (exit code, stdout, stderr)."""

    def run(script, *arguments):
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        code = 0
        try:
            runpy.run_path(str(PROJECT / script), run_name="__main__")
        except SystemExit as end:
            code = end.code or 0
        output = capsys.readouterr()
        return code, output.out, output.err

    return run
