"""What a run leaves behind and reads back: one folder per row of the table.

    config.json         every setting in force, versions, git revision: `options.Config`
    metrics.jsonl       one line per epoch of each phase
    base.safetensors    the learned prompts after phase 1, new.safetensors after phase 2
    result.json         the scores, and what they cost
    lists.json          for images of your own: which images the run saw
    resume.pt           until the row is finished: what --resume continues from

Every file is written beside its place and then renamed, so none is ever half-written.
"""

import contextlib
import functools
import hashlib
import importlib.metadata
import io
import json
import math
import os
import pathlib
import platform
import re
import shutil
import subprocess
import sys
import time
import typing

import filelock
import msgspec
import safetensors
import safetensors.torch
import torch
from tqdm import tqdm

from harness.cli import printable, warn
from harness.files import Index, Lists, Name, Real, atomic_write, decode, fingerprint, make_folder, read_json
from harness.options import FIELDS, MACHINE_SETTINGS, Config, learner_settings, recipes, typed

try:
    import resource
except ImportError:  # Windows
    resource = None

PACKAGES = ["torch", "torchvision", "clip-anytorch", "sentence-transformers", "numpy", "pillow", "safetensors"]
COST = ["learnable_parameters", "seconds", "peak_mib"]  # in a result, beside the scores
NUMBERS = dict[str, Real | None]
OF_CLASS = typing.TypedDict("OF_CLASS", {"class": str, "accuracy": Real | None, "images": Index})
DETAILS = {"per_class": dict[str, list[OF_CLASS]]}  # what of result.json is no number
DETAILS |= dict.fromkeys(["one_list", "one_list_final", "balanced", "ece"], NUMBERS)


class Header(msgspec.Struct, omit_defaults=True):
    """What a file of prompts belongs to."""

    backbone: Name
    settings: dict[str, int | float | str | None]  # of the learner's class
    clip: Name
    clip_sha256: Name
    dataset: Name | None = None
    clip_activation: str | None = None
    clip_head_width: int | None = None
    classnames: list[Name] | None = None  # that phase 1 tuned on
    candidates: list[Name] | None = None  # that these prompts classify


# The settings of a row ------------------------------------------------------------------------------------------------


def row_settings(args, method, learner, task, clip_sha256):
    """config.json's content for one row of the table, a `Config`.

    args: `Settings` with all defaults filled in. learner: the class. task: a `data.Task`.
    """
    base, new = recipes(args, method, learner, bool(task.new_names))
    of_learner = learner_settings(args, learner)
    files = [pathlib.Path(value) for value in of_learner.values() if isinstance(value, str) and os.path.isfile(value)]
    return Config(
        **{**msgspec.structs.asdict(args), "method": method},
        learner_settings=of_learner,
        base=base,
        new=new,
        clip_sha256=clip_sha256,
        classnames=task.base_names,
        new_classnames=task.new_names,
        training_images=fingerprint([task.base_train, task.new_train]),
        test_images=fingerprint_of_tests(task),
        files_sha256={str(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in files},
        versions=versions(),
    )


def fingerprint_of_tests(task):
    """The SHA-256 of a task's lists of test images."""
    return fingerprint({name: test.items for name, test in task.tests.items()})


def folder_name(settings, method):
    """A row's folder: "demo-coop-mao-seed1", with settings that are not the default appended, and a hash of them.

    settings: as the user typed them. The hash separates values that look alike, such as two --root whose last folders
    have one name. A long name is cut.
    """
    always = {"dataset", "backbone", "method", "seed"}
    more = {name: value for name, value in typed(settings).items() if name not in MACHINE_SETTINGS | always}
    parts = [settings.dataset, settings.backbone, method, f"seed{settings.seed}"]
    for option, value in more.items():
        if option == "root" and settings.dataset != "folder":
            continue  # where the dataset lies is not what a person wants to see
        if isinstance(value, int | float) and not isinstance(value, bool):
            parts.append(f"{option}{value:g}")
        else:
            text = " ".join(value) if isinstance(value, tuple) else pathlib.PurePath(str(value)).name
            text = "" if value is True else re.sub(r"[^A-Za-z0-9.]+", "-", text).strip("-")
            parts.append(f"{option}-{text}".strip("-"))
    name = "-".join(parts).replace("_", "-")
    if not more:
        return name
    return f"{name[:120]}-{fingerprint({option: real_path(value) for option, value in more.items()})[:6]}"


def real_path(value):
    """A setting's value; of a path that exists the resolved one, so that two ways to write it are one."""
    return os.path.realpath(value) if isinstance(value, str) and os.path.exists(value) else value


@functools.cache
def versions():
    """Versions of Python and of the packages that matter, and the project's git revision (None outside git)."""
    found = {package: importlib.metadata.version(package) for package in PACKAGES}
    # `git describe --dirty` locks the index, and a killed run would leave the lock.
    git = ["git", "--no-optional-locks", "status", "--porcelain=v2", "--branch", "--untracked-files=no"]
    try:
        told = subprocess.check_output(git, cwd=pathlib.Path(__file__).parent, text=True, stderr=subprocess.DEVNULL)
    except (OSError, subprocess.CalledProcessError):
        told = ""
    head, *changed = [line for line in told.splitlines() if line.startswith("# branch.oid") or line[0] != "#"] or [""]
    revision = head.removeprefix("# branch.oid ") + "-dirty" * bool(changed)
    return {"python": platform.python_version(), **found, "git": revision or None}


# The folder -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def run_lock(folder):
    """Keeps other runs out of a folder. ValueError: another run has it. OSError: there is no place for the folder.

    The lock is a file beside the folder, and ends with the process however that ends. Where a disk cannot lock, or
    nothing can be written, it warns and goes on: a finished run can be shown.
    """
    make_folder(folder.parent)
    lock = filelock.FileLock(folder.with_name(f".{folder.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout as error:
        raise ValueError(f"another run is writing into {folder}: wait for it, or give another --out") from error
    except (OSError, NotImplementedError) as error:
        warn(f"{folder} cannot be locked ({error}): start no other run that writes there, or give another --out")
    try:
        yield
    finally:
        if lock.is_locked:
            pathlib.Path(lock.lock_file).unlink(missing_ok=True)
            lock.release()


class Record:
    """Writes the folder of one row, and measures its time and memory.

    config: an `options.Config`. title: of the row, for the progress. resume: continue a stopped run. force: tune again
    what is there; the finished run is then kept as `<folder>.previous` until this one is finished too. `result` is what
    a finished run of these settings left, a dict, or None. ValueError: the folder holds a run of other settings, even
    with force; or a stopped run, and neither resume nor force is given.
    """

    def __init__(self, folder, config, title="", resume=False, force=False):
        self.folder, self.config, self.metrics, self.seconds = pathlib.Path(folder), config, [], 0.0
        self.title = title
        self.previous = self.folder.with_name(self.folder.name + ".previous")
        self.result = self.state = None
        restart_peak()
        make_folder(self.folder)
        if (self.folder / "result.json").exists():
            self.refuse_others(self.folder, "finished")
            if not force:
                self.result = read_result(self.folder)
                with contextlib.suppress(OSError):  # the folder may be one to read alone
                    (self.folder / "resume.pt").unlink(missing_ok=True)  # killed between the two
                return
            if self.previous.is_dir():
                self.refuse_others(self.previous, "finished")
                shutil.rmtree(self.previous)
            os.replace(self.folder, self.previous)
        elif (self.folder / "resume.pt").exists():
            with contextlib.suppress(FileNotFoundError):  # without config.json nothing can continue it
                self.refuse_others(self.folder, "stopped")
            if not force:
                self.state = read_state(self.folder)
                if not resume:
                    raise ValueError(
                        f"{self.folder} holds a run of these settings that was stopped after epoch "
                        f"{self.state['epoch']} of the {self.state['phase']} phase: add --resume to continue it, or "
                        "--force to start over"
                    )
                self.metrics, self.seconds = self.state["metrics"], self.state["seconds"]
                self.write_metrics()
                return
        if resume and config.base:
            print(printable(f"{title}: no stopped run to resume, so it starts{self.nearest_run()}"), file=sys.stderr)
        make_folder(self.folder)
        for name in ("metrics.jsonl", "base.safetensors", "new.safetensors", "result.json", "lists.json", "resume.pt"):
            (self.folder / name).unlink(missing_ok=True)  # what a stopped run left
        atomic_write(self.folder / "config.json", json.dumps(msgspec.to_builtins(config), indent=1) + "\n")

    def refuse_others(self, folder, kind):
        """ValueError: the run in a folder has other settings, or a file that they name has other content now.

        kind: "finished", or "stopped": then a warning says if it would continue on another device, with other threads
        or versions.
        """
        there, here = (msgspec.to_builtins(one) for one in (read_config(folder), self.config))
        differing = {name for name in here if real_path(there[name]) != real_path(here[name])}
        others = ", ".join(sorted(differing - MACHINE_SETTINGS - {"versions"}))
        if others:
            raise ValueError(f"{folder} holds a {kind} run of another {others}: give another --out, or move it")
        bits = sorted(differing & {"device", "threads", "versions"})
        if kind == "stopped" and bits:
            warn(f"the stopped run had another {', '.join(bits)}: it may not continue bit-identically")

    def nearest_run(self):
        """What the most similar run beside this one has for other settings: the end of a sentence, or nothing."""
        here, found = msgspec.to_builtins(self.config), []
        for path in self.folder.parent.glob("*/config.json"):
            with contextlib.suppress(ValueError, OSError):  # broken, or of another version
                there = msgspec.to_builtins(read_config(path.parent))
                names = [n for n in FIELDS if n not in MACHINE_SETTINGS and real_path(there[n]) != real_path(here[n])]
                if names and "method" not in names:
                    told = ", ".join(f"{name} {there[name]} instead of {here[name]}" for name in names)
                    found.append((len(names), f"; {path.parent.name} has {told}"))
        return min(found, default=(0, ""))[1]

    def write_lists(self, lists):
        """Writes lists.json. lists: a `Lists`, or None where there is nothing to keep."""
        if lists is not None:
            atomic_write(self.folder / "lists.json", msgspec.json.encode(lists) + b"\n")

    def epochs_left(self, phase, epochs, steps, learner, optimizer, scaler):
        """The epochs 1, 2, ... of a phase, "base" or "new", as a range; of a stopped run, which is restored, the rest.

        steps: of an epoch.
        """
        done = 0
        if self.state is not None and self.state["phase"] == phase:
            state, done = self.state, self.state["epoch"]
            for restored, name in ((learner, "learner"), (optimizer, "optimizer"), (scaler, "scaler")):
                restored.load_state_dict(state[name])
            for name, value in state["carried"].items():
                setattr(learner, name, value)
            torch.set_rng_state(state["random"])  # learners draw on the CPU alone
        config, batches = self.config, "labeled images" if phase == "base" else "pseudo-labeled images"
        if phase == "base" and config.method == "mao" and not config.no_base:
            batches = "hard negatives" if config.sampler == "hard" else config.sampler
        number = f"phase {1 if phase == 'base' else 2} of {2 if config.new else 1}"
        self.told = f"{self.title}, {number}: {batches}"
        self.bar = tqdm(total=epochs * steps, initial=done * steps, desc=self.told, unit="batch", disable=None)
        self.losses, self.sizes, self.started = [], [], time.perf_counter()
        return range(done + 1, epochs + 1)

    def step(self, loss=None, candidates=0):
        """Notes the loss of a step, and how many classes it ran over. loss: None where the step was left out."""
        self.bar.update()
        if loss is not None:
            self.losses.append(loss.detach())
            self.sizes.append(candidates)

    def end_epoch(self, phase, epoch, learner, optimizer, scaler, **more):
        """Keeps the prompts, a line of metrics with `more` in it, and what --resume needs. ValueError: it diverged."""
        loss = torch.stack(self.losses).mean().item() if self.losses else 0.0  # no loss: all steps were left out
        if not math.isfinite(loss) or not all(p.isfinite().all() for p in learner.parameters()):
            kept = "nothing to keep yet" if epoch == 1 else f"epoch {epoch - 1}'s prompts are kept in {self.folder}"
            raise ValueError(f"the {phase} phase diverged in epoch {epoch}, its loss is {loss}: lower --lr; {kept}")
        told = f"{self.told}, epoch {epoch}/{getattr(self.config, phase).epochs}, loss {loss:.2f}"
        self.bar.set_description(told)
        if self.bar.disable:  # stderr is no terminal
            print(told, file=sys.stderr, flush=True)
        self.save_prompts(phase, learner)
        seconds = time.perf_counter() - self.started
        sizes, lr = self.sizes or [0], optimizer.param_groups[0]["lr"]
        line = {"phase": phase, "epoch": epoch, "loss": loss, "lr": lr, "candidates": sum(sizes) / len(sizes)}
        self.metrics.append(json.dumps({**line, "seconds": seconds, **more}))
        self.seconds += seconds
        self.write_metrics()
        state = {
            "phase": phase,
            "epoch": epoch,
            "learner": learner.state_dict(),
            "carried": {name: getattr(learner, name) for name in learner.carried},
            "optimizer": optimizer.state_dict(),
            "scaler": scaler.state_dict(),
            "random": torch.get_rng_state(),
            "metrics": self.metrics,
            "seconds": self.seconds,
            "run": config_sha256(self.folder),
        }
        content = io.BytesIO()
        torch.save(state, content)
        digest = hashlib.sha256(content.getvalue()).hexdigest()  # torch.load does not see a flipped bit
        atomic_write(self.folder / "resume.pt", digest.encode() + b"\n" + content.getvalue())
        self.losses, self.sizes, self.started = [], [], time.perf_counter()
        if epoch == getattr(self.config, phase).epochs:
            self.bar.close()

    def write_metrics(self):
        atomic_write(self.folder / "metrics.jsonl", "\n".join(self.metrics) + "\n")

    def save_prompts(self, name, learner):
        """Writes the learner's state dict as `name`.safetensors; its header says what it belongs to."""
        config = msgspec.structs.asdict(self.config)
        known = {field: config[field] for field in Header.__struct_fields__ if field in config}
        names = self.config.classnames if name == "base" else self.config.new_classnames
        header = msgspec.to_builtins(Header(settings=config["learner_settings"], candidates=names, **known))
        state = {key: value.detach().cpu().contiguous() for key, value in learner.state_dict().items()}
        # One key: safetensors writes several in an order that changes from run to run.
        atomic_write(self.folder / f"{name}.safetensors", safetensors.torch.save(state, {"mao": json.dumps(header)}))

    def finish(self, scores, learner):
        """Ends the row: writes result.json, the scores, a dict, and what they cost."""
        learnable = sum(p.numel() for p in learner.parameters() if p.requires_grad)
        cost = {"learnable_parameters": learnable, "seconds": self.seconds, "peak_mib": peak_mib(self.config.device)}
        self.result = {**scores, **cost}
        atomic_write(self.folder / "result.json", json.dumps(self.result, indent=1) + "\n")
        (self.folder / "resume.pt").unlink(missing_ok=True)
        shutil.rmtree(self.previous, ignore_errors=True)


# Reading it back ------------------------------------------------------------------------------------------------------


def read_header(path):
    """The `Header` of a file of prompts. FileNotFoundError: no such file. ValueError: `Record` did not write it."""
    advice = "give base.safetensors or new.safetensors of a run's folder"
    try:
        with safetensors.safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get("mao", "{}")
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} is missing: {advice}") from error
    except (safetensors.SafetensorError, ValueError, OSError) as error:
        raise ValueError(f"{path} is not a file of prompts ({error}): {advice}") from error
    return decode(text, Header, f"the header of {path}", advice)


def read_prompts(path, backbone, clip_sha256):
    """The state dict that `Record.save_prompts` wrote.

    Errors as `read_header`; ValueError too: of another backbone, or for another CLIP.
    """
    header = read_header(path)
    if header.backbone != backbone:
        raise ValueError(f"the prompts in {path} are of the backbone '{header.backbone}', not '{backbone}'")
    if header.clip_sha256 != clip_sha256:
        raise ValueError(
            f"the prompts in {path} were tuned for another CLIP, '{header.clip}' of SHA-256 "
            f"{header.clip_sha256[:8]}...: give that one with --clip"
        )
    return safetensors.torch.load_file(path)


def build_learner(learners, backbone, settings, clip_model, classnames, states, where):
    """The prompt learner that a file, `where`, names. settings: of its class, a dict. states: of `read_prompts`.

    learners: {name: class}. ValueError: a backbone or setting that is not known here, or prompts that do not fit.
    """
    if backbone not in learners:
        raise ValueError(f"{where} is of a backbone '{backbone}'; the known ones are {', '.join(learners)}")
    try:
        learner = learners[backbone](clip_model, classnames, **settings)
        for state in states:  # the last ones stay
            learner.load_state_dict(state)
        return learner
    except (TypeError, RuntimeError, ValueError, ArithmeticError, MemoryError) as error:
        raise ValueError(f"{where} does not fit {backbone} or its prompts ({error}): run the row again") from error


def prompt_files(folder, config):
    """{"base": file of the prompts that score base classes, "new": that of new classes} of a row; config: its own."""
    return {"base": folder / "base.safetensors", "new": folder / f"{'new' if config.new else 'base'}.safetensors"}


def read_learner(folder, config, learners, clip_model, sha256):
    """(learner, its state dicts {"base", "new"}) of a finished row that was tuned. Errors: of the functions above."""
    states = {half: read_prompts(file, config.backbone, sha256) for half, file in prompt_files(folder, config).items()}
    about = config.backbone, config.learner_settings, clip_model, config.classnames, states.values()
    return build_learner(learners, *about, folder / "config.json"), states


def read_config(folder):
    """config.json of a row's folder, a `Config`. FileNotFoundError: not there. ValueError: broken."""
    advice = "give the folder of a run of this version, or move it away and run it again"
    return read_json(pathlib.Path(folder) / "config.json", Config, advice)


def read_result(folder):
    """result.json of a row's folder, a dict, or None where the row is not finished. ValueError: broken."""
    path, advice = pathlib.Path(folder) / "result.json", "move the folder away and run it again"
    if not path.exists():
        return None
    result = read_json(path, dict, advice)
    try:
        for key, value in result.items():
            msgspec.convert(value, DETAILS.get(key, Index | Real | None))
    except (msgspec.ValidationError, UnicodeError) as error:
        raise ValueError(f"{path} is broken ({key}: {error}): {advice}") from error
    if None in (result.get("seconds"), result.get("learnable_parameters")) or "peak_mib" not in result:
        raise ValueError(f"{path} is broken (it lacks what the row cost): {advice}")
    return result


def read_metrics(folder):
    """The lines of metrics.jsonl, dicts."""
    return [json.loads(line) for line in (pathlib.Path(folder) / "metrics.jsonl").read_text().splitlines()]


def read_lists(folder):
    """The `Lists` of a row's folder, or None where it has none. ValueError: broken."""
    path = pathlib.Path(folder) / "lists.json"
    return read_json(path, Lists, "run the row again") if path.is_file() else None


def check_data(folder, config, task):
    """ValueError: a `data.Task` has other classes or other test images than the run in `folder`."""
    if (task.base_names, task.new_names) != (config.classnames, config.new_classnames):
        names = ", ".join([*task.base_names, *task.new_names][:5])
        raise ValueError(f"{folder} was tuned on other classes than there are now ({names}, ...): restore the data")
    if fingerprint_of_tests(task) != config.test_images:
        raise ValueError(f"{folder} was scored on other test images than the lists have now: restore the data")


def warn_of_difference(folder, result, scores):
    """Warns where scores differ from result.json's, in the digits that are shown."""
    for name, value in scores.items():
        there = result.get(name)
        if isinstance(value, float) and isinstance(there, float | int) and f"{there:.2f}" != f"{value:.2f}":
            warn(f"{folder}/result.json has {there:.2f} for {name}, and this is {value:.2f}: another machine or CLIP")
            return


def config_sha256(folder):
    """The SHA-256 of a row's config.json, which tells its run from others."""
    return hashlib.sha256((folder / "config.json").read_bytes()).hexdigest()


def read_state(folder):
    """resume.pt of a row's folder. ValueError: broken, or of another run than config.json beside it."""
    path = folder / "resume.pt"
    try:
        digest, _, content = path.read_bytes().partition(b"\n")
        if hashlib.sha256(content).hexdigest().encode() != digest:
            raise ValueError("its bytes are not those that were written")
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        if state["run"] != config_sha256(folder):
            raise ValueError("it is of another run than the config.json beside it")
        return state
    except Exception as error:  # torch raises errors of every kind on a broken file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} is broken ({reason}): add --force to start over") from error


def restart_peak():
    """Starts the measurement of peak memory anew: a GPU's, and the process's where the system is Linux."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):
        pathlib.Path("/proc/self/clear_refs").write_text("5")


def peak_mib(device):
    """Peak memory in MiB, of the GPU or of the process, since `restart_peak`; None on Windows."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 2**20
    if resource is None:
        return None
    unit = 2**20 if sys.platform == "darwin" else 2**10  # of ru_maxrss: bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
