"""Whole runs on a device that is not there (pretend.py): they end with the CPU's scores, and no step waits for it."""

import json

import pytest

import run
from harness import demo, runs, tuning

pretend = pytest.importorskip("pretend", exc_type=ImportError)  # oldest PyTorch
DATA = ["--dataset", "folder", "--clip", "demo", "--method", "mao", "--shots", "2", "--epochs", "4"]
load, step = run.load_clip_of, runs.Record.step


def run_on(device, words, out, monkeypatch):
    """(result.json, how often the device was waited for before each step) of a short run of MAO."""
    waits = []

    def load_and_move(settings, _):
        clip_model, sha256 = load(settings, "cpu")
        return (pretend.move(clip_model) if device == pretend.NAME else clip_model), sha256

    def count_and_step(record, *loss, **values):
        waits.append(pretend.waits.total())
        return step(record, *loss, **values)

    monkeypatch.setattr(run, "load_clip_of", load_and_move)
    monkeypatch.setattr(runs.Record, "step", count_and_step)
    monkeypatch.setattr(tuning, "choose_device", lambda _: device)
    with pretend.Mode():
        run.main([*DATA, "--root", str(out / "images"), *words, "--out", str(out / device)])
    (result,) = (out / device).glob("*/result.json")
    return json.loads(result.read_text()), waits


@pytest.mark.parametrize("words", [
    ["--backbone", "coop", "--cache-views", "2"],
    ["--backbone", "maple", "--labeler", "tuned"],
    ["--backbone", "promptsrc", "--precision", "fp16"],
], ids=" ".join)  # fmt: skip
def test_a_run_has_the_cpus_scores_and_no_step_waits(words, tmp_path, monkeypatch):
    for name in demo.CLASSNAMES[::10]:
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(8):
            demo.read(f"sepia/test/{name}/{number:02d}").save(tmp_path / "images" / name / f"{number}.png")
    ours, theirs = (run_on(device, words, tmp_path, monkeypatch) for device in (pretend.NAME, "cpu"))
    assert all(ours[0][score] == theirs[0][score] for score in ("base", "new", "one_list"))
    waits = ours[1]
    assert sum(before != after for before, after in zip(waits, waits[1:])) <= 4 < len(waits)  # once an epoch at most
