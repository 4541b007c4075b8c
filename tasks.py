"""The task of a run: what training sees, and what only the evaluation reads, in each protocol.

Base-to-new is Table 1, cross-dataset is Table 2, few-shot is what CoOp's users run; and there is MAO on new classes of
one's own, of which there are images without any labels.
"""

import os
import pathlib
from dataclasses import dataclass, field
from typing import Callable, NamedTuple

import demo
from data import DEMOS, LAYOUTS, class_folders, class_names, few_shot, halves, lines, open_dataset, pictures, select
from loaders import PICTURES, FolderReader

PROTOCOLS = ["base-to-new", "cross-dataset", "few-shot"]


class TestSet(NamedTuple):
    """Test images of some classes, and what reads them. Only evaluate.py opens it."""

    names: list
    items: list  # [path, label, name]
    read: Callable  # path -> RGB picture
    template: str  # of zero-shot CLIP


@dataclass
class Task:
    """What training sees, and what only the evaluation reads."""

    crop_scale: tuple
    base_names: list
    base_train: list  # [path, label, name] of the labelled images
    read: Callable  # path -> RGB picture
    tests: dict  # {score: TestSet}; "base" is scored by the prompts after phase 1, "new" by the last
    new_names: list = field(default_factory=list)
    new_train: list = field(default_factory=list)  # paths of the unlabelled new images, nothing else
    new_read: Callable | None = None
    new_answers: list | None = None  # their labels, where known: for evaluate.pseudo_label_accuracy, and nobody else


def test_set(source, labels=None):
    """The test images of some labels of a `Source`, or of all."""
    names = class_names(source)
    labels = list(names) if labels is None else labels
    return TestSet([names[label] for label in labels], select(source.split["test"], labels), source.read,
                   source.template)


def open_task(source, shots=16, unlabeled_shots=None, seed=1):
    """Base-to-new: the few-shot draw of a `Source` for a seed, halved.

    ValueError: fewer than 2 base or 1 new classes, or shots below 1.
    """
    if min(shots, unlabeled_shots or shots) < 1:
        raise ValueError("at least 1 shot a class is needed: choose --shots and --unlabeled-shots of 1 or more")
    base, new = halves(source.split["train"])
    tests = {"base": test_set(source, base), "new": test_set(source, new)}
    if len(base) < 2 or not new:
        raise ValueError(f"{len(base + new)} classes are too few to halve into base and new: 3 are the least")
    new_items = select(few_shot(source.split, unlabeled_shots or shots, seed)["train"], new)
    return Task(
        source.crop_scale, tests["base"].names, select(few_shot(source.split, shots, seed)["train"], base),
        source.read, tests, tests["new"].names, [path for path, _, _ in new_items], source.read,
        [label for _, label, _ in new_items])


def open_whole_task(source, shots, seed, tests):
    """All classes of a `Source`, few-shot: the base phase alone tunes on them. tests: {score: Source} to score on.

    With other datasets among the `tests` this is cross-dataset, with the source alone few-shot.
    """
    names = class_names(source)
    if len(names) < 2:
        raise ValueError("1 class is too few to tune on: 2 are the least")
    return Task(
        source.crop_scale, list(names.values()), select(few_shot(source.split, shots, seed)["train"], list(names)),
        source.read, {score: test_set(scored) for score, scored in tests.items()})


def open_unlabeled_task(source, shots, seed, unlabeled, new_classes, new_test=None):
    """All classes of a `Source` are base. The new ones stand in the text file `new_classes`, a name a line, and
    `unlabeled` is a folder of images of them without labels, its subfolders included.

    new_test: a folder of class folders with those names, to score New on; without it New stays unknown.
    """
    task = open_whole_task(source, shots, seed, {"base": source})
    task.new_names = read_names(new_classes)
    task.new_train, task.new_read = find_pictures(unlabeled), FolderReader(pathlib.Path(unlabeled))
    if new_test is not None:
        if not pathlib.Path(new_test).is_dir():
            raise FileNotFoundError(f"{new_test} is not a folder: give --new-test a folder of class folders")
        items = class_folders(pathlib.Path(new_test))["all"]
        for _, _, name in items:
            if name not in task.new_names:
                raise ValueError(f"{new_test} holds a class '{name}' that {new_classes} does not name: "
                                 "name it there, or take the folder out")
        items = [[path, task.new_names.index(name), name] for path, _, name in items]
        task.tests["new"] = TestSet(task.new_names, items, FolderReader(pathlib.Path(new_test)), source.template)
    return task


def read_names(path):
    """Class names of a text file, a line each, in its order. ValueError, FileNotFoundError: none, or one twice."""
    try:
        names = lines(pathlib.Path(path))
    except (OSError, UnicodeDecodeError) as error:
        raise FileNotFoundError(f"cannot read class names in {path} ({getattr(error, 'strerror', None) or error}): "
                                "give a text file in UTF-8 with a name a line") from error
    if not names:
        raise ValueError(f"{path} is empty: give a text file with a class name a line")
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{path} names '{name}' twice: give each class once")
    return names


def find_pictures(folder):
    """Paths of all pictures in a folder and below it, relative to it, sorted. Errors: no folder, or no picture."""
    folder = pathlib.Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder: give one that holds images")
    found = sorted(os.path.relpath(os.path.join(inner, name), folder)
                   for inner, _, _ in os.walk(folder) for name in pictures(inner))
    if not found:
        raise ValueError(f"{folder} holds no images ({', '.join(sorted(PICTURES))}): give a folder that does")
    return found


def task_of(settings, download=False):
    """The task that a run's settings name: a dict of run.py's dataset, root, protocol, ..., as config.json has it.

    ValueError, FileNotFoundError: as the functions above, settings that do not go together, or a missing image.
    """
    optional = dict.fromkeys(("unlabeled", "new_classes", "new_test"))
    settings = {"protocol": PROTOCOLS[0], "targets": ["all"], **optional, **settings}
    name, root, shots, seed, protocol, targets, unlabeled, new_classes, new_test = (settings[key] for key in (
        "dataset", "root", "shots", "seed", "protocol", "targets", *optional))
    if name == "folder" and not root:
        raise ValueError("--dataset folder needs --root, the folder of your class folders")
    if bool(unlabeled) != bool(new_classes) or new_test and not unlabeled:
        raise ValueError("--unlabeled DIR and --new-classes FILE go together (and --new-test with them): give both")
    for key, unset in (("unlabeled", None), ("no_new", False), ("no_reg_new", False), ("pseudo_labeler", "clip")):
        if settings.get(key, unset) != unset and protocol != "base-to-new":
            raise ValueError(f"--{key.replace('_', '-')} has no place in the {protocol} protocol: it has no new phase")
    if targets != ["all"] and protocol != "cross-dataset":
        raise ValueError(f"--targets has no place in the {protocol} protocol: add --protocol cross-dataset")
    root = root or "data"

    def opened(name):  # EuroSAT's 90 MB are fetched without being asked
        asked = download or name == "eurosat" and not pathlib.Path(root, "eurosat", "2750").exists()
        return open_dataset(name, root, asked)

    source = opened(name)
    if protocol == "cross-dataset":
        if name == "folder":
            raise ValueError("--dataset folder has no targets for the cross-dataset protocol: --root is its own")
        same = {"demo", f"demo-{demo.DEFAULT}"} if name in ("demo", f"demo-{demo.DEFAULT}") else {name}
        if targets == ["all"]:  # the others of its kind
            targets = [other for other in (DEMOS[1:] if name in DEMOS else LAYOUTS) if other not in same]
        for target in (target for target in targets if target in same):
            raise ValueError(f"--targets {target} is the source itself: give others")
        task = open_whole_task(source, shots, seed, {name: source, **{target: opened(target) for target in targets}})
    elif protocol == "few-shot":
        task = open_whole_task(source, shots, seed, {"accuracy": source})
    elif unlabeled:
        task = open_unlabeled_task(source, shots, seed, unlabeled, new_classes, new_test)
    else:
        task = open_task(source, shots, settings["unlabeled_shots"], seed)
    look_for_images(task)
    return task


def look_for_images(task):
    """Errors now and not in the midst of a run: a training image is no picture, or a test image is missing."""
    for read, paths in ((task.read, [path for path, _, _ in task.base_train]), (task.new_read, task.new_train)):
        if isinstance(read, FolderReader):  # the demo's are drawn
            for path in paths:
                read(path, decode=False)
    for _, items, read, _ in task.tests.values():
        if isinstance(read, FolderReader):
            missing = [path for path, _, _ in items if not os.path.isfile(read.folder / path)]
            if missing:
                raise FileNotFoundError(
                    f"{len(missing)} of {len(items)} test images are missing, the first is {read.folder / missing[0]}: "
                    "complete the folder, or take them out of the split")
