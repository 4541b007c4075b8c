"""Runs cells, each once: in this process one after another, or many at a time on Ray.

A cell is one row of run.py, given as a tuple of its options. It is tuned in its own folder under `out`/.attempts, and
moved into place when it is finished. So a cell in its place is a finished one, and of two attempts the first counts.
What a killed attempt left is adopted by the next one, which continues it bit-identically.
"""

import contextlib
import functools
import importlib.util
import io
import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
import traceback
import uuid
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from tqdm import tqdm

import run
from harness import options
from harness.cli import sentence, warn
from harness.runs import folder_name, read_config, read_result, real_path, run_lock

ATTEMPTS = ".attempts"  # the folder of the cells that are being tuned
ANSWER = 10  # seconds that a cluster has to answer
RETRIES = 3  # of a cell whose worker or node was lost
ALONE = ("--cache", "none")  # of a cell whose memory counts: it encodes its test images itself
STORE = 80 * 2**20  # bytes of Ray's object store, which holds nothing but words here


@functools.cache
def parsed(cell):
    """(run.py's settings, the folder's name) of a cell."""
    settings = options.parse(cell)
    return settings, folder_name(settings, settings.method[0])


def finished(cell, out):
    """The result of a cell that is in its place, a dict, or None. ValueError: a broken one, or another run is there.

    The folder's config.json is compared with the settings, not just the folder's name.
    """
    settings, name = parsed(cell)
    result = read_result(out / name)
    if result is None:
        return None
    there = read_config(out / name)
    for key in options.FIELDS.keys() - options.MACHINE_SETTINGS:
        value = settings.method[0] if key == "method" else getattr(settings, key)
        # None and "auto" are filled in by the machine that runs the cell
        if value not in (None, "auto") and real_path(getattr(there, key)) != real_path(value):
            raise ValueError(f"{out / name} holds a run of another {key}: move it, or give another --out")
    return result


def attempt(cell, out, threads, device, *more):
    """Runs a cell and moves it into its place in `out`. threads: of PyTorch; the last bits depend on them.

    more: of run.py's options, such as `ALONE`.

    Returns (why it failed, a sentence, or None; its warnings, lines). It raises nothing but KeyboardInterrupt.
    """
    settings, name = parsed(cell)
    scratch, printed, error = out / ATTEMPTS / f"{name}@{uuid.uuid4().hex[:8]}", io.StringIO(), None
    try:
        scratch.mkdir(parents=True)
        adopt(name, out, scratch)
        workers = "0" if settings.dataset.startswith("demo") else str(threads)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(printed):
            machine = ["--threads", str(threads), "--workers", workers, "--device", device, *more]
            run.main([*cell, *machine, "--out", str(scratch), "--resume"])
        with contextlib.suppress(OSError):  # it is there: another attempt came first
            os.rename(scratch / name, out / name)
        if finished(cell, out) is None:
            raise ValueError(f"{out / name} cannot be put into its place: move what is there")
        shutil.rmtree(scratch, ignore_errors=True)
    except Exception as failure:  # one cell's failure, of whatever kind, must not end the others
        known = sentence(failure) if isinstance(failure, (ValueError, OSError, MemoryError, RuntimeError)) else None
        error = known or "".join(traceback.format_exception_only(failure)).strip()
    return error, [line for line in printed.getvalue().splitlines() if ": warning: " in line]


def adopt(name, out, scratch):
    """Moves what a killed attempt at a cell left, or a stopped run in its place, into the folder `scratch`."""
    for left in [out, *sorted((out / ATTEMPTS).glob(f"{name}@*"))]:
        if (left / name).is_dir() and not (left / name / "result.json").exists():
            with contextlib.suppress(ValueError, OSError), run_lock(left / name):  # a dead writer has no lock any more
                os.rename(left / name, scratch / name)
                return


def clear(out, wanted):
    """Removes what killed attempts left, except where one of the cells `wanted`, names, can continue from it."""
    for left in (out / ATTEMPTS).glob("*@*"):
        name = left.name.rsplit("@", 1)[0]
        if name not in wanted or not (left / name / "resume.pt").exists():
            with contextlib.suppress(ValueError, OSError), run_lock(left / name):
                shutil.rmtree(left)
    with contextlib.suppress(OSError):
        (out / ATTEMPTS).rmdir()  # where it is empty


def run_cells(cells, out, threads=1, device="cpu", own=(), serial=False, **ray):
    """Runs cells that are not finished, with a progress bar. Returns {cell: why it failed, a sentence}.

    own: the cells that get a process of their own, so that peak memory is theirs alone. serial: one after another;
    without Ray installed that is what happens. ray: of `on_ray`. ValueError: as `on_ray`.
    """
    serial = serial or not cells  # nothing to run needs no Ray
    if not serial and importlib.util.find_spec("ray") is None:
        missing = "Ray is not installed (pip install -r requirements-sweep.txt)"
        if ray.get("address"):
            raise ValueError(f"{missing}: --address needs it")
        print(f"{missing}: cells run one after another")
        serial = True
    clear(out, {parsed(cell)[1] for cell in cells})
    failed, how = {}, (cells, out, threads, device, own)
    outcomes = serially(*how) if serial else on_ray(*how, **ray)
    for cell, error, warnings in tqdm(outcomes, "cells", len(cells), disable=None if cells else True):
        name = parsed(cell)[1]
        for warning in dict.fromkeys(warnings):
            warn(f"{name}: {warning.split(': warning: ', 1)[1]}")
        if error:
            failed[cell] = error
            warn(f"{name} failed: {error}")
    clear(out, {parsed(cell)[1] for cell in failed})
    return failed


def serially(cells, out, threads, device, own=()):
    """Yields (cell, error, warnings) of each cell, one after another. Arguments: those of `run_cells`."""
    for cell in cells:
        if cell not in own:
            yield cell, *attempt(cell, out, threads, device)
            continue
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            try:
                outcome = process.submit(attempt, cell, out, threads, device, *ALONE).result()
            except BrokenProcessPool:
                outcome = "its process was killed: perhaps there is no memory left", []
        yield cell, *outcome


def on_ray(cells, out, threads, device, own=(), gpus=0.0, mib=None, address=None):
    """Yields (cell, error, warnings) of each cell as it ends. As many run at a time as Ray has room for.

    own: as of `run_cells`; the other cells share warm processes, which saves them the imports. threads, gpus, mib: what
    a cell takes: CPUs, GPUs, memory in MiB (None: not counted). address: "host:port" of a cluster, or None for this
    machine. On a cluster, `out` and the project must lie on a disk that all nodes share.
    ValueError: the cluster does not answer, or no node has room for a cell.
    """
    import ray

    with cluster(ray, address):
        needs = {"CPU": threads, "GPU": gpus, "memory": (mib or 0) * 2**20}
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        if not any(all(node.get(kind, 0) >= need for kind, need in needs.items()) for node in nodes):
            need = ", ".join(f"{kind} {need:g}" for kind, need in needs.items())
            raise ValueError(f"no node has {need}: lower --cpus-per-run, --gpus-per-run or --memory-per-run")
        resources = {"num_cpus": threads, "num_gpus": gpus, "memory": needs["memory"] or None, "max_retries": RETRIES}
        warm, fresh = ray.remote(**resources)(attempt), ray.remote(max_calls=1, **resources)(attempt)
        waiting = {}
        for cell in cells:
            task, more = (fresh, ALONE) if cell in own else (warm, ())
            waiting[task.remote(cell, out.resolve(), threads, device, *more)] = cell
        while waiting:
            for reference in ray.wait(list(waiting))[0]:
                cell = waiting.pop(reference)
                try:
                    yield cell, *ray.get(reference)
                except ray.exceptions.RayError as error:
                    yield cell, f"Ray could not run it ({' '.join(str(error).split())[:200]})", []


@contextlib.contextmanager
def cluster(ray, address):
    """While this lasts, Ray runs: a small cluster here, or the one at `address`. ValueError: that does not answer."""
    os.environ.update({"RAY_USAGE_STATS_ENABLED": "0", "RAY_task_oom_retries": "0", "RAY_DEDUP_LOGS": "0"})
    quiet = {"include_dashboard": False, "object_store_memory": STORE} if address is None else {}
    if address is not None:
        ask(address)
    context = ray.init(address or "local", log_to_driver=False, logging_level="ERROR", **quiet)
    try:
        yield
    finally:
        ray.shutdown()
        if address is None:  # what it wrote into the temporary folder
            shutil.rmtree(context.address_info["session_dir"], ignore_errors=True)


def ask(address):
    """Asks a cluster for an answer, in another process, as Ray itself waits for minutes. ValueError: there is none."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=ANSWER / 2).close()
        code = f"import ray; ray.init({address!r}, log_to_driver=False, logging_level='ERROR')"
        subprocess.run([sys.executable, "-c", code], timeout=ANSWER, check=True, capture_output=True)
    except (OSError, ValueError, OverflowError, subprocess.SubprocessError) as error:
        answer = f"no Ray cluster answers at {address}"
        raise ValueError(f"{answer}: start one with `ray start --head`, or leave out --address") from error
