"""Kills runs by SIGKILL at random moments, continues them by --resume, and compares them with runs never stopped.

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

import torch

import run
import sampler
from harness import demo, runs
from harness.cli import run_main

SMALL = "--method mao --shots 1 --epochs 4 --workers 0 --cache none"
CHANGING = ("out", "resume", "versions", "seconds", "peak_mib")  # in files in JSON
RUNS = [
    "--backbone promptsrc --labeler tuned",
    "--backbone proda --learner prompts=8",
    "--backbone coop --precision fp16 --sampler random-classes",
    "--backbone maple --workers 1",
    "--backbone coop --cache-views 2 --labeler balanced",
]


def start(arguments, out, dies=None):
    """Forks a process that is `run.py ARGUMENTS --out OUT`, and returns its id. dies: of `die_in_save`."""
    process = os.fork()
    if process:
        return process
    try:
        log = os.open(out.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        if dies is not None:
            die_in_save(*dies)
        run_main("run.py", lambda: run.main(f"{SMALL} {arguments} --out {out}".split()))
        os._exit(0)
    except SystemExit as stop:
        os._exit(stop.code or 0)
    finally:
        os._exit(3)


def die_in_save(number, where):
    """From now on, this process kills itself in its save `number`, from 1. where: "half", "written" or "renamed"."""
    saves, replace, write = itertools.count(1), os.replace, runs.atomic_write

    def dying_replace(source, target):
        if where == "renamed":
            replace(source, target)
        os.kill(os.getpid(), signal.SIGKILL)

    def dying_write(path, content):
        if next(saves) == number:
            os.replace = dying_replace
            if where == "half":
                path.with_name(f".{path.name}.part").write_bytes(b"{" + os.urandom(len(content) // 2))
                os.kill(os.getpid(), signal.SIGKILL)
        write(path, content)

    runs.atomic_write = dying_write


def left_behind(process, out):
    """What a run leaves when its process has ended, {file: content}, without what changes from run to run."""
    status = os.waitpid(process, 0)[1]
    if status:
        return {f"{out.name} ended with {status}": out.with_suffix(".log").read_text()[-500:]}
    (folder,) = [path for path in out.iterdir() if not path.name.startswith(".")]
    found = {path.name: path.read_bytes() for path in folder.iterdir()}
    for name in ("config.json", "result.json", "metrics.jsonl"):
        for line in found.pop(name).splitlines() if name == "metrics.jsonl" else [found.pop(name)]:
            values = {key: value for key, value in json.loads(line).items() if key not in CHANGING}
            found.setdefault(name, []).append(values)
    return found


def survive(kills, seed, folder):
    """[(whether it was killed before its end, "" or what is not equal)] of every kill."""
    rng, whole, ends = random.Random(seed), {}, []
    for number in range(kills):
        arguments, out = RUNS[number % len(RUNS)], folder / f"killed{number}"
        if arguments not in whole:
            first, began = folder / f"whole{len(whole)}", time.perf_counter()
            whole[arguments] = left_behind(start(arguments, first), first), time.perf_counter() - began
        content, seconds = whole[arguments]
        moment, dies = rng.uniform(0, seconds), (rng.randint(1, 3 * 4 + 2), rng.choice(["half", "written", "renamed"]))
        in_time = number // len(RUNS) % 2
        process = start(arguments, out, None if in_time else dies)
        if in_time:
            time.sleep(moment)
            os.kill(process, signal.SIGKILL)
        killed = os.WIFSIGNALED(os.waitpid(process, 0)[1])
        again = left_behind(start(f"{arguments} --resume", out), out)
        how = ", ".join(sorted(name for name in content.keys() | again.keys() if content.get(name) != again.get(name)))
        ends.append((killed, how))
        when = f"after {moment:.2f} s" if in_time else f"in save {dies[0]}, {dies[1]}"
        print(f"{number + 1:3d}  {arguments:60s} {when:24s} {how or 'bit-identical'}", flush=True)
        shutil.rmtree(out)
    return ends


def main():
    """The command line of tests/kills.py. Exit code 1: a run came out otherwise."""
    parser = argparse.ArgumentParser("tests.kills", description=__doc__)
    parser.add_argument("--kills", type=int, default=50, metavar="N", help="default: 50")
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="of the moments (default: 1)")
    args = parser.parse_args()
    torch.set_num_threads(1)  # forked processes cannot share a pool of threads
    demo.CLASSNAMES[:] = demo.CLASSNAMES[::10]  # with all 100, a run takes long
    embeddings = sampler.minilm(demo.CLASSNAMES[:5])  # once, not in every process
    sampler.minilm = lambda names: embeddings
    with tempfile.TemporaryDirectory() as folder:
        ends = survive(args.kills, args.seed, pathlib.Path(folder))
    good, killed = sum(not how for _, how in ends), sum(killed for killed, _ in ends)
    print(f"{good} of {len(ends)} runs came out as if never stopped; {killed} of them had been killed before their end")
    sys.exit(good != len(ends))


if __name__ == "__main__":
    main()
