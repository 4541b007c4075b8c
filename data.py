"""What a run sees of its data: a dataset's lists, CoOp's few-shot draw and base/new halves, and each protocol's task.

    python data.py eurosat --root DIR               what a run would see: classes, halves, images, (b, K)
    python data.py eurosat --root DIR --list base   one image per line: path, label, class name
    python data.py dtd --root DIR --download        fetches it first, where it has an open address

Layout, splits and draws are CoOp's, which the paper and everyone it compares with use (section 4.1).
"""

if __name__ == "__main__":
    from cli import catch_early_interrupt

    catch_early_interrupt()  # the imports below take seconds

import collections
import csv
import difflib
import math
import os
import pathlib
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import demo
from cli import Parser, at_least, end, printable, warn
from encoders import as_clip_reads, name_finder
from formats import NAMES, check, once, read_json
from images import FolderReader, find_images, image_paths
from layouts import (
    LAYOUTS,
    by_label,
    class_folders,
    fetch,
    find_split_file,
    keep_split,
    read_lines,
    read_split,
    split_by_rule,
)
from record import fingerprint
from sampler import paper_batch

DEMOS = ["demo"] + [f"demo-{domain}" for domain in demo.LIGHTS]
DATASETS = [*DEMOS, *LAYOUTS, "folder"]
PROTOCOLS = ["base-to-new", "cross-dataset", "few-shot"]

# Datasets -------------------------------------------------------------------------------------------------------------


class Source(NamedTuple):
    """A dataset as its files state it: `split` maps "train", "val" and "test" to lists of [path, label, class name]."""

    split: dict
    image_folder: pathlib.Path | None  # None: the demo, whose images are drawn
    template: str  # of zero-shot CLIP
    crop_scale: tuple = (0.08, 1.0)  # of the random resized crop, as shares of the area
    plain: bool = False  # whether images are read as CoOp reads them, not as a viewer shows them

    @property
    def read(self):
        """What reads an image: path -> RGB image (PIL)."""
        return demo.read if self.image_folder is None else FolderReader(self.image_folder, self.plain)


def open_dataset(name, root="data", download=False, names=None, template=None, kept=None):
    """The `Source` of dataset `name` under `root`. Reads lists alone, never an image.

    name: of `DATASETS`; "folder" is any folder, `root`/<class name>/*.jpg or `root`/train and `root`/test with such
    class folders. download: fetches what is missing, where a program can. names, template: of "folder" alone, a file
    of `read_folder_names` and the words of zero-shot CLIP. kept: of "folder" alone, the split that a run kept, which
    then stands for what the folder holds now. ValueError: unknown name, or a broken list.
    FileNotFoundError: the dataset is not there; says what was looked for and where to get it.
    """
    for option, value in (("--names", names), ("--template", template)):
        if value is not None and name != "folder":
            raise ValueError(f"{option} is for --dataset folder, and {name} has its own: leave it out")
    if template is not None:
        words = template.replace("{}", "")
        if template.count("{}") != 1 or not words.strip() or "{" in words or "}" in words:
            raise ValueError(
                f"--template '{template}' needs {{}} once, where the name goes, words around it, and no other braces"
            )
    root = pathlib.Path(root)
    if name in DEMOS:
        domain = demo.DEFAULT if name == "demo" else name.removeprefix("demo-")
        return Source(demo.split(domain), None, demo.TEMPLATE, demo.CROP_SCALE)
    if name == "folder":
        split = kept or folder_split(root, None if names is None else read_folder_names(names))
        source = Source(split, root, template or "a photo of a {}.")
    elif name in LAYOUTS:
        layout, folder = LAYOUTS[name], root / LAYOUTS[name].folder
        if download:
            fetch(name, folder)
        source = Source(read_split(name, folder), folder / layout.images, layout.template, plain=True)
    else:
        near = difflib.get_close_matches(name, DATASETS) or DATASETS
        raise ValueError(f"there is no dataset '{name}': did you mean {' or '.join(near)}?")
    where = root if kept is None else "the run's lists.json"
    if name in LAYOUTS:
        where = find_split_file(name, folder) or folder
    check_classes(source, where)
    if name in LAYOUTS:
        keep_split(name, folder, source.split)
    return source


def folder_split(root, renamed=None):
    """The split of one's own folder: `root`/train and `root`/test, or class folders split by CoOp's rule.

    renamed: {folder: class name}, of all folders, or None. A class of test is that of train which is named so, or
    which CLIP reads so. FileNotFoundError: no such folder. ValueError: no class folders, or one without images or name.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is not a folder: give --root the folder of your class folders")
    if not (root / "train").is_dir() or not (root / "test").is_dir():
        return split_by_rule(named_folders(root, renamed))
    train, test = (named_folders(root / part, renamed)["all"] for part in ("train", "test"))
    find = name_finder(list(dict.fromkeys(name for _, _, name in train)))
    test = [[path, label, find(name) or name] for path, label, name in test]
    label_of = {name: label for label, name in enumerate(sorted({name for _, _, name in train + test}))}
    split = {"val": []}
    for part, items in (("train", train), ("test", test)):
        split[part] = [[f"{part}/{path}", label_of[name], name] for path, _, name in items]
    return split


def named_folders(folder, renamed):
    """`class_folders`, where `renamed` must have a name for each, unless it is None. ValueError: it has not."""
    lists = class_folders(folder, renamed)
    for path, _, _ in lists["all"]:
        inner = path.split("/")[0]
        if renamed is not None and inner not in renamed:
            raise ValueError(f"--names has no name for the class folder {folder / inner}: add one")
    return lists


def read_folder_names(path):
    """{folder: class name} of a JSON object, or of a CSV file with a folder and a name per line.

    FileNotFoundError: it cannot be read. ValueError: it is something else.
    """
    advice = 'give JSON, {"folder": "name", ...}, or CSV, folder,name in each line'
    try:
        text = pathlib.Path(path).read_text(encoding="utf-8-sig")
        if text.lstrip().startswith("{"):
            found = read_json(path, NAMES, advice=advice, option="--names ")
        else:
            found = check(once(csv.reader(text.splitlines())), NAMES, (), f"--names {path}", advice)
    except OSError as error:
        raise FileNotFoundError(f"cannot read --names {path} ({error.strerror}): {advice}") from error
    except (ValueError, csv.Error) as error:
        raise ValueError(f"--names {path} cannot be read ({error}): {advice}") from error
    if not found:
        raise ValueError(f"--names {path} is empty: {advice}")
    found = {folder.strip(): name.strip() for folder, name in found.items()}
    name = twice(found.values())
    if name is not None:
        raise ValueError(f"--names {path} gives two folders the name '{name}': give each class its own")
    return found


def twice(names):
    """The first of some names that is among them more than once, or None."""
    return next((name for name, count in collections.Counter(names).items() if count > 1), None)


def class_names(source):
    """{label: class name} of a `Source`, in the order of the labels."""
    names = {}
    for _, label, name in source.split["train"]:
        names.setdefault(label, name)
    return dict(sorted(names.items()))


def check_classes(source, where):
    """ValueError: a class of a `Source` has no training or no test image, or a label has two names.

    where: of the lists, for the sentence. Warns about names that are one to CLIP.
    """
    names = class_names(source)
    test_names = {label: name for _, label, name in source.split["test"]}
    for part, items in source.split.items():
        for path, label, name in items:
            if names.get(label, name) != name or test_names.get(label, name) != name:
                known = names.get(label, test_names.get(label))
                raise ValueError(
                    f"{where}: the {part} list names the class {label} '{name}' at {path}, where it is '{known}' "
                    "elsewhere: mend it, or get CoOp's own again"
                )
    for label, name in names.items():
        if label not in test_names:
            raise ValueError(f"{where}: the class '{name}' has no test image: add some, or take the class out")
    for label, name in sorted(test_names.items()):
        if label not in names:
            raise ValueError(f"{where}: the class '{name}' has no training image: add some, or take the class out")
    warn_of_twins(names.values())


def warn_of_twins(names, known=None):
    """Warns about class names that CLIP cannot tell apart: among `names`, or of `names` and those `known`."""
    first = {as_clip_reads(name): name for name in known or ()}
    for name in names:
        other = first.get(as_clip_reads(name))
        if other is not None:
            warn(f"the classes '{other}' and '{name}' have one name to CLIP: no prompt can tell them apart")
        elif known is None:
            first[as_clip_reads(name)] = name


# The few-shot draw and the halves -------------------------------------------------------------------------------------


def few_shot(split, shots, seed):
    """CoOp's draw: {"train": `shots` items per class, "val": min(shots, 4)}. A class that has fewer gives all.

    One generator draws first from the train list, then from the val list, in the order of the labels there, by first
    appearance (Dassl's generate_fewshot_dataset, which CoOp calls). Nothing here tunes on "val"; it is drawn for CoOp's
    lists. split: {"train", "val"}, lists of [path, label, class name]. seed: CoOp's are 1, 2 and 3.
    """
    rng, drawn = random.Random(seed), {"train": [], "val": []}
    for part, count in (("train", shots), ("val", min(shots, 4))):
        for group in by_label(split.get(part, [])):
            drawn[part] += rng.sample(group, count) if len(group) >= count else group
    return drawn


def halves(items):
    """The sorted labels of a dataset's items in two lists: the first ceil(n/2) are base, the rest new (section 4.2)."""
    labels = sorted({label for _, label, _ in items})
    middle = math.ceil(len(labels) / 2)
    return labels[:middle], labels[middle:]


def select(items, labels):
    """The items [path, label, class name] of some classes, with labels that restart at 0 in the order of `labels`."""
    position = {label: index for index, label in enumerate(labels)}
    return [[path, position[label], name] for path, label, name in items if label in position]


# The task of a run ----------------------------------------------------------------------------------------------------


class TestSet(NamedTuple):
    """Test images of some classes, and what reads them. Only evaluate.py opens it."""

    names: list
    items: list  # [path, label, class name]
    read: Callable  # path -> RGB image
    template: str  # of zero-shot CLIP


@dataclass
class Task:
    """What training sees, and what only the evaluation reads."""

    crop_scale: tuple  # of the random resized crop, as shares of the area
    base_names: list
    base_train: list  # [path, label, class name] of the labeled images
    read: Callable  # path -> RGB image
    tests: dict  # {score: TestSet}; "base" is scored by the prompts after phase 1, "new" by the last
    new_names: list = field(default_factory=list)
    new_train: list = field(default_factory=list)  # paths of the unlabeled new images, nothing else
    new_read: Callable | None = None
    new_answers: list | None = None  # their labels, where known: for evaluate.pseudo_label_accuracy, and nobody else
    label_template: str = "a photo of a {}."  # the foundation CLIP's, of Eq. 7 (section 2)
    lists: dict | None = None  # of images of one's own: `formats.LISTS`, which the run keeps
    listed: str | None = None  # of a run to be scored again: `test_images` before missing ones are left out

    def training_images(self):
        """The SHA-256 of what is trained on: the lists of both phases."""
        return fingerprint([self.base_train, self.new_train])

    def test_images(self):
        """The SHA-256 of the lists of test images."""
        return fingerprint({name: test.items for name, test in self.tests.items()})


def test_set(source, labels=None):
    """The `TestSet` of some labels of a `Source`, or of all."""
    names = class_names(source)
    labels = list(names) if labels is None else labels
    items = select(source.split["test"], labels)
    return TestSet([names[label] for label in labels], items, source.read, source.template)


def open_task(source, shots=16, unlabeled_shots=None, seed=1, unlabeled_draw="balanced"):
    """Base-to-new (Table 1): the few-shot draw of a `Source` for a seed, halved.

    unlabeled_shots: images per new class; None: as `shots`. unlabeled_draw: "balanced" draws them class by class, which
    takes their labels; "random" draws as many from all of them, without looking, so that a class may have none.
    ValueError: fewer than 2 base or 1 new classes, or shots below 1.
    """
    unlabeled_shots = unlabeled_shots or shots
    if shots < 1 or unlabeled_shots < 1:
        raise ValueError("at least 1 shot per class is needed: choose --shots and --unlabeled-shots of 1 or more")
    base, new = halves(source.split["train"])
    if len(base) < 2 or not new:
        raise ValueError(f"{len(base + new)} classes are too few to halve into base and new: 3 are the least")
    tests = {"base": test_set(source, base), "new": test_set(source, new)}
    new_items = select(few_shot(source.split, unlabeled_shots, seed)["train"], new)  # I_n, by the same rule and seed
    if unlabeled_draw == "random":
        of_new = set(new)
        pool = [item for item in source.split["train"] if item[1] in of_new]
        new_items = select(random.Random(seed).sample(pool, len(new_items)), new)
    return Task(
        crop_scale=source.crop_scale,
        base_names=tests["base"].names,
        base_train=select(few_shot(source.split, shots, seed)["train"], base),
        read=source.read,
        tests=tests,
        new_names=tests["new"].names,
        new_train=[path for path, _, _ in new_items],
        new_read=source.read,
        new_answers=[label for _, label, _ in new_items],
    )


def few_shot_task(source, shots, seed):
    """Few-shot, as CoOp's users run it: all classes of a `Source` are base classes, and there are no new ones.

    ValueError: fewer than 2 classes.
    """
    names = class_names(source)
    if len(names) < 2:
        raise ValueError("1 class is too few to tune on: 2 are the least")
    items = select(few_shot(source.split, shots, seed)["train"], list(names))
    return Task(source.crop_scale, list(names.values()), items, source.read, {"accuracy": test_set(source)})


def cross_dataset_task(name, source, targets, shots, seed):
    """Cross-dataset (Table 2): few-shot on the `Source` called `name`, scored on it and on the targets' own classes.

    targets: {name: Source}. ValueError: as `few_shot_task`.
    """
    task = few_shot_task(source, shots, seed)
    task.tests = {name: test_set(source)}
    for target, target_source in targets.items():
        task.tests[target] = test_set(target_source)
    return task


def own_new_classes_task(source, shots, seed, unlabeled, new_classes, new_test=None, kept=None):
    """New classes of one's own, of which there are images without labels. All classes of a `Source` are base classes.

    unlabeled: the folder of those images, its subfolders included. new_classes: a text file, one class name per line.
    new_test: a folder of class folders with those names, to score New on; without it New stays unknown. kept: the items
    of `new_test` that a run kept; nothing is to be tuned then, and the unlabeled images stay out.
    ValueError, FileNotFoundError: as `few_shot_task`, `read_names`, `find_images` and `class_folders`; a class of
    `new_test` that `new_classes` does not name.
    """
    task = few_shot_task(source, shots, seed)
    task.tests = {"base": test_set(source)}
    task.new_names = read_names(new_classes)
    warn_of_twins(task.new_names, task.base_names)
    task.new_read = FolderReader(pathlib.Path(unlabeled))
    label_of = {name: label for label, name in enumerate(task.new_names)}
    if kept is not None:
        items = [[path, label_of[name], name] for path, _, name in kept if name in label_of]
        task.tests["new"] = TestSet(task.new_names, items, FolderReader(pathlib.Path(new_test)), source.template)
        return task
    task.new_train = find_images(unlabeled)
    if new_test is None:
        return task
    if not pathlib.Path(new_test).is_dir():
        raise FileNotFoundError(f"{new_test} is not a folder: give --new-test a folder of class folders")
    items, find = [], name_finder(task.new_names)
    for path, _, name in class_folders(pathlib.Path(new_test))["all"]:
        found = find(name)
        if found is None:
            raise ValueError(
                f"{new_test} holds a class '{name}' that {new_classes} does not name: name it there, "
                "or take the folder out"
            )
        items.append([path, label_of[found], found])
    task.tests["new"] = TestSet(task.new_names, items, FolderReader(pathlib.Path(new_test)), source.template)
    return task


def read_names(path):
    """The class names of a text file, one per line, in its order.

    FileNotFoundError: it cannot be read. ValueError: it has no name, or one twice.
    """
    try:
        names = read_lines(pathlib.Path(path))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise FileNotFoundError(
            f"cannot read class names in {path} ({reason}): give a text file in UTF-8 with one name per line"
        ) from error
    if not names:
        raise ValueError(f"{path} is empty: give a text file with one class name per line")
    name = twice(names)
    if name is not None:
        raise ValueError(f"{path} names '{name}' twice: give each class once")
    warn_of_twins(names)
    return names


# From settings to a task ----------------------------------------------------------------------------------------------

NEW_PHASE = ["unlabeled_draw", "pseudo_label_view", "pseudo_labels"]  # settings that the paper has no other value of
# fmt: off
OPTIONAL = {  # settings that may be missing, with their defaults
    "protocol": "base-to-new", "targets": ["all"], "unlabeled": None, "new_classes": None, "new_test": None,
    "no_new": False, "no_reg_new": False, "pseudo_labeler": "clip", "names": None, "template": None,
    "unlabeled_draw": "balanced", "pseudo_label_view": "augmented", "pseudo_labels": "top1",
}
# fmt: on


def task_of(settings, download=False, kept=None):
    """The `Task` that a run's settings name: a dict of run.py's dataset, root, protocol, ..., as config.json has it.

    kept: the lists that a run kept, to score it again: `formats.LISTS`, or {} of a run that has none.
    ValueError, FileNotFoundError: as the functions here; settings that do not go together, or a missing image.
    """
    settings = {**OPTIONAL, **settings}
    check_settings(settings)
    name, shots, seed = settings["dataset"], settings["shots"], settings["seed"]
    split = (kept or {}).get("split")
    source = open_source(name, settings["root"], download, settings["names"], settings["template"], split)
    if settings["protocol"] == "cross-dataset":
        targets = {target: open_source(target, settings["root"], download) for target in target_names(settings)}
        task = cross_dataset_task(name, source, targets, shots, seed)
    elif settings["protocol"] == "few-shot":
        task = few_shot_task(source, shots, seed)
    elif settings["unlabeled"]:
        unlabeled, new_classes, new_test = settings["unlabeled"], settings["new_classes"], settings["new_test"]
        kept_test = (kept or {}).get("new_test")
        task = own_new_classes_task(source, shots, seed, unlabeled, new_classes, new_test, kept_test)
    else:
        task = open_task(source, shots, settings["unlabeled_shots"], seed, settings["unlabeled_draw"])
    if settings["template"] is not None:
        task.label_template = settings["template"]
    if name == "folder" or (settings["new_test"] and "new" in task.tests):
        new_test = task.tests["new"].items if settings["new_test"] else None
        task.lists = {"split": source.split if name == "folder" else None, "new_test": new_test}
    if kept is None:
        look_for_images(task)
    else:
        task.listed = task.test_images()
        if split is not None:
            tell_what_changed(pathlib.Path(settings["root"]), split)
        leave_out_missing(task)
    return task


def tell_what_changed(root, split):
    """Warns where a folder of one's own no longer holds the images of the split that a run kept.

    FileNotFoundError: no such folder.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is not a folder: give --root, the folder of the class folders")
    then = {path for items in split.values() for path, _, _ in items}
    now = {path for path in image_paths(root)[0] if os.path.dirname(path)}
    halves = {"train", "test"}  # of the layout root/train and root/test, where nothing else counts
    if halves == {path.split("/")[0] for path in then}:
        now = {path for path in now if path.split("/")[0] in halves}
    if then != now:
        warn(
            f"{root} has changed since the run: {len(now - then)} images are new and {len(then - now)} missing; "
            "the run's own images are scored"
        )


def leave_out_missing(task):
    """Takes test images that are no longer there out of a task, with a warning. ValueError: none is left."""
    for name, test in task.tests.items():
        if isinstance(test.read, FolderReader):
            folder = test.read.folder
            items = [item for item in test.items if os.path.isfile(folder / item[0])]
            if not items:
                raise ValueError(f"none of the run's {len(test.items)} test images is in {folder}: give --root")
            if len(items) < len(test.items):
                missing = len(test.items) - len(items)
                warn(
                    f"{missing} of the run's {len(test.items)} test images are missing in {folder}: the rest is scored"
                )
            task.tests[name] = test._replace(items=items)


def check_settings(settings):
    """ValueError: settings that do not go together."""
    name, protocol = settings["dataset"], settings["protocol"]
    if name == "folder" and not settings["root"]:
        raise ValueError("--dataset folder needs --root, the folder of your class folders")
    unlabeled, new_classes, new_test = settings["unlabeled"], settings["new_classes"], settings["new_test"]
    if bool(unlabeled) != bool(new_classes) or (new_test and not unlabeled):
        raise ValueError("--unlabeled DIR and --new-classes FILE go together (and --new-test with them): give both")
    if protocol != "base-to-new":
        for key in ("unlabeled", "no_new", "no_reg_new", "pseudo_labeler", *NEW_PHASE):
            if settings[key] != OPTIONAL[key]:
                option = key.replace("_", "-")
                raise ValueError(f"--{option} has no place in the {protocol} protocol: it has no new phase")
    if unlabeled and settings["unlabeled_draw"] != "balanced":
        raise ValueError("--unlabeled-draw has no place with --unlabeled, which takes all images of its folder")
    if protocol != "cross-dataset" and settings["targets"] != ["all"]:
        raise ValueError(f"--targets has no place in the {protocol} protocol: add --protocol cross-dataset")
    if protocol == "cross-dataset" and name == "folder":
        raise ValueError("--dataset folder has no targets for the cross-dataset protocol: --root is its own")


def open_source(name, root, download, names=None, template=None, kept=None):
    """`open_dataset` for a run. EuroSAT's 90 MB are fetched without being asked for. root: None is "data"."""
    root = root or "data"
    if name == "eurosat" and not pathlib.Path(root, "eurosat", "2750").exists():
        download = True
    return open_dataset(name, root, download, names, template, kept)


def target_names(settings):
    """The names of a cross-dataset run's targets; ["all"] are all others of the source's kind.

    ValueError: the source itself is among them.
    """
    source = full_name(settings["dataset"])
    if settings["targets"] == ["all"]:
        kind = DEMOS[1:] if settings["dataset"] in DEMOS else LAYOUTS
        return [name for name in kind if name != source]
    for target in settings["targets"]:
        if full_name(target) == source:
            raise ValueError(f"--targets {target} is the source itself: give others")
    name = twice(map(full_name, settings["targets"]))
    if name is not None:
        raise ValueError(f"--targets has {name} twice: give each once")
    return settings["targets"]


def full_name(name):
    """A dataset's name, with the domain that "demo" means."""
    return f"demo-{demo.DEFAULT}" if name == "demo" else name


def look_for_images(task):
    """Raises an error now and not in the midst of a run. The demo's images are drawn, and need no look.

    UnreadableImage: a training image is missing or no image. FileNotFoundError: a test image is missing.
    """
    if isinstance(task.read, FolderReader):
        for path, _, _ in task.base_train:
            task.read(path, decode=False)
    if isinstance(task.new_read, FolderReader):
        for path in task.new_train:
            task.new_read(path, decode=False)
    for test in task.tests.values():
        if isinstance(test.read, FolderReader):
            folder = test.read.folder
            missing = [path for path, _, _ in test.items if not os.path.isfile(folder / path)]
            if missing:
                raise FileNotFoundError(
                    f"{len(missing)} of {len(test.items)} test images are missing, the first is {folder / missing[0]}: "
                    "complete the folder, or take them out of the split"
                )


# The command ----------------------------------------------------------------------------------------------------------


def show(name, source, items, base, new):
    """Prints what a run would see. items: {"base", "new", "test"}. base, new: the labels of the halves."""
    names = class_names(source)
    print(printable(f"{name}: {len(names)} classes, '{source.template}'"))
    print(printable(f"images: {source.image_folder or 'drawn by demo.py'}"))
    for half, labels, how in (("base", base, "few-shot"), ("new", new, "few-shot (unlabeled)")):
        tests = select(items["test"], labels)
        told = f"{len(labels)} classes, {len(items[half])} {how} and {len(tests)} test images"
        print(printable(f"{half}: {told}: {', '.join(names[label] for label in labels)}"))
    anchors, top_k = paper_batch(len(base))
    print(f"base phase: b = {anchors} anchors, K = {top_k} classes each")


def main():
    """The command line of data.py."""
    parser = Parser("data.py", __doc__)
    add = parser.add_argument
    # fmt: off
    add("name", help=f"one of {', '.join(DATASETS)}")
    add("--root", default="data", metavar="DIR",
        help="the folder of the datasets (default: data); of 'folder' that of the class folders")
    add("--names", metavar="FILE", help="of 'folder': JSON or CSV from its class folders to names")
    add("--template", metavar="WORDS", help="of 'folder': words of zero-shot CLIP, {} for the name")
    add("--download", action="store_true", help="fetch what is missing of the dataset")
    add("--shots", type=at_least(1), default=16, metavar="N", help="images per class (default: 16)")
    add("--seed", type=at_least(0), default=1, metavar="N", help="of the few-shot draw (default: 1)")
    add("--list", choices=["train", "val", "base", "new", "test"],
        help="one image per line, path<TAB>label<TAB>class name, in the order drawn: the whole draw (train, val) or "
        "test list with the split's labels, or a half of the draw with labels from 0")
    # fmt: on
    args = parser.parse_args()
    source = open_dataset(args.name, args.root, args.download, args.names, args.template)
    base, new = halves(source.split["train"])
    items = few_shot(source.split, args.shots, args.seed)
    items["base"], items["new"] = select(items["train"], base), select(items["train"], new)
    items["test"] = source.split["test"]
    if args.list is None:
        show(args.name, source, items, base, new)
    else:
        for path, label, name in items[args.list]:
            print(printable(path), label, printable(name), sep="\t")


if __name__ == "__main__":
    end("data.py", main)
