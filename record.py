"""What a run leaves behind, and reads back: one folder per row of the table.

    config.json         every setting in force, versions, git revision
    metrics.jsonl       one line per epoch of each phase
    base.safetensors    the learned prompts after phase 1, new.safetensors after phase 2
    result.json         the scores and what they cost
    lists.json          of images of one's own: which the run saw
    resume.pt           until the row is finished: what --resume goes on from

Every file is written beside its place and then renamed, so none is ever half-written.
"""

import contextlib
import hashlib
import importlib.metadata
import io
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

from cli import warn
from formats import CONFIG, HEADER, LISTS, METRICS, RESULT, SPLIT, Percent, check, parse, read_json

try:
    import resource
except ImportError:  # Windows
    resource = None

PACKAGES = ["torch", "torchvision", "clip-anytorch", "sentence-transformers", "numpy", "pillow", "safetensors"]
COST = ["learnable_parameters", "seconds", "peak_mib"]  # in a result, beside the scores
ELSEWHERE = [  # settings that do not change what is tuned
    "out", "workers", "image_memory", "download", "device", "threads", "eval", "plot", "resume", "force",
]  # fmt: skip
FILES = [
    "config.json", "metrics.jsonl", "base.safetensors", "new.safetensors", "result.json", "lists.json", "resume.pt",
]  # fmt: skip


def folder_name(dataset, backbone, method, seed, changed):
    """A row's folder: "demo-coop-mao-seed1", with settings that are not the default appended, and a hash of them.

    changed: a dict of those, from option names to values. What two values show alike, as two --root whose last folders
    have one name, the hash keeps apart. A long name is cut.
    """
    parts = [dataset, backbone, method, f"seed{seed}"]
    for option, value in changed.items():
        if option == "root" and dataset != "folder":
            continue  # where the dataset lies is not what a person wants to see
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            parts.append(f"{option}{value:g}")
        else:
            text = "" if value is True else re.sub(r"[^A-Za-z0-9.]+", "-", pathlib.PurePath(str(value)).name).strip("-")
            parts.append(f"{option}-{text}".strip("-"))
    name = "-".join(parts).replace("_", "-")
    if not changed:
        return name
    return f"{name[:120]}-{fingerprint({option: place(value) for option, value in changed.items()})[:6]}"


def fingerprint(content):
    """SHA-256 of what JSON can hold, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def place(value):
    """A setting's value; of a path that is there the whole one, so that two ways to write it are one."""
    return os.path.realpath(value) if isinstance(value, str) and os.path.exists(value) else value


def write(path, content):
    """Puts text or bytes into `path`, whole or not at all. OSError: no room, or the folder cannot be written."""
    with whole(path) as file, telling(path):
        file.write(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def whole(path):
    """A binary file beside `path`, which takes its place when all is written, and not at all after an error."""
    beside = path.with_name(f".{path.name}.part")
    try:
        with telling(path):
            file = open(beside, "wb")  # noqa: SIM115  closed below, each time in its own way
        try:
            yield file
            with telling(path):
                file.close()
        finally:
            with contextlib.suppress(OSError):
                file.close()
        with telling(path):
            os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


@contextlib.contextmanager
def telling(path):
    """Turns an OSError of what is done here into a sentence: `path` cannot be written."""
    try:
        yield
    except OSError as error:
        raise OSError(f"cannot write {path} ({error.strerror}): make room there, or choose another folder") from error


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


def make_folder(folder):
    """Makes a folder, and those above it, where they are not there. OSError: it cannot be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"cannot make the folder {folder} ({error.strerror}): give another with --out") from error


@contextlib.contextmanager
def alone(folder):
    """While this lasts, no other process writes into a run's folder. ValueError: one does. OSError: no place for it.

    The lock is a file beside the folder, and ends with the process however that ends.
    """
    lock = filelock.FileLock(folder.with_name(f".{folder.name}.lock"))
    make_folder(folder.parent)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout as error:
        if not os.path.exists(lock.lock_file):
            raise OSError(f"cannot write beside {folder}: give another --out") from error
        raise ValueError(f"another run is writing into {folder}: wait for it, or give another --out") from error
    except OSError as error:
        raise OSError(f"cannot write beside {folder} ({error.strerror}): give another --out") from error
    try:
        yield
    finally:
        pathlib.Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


class Record:
    """Writes the folder of one row, whose peak memory starts anew.

    finished: the result of these settings that is there already, a dict, or None. state: what a stopped run left, of
    `keep`, or None. resume: go on from it. force: tune again what is there. The finished run then stands aside as
    `<folder>.previous` until this one is finished too.
    ValueError: the folder holds a run of other settings, even with force; or a stopped one, and neither resume nor
    force is said.
    """

    def __init__(self, folder, config, resume=False, force=False):
        self.folder, self.config, self.metrics, self.seconds = pathlib.Path(folder), config, [], 0.0
        self.previous = self.folder.with_name(self.folder.name + ".previous")
        self.finished = self.state = None
        restart_peak()
        make_folder(self.folder)
        if (self.folder / "result.json").exists():
            self.refuse_others(self.folder, "finished")
            if not force:
                self.finished = read_result(self.folder)
                return
            if self.previous.is_dir():
                self.refuse_others(self.previous, "finished")
                shutil.rmtree(self.previous, ignore_errors=True)
            os.replace(self.folder, self.previous)
            self.folder.mkdir()
        elif (self.folder / "resume.pt").exists() and force:
            try:
                read_config(self.folder)
            except (FileNotFoundError, ValueError):
                pass  # nothing could go on from it
            else:
                self.refuse_others(self.folder, "stopped")
        elif (self.folder / "resume.pt").exists():
            self.refuse_others(self.folder, "stopped")
            self.state = read_state(self.folder)
            if not resume:
                raise ValueError(
                    f"{self.folder} holds a run of these settings that was stopped after epoch {self.state['epoch']} "
                    f"of the {self.state['phase']} phase: add --resume to go on from there, or --force to start over"
                )
            self.metrics, self.seconds = self.state["metrics"], self.state["seconds"]
            self.write_metrics()
            return
        for name in FILES:
            (self.folder / name).unlink(missing_ok=True)
        write(self.folder / "config.json", json.dumps({**config, "versions": versions()}, indent=1) + "\n")

    def refuse_others(self, folder, kind):
        """ValueError: the run in a folder is of other settings: a file that it names has another content now.

        Warns where a stopped run is to go on under other versions, threads or device: its bits may then differ.
        """
        advice = "move the folder away" if kind == "finished" else "move the folder away, or add --force to start over"
        there, here = read_config(folder, advice), json.loads(json.dumps(self.config))
        shared = [key for key in here if key in there and key not in ELSEWHERE]
        differing = [key for key in shared if place(here[key]) != place(there[key])]
        if differing:
            raise ValueError(
                f"{folder} holds a {kind} run of another {', '.join(differing)}: give another --out, or move it"
            )
        other = [key for key in ("device", "threads") if here[key] != there.get(key)]
        if there.get("versions") != versions():
            other.append("versions")
        if kind == "stopped" and other:
            warn(f"the stopped run was of another {', '.join(other)}: its bits may differ from a run never stopped")

    def lists(self, content):
        """Writes lists.json, of the types `formats.LISTS`. None: there is nothing to keep."""
        if content is not None:
            write(self.folder / "lists.json", json.dumps(content) + "\n")

    def epoch(self, line):
        """Adds a line to metrics.jsonl: a dict. Its `seconds` are summed for the result."""
        self.seconds += line["seconds"]
        self.metrics.append(json.dumps(line))
        self.write_metrics()

    def write_metrics(self):
        """Writes metrics.jsonl anew."""
        write(self.folder / "metrics.jsonl", "\n".join(self.metrics) + "\n")

    def keep(self, phase, epoch, learner, optimizer, scaler):
        """Writes resume.pt: all that the next epoch depends on and no seed gives. phase: "base" or "new"."""
        state = {
            "phase": phase,
            "epoch": epoch,
            "learner": learner.state_dict(),
            "carried": {name: getattr(learner, name) for name in getattr(learner, "carried", ())},
            "optimizer": optimizer.state_dict(),
            "scaler": scaler.state_dict(),
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
            "metrics": self.metrics,
            "seconds": self.seconds,
        }
        state["run"] = config_sha256(self.folder)
        content = io.BytesIO()
        torch.save(state, content)
        digest = hashlib.sha256(content.getvalue()).hexdigest()  # torch.load does not see a flipped bit
        write(self.folder / "resume.pt", digest.encode() + b"\n" + content.getvalue())

    def restore(self, learner, optimizer, scaler):
        """Puts back what `keep` kept. ValueError: it does not fit."""
        state = self.state
        try:
            learner.load_state_dict(state["learner"])
            for name, value in state["carried"].items():
                setattr(learner, name, value)
            optimizer.load_state_dict(state["optimizer"])
            scaler.load_state_dict(state["scaler"])
            torch.set_rng_state(state["random"])
            if torch.cuda.is_available() and state["random_cuda"]:
                torch.cuda.set_rng_state_all(state["random_cuda"])
        except Exception as error:  # torch raises of every kind on a state of something else
            raise ValueError(
                f"{self.folder / 'resume.pt'} does not fit the run ({error}): add --force to start over"
            ) from error

    def prompts(self, name, learner):
        """Writes the learner's state dict as `name`.safetensors; the header says what it belongs to."""
        header = {key: self.config[key] for key in HEADER if self.config.get(key) is not None}
        state = {key: value.detach().cpu().contiguous() for key, value in learner.state_dict().items()}
        # One key: safetensors writes several in an order that changes from run to run.
        write(self.folder / f"{name}.safetensors", safetensors.torch.save(state, {"mao": json.dumps(header)}))

    def result(self, scores, learner):
        """Ends the row: writes result.json and returns it. scores: a dict."""
        found = write_result(self.folder, scores, learner, self.seconds, peak_mib(self.config["device"]))
        shutil.rmtree(self.previous, ignore_errors=True)
        return found


def write_result(folder, scores, learner, seconds, peak):
    """Writes result.json: the row's scores, a dict, and what they cost. Returns both in one. peak: MiB, or None."""
    result = {
        **scores,
        "learnable_parameters": sum(p.numel() for p in learner.parameters() if p.requires_grad),
        "seconds": seconds,
        "peak_mib": peak,
    }
    write(folder / "result.json", json.dumps(result, indent=1) + "\n")
    (folder / "resume.pt").unlink(missing_ok=True)
    return result


def read_header(path):
    """What a file of prompts belongs to, of the types `formats.HEADER`.

    FileNotFoundError: no such file. ValueError: not one that `Record.prompts` wrote.
    """
    if pathlib.Path(path).is_dir():
        raise ValueError(f"{path} is a folder: give a file of prompts in it, base.safetensors or new.safetensors")
    try:
        with safetensors.safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get("mao", "{}")
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} is missing: give prompts that run.py left, or run the row again") from error
    except (safetensors.SafetensorError, ValueError, OSError) as error:
        raise ValueError(f"{path} is not a file of prompts ({error}): give one that run.py wrote") from error
    advice = "give one that run.py wrote"
    header, needed = parse(text, f"the header of {path}", advice), ("backbone", "settings", "clip", "clip_sha256")
    if isinstance(header, dict) and not set(needed) <= header.keys():
        raise ValueError(f"{path} does not say which CLIP its prompts are for: {advice}")
    return check(header, HEADER, needed, f"the header of {path}", advice)


def read_prompts(path, backbone, clip_sha256):
    """The state dict that `Record.prompts` wrote.

    Errors as `read_header`; ValueError too: of another backbone or for another CLIP, or not of finite numbers.
    """
    header = read_header(path)
    if header["backbone"] != backbone:
        raise ValueError(f"the prompts in {path} are of the backbone '{header['backbone']}', not '{backbone}'")
    if header["clip_sha256"] != clip_sha256:
        raise ValueError(
            f"the prompts in {path} were tuned for another CLIP, '{header['clip']}' of SHA-256 "
            f"{header['clip_sha256'][:8]}...: give that one with --clip"
        )
    state = safetensors.torch.load_file(path)
    if not all(value.is_floating_point() and value.float().isfinite().all() for value in state.values()):
        raise ValueError(f"the prompts in {path} are not all finite numbers: run the row again")
    return state


def read_config(folder, advice=None):
    """config.json of a row's folder. advice: what to do. FileNotFoundError: not there. ValueError: broken."""
    path = pathlib.Path(folder) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: {advice or 'give a folder of a run, runs/...'}")
    needed = ("dataset", "backbone", "method", "settings", "clip", "clip_sha256", "classnames", "shots", "seed")
    return read_json(path, CONFIG, needed, advice or "run it again")


def read_result(folder):
    """result.json of a row's folder, or None where the row is not finished. ValueError: broken."""
    path = pathlib.Path(folder) / "result.json"
    if not path.exists():
        return None
    needed, advice = ("learnable_parameters", "seconds", "peak_mib"), "score the row again with --eval, without it"
    result = read_json(path, RESULT, needed, advice, others=Percent)
    whole = {
        "base": ("new", "h", "base_by_final_prompt"),
        "one_list": ("one_list_final",),
        "one_list_final": ("one_list",),
    }
    for score, others in whole.items():
        for other in others if score in result else ():
            if other not in result:
                raise ValueError(f"{path} is broken ('{other}' is missing beside '{score}'): {advice}")
    if not {"base", "accuracy", "average"} & result.keys():
        raise ValueError(f"{path} is broken (it holds no score): {advice}")
    return result


def read_metrics(folder):
    """The lines of metrics.jsonl, dicts; none where there is no such file. ValueError: broken."""
    path = pathlib.Path(folder) / "metrics.jsonl"
    if not path.is_file():
        return []
    lines, advice = path.read_text(errors="replace").splitlines(), "run the row again"
    needed = ("phase", "epoch", "loss", "seconds")
    return [check(parse(line, path, advice), METRICS, needed, path, advice) for line in lines]


def read_lists(folder):
    """lists.json of a row's folder, or None where it has none. ValueError: broken."""
    path = pathlib.Path(folder) / "lists.json"
    if not path.is_file():
        return None
    lists = read_json(path, LISTS, tuple(LISTS), "run the row again")
    if lists["split"] is not None:
        check(lists["split"], SPLIT, ("train", "test"), path, "run the row again")
    return lists


def config_sha256(folder):
    """The SHA-256 of a row's config.json, which tells its run from others."""
    return hashlib.sha256((folder / "config.json").read_bytes()).hexdigest()


def read_state(folder):
    """resume.pt of a row's folder. ValueError: broken, or of another run than config.json beside it."""
    path = pathlib.Path(folder) / "resume.pt"
    try:
        digest, _, content = path.read_bytes().partition(b"\n")
        if hashlib.sha256(content).hexdigest().encode() != digest:
            raise ValueError("its bytes are not those that were written")
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        if state["run"] != config_sha256(path.parent):
            raise ValueError("it is of another run than the config.json beside it")
        return state
    except Exception as error:  # torch raises of every kind on a broken file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} is broken ({reason}): add --force to start over") from error


def unfinished(config, metrics):
    """Why a row without a result cannot be scored: a clause, or None where it is tuned to its end."""
    epochs = [(line["phase"], line["epoch"]) for line in metrics]
    for phase in ("base", "new"):
        count = config.get(f"{phase}_epochs")
        if count is not None and (phase, count) not in epochs:
            last = f"epoch {epochs[-1][1]} of the {epochs[-1][0]} phase" if epochs else "nothing"
            return f"it was stopped after {last}: run.py with the same options and --resume goes on"
    return None


def restart_peak():
    """Lets peak memory start anew: a GPU's, and the process's where the system is Linux."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):
        pathlib.Path("/proc/self/clear_refs").write_text("5")


def peak_mib(device):
    """Peak memory in MiB, of the GPU or of the process, since `restart_peak`; None on Windows."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    if resource is None:
        return None
    unit = 2**20 if sys.platform == "darwin" else 2**10  # of ru_maxrss: bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
