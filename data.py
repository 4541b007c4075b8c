"""What a run sees of its data: CoOp's few-shot draw, base and new classes, and the task of each protocol.

    python data.py eurosat --root DIR               what a run would see: classes, halves, images, (b, K)
    python data.py eurosat --root DIR --list base   one image per line: path, label, class name
    python data.py dtd --root DIR --download        downloads it first, where that is possible

Layout, splits and draws are CoOp's, which the paper and everyone it compares with use (section 4.1).
"""

import hashlib
import math
import pathlib
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from harness import folders
from harness.cli import printable, run_main
from harness.files import Count, Index, Lists
from harness.image_files import FolderReader, find_images
from harness.layouts import by_label
from harness.options import Parser, checked, paper_batch

# The few-shot draw and the halves -------------------------------------------------------------------------------------


def few_shot(split, shots, seed):
    """CoOp's draw: {"train": `shots` items per class, "val": min(shots, 4)}. A class that has fewer gives all.

    One generator draws first from the train list, then from the val list, in the order in which labels first appear
    (Dassl's generate_fewshot_dataset, which CoOp calls). Nothing here tunes on "val"; it is drawn for CoOp's lists.
    split: {"train", "val"}, lists of [path, label, class name]. seed: CoOp's are 1, 2 and 3.
    """
    rng, drawn = random.Random(seed), {"train": [], "val": []}
    for part, count in (("train", shots), ("val", min(shots, 4))):
        for group in by_label(split.get(part, [])):
            drawn[part] += rng.sample(group, count) if len(group) >= count else group
    return drawn


def describe_draw(drawn, shots, seed):
    """One line that identifies a draw, by the first 12 hex digits of its SHA-256 (docs/datasets.md lists some).

    The hash is of path, tab, label and newline of each image in the order drawn, in UTF-8: the first two columns that
    `data.py --list train` prints. drawn: the "train" of `few_shot`, all classes, with the labels of the split.
    """
    text = "".join(f"{printable(path)}\t{label}\n" for path, label, _ in drawn)
    digits = hashlib.sha256(text.encode()).hexdigest()[:12]
    return f"few-shot draw: {shots} {'shot' if shots == 1 else 'shots'}, seed {seed}, SHA-256 {digits}"


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
#
# It is made from a `folders.Source`, a dataset as its files state it: split {"train", "val", "test"}, read, template,
# crop_scale. `folders.class_names(source)` is {label: name}.


class TestSet(NamedTuple):
    """Test images of some classes, and the function that reads them. Only harness/scores.py opens it."""

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
    tests: dict  # {score: TestSet}; the prompts after phase 1 score "base", the last ones "new"
    new_names: list = field(default_factory=list)
    new_train: list = field(default_factory=list)  # paths of the unlabeled new images, and nothing else
    new_read: Callable | None = None
    new_answers: list | None = None  # their labels, where known: for scores.pseudo_label_accuracy alone
    label_template: str = "a photo of a {}."  # the foundation CLIP's, of Eq. 7 (section 2)
    lists: Lists | None = None  # of images of the user's own, which the run keeps
    source: folders.Source | None = None  # what all of it comes from
    draw: str = ""  # the line of `describe_draw` of the few-shot draw; the draw itself has labels of new classes


def test_set(source, labels=None):
    """The `TestSet` of some labels of a `folders.Source`, or of all."""
    names = folders.class_names(source)
    labels = list(names) if labels is None else labels
    items = select(source.split["test"], labels)
    return TestSet([names[label] for label in labels], items, source.read, source.template)


def base_to_new_task(source, shots, unlabeled_shots, seed):
    """Base-to-new (Table 1): the few-shot draw of a `folders.Source`, halved; of new classes the images alone.

    unlabeled_shots: images per new class. ValueError: fewer than 2 base classes or 1 new class.
    """
    base, new = halves(source.split["train"])
    if len(base) < 2 or not new:
        raise ValueError(f"base-to-new needs 3 classes, not {len(base + new)}: add some, or run.py --protocol few-shot")
    tests = {"base": test_set(source, base), "new": test_set(source, new)}
    drawn = {count: few_shot(source.split, count, seed)["train"] for count in {shots, unlabeled_shots}}
    new_items = select(drawn[unlabeled_shots], new)  # I_n, by the same rule and seed
    return Task(
        crop_scale=source.crop_scale,
        base_names=tests["base"].names,
        base_train=select(drawn[shots], base),
        read=source.read,
        tests=tests,
        new_names=tests["new"].names,
        new_train=[path for path, _, _ in new_items],
        new_read=source.read,
        new_answers=[label for _, label, _ in new_items],
        source=source,
        draw=describe_draw(drawn[shots], shots, seed),
    )


def few_shot_task(source, shots, seed):
    """Few-shot, as in CoOp: all classes of a `folders.Source` are base classes. ValueError: fewer than 2 classes."""
    test, drawn = test_set(source), few_shot(source.split, shots, seed)["train"]
    if len(test.names) < 2:
        raise ValueError("1 class is too few to tune on: at least 2 are needed")
    items, draw = select(drawn, list(folders.class_names(source))), describe_draw(drawn, shots, seed)
    return Task(source.crop_scale, test.names, items, source.read, {"accuracy": test}, source=source, draw=draw)


def own_new_classes_task(source, args, kept_test=None):
    """All classes of a `folders.Source` are base classes; the user has images of new classes, without labels.

    args: settings with `unlabeled`, `new_classes` and `new_test`. kept_test: the items of --new-test that a run kept,
    to score it again; then nothing is tuned, and the unlabeled images are left out. ValueError, FileNotFoundError: as
    `few_shot_task`, `folders.read_names`, `image_files.find_images` and `folders.labeled_folder`.
    """
    task = few_shot_task(source, args.shots, args.seed)
    task.tests = {"base": task.tests["accuracy"]}
    task.new_names, task.new_read = folders.read_names(args.new_classes), FolderReader(pathlib.Path(args.unlabeled))
    folders.warn_of_same_names(task.new_names, task.base_names)
    task.new_train = [] if kept_test else find_images(args.unlabeled)
    if args.new_test:
        items = kept_test or folders.labeled_folder(args.new_test, task.new_names, args.new_classes)
        task.tests["new"] = TestSet(task.new_names, items, FolderReader(pathlib.Path(args.new_test)), source.template)
    return task


def open_task(args, kept=None):
    """The `Task` of a run's settings, an `options.Settings`; checks that all of its images exist.

    kept: the `Lists` that the run kept, to score it again. ValueError, FileNotFoundError: as the functions here; a
    missing or unreadable image.
    """
    root, name = args.root or "data", args.dataset
    eurosat = name == "eurosat" and not (folders.dataset_folder(name, root) / "2750").exists()  # 90 MB: downloaded
    source = folders.open_dataset(name, root, args.download or eurosat, args.names, args.template, kept and kept.split)
    if args.protocol == "cross-dataset":  # Table 2: few-shot on the source, scored on all datasets with their classes
        task = few_shot_task(source, args.shots, args.seed)
        task.tests = {name: test_set(source)}
        for target in folders.target_names(name, list(args.targets)):
            task.tests[target] = test_set(folders.open_dataset(target, root, args.download))
    elif args.protocol == "few-shot":
        task = few_shot_task(source, args.shots, args.seed)
    elif args.unlabeled and args.new_classes:
        task = own_new_classes_task(source, args, kept and kept.new_test)
    else:
        task = base_to_new_task(source, args.shots, args.unlabeled_shots or args.shots, args.seed)
    task.label_template = args.template or task.label_template
    if name == "folder" or args.new_test:
        new_test = task.tests["new"].items if args.new_test else None
        task.lists = Lists(source.split if name == "folder" else None, new_test)
    if kept is None:
        folders.look_for_images(task)
    return task


# The command ----------------------------------------------------------------------------------------------------------


def main(arguments=None):
    """The command line of data.py."""
    parser = Parser("data.py", __doc__)
    add = parser.add_argument
    # fmt: off
    add("name", help=f"one of {', '.join(folders.DATASETS)}")
    add("--root", default="data", metavar="DIR",
        help="the folder of the datasets (default: data); for 'folder' that of the class folders")
    add("--names", metavar="FILE", help="for 'folder': JSON or CSV from its class folders to names")
    add("--template", metavar="WORDS", help="for 'folder': the prompt of zero-shot CLIP, {} for the name")
    add("--download", action="store_true", help="download what is missing of the dataset")
    add("--shots", type=checked(Count), default=16, metavar="N", help="images per class (default: 16)")
    add("--seed", type=checked(Index), default=1, metavar="N", help="of the few-shot draw (default: 1)")
    add("--list", choices=["train", "val", "base", "new", "test"],
        help="one image per line, path<TAB>label<TAB>class name, in the order drawn: the whole draw (train, val) or "
        "test list with the split's labels, or a half of the draw with labels from 0")
    # fmt: on
    args = parser.parse_args(arguments)
    source = folders.open_dataset(args.name, args.root, args.download, args.names, args.template)
    base, new = halves(source.split["train"])
    items = few_shot(source.split, args.shots, args.seed) | {"test": source.split["test"]}
    items["base"], items["new"] = select(items["train"], base), select(items["train"], new)
    if args.list is not None:
        for path, label, name in items[args.list]:
            print(printable(path), label, printable(name), sep="\t")
        return
    about = f"'{source.template}', images: {source.image_folder or 'drawn by harness/demo.py'}"
    print(printable(f"{args.name}: {len(base + new)} classes, {about}"))
    task = base_to_new_task(source, args.shots, args.shots, args.seed)
    print(task.draw, folders.describe(task, args.shots, args.shots), sep="\n")
    print("base phase: b = {} anchors, K = {} classes each".format(*paper_batch(len(base))))


if __name__ == "__main__":
    run_main("data.py", main)
