"""Datasets by name: the demo's domains, the eleven of the paper, and any folder of class folders.

Class names and folders are taken as people have them: in any case and Unicode form, named by a JSON or CSV file, split
into train and test or not.
"""

import collections
import csv
import difflib
import hashlib
import os
import pathlib
import re
from typing import NamedTuple

from harness import demo
from harness.cli import printable, warn
from harness.clips import clip
from harness.files import decode, no_duplicate_keys, read_text
from harness.images import FolderReader, image_paths, warn_of_odd_images
from harness.layouts import LAYOUTS, class_folders, fetch, parts_of, read_split, split_by_rule, subfolders, unwrapped

DEMOS = ["demo"] + [f"demo-{domain}" for domain in demo.LIGHTS]
DATASETS = [*DEMOS, *LAYOUTS, "folder"]
RULE = "50/20/30% of each class by CoOp's rule, seed 1"
LABEL_COLUMNS = ["class_name", "classname", "labels", "label", "class", "category", "breed", "species", "name"]

# Datasets -------------------------------------------------------------------------------------------------------------


class Source(NamedTuple):
    """A dataset as its files state it: `split` maps "train", "val" and "test" to lists of [path, label, class name]."""

    split: dict
    image_folder: pathlib.Path | None  # None: the demo, whose images are drawn
    template: str  # of zero-shot CLIP
    crop_scale: tuple = (0.08, 1.0)  # of the random resized crop, as shares of the area
    plain: bool = False  # whether images are read as CoOp reads them, not as a viewer shows them
    rule: str = "the demo's own split"  # where the split comes from

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
        if kept:
            split, rule = {"train": [], "val": [], "test": []} | kept, "as the run kept it"
        else:
            split, rule = folder_split(root, None if names is None else read_folder_names(names))
        source = Source(split, root, template, rule=rule)
        check_classes(source, root if kept is None else "the run's lists.json")
        return source
    if name not in LAYOUTS:
        near = difflib.get_close_matches(name, DATASETS) or DATASETS
        raise ValueError(f"there is no dataset '{name}': did you mean {' or '.join(near)}?")
    layout, folder = LAYOUTS[name], dataset_folder(name, root)
    if download:
        fetch(name, folder)
    rule = layout.split if layout.split and (folder / layout.split).is_file() else "its own lists, or CoOp's rule"
    source = Source(read_split(name, folder), folder / layout.images, layout.template, plain=True, rule=rule)
    check_classes(source, folder)
    return source


def dataset_folder(name, root):
    """Where one of the eleven datasets lies: in its folder under `root`, one folder deeper, or in `root` itself."""
    layout, root = LAYOUTS[name], pathlib.Path(root)
    mark = layout.images if layout.images != "." else layout.split
    places = root / layout.folder, *subfolders(root / layout.folder), root
    return next((place for place in places if (place / mark).exists()), places[0])


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
    """(Split of a user's folder, where it comes from): parts such as `root`/train and `root`/test, or CoOp's rule.

    The parts hold class folders. Images in no class folders are labeled by a table beside them (`labeled_by_table`).
    renamed: {folder: class name} of all folders, or None. A test class is the training class that has its name, or
    whose name is the same to CLIP. Without a test part, "val" is the test.
    FileNotFoundError: no such folder. ValueError: no class folders, or one without images or without a name.
    """
    place, split = unwrapped(root), {"train": [], "val": [], "test": []}
    parts = parts_of(place)
    classes = [path for folder in parts.values() or [place] for path in subfolders(folder)]
    for path in classes:
        if not parts and parts_of(path):
            raise ValueError(f"{path} has parts of its own: the layout is {root}/train/{path.name}/*.jpg")
    rule, split["train"] = labeled_by_table(root, place, renamed) if len(classes) < 2 else ("", [])
    if not rule and not parts:
        return split_by_rule({"all": named_folders(root, root, renamed)}), RULE
    if not rule:
        rule = " and ".join(path.name for path in parts.values())
        split |= {part: named_folders(root, folder, renamed) for part, folder in parts.items()}
    unused = [path.name for path in subfolders(place) if parts and path not in parts.values()]
    if unused:
        warn(f"{place}: left out beside {rule}: {', '.join(unused)}")
    find = name_finder([name for _, _, name in split["train"]])
    for item in (item for items in split.values() for item in items):
        item[2] = find(item[2]) or item[2]
    names = sorted({name for items in split.values() for _, _, name in items})
    label_of = {name: label for label, name in enumerate(names)}
    split = {part: [[path, label_of[name], name] for path, _, name in items] for part, items in split.items()}
    if not split["test"]:
        split["test"], split["val"] = split["val"], []
    if not split["test"]:
        return split_by_rule({"all": split["train"]}), f"{rule}, and {RULE}"
    return split, rule


def named_folders(root, folder, renamed):
    """The items of `class_folders`, with paths from `root`, named by `renamed` unless it is None.

    ValueError: it lacks the name of a folder.
    """
    items, inside = class_folders(folder, renamed)["all"], folder.relative_to(root).as_posix()
    unnamed = {name for _, _, name in items} - set((renamed or {}).values())
    if renamed is not None and unnamed:
        raise ValueError(f"--names has no name for the class folder {folder / min(unnamed)}: add one")
    return [[path if folder == root else f"{inside}/{path}", label, name] for path, label, name in items]


def labeled_by_table(root, place, renamed):
    """(Name of the CSV file in the folder `place` that labels its images, items [path, 0, class name]), or ("", []).

    One column has the names of the image files there, with or without their endings. The column of classes is told by
    its header, or is the only other one. ValueError: that is not clear, or an image has two classes.
    """
    paths, found, items = image_paths(place)[0], "", []
    images = {name: path for path in paths for name in (os.path.basename(path), pathlib.Path(path).stem)}
    for table in sorted(place.glob("*.[ct]sv")):
        text = read_text(table)
        rows = [row for row in csv.reader(text.splitlines(), delimiter=max(",;\t", key=text.count)) if row]
        columns = [[cell.strip() for cell in column] for column in zip(*rows)]
        of_files = [[images.get(re.split(r"[\\/]", cell)[-1]) for cell in column] for column in columns]
        files = min(of_files, key=lambda column: column.count(None), default=[])
        if 2 * files.count(None) >= len(files):
            continue
        first, columns = int(files[0] is None), [one for one, of in zip(columns, of_files) if of is not files]
        known = [one for name in LABEL_COLUMNS for one in columns if first and one[0].lower() == name]
        if not known and len(columns) != 1:
            raise ValueError(f"{table}: which column has the classes? Call it 'label', or sort the images into folders")
        pairs = {(image, name) for image, name in zip(files[first:], (known or columns)[0][first:]) if image and name}
        labels = dict(pairs)
        if found or len(labels) < len(pairs):
            raise ValueError(
                f"{table} gives an image two classes, or {found or 'another'} labels the images too: leave one"
            )
        missing = files[first:].count(None), len(paths) - len(labels)
        if any(missing):
            warn(
                f"{table}: {missing[0]} lines name no image, {missing[1]} of {len(paths)} images have no label: left out"
            )
        for name, image in sorted((name, image) for image, name in pairs):
            items.append([(place / image).relative_to(root).as_posix(), 0, (renamed or {}).get(name, name)])
        found = table.name
    return found, items


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

    A JSON list of names will do, and so will numbers from 0 or 1, or WordNet's ids, before the names.
    FileNotFoundError: it cannot be read. ValueError: it holds no name, or one twice.
    """
    advice = "give a text file in UTF-8 with one class name per line"
    text = read_text(path, advice)
    names = [line.strip() for line in text.splitlines() if line.strip()]
    if text.lstrip()[:1] in ("[", "{"):
        names = decode(text, list[str], path, advice)
    coded = [re.fullmatch(r"(\d+|n\d{8})[\s,:;]+(.*\S)", name) for name in names]
    if len(names) > 1 and all(coded) and re.fullmatch(r"0*[01]|n.*", coded[0][1]):
        warn(f"{path}: the numbers before its {len(names)} names are left out, as in '{names[0]}'")
        names = [match[2] for match in coded]
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
    codes = [name for name in names if re.fullmatch(r"n?[\d\W_]+", name)]
    if codes:
        warn(f"{len(codes)} of {len(names)} names are numbers or codes, such as '{codes[0]}', which tell CLIP nothing")


# What a run says before it works --------------------------------------------------------------------------------------


def look_for_images(task):
    """Raises an error before the work begins rather than during it, and warns about the user's own images.

    task: a `data.Task`. UnreadableImage: a training image is missing or cannot be opened. FileNotFoundError: test
    images are missing.
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
    own = task.source.image_folder is not None and not task.source.plain
    images = {part: [(task.source.read, *item) for item in items] for part, items in task.source.split.items() if own}
    if task.new_names and task.new_answers is None:
        images["unlabeled"] = [(task.new_read, path, None, None) for path in task.new_train]
        images["new test"] = (
            [(task.tests["new"].read, *item) for item in task.tests["new"].items] if "new" in task.tests else []
        )
    for read in {read for items in images.values() for read, *_ in items}:
        warn_of_odd_images(read, [path for items in images.values() for of, path, _, _ in items if of == read])
    warn_of_copies(
        {part: [(read.folder / path, name) for read, path, _, name in items] for part, items in images.items()}
    )


def warn_of_copies(images):
    """Warns about files that are in training and test at once, or in two classes, byte by byte.

    images: {part: pairs of path and class name or None}, parts as in a split, "unlabeled" and "new test".
    """
    content = contents([path for pairs in images.values() for path, _ in pairs])
    classes = collections.defaultdict(set)
    for path, name in (pair for pairs in images.values() for pair in pairs if pair[1] is not None):
        classes[content.get(path)].add(name)
    twice = [path for path in content if len(classes[content[path]]) > 1]
    if twice:
        warn(f"{len(twice)} images are in two classes, byte by byte, for example {twice[0]}: remove the wrong ones")
    for tuned, test, why in (
        ("train", "test", "the scores are too high"),
        ("unlabeled", "new test", "New is transductive"),
    ):
        seen = {content.get(path) for path, _ in images.get(tuned, ())} - {None}
        twice = [path for path, _ in images.get(test, ()) if content.get(path) in seen]
        if twice:
            text = f"{len(twice)} of {len(images[test])} {test} images are {tuned} images too, byte by byte"
            warn(f"{text}, for example {twice[0]}: {why}")


def contents(paths):
    """{path: int} of the files that have the bytes of another one, equal for the same bytes.

    Only files of one size are opened, and only those whose middle is the same are read as a whole.
    """

    def middle(path):
        with open(path, "rb") as file:
            file.seek(os.path.getsize(path) // 2)
            return file.read(2**14)

    groups = [paths]
    for key in (os.path.getsize, middle, lambda path: hashlib.sha256(path.read_bytes()).digest()):
        finer = collections.defaultdict(list)
        for number, path in ((number, path) for number, group in enumerate(groups) for path in group):
            finer[number, key(path)].append(path)
        groups = [group for group in finer.values() if len(group) > 1]
    return {path: number for number, group in enumerate(groups) for path in group}


def describe(task, shots, new_shots):
    """What a run sees of its data, lines of text: how it is split, and of each half its images and classes.

    task: a `data.Task`. shots, new_shots: images per class that it asks for.
    """
    sizes = {part: len(items) for part, items in task.source.split.items()}
    lines = [
        f"split by {task.source.rule}: {sizes['train']} training, {sizes['test']} test, {sizes['val']} unused images"
    ]
    base, new = next(iter(task.tests.values())).items, task.tests["new"].items if "new" in task.tests else []
    for half, names, kind, tuned, test, labels, asked in (
        ("base", task.base_names, "labeled", task.base_train, base, [label for _, label, _ in task.base_train], shots),
        ("new", task.new_names, "unlabeled", task.new_train, new, task.new_answers or [], new_shots),
    ):
        some = f"{', '.join(names[:20])}{f' and {len(names) - 20} more' if len(names) > 20 else ''}"
        halved = f" (the {'first' if half == 'base' else 'second'} half)" if task.new_answers is not None else ""
        line = f"{half}: {len(names)} classes{halved}, {len(tuned)} {kind} images to tune, {len(test)} to test: {some}"
        lines += [line] if names else []
        few = [count for count in collections.Counter(labels).values() if count < asked]
        if few:
            lines.append(
                f"{len(few)} {half} classes have fewer than {asked} images to tune on; the least is {min(few)}"
            )
    return "\n".join(map(printable, lines))
