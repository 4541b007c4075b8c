"""Kills runs by SIGKILL at random moments, goes on with --resume, and compares all with runs that were never stopped.

    python -m tests.kills --kills 50        50 kills on the demo; the suite does a handful

Half of the kills come at a random time, the others in the midst of a random save: half a file is written, or the whole
file beside its place, or it is just renamed.
"""

import argparse
import itertools
import json
import os
import pathlib
import random
import shutil
import signal
import sys
import tempfile
import time

import record
import sentence_transformers  # noqa: F401  # here once, not in every forked process
import torch
from cli import end

import data
import run

SMALL = ["--method", "mao", "--shots", "2", "--epochs", "6", "--workers", "0"]
RUNS = [
    "--backbone coop",
    "--backbone maple --top-k 4",
    "--backbone promptsrc --top-k 4",
    "--backbone coop --precision fp16",
    "--backbone coop --cache-views 2",
    "--backbone proda --prompts 8 --top-k 4",
    "--backbone promptsrc --top-k 4 --pseudo-labeler tuned --workers 1",
]


def start(arguments, out, dies=None):
    """Forks a process that is `run.py ARGUMENTS --out OUT`, and returns its id. dies: of `die_in_save`."""
    process = os.fork()
    if process:
        return process
    try:
        log = os.open(pathlib.Path(out).with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        if dies is not None:
            die_in_save(*dies)
        whole = data.test_set  # a tenth of the test images will do: scoring takes longer than tuning here
        data.test_set = lambda *some: whole(*some)._replace(items=whole(*some).items[::10])
        end("run.py", lambda: run.main([*SMALL, *arguments.split(), "--out", str(out)]))
        os._exit(0)
    except SystemExit as stop:
        os._exit(stop.code or 0)
    finally:
        os._exit(3)


def die_in_save(number, where):
    """From now on, this process kills itself in its save `number`, from 1. where: "half", "written" or "renamed"."""
    saves, replace, write = itertools.count(1), os.replace, record.write
    now = [0]

    def dying_write(path, content):
        now[0] = next(saves)
        if now[0] == number and where == "half":
            path.with_name(f".{path.name}.part").write_bytes(b"{" + os.urandom(len(content) // 2))
            os.kill(os.getpid(), signal.SIGKILL)
        return write(path, content)

    def dying_replace(source, target):
        if now[0] == number and where == "written":
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)
        if now[0] == number and where == "renamed":
            os.kill(os.getpid(), signal.SIGKILL)

    record.write, os.replace = dying_write, dying_replace


def left_behind(out):
    """What a finished run leaves, {file: content}, without what a clock or the number of saves changes."""
    (folder,) = [path for path in pathlib.Path(out).iterdir() if not path.name.startswith(".")]
    found = {path.name: path.read_bytes() for path in folder.iterdir()}
    config = json.loads(found["config.json"])
    found["config.json"] = {key: value for key, value in config.items() if key not in ("out", "resume")}
    for name in ("metrics.jsonl", "result.json"):
        lines = found[name].decode().splitlines() if name == "metrics.jsonl" else [found[name]]
        found[name] = [
            {k: v for k, v in json.loads(line).items() if k not in ("seconds", "peak_mib")} for line in lines
        ]
    return found


def survive(kills, seed, folder):
    """[(what was killed, when, how it ended)] of every kill; how: "" where all is equal, else what is not."""
    rng, whole, ends = random.Random(seed), {}, []
    for number in range(kills):
        arguments = RUNS[number % len(RUNS)]
        if arguments not in whole:
            out, began = folder / f"whole{len(whole)}", time.perf_counter()
            code = os.waitpid(start(arguments, out), 0)[1]
            if code:
                raise RuntimeError(
                    f"run.py {arguments} ended with {code}: {out.with_suffix('.log').read_text()[-500:]}"
                )
            whole[arguments] = (left_behind(out), time.perf_counter() - began)
        content, seconds = whole[arguments]
        out = folder / f"killed{number}"
        if number // len(RUNS) % 2:
            moment, dies = rng.uniform(0, seconds), None
            when = f"after {moment:.2f} s"
        else:
            moment, dies = None, (rng.randint(1, 3 * 6 + 2), rng.choice(["half", "written", "renamed"]))
            when = f"in save {dies[0]}, {dies[1]}"
        process = start(arguments, out, dies)
        if moment is not None:
            time.sleep(moment)
            os.kill(process, signal.SIGKILL)
        status = os.waitpid(process, 0)[1]
        killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        code = os.waitpid(start(arguments + " --resume", out), 0)[1]
        again = left_behind(out) if code == 0 else {}
        differing = [name for name in content.keys() | again.keys() if content.get(name) != again.get(name)]
        how = ", ".join(sorted(differing)) + (f" (exit code {code >> 8})" if code else "")
        ends.append((arguments, when if killed else f"{when}, when it was over", how))
        print(f"{number + 1:3d}  {ends[-1][0]:60s} {ends[-1][1]:32s} {how or 'the same bits'}", flush=True)
        if not how:
            shutil.rmtree(out, ignore_errors=True)
    return ends


def main():
    """The command line of tests/kills.py. Exit code 1: a run came out otherwise."""
    parser = argparse.ArgumentParser("tests.kills", description=__doc__)
    parser.add_argument("--kills", type=int, default=50, metavar="N", help="default: 50")
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="of the moments (default: 1)")
    args = parser.parse_args()
    torch.set_num_threads(1)  # forked processes cannot share a pool of threads
    with tempfile.TemporaryDirectory() as folder:
        ends = survive(args.kills, args.seed, pathlib.Path(folder))
    good = sum(not how for _, _, how in ends)
    stopped = sum("over" not in when for _, when, _ in ends)
    print(
        f"{good} of {len(ends)} runs came out as if never stopped; {stopped} of them had been killed before their end"
    )
    sys.exit(good != len(ends))


if __name__ == "__main__":
    main()
