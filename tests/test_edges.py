"""The edges of a command: a reader that goes away, a machine that runs out, other people's text."""

import csv
import os
import signal
import subprocess
import sys
from unittest import mock

import pytest
import torch
from conftest import PROJECT, draw, refuses, succeeds

from harness import cli, images

PREDICT = "predict.py --workers 0 --prompt run/new.safetensors --classes names.txt"
PRINT = "from harness.cli import run_main; run_main('x.py', lambda: print('line\\n' * 100_000))"


@pytest.mark.parametrize("option", ["--help", "--wrong", ""])
@pytest.mark.parametrize(
    "line", ["run.py --dataset folder --root x", "data.py dtd --root x", "predict.py run.py --run x"]
)
def test_help_a_wrong_option_and_a_missing_folder_are_answered_without_pytorch(line, option):
    ask = [sys.executable, "-X", "importtime", *line.split(), *option.split()]
    done = subprocess.run(ask, cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode == (0 if option == "--help" else 2) and " torch\n" not in done.stderr, done.stderr


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="only Linux has it")
def test_an_output_that_takes_nothing():
    full = "x.py: the output cannot be written (No space left on device): make room, or send it elsewhere\n"
    for where, found in ((" | head -1", (141, "line\n", "")), (">&-", (0, "", "")), (">/dev/full", (2, "", full))):
        ask = f'{sys.executable} -c "{PRINT}" {where}; exit ${{PIPESTATUS[0]}}'
        done = subprocess.run(["bash", "-c", ask], cwd=PROJECT, capture_output=True, text=True)
        assert (done.returncode, done.stdout, done.stderr) == found


def test_a_machine_that_runs_out_is_one_sentence(capsys):
    """A fault of the program is not hidden."""
    memory = [MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")]
    memory += [RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried")]
    workers = [OSError(24, "Too many open files"), RuntimeError("received 0 items of ancdata")]
    workers += [RuntimeError("unable to write to file </torch_1_2>: No space left on device (28)")]
    for error in (*memory, *workers):
        with pytest.raises(SystemExit) as stop:
            cli.run_main("run.py", mock.Mock(side_effect=error))
        words = "lower --batch-size" if error in memory else "give --workers 0"
        refuses((stop.value.code, *capsys.readouterr()), words)
    with pytest.raises(RuntimeError, match="shapes"):
        cli.run_main("run.py", mock.Mock(side_effect=RuntimeError("shapes do not match")))


def test_a_worker_that_is_killed():
    class Killed(images.Images):
        def __getitem__(self, key):
            os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(RuntimeError) as error:
        next(iter(images.loader(Killed(["a.png"] * 4, None, None), 1, batch_size=2)))
    assert "give --workers 0" in cli.sentence(error.value)


def test_text_of_other_people(photos, command):
    """Names with escape sequences, line ends, formulas and bytes that are no UTF-8: escaped in print, else kept."""
    names = ["=cmd.png", "\x1b[2J\n.png", os.fsdecode(b"\xff.png")]
    for name in names:
        draw(photos / name)
    (photos / "names.txt").write_text("=1+1\n\x1b[2Jred\n@x\n")
    code, out, err = command(f"{PREDICT} --out a.csv", ".")
    assert code == 1 and "\x1b" not in out + err, err
    text = (photos / "a.csv").read_text("utf-8-sig")
    rows = list(csv.reader(text.splitlines(keepends=True)))
    assert {"'=cmd.png", names[1], "\\udcff.png"} < {row[0] for row in rows}
    assert all(row[1][:1] in ("'", "\x1b", "") for row in rows[1:])
    out, err = succeeds(command(f"{PREDICT} --out a.csv", names[1]))
    assert "\x1b" not in out + err and "\\x1b[2Jred" in out
    for name in ("a\tb\nc", "\x1b[2Jd", "=e"):
        for number in range(4):
            draw(photos / "own" / name / f"{number}.png")
    out, err = succeeds(command("data.py folder --root own --list test --shots 1"))
    assert "\x1b" not in out + err and len(out.splitlines()) == 3
    assert all(line.count("\t") == 2 for line in out.splitlines())


@pytest.mark.parametrize("line", [f"{PREDICT} --out runs.csv 1.png", "run.py --method zeroshot"])
def test_a_full_disk(line, photos, command):
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, before[1]))  # no file grows beyond 10 bytes
    try:
        found = command(line)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    refuses(found, "cannot write", "runs", " (File too large): make room there")
    assert not [path for path in photos.rglob("*") if path.is_file() and "runs" in str(path.relative_to(photos))]
