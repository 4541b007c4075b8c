"""Datasets by name: the demo's domains, the eleven of the paper, and any folder of class folders.

Class names and folders are taken as people have them: in any case and Unicode form, named by a JSON or CSV file, split
into train and test or not.
"""

import collections
import csv
import difflib
import os
import pathlib
from typing import NamedTuple

from harness import demo
from harness.cli import printable, warn
from harness.clips import clip
from harness.files import decode, no_duplicate_keys, read_text
from harness.images import FolderReader
from harness.layouts import LAYOUTS, class_folders, fetch, read_split, split_by_rule

DEMOS = ["demo"] + [f"demo-{domain}" for domain in demo.LIGHTS]
DATASETS = [*DEMOS, *LAYOUTS, "folder"]

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
        """The function that reads an image: path -> RGB image (PIL)."""
        return demo.read if self.image_folder is None else FolderReader(self.image_folder, self.plain)


def open_dataset(name, root="data", download=False, names=None, template=None, kept=None):
    """The `Source` of dataset `name` under `root`. Reads lists only, never an image.

    name: one of `DATASETS`; "folder" is any folder, `root`/<class name>/*.jpg, or `root`/train and `root`/test with
    such class folders. download: fetches what is missing, if a program can. Only for "folder": names is a file for
    `read_folder_names`, template the words of zero-shot CLIP, and kept the split of an earlier run, which then replaces
    the folder's present contents.
    ValueError: unknown name, or a list that is missing or broken; says where to get it. FileNotFoundError: no such
    folder, or a failed download.
    """
    if name != "folder" and (names is not None or template is not None):
        raise ValueError(f"--names and --template are for --dataset folder, and {name} has its own: leave them out")
    template = "a photo of a {}." if template is None else template
    words = template.replace("{}", "", 1)
    if words == template or not words.strip() or "{" in words or "}" in words:
        raise ValueError(
            f"--template '{template}' needs {{}} once, where the name goes, words around it, and no other braces"
        )
    root = pathlib.Path(root)
    if name in DEMOS:
        domain = full_name(name).removeprefix("demo-")
        return Source(demo.split(domain), None, demo.TEMPLATE, demo.CROP_SCALE)
    if name == "folder":
        kept = kept and {"train": [], "val": [], "test": []} | kept
        source = Source(kept or folder_split(root, None if names is None else read_folder_names(names)), root, template)
        check_classes(source, root if kept is None else "the run's lists.json")
        return source
    if name not in LAYOUTS:
        near = difflib.get_close_matches(name, DATASETS) or DATASETS
        raise ValueError(f"there is no dataset '{name}': did you mean {' or '.join(near)}?")
    layout, folder = LAYOUTS[name], root / LAYOUTS[name].folder
    if download:
        fetch(name, folder)
    source = Source(read_split(name, folder), folder / layout.images, layout.template, plain=True)
    check_classes(source, folder)
    return source


def class_names(source):
    """{label: class name} of a `Source`, in the order of the labels."""
    return dict(sorted({label: name for _, label, name in source.split["train"]}.items()))


def check_classes(source, where):
    """ValueError: a class of a `Source` has no training or no test image, or a label has two names.

    where: the file or folder of the lists, for the message. Warns about names that are the same to CLIP.
    """
    names = {}
    for part, items in source.split.items():
        for path, label, name in items:
            if names.setdefault(label, name) != name:
                raise ValueError(
                    f"{where}: the {part} list names the class {label} '{name}' at {path}, but elsewhere it is "
                    f"'{names[label]}': fix it, or get CoOp's own again"
                )
    train, test = ({label for _, label, _ in source.split[part]} for part in ("train", "test"))
    for label in sorted(train ^ test):
        lacking = "test" if label in train else "training"
        raise ValueError(f"{where}: the class '{names[label]}' has no {lacking} image: add some, or remove the class")
    warn_of_same_names(class_names(source).values())


def full_name(name):
    """A dataset's name; for "demo", that of the domain that it means."""
    return f"demo-{demo.DEFAULT}" if name == "demo" else name


def target_names(dataset, targets):
    """The names of a cross-dataset run's targets. ["all"]: all datasets of the source's kind but the source itself.

    ValueError: one is named twice, or is the source.
    """
    if targets == ["all"]:
        return [name for name in (DEMOS[1:] if dataset in DEMOS else LAYOUTS) if name != full_name(dataset)]
    name = first_duplicate(map(full_name, [dataset, *targets]))
    if name is not None:
        raise ValueError(f"--targets has {name} twice, or it is the source itself: give each other dataset once")
    return targets


# A folder of class folders --------------------------------------------------------------------------------------------


def folder_split(root, renamed=None):
    """The split of a user's folder: `root`/train and `root`/test, or class folders split by CoOp's rule.

    renamed: {folder: class name} of all folders, or None. A test class is the training class that has its name, or
    whose name is the same to CLIP.
    FileNotFoundError: no such folder. ValueError: no class folders, or one without images or without a name.
    """
    if not (root / "train").is_dir() or not (root / "test").is_dir():
        return split_by_rule(named_folders(root, renamed))
    train, test = (named_folders(root / part, renamed)["all"] for part in ("train", "test"))
    find = name_finder([name for _, _, name in train])
    test = [[path, label, find(name) or name] for path, label, name in test]
    label_of = {name: label for label, name in enumerate(sorted({name for _, _, name in train + test}))}
    split = {"val": []}
    for part, items in (("train", train), ("test", test)):
        split[part] = [[f"{part}/{path}", label_of[name], name] for path, _, name in items]
    return split


def named_folders(folder, renamed):
    """`class_folders`, named by `renamed` unless it is None. ValueError: it lacks the name of a folder."""
    lists = class_folders(folder, renamed)
    unnamed = {path.split("/")[0] for path, _, _ in lists["all"]} - set(renamed or ())
    if renamed is not None and unnamed:
        raise ValueError(f"--names has no name for the class folder {folder / min(unnamed)}: add one")
    return lists


def labeled_folder(folder, names, where):
    """Lists a folder of class folders for --new-test: [path, label, class name], with labels by position in `names`.

    where: the file of the names, for the message. A folder belongs to the name that is the same to CLIP.
    FileNotFoundError: no such folder. ValueError: a class folder has none of the names, or no images.
    """
    items, find = class_folders(pathlib.Path(folder))["all"], name_finder(names)
    for item in items:
        name = find(item[2])
        if name is None:
            raise ValueError(f"{folder} holds a class '{item[2]}' that {where} does not name: name it, or remove it")
        item[1:] = names.index(name), name
    return items


# Class names ----------------------------------------------------------------------------------------------------------


def read_names(path):
    """The class names of a text file, one per line, in its order. Warns about names that are the same to CLIP.

    FileNotFoundError: it cannot be read. ValueError: it holds no name, or one twice.
    """
    lines = read_text(path, "give a text file in UTF-8 with one class name per line").splitlines()
    names = [line.strip() for line in lines if line.strip()]
    if not names or first_duplicate(names):
        raise ValueError(f"{path} is empty, or has '{first_duplicate(names)}' twice: give each class name once")
    warn_of_same_names(names)
    return names


def read_folder_names(path):
    """{folder: class name} from a JSON object, or from a CSV file with a folder and a name per line.

    FileNotFoundError: it cannot be read. ValueError: it holds something else, an empty name, or a name twice.
    """
    advice = 'give JSON, {"folder": "name", ...}, or CSV, folder,name in each line'
    text = read_text(path, advice, "--names ")
    try:
        if text.lstrip().startswith("{"):
            found = decode(text, dict[str, str], f"--names {path}", advice)
        else:
            found = no_duplicate_keys(csv.reader(text.splitlines()))
    except (ValueError, csv.Error) as error:
        raise ValueError(f"--names {path} cannot be read ({error}): {advice}") from error
    found = {folder.strip(): name.strip() for folder, name in found.items()}
    wrong = first_duplicate(found.values()) or ("" if "" in found.values() else None)
    if wrong is not None:
        raise ValueError(f"--names {path} has '{wrong}' twice or as a name: give each folder its own name")
    return found


def first_duplicate(names):
    """The first of some names that occurs more than once, or None."""
    return next((name for name, count in collections.Counter(names).items() if count > 1), None)


def as_clip_reads(name):
    """What CLIP sees of a class name, a string: two names with the same result are one class to it.

    The prompts here read `_` as a space. CLIP's tokenizer composes accents, repairs broken Unicode and HTML, joins
    blanks, and lower-cases.
    """
    cleaned = clip.simple_tokenizer.basic_clean(name.replace("_", " "))
    return clip.simple_tokenizer.whitespace_clean(cleaned).lower()


def name_finder(names):
    """A function from a name to the equal one in `names`, else to the first that is the same to CLIP, else to None."""
    exact, read = set(names), {}
    for name in names:
        read.setdefault(as_clip_reads(name), name)
    return lambda name: name if name in exact else read.get(as_clip_reads(name))


def warn_of_same_names(names, known=()):
    """Warns about class names that CLIP cannot tell apart: within `names`, or between them and `known` if given."""
    first = {as_clip_reads(name): name for name in known}
    for name in names:
        key = as_clip_reads(name)
        if key in first:
            warn(f"the classes '{first[key]}' and '{name}' have the same name to CLIP: no prompt can tell them apart")
        elif not known:
            first[key] = name


def look_for_images(task):
    """Raises an error before the work begins rather than during it. task: a `data.Task`.

    UnreadableImage: a training image is missing or cannot be opened. FileNotFoundError: test images are missing.
    """
    for read, paths in ((task.read, [path for path, _, _ in task.base_train]), (task.new_read, task.new_train)):
        if isinstance(read, FolderReader):  # the demo's images are drawn
            for path in paths:
                read(path, decode=False)
    for test in task.tests.values():
        folder = test.read.folder if isinstance(test.read, FolderReader) else None
        missing = [path for path, _, _ in test.items if folder and not os.path.isfile(folder / path)]
        if missing:
            text = f"{len(missing)} of {len(test.items)} test images are missing, for example {folder / missing[0]}"
            raise FileNotFoundError(f"{text}: complete the folder, give another --root, or correct the split")


def describe(task):
    """What a run sees of its data, lines of text: of each half its images to tune and to test, and its classes.

    task: a `data.Task`.
    """
    base, new = next(iter(task.tests.values())).items, task.tests["new"].items if "new" in task.tests else []
    images = f"{len(task.base_train)} labeled images to tune, {len(base)} to test: {', '.join(task.base_names)}"
    lines = [f"base: {len(task.base_names)} classes, {images}"]
    if task.new_names:
        images = f"{len(task.new_train)} unlabeled images to tune, {len(new)} to test: {', '.join(task.new_names)}"
        lines.append(f"new: {len(task.new_names)} classes, {images}")
    return "\n".join(map(printable, lines))
