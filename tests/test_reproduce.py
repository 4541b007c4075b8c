"""experiments/reproduce.py and experiments/sweep.py: cells once, tables that add up, failures in their place, Ray."""

import contextlib
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
import record
from conftest import PROJECT
from layouts import LAYOUTS
from record import read_metrics

from experiments import reproduce, sweep

TINY = ("--shots", "1", "--epochs", "2")


def tiny(domain, *more):
    return ("--dataset", f"demo-{domain}", "--seed", "1", "--method", *(more or ("zeroshot",)), *TINY)


def arguments(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["experiments.reproduce", *map(str, words)])
    return reproduce.arguments()


def pretend(out, cell, base, new, **more):
    """Puts a finished cell into its place, with these scores."""
    args, name = sweep.parsed(cell)
    (out / name).mkdir(parents=True)
    left_out = ("changed", "batch_size", "targets")
    config = {key: value for key, value in vars(args).items() if key not in left_out}
    config |= {"method": args.method[0], "clip_sha256": "0" * 64, "classnames": ["a"], **more}
    (out / name / "config.json").write_text(json.dumps(config))
    result = {"base": base, "new": new, "h": 1.0, "base_by_final_prompt": base, "learnable_parameters": 1}
    (out / name / "result.json").write_text(json.dumps({**result, "seconds": 2.0, "peak_mib": 3.0}))


def cells(args, name, row, dataset):
    return reproduce.cells_of(name, args)[row, dataset]


# Tables ---------------------------------------------------------------------------------------------------------------


def test_h_is_of_the_averages():
    found = reproduce.with_h([{"Base": 80.0, "New": 40.0}, {"Base": 100.0, "New": 60.0}])
    assert found["Base"] == (90, pytest.approx(200**0.5)) and found["New"][0] == 50
    assert found["H"][0] == pytest.approx(2 * 90 * 50 / 140)  # not the mean of 53.3 and 75
    assert reproduce.with_h([{"Base": 80.0, "New": None}])["Base"] == (80, None)


def test_an_average_is_over_the_datasets_that_every_row_has(monkeypatch, tmp_path):
    args = arguments(monkeypatch, "table1", "--backbones", "coop", "--seeds", 1, 2)
    for dataset, base in (("eurosat", 90.0), ("dtd", 80.0), ("ucf101", 70.0)):
        for row in ("zero-shot CLIP", "CoOp", "CoOp + MAO"):
            for number, cell in enumerate(cells(args, "table1", row, dataset)):
                if not (dataset == "ucf101" and row == "CoOp" and number == 1):
                    pretend(tmp_path, cell, base + number, 50.0)
    lines, notes = reproduce.lines_of("table1", args, tmp_path, {})
    found = {(line["dataset"], line["row"], line["score"]): line for line in lines}
    average = found["average", "CoOp + MAO", "Base"]
    assert average["ours"] == pytest.approx(85.5) and average["spread"] == pytest.approx(0.5**0.5)
    paper = reproduce.PAPER["table1_base_to_new"]["rows"]["coop+mao"]
    assert average["paper"] == pytest.approx((paper["eurosat"]["base"] + paper["dtd"]["base"]) / 2)
    assert average["difference"] == pytest.approx(85.5 - average["paper"])
    assert found["ucf101", "CoOp", "Base"]["seeds"] == 1 and found["ucf101", "CoOp", "Base"]["ours"] == 70
    assert "without" in notes[0] and "ucf101" in notes[0] and "eurosat" not in notes[0]
    text = reproduce.written("table1", lines, notes, args)
    assert notes[0] in text and "| average" in text and f"{average['difference']:+.2f}" in text


def test_the_whole_average_is_beside_the_papers_own(monkeypatch, tmp_path):
    args = arguments(monkeypatch, "table8", "--seeds", 1)
    for of_row in reproduce.cells_of("table8", args).values():
        pretend(tmp_path, of_row[0], 80.0, 70.0)
    lines, notes = reproduce.lines_of("table8", args, tmp_path, {})
    line = next(line for line in lines if line["row"] == "(d) + MAO" and line["score"] == "H")
    assert line["dataset"] == "average" and line["paper"] == 78.08 and not notes
    assert line["difference"] == pytest.approx(2 * 80 * 70 / 150 - 78.08)


def test_a_failed_cell_leaves_its_reason_in_its_place(monkeypatch, tmp_path):
    args = arguments(monkeypatch, "table8", "--demo", "--quick")
    table = reproduce.cells_of("table8", args)
    (failing,) = table["(b) CoOp, 2x epochs", "demo-sepia"]
    for (row, _), (cell,) in table.items():
        if row != "(b) CoOp, 2x epochs":
            pretend(tmp_path, cell, 80.0, 70.0)
    lines, notes = reproduce.lines_of("table8", args, tmp_path, {failing: "no memory"})
    text = reproduce.written("table8", lines, notes, args)
    line = next(line for line in text.splitlines() if "(b) CoOp" in line)
    assert "[1]" in line and "80.00" not in line and "no memory" in text.split("[1]")[-1]
    assert sum("80.00" in line for line in text.splitlines()) == 3


def test_table_2_averages_over_the_targets_that_were_run(monkeypatch, tmp_path):
    paper = reproduce.PAPER["table2_cross_dataset"]["rows"]["coop"]
    for words, average in ((["--quick"], paper["average"]), (["--datasets", "dtd"], paper["dtd"])):
        args = arguments(monkeypatch, "table2", "--backbones", "coop", "--backbones", "coop", "--seeds", 1, 1, *words)
        table = reproduce.cells_of("table2", args)
        assert list(table) == [(row, "imagenet") for row in ("zero-shot CLIP", "CoOp", "CoOp + MAO")]
        (cell,) = table["CoOp", "imagenet"]
        assert sweep.parsed(cell)[0].targets == (["all"] if words == ["--quick"] else ["dtd"])
        assert reproduce.papers(reproduce.MADE["table2"], reproduce.plain("coop", paper="coop"), "imagenet", [], args)[
            "average"
        ] == pytest.approx(average)
    named = arguments(monkeypatch, "table8", "--quick", "--datasets", "dtd", "eurosat", "dtd")
    assert named.datasets == ["dtd", "eurosat"]  # --quick drops nothing that was named


def test_every_row_of_the_papers_tables_is_there(monkeypatch):
    args = arguments(monkeypatch, "all")
    for made in reproduce.MADE.values():
        if made.paper:
            assert {row.paper for row in made.rows(args)} - {None} == set(reproduce.PAPER[made.paper]["rows"])
    every = [cell for row in reproduce.cells_of("table1", args).values() for cell in row]
    assert len(every) == 11 * 7 * 3 and set(reproduce.CLASSES) == set(LAYOUTS)
    labelers = reproduce.cells_of("table5", args)
    assert labelers["+ MAO, foundation CLIP", "dtd"] == cells(args, "table4", "(d) full", "dtd")  # one cell for both


def test_a_cell_of_other_settings_in_its_place_is_refused(tmp_path):
    cell = tiny("plain")
    pretend(tmp_path, cell, 80.0, 70.0)
    assert sweep.finished(cell, tmp_path)["base"] == 80
    path = tmp_path / sweep.parsed(cell)[1] / "config.json"
    path.write_text(path.read_text().replace('"shots": 1', '"shots": 2'))
    with pytest.raises(ValueError, match="another shots"):
        sweep.finished(cell, tmp_path)


def test_the_plan_runs_nothing(monkeypatch, tmp_path, capsys):
    args = arguments(monkeypatch, "table1", "--backbones", "coop", "--datasets", "eurosat", "--seeds", 1)
    pretend(tmp_path, cells(args, "table1", "CoOp", "eurosat")[0], 80.0, 70.0)
    monkeypatch.setattr(sys, "argv", ["x", "table1", "--backbones", "coop", "--datasets", "eurosat", "--seeds", "1",
                                      "--plan", "--out", str(tmp_path)])  # fmt: skip
    before = sorted(tmp_path.rglob("*"))
    assert reproduce.main() is None
    told = capsys.readouterr().out
    assert "3 cells, 1 done, 2 to run" in told and "min one after another" in told
    assert sorted(tmp_path.rglob("*")) == before


# Cells ----------------------------------------------------------------------------------------------------------------


def prompts(out):
    """{cell's folder: bytes of its prompts}, of those in their place."""
    return {path.parent.name: path.read_bytes() for path in out.glob("demo-*/base.safetensors")}


def test_cells_run_once_and_one_that_fails_does_not_end_the_others(tmp_path):
    wanted = [tiny("plain", "backbone"), (*tiny("plain", "mao"), "--top-k", "60"), tiny("dusk")]
    outcomes = list(sweep.serial(wanted, tmp_path, 1, "cpu", alone=wanted[2:]))
    assert [error is None for _, error, _ in outcomes] == [True, False, True]
    assert "top-k is 60" in outcomes[1][1] and "\n" not in outcomes[1][1]
    assert [sweep.finished(cell, tmp_path) is not None for cell in wanted] == [True, False, True]
    sweep.clear(tmp_path, set())
    assert not (tmp_path / sweep.ATTEMPTS).exists()
    written = (tmp_path / sweep.parsed(wanted[0])[1] / "result.json").stat().st_mtime_ns
    assert sweep.attempt(wanted[0], tmp_path, 1, "cpu")[0] is None  # a second attempt: the first counts
    assert (tmp_path / sweep.parsed(wanted[0])[1] / "result.json").stat().st_mtime_ns == written


def test_a_killed_attempt_goes_on(tmp_path, monkeypatch):
    cell = (*tiny("plain", "mao")[:-1], "4", "--no-new")
    for out in ("whole", "killed"):
        (tmp_path / out).mkdir()
    assert sweep.attempt(cell, tmp_path / "whole", 1, "cpu")[0] is None
    kept = record.Record.keep

    def killed(self, *arguments):
        kept(self, *arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(record.Record, "keep", killed)
        with pytest.raises(KeyboardInterrupt):
            sweep.attempt(cell, tmp_path / "killed", 1, "cpu")
    name = sweep.parsed(cell)[1]
    (left,) = (tmp_path / "killed" / sweep.ATTEMPTS).iterdir()
    first = read_metrics(left / name)
    sweep.clear(tmp_path / "killed", {name})  # a new driver: what can go on is left there
    assert sweep.attempt(cell, tmp_path / "killed", 1, "cpu")[0] is None
    assert read_metrics(tmp_path / "killed" / name)[0] == first[0] and len(first) == 1  # not tuned again
    assert prompts(tmp_path / "whole") == prompts(tmp_path / "killed") != {}


def test_a_second_driver_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["x", "table8", "--demo", "--quick", "--serial", "--out", str(tmp_path / "o")])
    with record.alone(tmp_path / "o"), pytest.raises(ValueError, match="another run is writing"):
        reproduce.main()


# Ray ------------------------------------------------------------------------------------------------------------------


def test_a_cluster_that_does_not_answer(monkeypatch):
    pytest.importorskip("ray")
    monkeypatch.setattr(sweep, "ANSWER", 2)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        for address in ("127.0.0.1:1", "nowhere", f"127.0.0.1:{mute.getsockname()[1]}"):
            started = time.monotonic()
            with pytest.raises(ValueError, match=f"no Ray cluster answers at {address}"):
                sweep.ask(address)
            assert time.monotonic() - started < 10


def test_without_ray_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match="requirements-sweep.txt, or add --serial"):
        list(sweep.on_ray([tiny("plain")], tmp_path, 1, "cpu"))


def test_a_node_that_dies_loses_no_cell(tmp_path):
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    wanted = [tiny(domain, method) for domain in ("plain", "sepia") for method in ("backbone", "zeroshot")]
    wanted.append((*tiny("plain", "mao"), "--top-k", "60"))  # fails
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(PROJECT))
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": sweep.STORE})
        second = cluster.add_node(num_cpus=1, object_store_memory=sweep.STORE)
        outcomes = []
        try:
            for outcome in sweep.on_ray(wanted, tmp_path / "ray", 1, "cpu", wanted[:1], address=cluster.address):
                outcomes.append(outcome)
                if len(outcomes) == 1:
                    cluster.remove_node(second, allow_graceful=False)
        finally:
            session = cluster.head_node.get_session_dir_path()
            ray.shutdown()
            cluster.shutdown()
            shutil.rmtree(session, ignore_errors=True)
    assert sorted(cell for cell, _, _ in outcomes) == sorted(wanted)  # each once
    assert [cell for cell, error, _ in outcomes if error] == [wanted[-1]]
    list(sweep.serial(wanted, tmp_path / "serial", 1, "cpu"))
    assert prompts(tmp_path / "ray") == prompts(tmp_path / "serial") != {}


DRIVER = """
import pathlib, sys
from experiments import sweep
for cell, error, _ in sweep.on_ray([tuple(c.split()) for c in sys.argv[2:]], pathlib.Path(sys.argv[1]), 1, "cpu"):
    print(cell, error, flush=True)
"""


def workers():
    """The processes of this machine, by number, in which Ray runs a cell."""
    found = set()
    for path in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has just ended
            if b"ray::attempt" in path.read_bytes():
                found.add(path.parent.name)
    return found


def test_after_a_killed_driver_the_same_command_goes_on(tmp_path):
    pytest.importorskip("ray")
    wanted, others = [tiny("plain"), (*tiny("plain", "mao")[:-1], "40", "--no-new")], workers()
    command = [sys.executable, "-c", DRIVER, str(tmp_path), *(" ".join(cell) for cell in wanted)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=PROJECT, text=True) as driver:
        driver.stdout.readline()  # the first cell is done, the second goes on
        os.kill(driver.pid, signal.SIGKILL)
    left = [cell for cell in wanted if sweep.finished(cell, tmp_path) is None]
    assert len(left) == 1
    time.sleep(3)  # Ray's workers end with their driver
    assert workers() <= others
    sweep.clear(tmp_path, {sweep.parsed(left[0])[1]})
    assert sweep.attempt(left[0], tmp_path, 1, "cpu")[0] is None and sweep.finished(left[0], tmp_path)


def test_what_cannot_be_drawn_or_was_killed_does_not_end_the_rest(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys, "argv", ["x", "fig6", "fig5", "--root", str(tmp_path), "--out", str(tmp_path / "o")])
    assert reproduce.main() == 1
    told = capsys.readouterr()
    assert f"In {tmp_path / 'o'}: nothing" in told.out
    left_out = [line.split("warning: ")[1].split(" is left out")[0] for line in told.err.splitlines()]
    assert left_out == [
        f"{name} of {dataset}" for name in ("fig6", "fig5") for dataset in ("caltech101", "oxford_pets")
    ]
    monkeypatch.setattr(sweep, "attempt", die)
    ((_, error, _),) = sweep.serial([tiny("plain")], tmp_path, 1, "cpu", alone=[tiny("plain")])
    assert "its process was killed" in error


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)
