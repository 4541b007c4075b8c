"""The edges of a command: interrupts, a reader that goes away, a machine that runs out, other people's text."""

import csv
import os
import signal
import subprocess
import sys
import time
import types

import cli
import images
import pytest
import torch
from conftest import PROJECT
from PIL import Image


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")
@pytest.mark.parametrize("script", ["run.py", "predict.py", "data.py", "-m experiments.reproduce"])
def test_ctrl_c_while_imports_run(script):
    default = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731  # a shell's background jobs ignore it
    process = subprocess.Popen(
        [sys.executable, *script.split(), "x"], cwd=PROJECT, stderr=subprocess.PIPE, text=True, preexec_fn=default
    )
    time.sleep(0.7)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and err == "stopped before anything began\n"


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such pipes")
def test_a_reader_that_goes_away():
    ask = f"{sys.executable} data.py demo --list test | head -1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", ask], cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode == 141 and done.stdout.count("\n") == 1 and done.stderr == ""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="only Linux has it")
def test_an_output_that_takes_nothing():
    for where, code, words in (
        (">&-", 0, ""),
        (">/dev/full", 2, "the output cannot be written (No space left on device)"),
    ):
        ask = f"{sys.executable} data.py demo {where}"
        done = subprocess.run(["bash", "-c", ask], cwd=PROJECT, capture_output=True, text=True)
        assert done.returncode == code and words in done.stderr and "Traceback" not in done.stderr, done.stderr


@pytest.mark.parametrize(
    "options, message",
    [
        (["--ctx-init", ""], "has no word to start the context from"),
        (["--ctx-init", "  "], "has no word to start the context from"),
        (["--lr", "1e39"], "1e39 is not a number of 1e-09 or more"),
        (["--lr", "nan"], "nan is not a number"),
        (["--n-ctx", "10" * 7], "is not a whole number of 1 to 1000"),
        (["--cache-views", str(2**63)], "is not a whole number of 1 to 1000"),
        (["--workers", "100000"], "is not a whole number of 0 to 1000"),
        (["--protocol", "cross-dataset", "--targets", "demo-ice", "demo-ice"], "has demo-ice twice"),
        (["--unlabeled", "a", "--new-classes", "b", "--unlabeled-shots", "1"], "--unlabeled-shots has no effect with"),
        (["--dataset", "a\x1b[2Jb"], "there is no dataset 'a\\x1b[2Jb'"),
    ],
)
def test_numbers_and_words_have_bounds(command, tmp_path, options, message):
    code, out, err = command("run.py", *options, "--out", tmp_path / "runs")
    assert code == 2 and out == "" and err.count("\n") == 1 and message in err and not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "error, words",
    [
        (MemoryError(), "lower --batch-size"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), "lower --batch-size"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), "lower --batch-size"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), "give --workers 0"),
        (RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly"), "give --workers 0"),
        (RuntimeError("unable to write to file </torch_1_2>: No space left on device (28)"), "give --workers 0"),
        (OSError(24, "Too many open files"), "give --workers 0"),
        (RuntimeError("received 0 items of ancdata"), "give --workers 0"),
    ],
)
def test_a_machine_that_runs_out_is_one_sentence(error, words, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as stop:
        cli.end("run.py", main)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and words in err and "what was finished is kept" in err and err.count("\n") == 1


def test_a_fault_of_the_program_is_not_hidden():
    def main():
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError):
        cli.end("run.py", main)


def test_a_worker_that_is_killed(tmp_path):
    class Killed(images.Images):
        def __getitem__(self, key):
            if torch.utils.data.get_worker_info() is not None:
                os.kill(os.getpid(), signal.SIGKILL)
            return super().__getitem__(key)

    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    dataset = Killed(["a.png"] * 4, images.FolderReader(tmp_path), images.test_transform(8))
    with pytest.raises(RuntimeError) as error:
        next(iter(images.loader(dataset, 1, batch_size=2)))
    assert "give --workers 0" in cli.sentence(error.value)


def test_workers_that_share_little_memory(tmp_path, monkeypatch, capsys):
    """Docker's 64 MB: fewer workers, with a warning, and the same batches."""
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png")
    dataset = images.Images(["a.png"] * 40, images.FolderReader(tmp_path), images.test_transform(224))
    for free, workers in ((2**26, 2), (2**20, 0), (2**34, 8)):
        monkeypatch.setattr(images.shutil, "disk_usage", lambda path, free=free: types.SimpleNamespace(free=free))
        assert images.loader(dataset, 8, batch_size=64).num_workers == workers
        told = f"room for the batches of {workers} workers, not 8"
        assert (told in capsys.readouterr().err) == (workers < 8)


def test_text_of_other_people(tmp_path, command, monkeypatch):
    """Names with escape sequences, line ends, formulas and bytes that are no UTF-8: escaped in print, kept in files."""
    assert command("run.py", "--method", "backbone", "--shots", 1, "--epochs", 2, "--out", tmp_path / "runs")[0] == 0
    (prompt,) = (tmp_path / "runs").glob("*")
    photos = tmp_path / "photos"
    photos.mkdir()
    names = ["=cmd.png", "\x1b[2J\n.png", os.fsdecode(b"\xff.png")]
    for name in names:
        Image.new("RGB", (32, 32), "blue").save(photos / name)
    (tmp_path / "names.txt").write_text("=1+1\n\x1b[2Jred\n@x\n")
    monkeypatch.chdir(photos)
    ask = ["predict.py", ".", "--prompt", prompt / "base.safetensors", "--classes", "../names.txt", "--out", "../a.csv"]
    code, out, err = command(*ask)
    assert code == 0, err
    assert "\x1b" not in out + err
    text = (tmp_path / "a.csv").read_bytes().decode("utf-8", "surrogateescape")
    rows = list(csv.reader(text.splitlines(keepends=True)))
    assert sorted(row[0] for row in rows[1:]) == sorted(["'=cmd.png", "\x1b[2J\n.png", os.fsdecode(b"\xff.png")])
    assert all(row[1][0] in "'\x1b" for row in rows[1:])
    code, out, err = command("predict.py", "\x1b[2J\n.png", *ask[2:])
    assert code == 0 and "\x1b" not in out + err and "\\x1b[2Jred" in out

    classes = tmp_path / "own"
    for name in ("a\tb\nc", "\x1b[2Jd", "=e"):
        (classes / name).mkdir(parents=True)
        for number in range(4):
            Image.new("RGB", (8, 8)).save(classes / name / f"{number}.png")
    code, out, err = command("data.py", "folder", "--root", classes, "--list", "test", "--shots", 1)
    assert code == 0 and "\x1b" not in out and len(out.splitlines()) == 3
    assert all(line.count("\t") == 2 for line in out.splitlines())


def test_a_disk_that_fills_while_predictions_are_written(tmp_path, command):
    code, _, err = command("run.py", "--method", "backbone", "--shots", 1, "--epochs", 2, "--out", tmp_path / "runs")
    (prompt,) = (tmp_path / "runs").glob("*/base.safetensors")
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    (tmp_path / "names.txt").write_text("red\nblue\n")
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ask = ["--prompt", prompt, "--classes", tmp_path / "names.txt", "--out", tmp_path / "a.csv"]
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, before[1]))  # no file grows beyond 10 bytes
    try:
        code, _, err = command("predict.py", tmp_path / "a.png", *ask)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert code == 2 and "a.csv (File too large): make room there" in err.splitlines()[-1]
    assert not list(tmp_path.glob("*.csv*")) and not list(tmp_path.glob(".a*"))
