"""What a run leaves behind, and reads back: one folder per row of the table.

    config.json         every setting in force, versions, git revision
    metrics.jsonl       one line per epoch of each phase
    base.safetensors    the learned prompts after phase 1, new.safetensors after phase 2
    result.json         the scores and what they cost

Every file is written beside its place and then renamed, so none is ever half-written.
"""

import contextlib
import importlib.metadata
import json
import os
import pathlib
import platform
import re
import shutil
import subprocess
import sys

import filelock
import safetensors
import safetensors.torch
import torch

try:
    import resource
except ImportError:  # Windows
    resource = None

PACKAGES = ["torch", "torchvision", "clip-anytorch", "sentence-transformers", "numpy", "pillow", "safetensors"]
COST = ["learnable_parameters", "seconds", "peak_mib"]  # in a result, beside the scores
ELSEWHERE = ["out", "workers", "download", "device", "threads", "eval"]  # settings that do not change what is tuned
HEADER = [  # of a file of prompts
    "dataset", "backbone", "settings", "clip", "clip_sha256", "clip_activation", "clip_head_width", "classnames",
]  # fmt: skip
FILES = ["config.json", "metrics.jsonl", "base.safetensors", "new.safetensors", "result.json"]


def folder_name(dataset, backbone, method, seed, changed):
    """A row's folder: "demo-coop-mao-seed1", with settings that are not the default appended.

    changed: a dict of those, from option names to values.
    """
    parts = [dataset, backbone, method, f"seed{seed}"]
    for option, value in changed.items():
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            parts.append(f"{option}{value:g}")
        else:
            text = "" if value is True else re.sub(r"[^A-Za-z0-9.]+", "-", pathlib.PurePath(str(value)).name).strip("-")
            parts.append(f"{option}-{text}".strip("-"))
    return "-".join(parts).replace("_", "-")


def write(path, content):
    """Puts text or bytes into `path`, whole or not at all. OSError: no room, or the folder cannot be written."""
    beside = path.with_name(f".{path.name}.part")
    try:
        beside.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(beside, path)
    except OSError as error:
        raise OSError(f"cannot write {path} ({error.strerror}): make room there, or choose another folder") from error
    finally:
        beside.unlink(missing_ok=True)


def versions():
    """Versions of Python and of the packages that matter, and the project's git revision (None outside git)."""
    git = ["git", "-C", str(pathlib.Path(__file__).parent)]
    try:
        revision = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
        if revision and subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True).stdout:
            revision += " with local changes"
    except OSError:
        revision = ""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return {"python": platform.python_version(), **found, "git": revision or None}


@contextlib.contextmanager
def alone(folder):
    """While this lasts, no other process writes into a run's folder. ValueError: one does. OSError: no place for it.

    The lock is a file beside the folder, and ends with the process however that ends.
    """
    lock = filelock.FileLock(folder.with_name(f".{folder.name}.lock"))
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except filelock.Timeout as error:
        raise ValueError(f"another run is writing into {folder}: wait for it, or give another --out") from error
    except OSError as error:
        raise OSError(f"cannot make the folder {folder} ({error.strerror}): give another with --out") from error
    try:
        yield
    finally:
        pathlib.Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


class Record:
    """Writes the folder of one row; a GPU's peak memory starts anew.

    A finished run that is there already stands aside as `<folder>.previous` until this one is finished too. ValueError:
    it is of other settings, and would be lost.
    """

    def __init__(self, folder, config):
        self.folder, self.config, self.metrics, self.seconds = pathlib.Path(folder), config, [], 0.0
        self.previous = self.folder.with_name(self.folder.name + ".previous")
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(f"cannot make the folder {folder} ({error.strerror}): give another with --out") from error
        if (self.folder / "result.json").exists():
            self.refuse_others()
            shutil.rmtree(self.previous, ignore_errors=True)
            os.replace(self.folder, self.previous)
            self.folder.mkdir()
        for name in FILES:
            (self.folder / name).unlink(missing_ok=True)
        write(self.folder / "config.json", json.dumps({**config, "versions": versions()}, indent=1) + "\n")

    def refuse_others(self):
        """ValueError: the finished run in the folder is of other settings. Two can have one name, as of two --root."""

        def place(value):  # two ways to write one path are one
            return os.path.realpath(value) if isinstance(value, str) and os.path.exists(value) else value

        there = read_folder(self.folder)[0]
        here = json.loads(json.dumps(self.config))
        shared = [key for key in here if key in there and key not in ELSEWHERE]
        differing = [key for key in shared if place(here[key]) != place(there[key])]
        if differing:
            raise ValueError(
                f"{self.folder} holds a finished run of another {', '.join(differing)}: give another --out, or move it"
            )

    def epoch(self, line):
        """Adds a line to metrics.jsonl: a dict. Its `seconds` are summed for the result."""
        self.seconds += line["seconds"]
        self.metrics.append(json.dumps(line))
        write(self.folder / "metrics.jsonl", "\n".join(self.metrics) + "\n")

    def prompts(self, name, learner):
        """Writes the learner's state dict as `name`.safetensors; the header says what it belongs to."""
        header = {key: self.config[key] for key in HEADER if self.config.get(key) is not None}
        state = {key: value.detach().cpu().contiguous() for key, value in learner.state_dict().items()}
        # One key: safetensors writes several in an order that changes from run to run.
        write(self.folder / f"{name}.safetensors", safetensors.torch.save(state, {"mao": json.dumps(header)}))

    def result(self, scores, learner):
        """Writes result.json: the row's scores, a dict, and what they cost. Returns both in one."""
        result = {
            **scores,
            "learnable_parameters": sum(p.numel() for p in learner.parameters() if p.requires_grad),
            "seconds": self.seconds,
            "peak_mib": peak_mib(self.config["device"]),
        }
        write(self.folder / "result.json", json.dumps(result, indent=1) + "\n")
        shutil.rmtree(self.previous, ignore_errors=True)
        return result


def read_header(path):
    """What a file of prompts belongs to: {"dataset", "backbone", "settings", "clip", "clip_sha256"}.

    FileNotFoundError: no such file. ValueError: not one that `Record.prompts` wrote.
    """
    if pathlib.Path(path).is_dir():
        raise ValueError(f"{path} is a folder: give a file of prompts in it, base.safetensors or new.safetensors")
    try:
        with safetensors.safe_open(path, "pt") as file:
            header = json.loads((file.metadata() or {}).get("mao", "{}"))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} is missing: give prompts that run.py left, or run the row again") from error
    except (safetensors.SafetensorError, ValueError, OSError) as error:
        raise ValueError(f"{path} is not a file of prompts ({error}): give one that run.py wrote") from error
    if not {"backbone", "settings", "clip", "clip_sha256"} <= header.keys():
        raise ValueError(f"{path} does not say which CLIP its prompts are for: give one that run.py wrote")
    return header


def read_prompts(path, backbone, clip_sha256):
    """The state dict that `Record.prompts` wrote.

    Errors as `read_header`; ValueError too: of another backbone, or for another CLIP.
    """
    header = read_header(path)
    if header["backbone"] != backbone:
        raise ValueError(f"the prompts in {path} are of the backbone '{header['backbone']}', not '{backbone}'")
    if header["clip_sha256"] != clip_sha256:
        raise ValueError(
            f"the prompts in {path} were tuned for another CLIP, '{header['clip']}' of SHA-256 "
            f"{str(header['clip_sha256'])[:8]}...: give that one with --clip"
        )
    return safetensors.torch.load_file(path)


def read_folder(folder):
    """[config, result] of a finished row's folder. FileNotFoundError: not there. ValueError: broken."""
    content = []
    for name in ("config.json", "result.json"):
        path = pathlib.Path(folder) / name
        try:
            content.append(json.loads(path.read_text()))
            if not isinstance(content[-1], dict) or "method" not in content[0]:
                raise ValueError("not what run.py wrote")
        except (FileNotFoundError, NotADirectoryError) as error:
            raise FileNotFoundError(f"{path} is missing: give a folder of a finished run, runs/...") from error
        except ValueError as error:
            raise ValueError(f"{path} is broken ({error}): run it again") from error
    return content


def peak_mib(device):
    """Peak memory in MiB: on a GPU since its last reset, on a CPU the whole process's so far; None on Windows."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    if resource is None:
        return None
    unit = 2**20 if sys.platform == "darwin" else 2**10  # of ru_maxrss: bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
