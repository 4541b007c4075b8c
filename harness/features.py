"""Frozen CLIP's features of whole images, kept on disk, so that runs do not encode the same images again.

A file in the folder of `--cache` has the features of one list of images. Its name is a hash (`file_of`), and it begins
with a hash of its content. A file that does not match is ignored.
"""

import contextlib
import functools
import hashlib
import os
import pathlib
import platform
import sys

import filelock
import safetensors.torch
import torch

import encoders
from harness import clips, demo, image_files, images
from harness.cli import warn
from harness.files import atomic_write, fingerprint, make_folder
from harness.runs import versions

LIMIT = 2 * 2**30  # bytes of all files in the folder
CODE = [*(module.__file__ for module in (clips, demo, encoders, image_files, images)), __file__]
CODE = [pathlib.Path(file).read_text("utf-8") for file in CODE]
warn_once = functools.cache(warn)


def frozen_features(clip_model, paths, read, device, workers=0, title="images", cache=None):
    """Frozen CLIP's features of whole images as they leave the encoder: batches [B, d] on the device, a tuple.

    paths, read, workers, title: as of `images.whole_images`. cache: (settings after `machine_defaults`, the CLIP's
    SHA-256), with which they are kept on disk; None: they are not.
    """
    file = file_of(*cache, clip_model, paths, read) if cache else None
    with lock(file) if file else contextlib.nullcontext():
        found = load(file) if file else None
        if found is None:
            batches = images.whole_images(clip_model, paths, read, device, workers, title)
            found = torch.cat([encoders.encode_images_fast(clip_model, batch) for batch in batches])
            if file:
                save(file, found)
    # A copy is aligned in memory, as the encoder's result is: last digits may depend on it.
    return found.to(device, copy=True).split(images.WHOLE)


def lock(file):
    """A context that one process at a time can enter for a file: the others wait while it encodes.

    It does nothing where the folder has no locks.
    """
    try:
        make_folder(file.parent)
        one = filelock.FileLock(file.with_suffix(".lock"))
        with contextlib.suppress(filelock.Timeout):
            return one.acquire(timeout=1)
        print("waiting for a process that is encoding the same images; --cache none does not wait", file=sys.stderr)
        return one.acquire()
    except (OSError, NotImplementedError):  # `save` will say what is wrong
        return contextlib.nullcontext()


def file_of(args, sha256, clip_model, paths, read):
    """The file of the features of a list of images, a Path, which need not exist; None: they are not kept.

    Its name hashes the CLIP, the machine, versions and code. Image files are identified by path, size and times, demo
    images by path. Images that any other function reads are not kept.
    """
    visual, from_files = clip_model.visual, isinstance(read, image_files.FolderReader)
    if args.cache == "none" or not from_files and read is not demo.read:
        return None
    there = [path for path in map(read.folder.joinpath, paths) if path.is_file()] if from_files else []
    stats = [(stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) for stat in map(os.stat, there)]
    read_as = (os.path.realpath(read.folder), read.plain) if from_files else None
    gpu = torch.cuda.get_device_name(args.device) if args.device.startswith("cuda") else None
    machine = args.device, gpu, platform.node(), torch.get_num_threads(), torch.__config__.show()
    heads = [getattr(part, "num_heads", None) for part in visual.modules()]
    model = sha256, args.precision, torch.get_float32_matmul_precision(), str(visual), heads, visual.input_resolution
    key = fingerprint([model, machine, versions() | {"git": None}, CODE, read_as, paths, stats])
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return pathlib.Path(args.cache or os.path.join(home, "mao"), f"{key}.features")


def load(file):
    """The features that `save` wrote, [N, d] on the CPU; None where they are not there, or not as they were written."""
    with contextlib.suppress(OSError):
        os.utime(file)  # the least recently used go first
    try:
        content = file.read_bytes()
    except OSError:
        return None
    whole = content[:64] == hashlib.sha256(content[64:]).hexdigest().encode()
    return safetensors.torch.load(content[64:]).get(file.stem) if whole else None


def save(file, features):
    """Writes features [N, d], and removes the least recently used ones beyond `LIMIT`, and what killed writers left.

    Warns, once, where that is not possible.
    """
    content = safetensors.torch.save({file.stem: features.cpu()})
    try:
        make_folder(file.parent)
        with filelock.FileLock(file.parent / "lock", timeout=60):  # one process writes at a time
            atomic_write(file, hashlib.sha256(content).hexdigest().encode() + content)
            size = 0
            for other in sorted(file.parent.glob(f"*{'[0-9a-f]' * 64}.features*"), key=os.path.getmtime, reverse=True):
                size += other.stat().st_size
                if size > LIMIT or other.suffix == ".part":
                    other.unlink()
    except (OSError, NotImplementedError) as error:
        why = getattr(error, "strerror", None) or error.__cause__ or error  # without the file's name: it is said once
        warn_once(f"features are not kept in {file.parent} ({why}): give another --cache, or none")
