"""Datasets by name: the demo's domains, the eleven of the paper, and any folder of class folders.

Class names and folders are taken as people have them: in any case and Unicode form, named by a JSON or CSV file, split
into train and test or not.
"""

import collections
import csv
import difflib
import hashlib
import html
import io
import os
import pathlib
import re
from typing import NamedTuple

import ftfy

from harness import demo
from harness.cli import printable, warn
from harness.files import decode, no_duplicate_keys, read_text
from harness.image_files import FolderReader, image_paths, warn_of_odd_images
from harness.layouts import LAYOUTS, class_folders, fetch, parts_of, read_split, split_by_rule, subfolders, unwrapped

DEMOS = ["demo"] + [f"demo-{domain}" for domain in demo.LIGHTS]
DATASETS = [*DEMOS, *LAYOUTS, "folder"]
NO_SPLIT = {"train": [], "val": [], "test": []}
RULE = "50/20/30% of each class by CoOp's rule, seed 1"
LABEL_COLUMNS = ["class_name", "classname", "labels", "label", "class", "category", "breed", "species", "name"]
PART_COLUMNS = {"split", "set", "subset", "part", "partition", "fold", "is_train", "phase"}

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
        raise ValueError(f"--template '{template}' needs {{}} once, for the name, words around it, and no other braces")
    root = pathlib.Path(root)
    if name in DEMOS:
        domain = full_name(name).removeprefix("demo-")
        return Source(demo.split(domain), None, demo.TEMPLATE, demo.CROP_SCALE)
    if name == "folder":
        renamed = None if names is None or kept else read_folder_names(names)
        split, rule = (NO_SPLIT | kept, "the run's lists.json") if kept else folder_split(root, renamed)
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
        few = f"{len(train ^ test)} of {len(names)} classes lack some"
        raise ValueError(f"{where}: the class '{names[label]}' has no {lacking} image ({few}): add some, or remove it")
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
    place, split = unwrapped(root), dict(NO_SPLIT)
    parts = parts_of(place)
    classes = [path for folder in parts.values() or [place] for path in subfolders(folder)]
    for path in classes:
        if not parts and parts_of(path):
            raise ValueError(f"{path} has parts of its own: the layout is {root}/train/{path.name}/*.jpg")
    several = len({re.sub(r"\d+", "", path.name) for path in classes}) > 1  # part_1 and part_2 need not be classes
    rule, split["train"] = ("", []) if several else labeled_by_table(root, place, renamed)
    if rule and parts:
        raise ValueError(
            f"{place} has parts and a table of labels, {rule}: give class folders in each part or no parts"
        )
    if not rule and not parts:
        refuse_unknown_parts(classes)
        return split_by_rule({"all": named_folders(root, root, renamed)}), RULE
    if not rule:
        rule = f"the folders {', '.join(parts[part].name for part in split if part in parts)}"
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


def refuse_unknown_parts(classes):
    """ValueError: one of the folders of classes seems to be a part, because its folders have the names of others.

    These are two or more of the folders beside it (train/cat and train/dog beside cat and dog), or three or more of
    the folders in one of those (fold1/cat and fold2/cat, ...). Two may be views: cat/front, cat/back, dog/front, ...
    """
    inner = {path: {folder.name for folder in subfolders(path)} for path in classes}
    beside = {path.name for path in classes}
    for path, names in inner.items():
        shared = max((names & others for other, others in inner.items() if other != path), key=len, default=set())
        if len(names & beside) > 1 or len(shared) > 2:
            told = ", ".join(sorted(shared | names & beside)[:3])
            raise ValueError(f"{path} seems to be a part, as others have {told} too: call the parts train and test")


def named_folders(root, folder, renamed):
    """The items of `class_folders`, with paths from `root`, named by `renamed` unless it is None.

    ValueError: it lacks the name of a folder.
    """
    items, inside = class_folders(folder, renamed)["all"], folder.relative_to(root).as_posix()
    names = list(dict.fromkeys(name for _, _, name in items))
    unnamed = set(names) - set((renamed or {}).values())
    if renamed is not None and unnamed:
        raise ValueError(f"--names has no name for the class folder {folder / min(unnamed)}: add one")
    plain = dict(zip(names, without_codes(names, folder) if renamed is None else names))
    return [[path if folder == root else f"{inside}/{path}", label, plain[name]] for path, label, name in items]


def labeled_by_table(root, place, renamed):
    """(Name of the CSV file in the folder `place` that labels its images, items [path, 0, class name]), or ("", []).

    One column has the names of the image files there, with or without their endings. The column of classes is told by
    its header, or is the only other one. ValueError: that is not clear, or an image has two classes.
    """
    paths, tables = image_paths(place)[0], []
    names, stems = {os.path.basename(path): path for path in paths}, {pathlib.Path(path).stem: path for path in paths}
    for table in sorted(place.glob("*.[ct]sv")) if len(names) == len(paths) else ():
        text = read_text(table, "save it as CSV in UTF-8")
        try:
            rows = [row for row in csv.reader(io.StringIO(text), delimiter=max(",;\t", key=text.count)) if row]
        except csv.Error as error:
            raise ValueError(f"{table} cannot be read ({error}): save it as CSV in UTF-8, or move it away") from error
        columns = [[cell.strip() for cell in column] for column in zip(*rows)]
        for images in names, stems:  # stems only where no column has names with their endings: 0, 1, 2 may count lines
            found = [[images.get(re.split(r"[\\/]", cell)[-1]) for cell in column] for column in columns]
            files = [of for of in found if 2 * of.count(None) < len(of)]
            if len(files) > 1:
                raise ValueError(f"{table} has two columns that could be the names of the images: leave one")
            if files:
                tables.append((table, files[0], [column for column, of in zip(columns, found) if of is not files[0]]))
                break
    if not tables:
        return "", []
    table, files, columns = tables[0]
    header = int(files[0] is None)
    known = [column for name in LABEL_COLUMNS for column in columns if header and column[0].lower() == name]
    if len(tables) > 1 or not known and len(columns) != 1:
        raise ValueError(f"{table} is not the only table there, or has no column 'label': leave one with such a column")
    labeled = zip(files[header:], (known or columns)[0][header:])
    pairs = sorted({(name, image) for image, name in labeled if image and name})
    if len(pairs) > len({image for _, image in pairs}):
        raise ValueError(f"{table} gives an image two classes: give each image one")
    lost, unlabeled = files[header:].count(None), len(paths) - len(pairs)
    if header and {column[0].lower() for column in columns} & PART_COLUMNS:
        warn(f"{table}: its column of parts is not used; for parts of your own, give the folders train and test")
    if lost or unlabeled:
        warn(f"{table}: {lost} of its lines name no image, and {unlabeled} images have no label: left out")
    start = (place / ".").relative_to(root)
    column = f", column {known[0][0]}" if known else ""
    names = renamed or {}
    return table.name + column, [[(start / path).as_posix(), 0, names.get(name, name)] for name, path in pairs]


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
    text = read_text(path, advice).strip()
    names = [line.strip() for line in text.splitlines() if line.strip()]
    names = decode(text, list[str], path, advice) if text.startswith(("[", "{")) else names
    names = without_codes(names, path)
    if not names or first_duplicate(names):
        raise ValueError(f"{path} is empty, or has '{first_duplicate(names)}' twice: give each class name once")
    warn_of_same_names(names)
    return names


def without_codes(names, where):
    """Class names without numbers from 0 or 1, or WordNet's ids, if they stand before all of them; then warns.

    As in "001.Laysan_Albatross" or "n02085620-Chihuahua". where: the file or folder of the names.
    """
    coded = [re.fullmatch(r"(\d+|n\d{8})[\s.,:;_-]+(.*\S)", name) for name in names]
    if len(names) < 2 or not all(coded) or not re.fullmatch(r"0*[01]|n.*", min(match[1] for match in coded)):
        return names
    if len({match[2] for match in coded}) < len(names):
        return names
    warn(f"{where}: the numbers before its {len(names)} names are left out, as in '{names[0]}'")
    return [match[2] for match in coded]


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
        advice = "name each folder once; labels of images belong into --root"
        raise ValueError(f"--names {path} has '{wrong}' twice or as a name: {advice}")
    return found


def first_duplicate(names):
    """The first of some names that occurs more than once, or None."""
    return next((name for name, count in collections.Counter(names).items() if count > 1), None)


def as_clip_reads(name):
    """What CLIP sees of a class name, a string: two names with the same result are one class to it.

    The prompts here read `_` as a space. CLIP's tokenizer composes accents, repairs broken Unicode and HTML, joins
    blanks, and lower-cases. So does this, without the package `clip`, which imports PyTorch.
    """
    cleaned = html.unescape(html.unescape(ftfy.fix_text(name.replace("_", " "))))
    return " ".join(cleaned.split()).lower()


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
    codes = [name for name in names if re.fullmatch(r"n?\d+", name)]
    if codes:
        warn(f"{len(codes)} of {len(names)} names are numbers, such as '{codes[0]}', which tell CLIP nothing")


# What a run says before it works --------------------------------------------------------------------------------------


def look_for_folders(settings):
    """Raises the error of a missing folder before anything is imported that takes seconds.

    settings: `options.Settings`. ValueError, FileNotFoundError: one of its folders is missing; as `open_dataset`.
    """
    given = [("--eval", folder) for folder in settings.eval]
    for option, folder in (*given, ("--unlabeled", settings.unlabeled), ("--new-test", settings.new_test)):
        if folder and not os.path.isdir(folder):
            raise ValueError(f"{option} {folder} is not a folder: give one that is there")
    name, root = settings.dataset, settings.root or "data"
    place = dataset_folder(name, root) if name in LAYOUTS else pathlib.Path(root)
    there = place.is_dir() or settings.download or settings.eval or name == "eurosat"
    if name not in DATASETS or not there and name not in DEMOS:
        open_dataset(name, root, names=settings.names, template=settings.template)


def look_for_images(task):
    """Raises an error before the work begins rather than during it, and warns about the user's own images.

    task: a `data.Task`. FileNotFoundError: images are missing. UnreadableImage: a training image cannot be opened.
    """
    tuned = [(task.read, [path for path, _, _ in task.base_train]), (task.new_read, task.new_train)]
    tuned = [(read, paths) for read, paths in tuned if isinstance(read, FolderReader)]  # the demo's images are drawn
    tests = [test for test in task.tests.values() if isinstance(test.read, FolderReader)]
    images = [read.folder / path for read, paths in tuned for path in paths]
    images += [test.read.folder / path for test in tests for path, _, _ in test.items]
    missing = [path for path in images if not os.path.isfile(path)]
    if missing:
        text = f"{len(missing)} of {len(images)} images are missing, for example {missing[0]}"
        raise FileNotFoundError(f"{text}: complete the folder, give another --root, or correct the split")
    for read, path in ((read, path) for read, paths in tuned for path in paths):
        read(path, decode=False)
    own, source = {}, task.source
    if source.image_folder is not None and not source.plain:
        for part, items in source.split.items():
            own[part] = [(source.image_folder / path, name) for path, _, name in items]
    if task.new_names and task.new_answers is None:
        own["unlabeled"] = [(task.new_read.folder / path, None) for path in task.new_train]
        for test in [task.tests["new"]] if "new" in task.tests else ():
            own["new test"] = [(test.read.folder / path, name) for path, _, name in test.items]
    warn_of_odd_images([path for part in own if part != "unlabeled" for path, _ in own[part]])
    warn_of_copies(own)


def warn_of_copies(own):
    """Warns about files that are in training and test at once, or in two classes, byte by byte.

    own: {part: pairs of path and class name or None}, parts as in a split, "unlabeled" and "new test".
    """
    content, names = contents([path for pairs in own.values() for path, _ in pairs]), collections.defaultdict(set)
    for path, name in (pair for pairs in own.values() for pair in pairs if pair[1] is not None):
        names[content.get(path)].add(name)
    found = [path for path in content if len(names[content[path]]) > 1]
    if found:
        warn(f"{len(found)} images are in two classes, byte by byte, for example {found[0]}: remove the wrong ones")
    for tuned, test, result in (
        ("train", "test", "scores too high"),
        ("unlabeled", "new test", "New is transductive"),
        ("train", "unlabeled", "pseudo-labels of base images"),
    ):
        seen = {content.get(path) for path, _ in own.get(tuned, ())} - {None}
        found = [path for path, _ in own.get(test, ()) if content.get(path) in seen]
        if found:
            text = f"{len(found)} of {len(own[test])} {test} images are {tuned} images too, byte by byte"
            warn(f"{text}, for example {found[0]}: {result}")


def contents(paths):
    """{path: what is equal for files of the same bytes} of the files that may have the bytes of another one.

    Only files of one size are opened, and only those with the same 4 KiB in the middle are read as a whole.
    """

    def digest(path, length):
        with open(path, "rb") as file:
            file.seek(os.path.getsize(path) // 2 if length else 0)
            return hashlib.sha256(file.read(length)).digest()

    keys = {path: os.path.getsize(path) for path in paths if os.path.isfile(path)}
    for length in (2**12, None):
        count = collections.Counter(map(keys.get, paths))
        keys = {path: (key, digest(path, length)) for path, key in keys.items() if count[key] > 1}
    return keys


def describe(task, shots, new_shots):
    """What a run sees of its data, lines of text: how it is split, and of each half its images and classes.

    task: a `data.Task`. shots, new_shots: images per class that it asks for.
    """
    train, val, test = (len(task.source.split[part]) for part in ("train", "val", "test"))
    halved = "" if task.new_answers is None else "; base is the first half of the classes, new the second"
    lines = [f"split by {task.source.rule}: {train} training, {test} test, {val} unused images{halved}"]
    base, new = next(iter(task.tests.values())).items, task.tests["new"].items if "new" in task.tests else []
    halves = [("base", "labeled", task.base_names, [label for _, label, _ in task.base_train], base, shots)]
    if task.new_names:
        labels = task.new_answers or [None] * len(task.new_train)
        halves.append(("new", "unlabeled", task.new_names, labels, new, new_shots))
    for half, kind, names, labels, test, asked in halves:
        few = [count for label, count in collections.Counter(labels).items() if label is not None and count < asked]
        less = f" ({len(few)} classes have fewer than {asked}, the least {min(few)})" if few else ""
        images = f"{len(labels)} {kind} images to tune{less}, {len(test)} to test"
        lines.append(f"{half}: {len(names)} classes, {images}: {', '.join(names[:20])}{', ...' * (len(names) > 20)}")
    return "\n".join(map(printable, lines))
