"""experiments/ except for bench.py: cells run once, tables add up, failures show in their place, Ray, figures."""

import csv
import os
import re
import signal
import socket
import subprocess
import sys

import msgspec
import pytest
import torch
from conftest import PROJECT

from backbones import CoOp
from experiments import dissect, figures, hidden, reproduce, sweep
from harness import options, runs, scores
from harness.layouts import LAYOUTS


def tiny(domain, *more):
    words = f"--dataset demo-{domain} --seed 1 --shots 1 --epochs 2 --method"
    return (*words.split(), *(more or ("zeroshot",)))


def arguments(monkeypatch, *words, of=reproduce.arguments):
    monkeypatch.setattr(sys, "argv", ["experiments", *map(str, words)])
    return of()


def pretend(out, cell, base, new, **more):
    """Puts a finished cell into its place, with these scores."""
    settings, name = sweep.parsed(cell)
    (out / name).mkdir(parents=True)
    given = {**msgspec.structs.asdict(settings), "method": settings.method[0], "clip_sha256": "0", "classnames": ["a"]}
    empty = {"learner_settings": {}, "base": None, "new": None, "files_sha256": {}, "versions": {}}
    config = options.Config(**given, **empty, new_classnames=[], training_images="", test_images="")
    (out / name / "config.json").write_bytes(msgspec.json.encode(config))
    result = {"base": base, "new": new, "h": 1.0, "base_by_final_prompt": base, "learnable_parameters": 1, **more}
    (out / name / "result.json").write_bytes(msgspec.json.encode({**result, "seconds": 2.0, "peak_mib": 3.0}))


# Tables ---------------------------------------------------------------------------------------------------------------


def test_h_is_of_the_averages():
    found = scores.over_seeds([{"Base": 80.0, "New": 40.0}, {"Base": 100.0, "New": 60.0}])
    assert found["Base"] == (90, pytest.approx(200**0.5)) and found["New"][0] == 50
    assert found["H"][0] == pytest.approx(2 * 90 * 50 / 140)  # not the mean of 53.3 and 75


def test_an_average_is_over_the_datasets_that_every_row_has(monkeypatch, tmp_path):
    args = arguments(monkeypatch, "table1", "--backbones", "coop", "--seeds", 1, 2)
    for (row, dataset), cells in reproduce.cells_of("table1", args).items():
        base = {"eurosat": 90.0, "dtd": 80.0, "ucf101": 70.0}.get(dataset)
        for number, cell in enumerate(cells if base else []):
            if not (dataset == "ucf101" and row == "CoOp" and number == 1):
                pretend(tmp_path, cell, base + number, 50.0)
    lines, notes = reproduce.lines_of("table1", args, tmp_path, {})
    found = {(line["dataset"], line["row"], line["score"]): line for line in lines}
    average = found["average", "CoOp + MAO", "Base"]
    assert (average["ours"], average["spread"]) == pytest.approx((85.5, 0.5**0.5))
    assert (average["paper"], average["difference"]) == pytest.approx((83.78, 85.5 - 83.78))  # of 87.12 and 80.44
    assert found["ucf101", "CoOp", "Base"]["seeds"] == 1 and found["ucf101", "CoOp", "Base"]["ours"] == 70
    assert "without" in notes[0] and "ucf101" in notes[0] and "eurosat" not in notes[0]
    text = reproduce.written("table1", lines, notes, args)
    assert notes[0] in text and f"{average['difference']:+.2f}" in text


def test_the_whole_average_is_compared_with_the_papers_own(monkeypatch, tmp_path):
    args = arguments(monkeypatch, "table8", "--seeds", 1)
    for (cell,) in reproduce.cells_of("table8", args).values():
        pretend(tmp_path, cell, 80.0, 70.0)
    lines, notes = reproduce.lines_of("table8", args, tmp_path, {})
    line = next(line for line in lines if line["row"] == "(d) + MAO" and line["score"] == "H")  # of the average
    assert line["paper"] == 78.08 and line["difference"] == pytest.approx(2 * 80 * 70 / 150 - 78.08) and not notes


def test_a_failed_cell_leaves_its_reason_in_its_place(monkeypatch, tmp_path):
    args = arguments(monkeypatch, "table8", "--demo", "--quick")
    table = reproduce.cells_of("table8", args)
    (failing,) = table.pop(("(b) CoOp, 2x epochs", "demo-sepia"))
    for (cell,) in table.values():
        pretend(tmp_path, cell, 80.0, 70.0)
    lines, notes = reproduce.lines_of("table8", args, tmp_path, {failing: "no memory"})
    text = reproduce.written("table8", lines, notes, args)
    line = next(line for line in text.splitlines() if "(b) CoOp" in line)
    assert "[1]" in line and "80.00" not in line and "no memory" in text.split("[1]")[-1]
    assert sum("80.00" in line for line in text.splitlines()) == 3


def test_table_2_averages_over_the_targets_that_were_run(monkeypatch):
    paper = reproduce.PAPER["table2_cross_dataset"]["rows"]["coop"]
    for words, average in ((["--quick"], paper["average"]), (["--datasets", "dtd"], paper["dtd"])):
        args = arguments(monkeypatch, "table2", "--backbones", "coop", "--seeds", 1, 1, *words)
        (cell,) = reproduce.cells_of("table2", args)["CoOp", "imagenet"]
        assert sweep.parsed(cell)[0].targets == (("all",) if words == ["--quick"] else ("dtd",))
        found = reproduce.papers(reproduce.MADE["table2"], reproduce.pairs(["coop"])[1], "imagenet", [], args)
        assert found["average"] == pytest.approx(average)


def test_every_row_of_the_papers_tables_is_there(monkeypatch):
    args = arguments(monkeypatch, "all")
    for made in reproduce.MADE.values():
        if made.paper:
            assert {row.paper for row in made.rows(args)} - {None} == set(reproduce.PAPER[made.paper]["rows"])
    assert len(reproduce.cells_of("table1", args)) == 11 * 7 and set(reproduce.CLASSES) == set(LAYOUTS)
    labelers, parts = reproduce.cells_of("table5", args), reproduce.cells_of("table4", args)
    assert labelers["+ MAO, foundation CLIP", "dtd"] == parts["(d) full", "dtd"]  # one cell for both


def test_the_plan_runs_nothing(monkeypatch, tmp_path, capsys):
    words = ["table1", "--backbones", "coop", "--datasets", "eurosat", "--seeds", 1, "--plan", "--out", tmp_path]
    args = arguments(monkeypatch, *words)
    pretend(tmp_path, reproduce.cells_of("table1", args)["CoOp", "eurosat"][0], 80.0, 70.0)
    before, _, told = sorted(tmp_path.rglob("*")), reproduce.main(), capsys.readouterr().out
    rows = [
        ("all rows", 3, 1),
        *(
            (f"--backbone coop --method {method}", 1, method == "backbone")
            for method in ("zeroshot", "backbone", "mao")
        ),
    ]
    found = re.findall(r"(\d) cells, +(\d) done, .* left: (.*)", told)
    assert [(row, int(cells), int(done)) for cells, done, row in found] == rows
    assert sorted(tmp_path.rglob("*")) == before
    (path,) = tmp_path.glob("*/config.json")
    path.write_text(path.read_text().replace('"shots":16', '"shots":2'))  # a cell of other settings in its place
    with pytest.raises(ValueError, match="holds a run of another shots"):
        reproduce.main()
    with runs.run_lock(tmp_path), pytest.raises(ValueError, match="another run is writing"):
        arguments(monkeypatch, "table8", "--demo", "--quick", "--out", tmp_path, of=reproduce.main)


def test_hidden(monkeypatch, tmp_path, capsys):
    def run_cells(cells, out):
        for cell in cells:
            lists, labeler = {"base": 60.0, "new": 20.0, "all": 40.0}, sweep.parsed(cell)[0].labeler
            pretend(out, cell, 80.0, 55.0 if labeler == "soft" else 50.0, one_list=lists, one_list_final=lists)
            metrics = out / sweep.parsed(cell)[1] / "metrics.jsonl"
            metrics.write_text('{"phase": "new", "epoch": 1, "loss": 0.1, "pseudo_label_accuracy": 61.5}')

    monkeypatch.setattr(sweep, "run_cells", run_cells)
    arguments(monkeypatch, "--seeds", 1, 2, "--out", tmp_path, "--figure", tmp_path / "f.png", of=hidden.main)
    told = " ".join(capsys.readouterr().out.split())
    assert "| CoOp + MAO | 80.00 ± 0.00 | 50.00 ± 0.00 | 61.54 ± 0.00 | 60.00 ± 0.00 | 20.00 ± 0.00 | 30.00" in told
    assert "+5.00 ± 0.00, 22 of 22" in told and "61.5% right" in told and (tmp_path / "f.png").is_file()


def test_dissect(monkeypatch, tmp_path, capsys):
    def run_cells(cells, out):
        for cell in cells:
            settings, noise = sweep.parsed(cell)[0], 3.0 * (cell[1] == "demo-dusk")  # of the dataset: it leaves no pair
            hard, other = (82.0, 40.0 + 20 * settings.seed), (84.0 - settings.seed, 70.0)
            base, new = hard if settings.sampler == "hard" else other
            pretend(out, cell, base + noise, new, ece={"base": 1.5, "new": 20.0, "one_list": 12.5})

    monkeypatch.setattr(sweep, "run_cells", run_cells)
    where = f"--datasets demo-plain demo-dusk --seeds 1 2 --out {tmp_path} --figure {tmp_path}/f.png -- --shots 2"
    arguments(monkeypatch, "--questions", "negatives", "phase 2", *where.split(), of=dissect.main)
    told = " ".join(capsys.readouterr().out.split())
    # Base differs by -1 and 0, New by -10 and 10: errors of sqrt(1/3)/2 times 1 or 20. "phase 2" has seed 1 alone.
    assert "| names, reg-B - random classes, reg-B | -0.50 ± 0.29, 2 of 4, none | +0.00 ± 5.77, 0 of 4, none |" in told
    assert "random classes, reg-B, new phase | -1.00 ± 0.00, 2 of 2 | -10.00 ± 0.00, 2 of 2 |" in told
    assert "| 1.50 ± 0.00 | 20.00 ± 0.00 | 12.50 ± 0.00 |" in told and "| demo-dusk | 0." in told
    assert (tmp_path / "f.png").is_file()


# Cells ----------------------------------------------------------------------------------------------------------------


def prompts(out):
    """{cell's folder: bytes of its prompts}, of those in their place."""
    return {path.parent.name: path.read_bytes() for path in out.glob("demo-*/base.safetensors")}


def test_cells_run_once_and_one_that_fails_does_not_end_the_others(tmp_path):
    wanted = [tiny("plain", "backbone"), (*tiny("plain", "mao"), "--top-k", "60"), tiny("dusk")]
    outcomes = list(sweep.serially(wanted, tmp_path, 1, "cpu", own=wanted[2:]))
    assert [error is None for _, error, _ in outcomes] == [True, False, True]
    assert "top-k 60" in outcomes[1][1] and "\n" not in outcomes[1][1]
    assert [sweep.finished(cell, tmp_path) is not None for cell in wanted] == [True, False, True]
    folder = tmp_path / sweep.parsed(wanted[0])[1]
    written = (folder / "result.json").stat().st_mtime_ns
    assert sweep.attempt(wanted[0], tmp_path, 1, "cpu")[0] is None  # a second attempt: the first counts
    sweep.clear(tmp_path, set())
    assert (folder / "result.json").stat().st_mtime_ns == written and not (tmp_path / sweep.ATTEMPTS).exists()
    code = "import matplotlib, sys; matplotlib.use('svg'); from experiments import figures; figures.main()"
    told = "assert matplotlib.get_backend() == 'svg' and 'matplotlib.pyplot' not in sys.modules"
    subprocess.run([sys.executable, "-c", f"{code}; {told}", "run", str(folder)], check=True, cwd=PROJECT)
    assert (tmp_path / "curves.png").is_file() and (folder / "confusion.png").is_file()
    rows = list(csv.DictReader((folder / "confusion.csv").read_text("utf-8-sig").splitlines()))
    right = {row["prompts"]: 0 for row in rows}
    for row in rows:
        if row["half"] == "base" and row["true class"] == row["predicted class"]:
            right[row["prompts"]] += int(row["images"])
    assert right["tuned prompts"] == pytest.approx(10 * runs.read_result(folder)["base"])  # of 1,000 images


def test_curves_have_a_panel_per_set_of_candidates_and_none_is_empty(tmp_path):
    cells = [tiny("plain", "backbone"), tiny("plain", "mao")]
    assert not any(error for _, error, _ in sweep.serially(cells, tmp_path, 1, "cpu"))
    folders = [tmp_path / sweep.parsed(cell)[1] for cell in cells]
    panels = {axis.get_title().replace("\n", " "): len(axis.lines) for axis in figures.curves(folders).axes}
    loss, right = "phase mean loss over", "new phase right pseudo-labels in percent"
    base, batch = f"base {loss} all 50 base classes", f"base {loss} the batch's classes, b = 4, K = 8"
    assert panels == {base: 1, batch: 1, f"new {loss} all 50 new classes": 1, right: 1}
    assert len(figures.curves(folders[:1]).axes) == 1


@pytest.mark.parametrize("names, written", [
    (["b", "a c", "a d"], ["b", "a c", "a d"]),
    ([f"{color} {i}" for color in ("red", "big") for i in range(9)], ["red", "big"]),
    ([f"{color} {i}" for i in range(9) for color in ("red", "big")], [f"red {i}" for i in range(9)]),  # every second
])  # fmt: skip
def test_names_of_classes_beside_a_matrix(names, written):
    axis = figures.canvas(1, "")[1][0]
    figures.show_confusion(axis, torch.arange(3), torch.arange(3), names, "title")
    assert [label.get_text() for label in axis.get_yticklabels()] == written
    assert [label.get_text() for label in axis.get_xticklabels()] == written


def test_a_killed_attempt_goes_on(tmp_path, monkeypatch):
    cell = (*tiny("plain", "mao"), "--epochs", "4", "--no-new")
    whole, killed, name = tmp_path / "whole", tmp_path / "killed", sweep.parsed(cell)[1]
    assert sweep.attempt(cell, whole, 1, "cpu")[0] is None

    def kill(self, epoch, epochs):
        if epoch == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(CoOp, "epoch_end", kill)
        sweep.attempt(cell, killed, 1, "cpu")
    (left,) = (killed / sweep.ATTEMPTS).glob(f"*/{name}")
    first, _ = runs.read_metrics(left), sweep.clear(killed, {name})  # a new command keeps what can go on
    assert sweep.attempt(cell, killed, 1, "cpu")[0] is None
    assert runs.read_metrics(killed / name)[0] == first[0] and len(first) == 1  # not tuned again
    assert prompts(whole) == prompts(killed) != {}


def die_once(cell, out, *_):
    if not (out / "died").exists():
        (out / "died").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return None, []


def test_what_cannot_be_drawn_or_was_killed_does_not_end_the_rest(monkeypatch, tmp_path, capsys):
    arguments(monkeypatch, "fig6", "fig5", "--root", tmp_path, "--out", tmp_path / "o")
    assert reproduce.main() == 1
    told = capsys.readouterr()
    assert told.out == "" and f"python data.py caltech101 --root {tmp_path} --download" in told.err
    left_out = [line.split("warning: ")[1].split(" is left out")[0] for line in told.err.splitlines()]
    assert left_out == [f"{name}-{one}.png" for name in ("fig6", "fig5") for one in ("caltech101", "oxford_pets")]
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ValueError, match="pip install matplotlib"):
        figures.demo_figure()
    monkeypatch.setattr(sweep, "attempt", die_once)
    failed = sweep.run_cells([tiny("plain")], tmp_path, own=[tiny("plain")], serial=True)
    assert "its process was killed" in failed[tiny("plain")]


# Ray ------------------------------------------------------------------------------------------------------------------


def test_a_cluster_that_does_not_answer(monkeypatch):
    pytest.importorskip("ray")
    monkeypatch.setattr(sweep, "ANSWER", 2)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        for address in ("127.0.0.1:1", "nowhere", f"127.0.0.1:{mute.getsockname()[1]}"):
            with pytest.raises(ValueError, match=f"no Ray cluster answers at {address}"):
                sweep.ask(address)


def test_without_ray_cells_run_one_after_another(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setattr(sweep, "attempt", lambda cell, *_: (None, []))
    assert sweep.run_cells([tiny("plain")], tmp_path) == {}
    assert "requirements-sweep.txt): cells run one after another" in capsys.readouterr().out
    with pytest.raises(ValueError, match="--address needs it"):
        sweep.run_cells([tiny("plain")], tmp_path, address="10.0.0.1:6379")


def test_ray_gives_the_same_bits_and_loses_no_cell(tmp_path, monkeypatch):
    pytest.importorskip("ray")
    wanted = [tiny("plain", "backbone"), tiny("sepia", "backbone"), (*tiny("plain", "mao"), "--top-k", "60")]
    for out, serial in (("ray", False), ("serial", True)):
        assert list(sweep.run_cells(wanted, tmp_path / out, own=wanted[:1], serial=serial)) == [wanted[2]]  # it fails
    assert prompts(tmp_path / "ray") == prompts(tmp_path / "serial") != {}
    monkeypatch.setattr(sweep, "attempt", die_once)
    monkeypatch.setenv("PYTHONPATH", f"{PROJECT}/tests:{PROJECT}")  # of Ray's workers
    assert sweep.run_cells(wanted, tmp_path) == {}
