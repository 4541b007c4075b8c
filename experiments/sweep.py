"""Runs cells, each once: in this process one after another, or many at a time on Ray.

A cell is one row of run.py, by run.py's own function. It is tuned in a folder of its own under `out`/.attempts and put
into its place when it is whole, so that a cell in its place is a finished one, and of two attempts the first counts. A
killed attempt is adopted by the next one and goes on, to the same bits.
"""

import contextlib
import functools
import io
import multiprocessing
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import traceback
import uuid
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import filelock

import run
import settings
from cli import sentence
from record import ELSEWHERE, folder_name, place, read_config, read_result

ATTEMPTS = ".attempts"  # the folder of the cells that are being tuned
ANSWER = 10  # seconds that a cluster has to answer
RETRIES = 3  # of a cell whose worker or node was lost
STORE = 80 * 2**20  # bytes of Ray's object store, which holds nothing but words here


@functools.cache
def parsed(options):
    """(run.py's settings, the folder's name) of a cell. options: a tuple of run.py's, one row."""
    args = settings.parse(list(options))
    return args, folder_name(args.dataset, args.backbone, args.method[0], args.seed, args.changed)


def finished(options, out):
    """The result of a cell that is in its place, a dict, or None. ValueError: another run is there, or a broken one.

    The folder's config.json is compared with the settings, and not just the folder's name.
    """
    args, name = parsed(options)
    result = read_result(out / name)
    if result is None:
        return None
    there, wanted = read_config(out / name), {**vars(args), "method": args.method[0]}
    for key, value in wanted.items():
        # None is a default that `settings.fit` fills in; the precision may be the worker's
        if key == "precision" and key not in args.changed:
            continue
        if key in there and key not in ELSEWHERE and value is not None and place(there[key]) != place(value):
            raise ValueError(f"{out / name} holds a run of another {key}: move it, or give another --out")
    return result


def attempt(options, out, threads, device):
    """Runs a cell, which is put into its place in `out`. threads: of PyTorch, which the bits depend on.

    Returns (why it failed, a sentence, or None; what it warned of, lines). It raises nothing but KeyboardInterrupt.
    """
    name = parsed(options)[1]
    scratch = out / ATTEMPTS / f"{name}@{uuid.uuid4().hex[:8]}"
    told, warned, error = io.StringIO(), io.StringIO(), None
    try:
        scratch.mkdir(parents=True)
        adopt(name, out, scratch)
        workers = "0" if options[1].startswith("demo") else str(threads)
        with contextlib.redirect_stdout(told), contextlib.redirect_stderr(warned):
            machine = ["--threads", str(threads), "--workers", workers, "--device", device]
            run.main([*options, *machine, "--out", str(scratch), "--resume"])
        with contextlib.suppress(OSError):  # it is there: another attempt came first
            os.rename(scratch / name, out / name)
        if finished(options, out) is None:
            error = f"{out / name} cannot be put into its place: move what is there"
        else:
            shutil.rmtree(scratch, ignore_errors=True)
    except SystemExit:
        error = (warned.getvalue().strip().splitlines() or ["it ended without a word"])[-1]
    except Exception as failure:  # one cell's failure, of whatever kind, must not end the others
        error = sentence(failure) if isinstance(failure, (ValueError, OSError, MemoryError, RuntimeError)) else None
        if error is None:
            error = " ".join(traceback.format_exception_only(failure)).strip()
    return error, [line for line in warned.getvalue().splitlines() if ": warning: " in line]


def adopt(name, out, scratch):
    """Moves what a killed attempt at a cell left, or a stopped run in its place, into the folder `scratch`."""
    for left in [out, *sorted((out / ATTEMPTS).glob(f"{name}@*"))]:
        if left == scratch or not (left / name).is_dir() or (left / name / "result.json").exists():
            continue
        lock = filelock.FileLock(left / f".{name}.lock")
        try:
            lock.acquire(timeout=0)  # its writer is dead: the lock ended with it
        except filelock.Timeout:
            continue
        try:
            os.rename(left / name, scratch / name)
            return
        except OSError:
            continue  # another attempt was faster
        finally:
            lock.release()


def clear(out, wanted):
    """Removes what killed attempts left, but for those that one of the cells `wanted`, names, can go on from."""
    for left in (out / ATTEMPTS).glob("*@*"):
        name = left.name.rsplit("@", 1)[0]
        if name in wanted and (left / name / "resume.pt").exists():
            continue
        lock = filelock.FileLock(left / f".{name}.lock")
        with contextlib.suppress(filelock.Timeout, OSError), lock.acquire(timeout=0):
            shutil.rmtree(left)
    with contextlib.suppress(OSError):
        (out / ATTEMPTS).rmdir()  # where it is empty


def serial(cells, out, threads, device, alone=()):
    """Yields (cell, error, warnings) of each cell, one after another. cells: tuples of options.

    alone: those that have a process of their own, so that their peak memory is not that of the cells before them.
    """
    for cell in cells:
        if cell in alone:
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
                try:
                    outcome = process.submit(attempt, cell, out, threads, device).result()
                except BrokenProcessPool:
                    outcome = "its process was killed: perhaps there is no memory left", []
            yield cell, *outcome
        else:
            yield cell, *attempt(cell, out, threads, device)


def on_ray(cells, out, threads, device, alone=(), gpus=0.0, mib=None, address=None):
    """Yields (cell, error, warnings) of each cell as it ends, as many at a time as Ray has room for.

    alone: as of `serial`; the other cells go to warm processes, which saves them the imports.
    threads, gpus, mib: what a cell takes: CPUs, GPUs, memory in MiB (None: not counted). address: "host:port" of a
    cluster; None: this machine alone. On a cluster, `out` and the project lie on a disk that all nodes share.
    ValueError: Ray is not installed, the cluster does not answer, or no node has room for a cell.
    """
    try:
        import ray
    except ImportError as error:
        raise ValueError("Ray is not here: pip install -r requirements-sweep.txt, or add --serial") from error
    with cluster(ray, address):
        needs = {"CPU": threads, "GPU": gpus, "memory": (mib or 0) * 2**20}
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        if not any(all(node.get(kind, 0) >= need for kind, need in needs.items()) for node in nodes):
            raise ValueError(
                f"no node has room for a cell of {threads} CPUs, {gpus} GPUs and {mib or 0:.0f} MiB: lower "
                "--cpus-per-run, --gpus-per-run or --memory-per-run"
            )
        resources = {"num_cpus": threads, "num_gpus": gpus, "memory": needs["memory"] or None, "max_retries": RETRIES}
        warm, own = ray.remote(**resources)(attempt), ray.remote(max_calls=1, **resources)(attempt)
        waiting = {}
        for cell in cells:
            task = own if cell in alone else warm
            waiting[task.remote(cell, out.resolve(), threads, device)] = cell
        while waiting:
            for reference in ray.wait(list(waiting))[0]:
                cell = waiting.pop(reference)
                try:
                    yield cell, *ray.get(reference)
                except ray.exceptions.RayError as error:
                    yield cell, f"its worker was lost {RETRIES + 1} times ({' '.join(str(error).split())[:200]})", []


@contextlib.contextmanager
def cluster(ray, address):
    """While this lasts, Ray runs: a small cluster here, or the one at `address`. ValueError: that does not answer."""
    os.environ.update({"RAY_USAGE_STATS_ENABLED": "0", "RAY_task_oom_retries": "0", "RAY_DEDUP_LOGS": "0"})
    quiet = {"include_dashboard": False, "object_store_memory": STORE}
    if address is not None:
        ask(address)
        quiet = {}
    context = ray.init(address or "local", log_to_driver=False, logging_level="ERROR", **quiet)
    try:
        yield
    finally:
        ray.shutdown()
        if address is None:  # what it wrote into the temporary folder
            session = pathlib.Path(context.address_info["session_dir"])
            shutil.rmtree(session, ignore_errors=True)
            latest = session.parent / "session_latest"
            if latest.is_symlink() and not latest.exists():
                latest.unlink()


def ask(address):
    """Asks a cluster for an answer, in another process, as Ray itself waits for minutes. ValueError: there is none."""
    advice = f"no Ray cluster answers at {address}: start one with `ray start --head`, or leave out --address"
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=ANSWER / 2).close()
        code = f"import ray; ray.init({address!r}, log_to_driver=False, logging_level='ERROR')"
        subprocess.run([sys.executable, "-c", code], timeout=ANSWER, check=True, capture_output=True)
    except (OSError, ValueError, OverflowError, subprocess.SubprocessError) as error:
        raise ValueError(advice) from error
