"""The eleven datasets of the paper: where their files lie, how they are split, and how they are fetched.

All is CoOp's: its folders, its lists, its splits (section 4.1). This file is not called datasets.py, because that name
would hide Hugging Face's package `datasets` from sentence-transformers.
"""

import collections
import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from typing import NamedTuple

from torchvision import datasets

from cli import warn
from formats import ITEMS, SPLIT, check, read_json
from images import hidden, image_paths, left_out
from record import write

# A dataset's own lists ------------------------------------------------------------------------------------------------
#
# They are for where CoOp's split file is missing. A reader takes the dataset's folder and returns lists of
# [path, label, class name], the paths relative to the dataset's images:
#     {"all"}                   class folders, or labels without an official test list
#     {"trainval", "test"}      an official test list
#     {"train", "val", "test"}  a final split
# Errors: FileNotFoundError where a file is missing; ValueError, KeyError, IndexError or TypeError where one is broken.


def class_folders(images, renamed=None, ignored=()):
    """A folder of class folders, all in sorted order: {"all"}. A class is named as its folder, or as `renamed` has it.

    Images are taken from a class folder's subfolders too. Warns about files that are not taken.
    FileNotFoundError: no such folder. ValueError: it holds no class folder, or one holds no images.
    """
    shown = sorted(path for path in images.iterdir() if not hidden(path.name))
    here = images.resolve()
    loops = {here, *here.parents}  # where a link would lead back to
    folders = [path for path in shown if path.is_dir() and path.name not in ignored and path.resolve() not in loops]
    if not folders:
        raise ValueError(f"{images} holds no class folders: what is wanted is {images}/<class name>/*.jpg")
    items, others = [], collections.Counter()
    for label, folder in enumerate(folders):
        name = (renamed or {}).get(folder.name, folder.name)
        found, others_here = image_paths(folder)
        others += others_here
        if not found:
            raise ValueError(
                f"the class folder {folder} holds no images: add some, or take it out "
                f"(what is wanted: {images}/<class name>/*.jpg)"
            )
        items += [[f"{folder.name}/{image}", label, name] for image in found]
    left_out(images, others)
    beside = collections.Counter(path.suffix.lower() or "no ending" for path in shown if path.is_file())
    left_out(images, beside, "that lie beside the class folders")
    return {"all": items}


def read_lines(path):
    """A text file's lines, stripped, without the empty ones. OSError: no such file. UnicodeDecodeError: not UTF-8."""
    stripped = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]  # sig: a byte order mark
    return [line for line in stripped if line]


def read_mat(path):
    """A MATLAB file's variables as lists, numbers, strings and dicts.

    Another process reads it, because scipy crashes on some broken files (1 of 100 mutated ones). Two datasets have such
    files, and need them only without a split file. FileNotFoundError: no such file. ValueError: it is broken.
    """
    with open(path, "rb"):
        pass  # the system's own error, where there is none
    read = (
        "import json, sys; from scipy.io import loadmat; found = loadmat(sys.argv[1], simplify_cells=True);"
        "found = {key: value for key, value in found.items() if key[:2] != '__'};"
        "print(json.dumps(found, default=lambda array: array.tolist()))"
    )
    try:
        child = subprocess.run([sys.executable, "-c", read, str(path)], capture_output=True, timeout=300)
    except subprocess.TimeoutExpired as error:
        raise ValueError(f"{path.name} cannot be read within {error.timeout} s") from error
    if child.returncode:
        told = child.stderr.decode(errors="replace").strip().splitlines() or [f"signal {-child.returncode}"]
        raise ValueError(f"{path.name} is not a MATLAB file that scipy reads: {told[-1]}")
    return json.loads(child.stdout)


def caltech101(folder):
    """{"all"}: class folders without the background and the easy faces."""
    renamed = {"airplanes": "airplane", "Faces": "face", "Leopards": "leopard", "Motorbikes": "motorbike"}
    return class_folders(folder / "101_ObjectCategories", renamed, ("BACKGROUND_Google", "Faces_easy"))


def images_folder(folder):
    """{"all"}: the class folders of DTD and Food101."""
    return class_folders(folder / "images")


# fmt: off
EUROSAT_NAMES = {
    "AnnualCrop": "Annual Crop Land", "Forest": "Forest", "HerbaceousVegetation": "Herbaceous Vegetation Land",
    "Highway": "Highway or Road", "Industrial": "Industrial Buildings", "Pasture": "Pasture Land",
    "PermanentCrop": "Permanent Crop Land", "Residential": "Residential Buildings", "River": "River",
    "SeaLake": "Sea or Lake",
}
# fmt: on


def eurosat(folder):
    """{"all"}: class folders, their names written out."""
    return class_folders(folder / "2750", EUROSAT_NAMES)


def oxford_flowers(folder):
    """{"all"}: the labels of all images in one file, the classes' names in another, "1": "pink primrose"."""
    names = json.loads((folder / "cat_to_name.json").read_text(encoding="utf-8-sig"))
    labels = read_mat(folder / "imagelabels.mat")["labels"]  # of image_00001.jpg, image_00002.jpg, ..., from 1
    return {"all": [[f"image_{i:05d}.jpg", label - 1, names[str(label)]] for i, label in enumerate(labels, 1)]}


def oxford_pets(folder):
    """{"trainval", "test"}: lines like "Abyssinian_100 1 1 1", an image and its label from 1."""
    lists = {}
    for part in ("trainval", "test"):
        lists[part] = []
        for line in read_lines(folder / "annotations" / f"{part}.txt"):
            image, label, *_ = line.split()
            lists[part].append([f"{image}.jpg", int(label) - 1, image.rsplit("_", 1)[0].lower()])
    return lists


def stanford_cars(folder):
    """{"trainval", "test"}: MATLAB tables. The class "Audi TTS Coupe 2012" is named "2012 Audi TTS Coupe"."""
    names = read_mat(folder / "devkit" / "cars_meta.mat")["class_names"]
    lists = {"trainval": [], "test": []}
    for part, images, table in (
        ("trainval", "cars_train", "devkit/cars_train_annos.mat"),
        ("test", "cars_test", "cars_test_annos_withlabels.mat"),
    ):
        for row in read_mat(folder / table)["annotations"]:
            label = row["class"] - 1
            car, year = names[label].rsplit(" ", 1)
            lists[part].append([f"{images}/{row['fname']}", label, f"{year} {car}"])
    return lists


def sun397(folder):
    """{"trainval", "test"}: lines like "/b/bazaar/indoor/sun_aabb.jpg", whose class is named "indoor bazaar"."""
    label_of = {place: label for label, place in enumerate(read_lines(folder / "ClassName.txt"))}  # /b/bazaar/indoor
    lists = {"trainval": [], "test": []}
    for part, file in (("trainval", "Training_01.txt"), ("test", "Testing_01.txt")):
        for path in read_lines(folder / file):
            place = path.rsplit("/", 1)[0]
            lists[part].append([path[1:], label_of[place], " ".join(reversed(place.split("/")[2:]))])
    return lists


def ucf101(folder):
    """{"trainval", "test"}: videos, "YoYo/v_YoYo_g01_c01.avi". The image is a middle frame, in the folder Yo_Yo."""
    label_of = {}
    for line in read_lines(folder / "ucfTrainTestlist" / "classInd.txt"):  # 101 YoYo
        number, action = line.split()
        label_of[action] = int(number) - 1
    lists = {"trainval": [], "test": []}
    for part, file in (("trainval", "trainlist01.txt"), ("test", "testlist01.txt")):
        for line in read_lines(folder / "ucfTrainTestlist" / file):
            action, video = line.split()[0].split("/")
            name = "_".join(re.findall("[A-Z][^A-Z]*", action))
            lists[part].append([f"{name}/{video.replace('.avi', '.jpg')}", label_of[action], name])
    return lists


def fgvc_aircraft(folder):
    """{"train", "val", "test"}: lines like "1025794 707-320", an image and its class."""
    label_of = {name: label for label, name in enumerate(read_lines(folder / "variants.txt"))}
    lists = {}
    for part in ("train", "val", "test"):
        lists[part] = []
        for line in read_lines(folder / f"images_variant_{part}.txt"):
            image, name = line.split(" ", 1)
            lists[part].append([f"{image}.jpg", label_of[name], name])
    return lists


def imagenet(folder):
    """{"train", "val", "test"}: folders like n01440764, named in classnames.txt. The validation images are the test.

    CoOp takes a folder's files as the disk lists them. Here they are sorted, so that every machine draws the same.
    """
    names = dict(line.split(" ", 1) for line in read_lines(folder / "classnames.txt"))  # n01440764 tench
    lists = {"train": [], "val": [], "test": []}
    for part, place in (("train", "train"), ("test", "val")):
        images = folder / "images" / place
        if not any(entry.is_dir() for entry in os.scandir(images)):
            raise ValueError(
                f"{images} holds no folders like n01440764; if the images lie there flat, sort them with the script "
                "valprep.sh (soumith/imagenetloader.torch)"
            )
        for label, wnid in enumerate(sorted(entry.name for entry in os.scandir(images) if entry.is_dir())):
            lists[part] += [[f"{place}/{wnid}/{image}", label, names[wnid]] for image in image_paths(images / wnid)[0]]
    return lists


# The layouts ----------------------------------------------------------------------------------------------------------


class Layout(NamedTuple):
    """Where a dataset lies under --root, as CoOp lays it out."""

    folder: str
    images: str  # under the folder; the split's paths are relative to it
    split: str | None  # name of CoOp's split file; None: CoOp has none
    template: str  # of zero-shot CLIP
    lists: Callable  # the reader above


# fmt: off
LAYOUTS = {
    "imagenet": Layout("imagenet", "images", None, "a photo of a {}.", imagenet),
    "caltech101": Layout("caltech-101", "101_ObjectCategories", "split_zhou_Caltech101.json", "a photo of a {}.",
                         caltech101),
    "oxford_pets": Layout("oxford_pets", "images", "split_zhou_OxfordPets.json", "a photo of a {}, a type of pet.",
                          oxford_pets),
    "stanford_cars": Layout("stanford_cars", ".", "split_zhou_StanfordCars.json", "a photo of a {}.", stanford_cars),
    "oxford_flowers": Layout("oxford_flowers", "jpg", "split_zhou_OxfordFlowers.json",
                             "a photo of a {}, a type of flower.", oxford_flowers),
    "food101": Layout("food-101", "images", "split_zhou_Food101.json", "a photo of {}, a type of food.", images_folder),
    "fgvc_aircraft": Layout("fgvc_aircraft", "images", None, "a photo of a {}, a type of aircraft.", fgvc_aircraft),
    "sun397": Layout("sun397", "SUN397", "split_zhou_SUN397.json", "a photo of a {}.", sun397),
    "dtd": Layout("dtd", "images", "split_zhou_DescribableTextures.json", "{} texture.", images_folder),
    "eurosat": Layout("eurosat", "2750", "split_zhou_EuroSAT.json", "a centered satellite photo of {}.", eurosat),
    "ucf101": Layout("ucf101", "UCF-101-midframes", "split_zhou_UCF101.json", "a photo of a person doing {}.", ucf101),
}
# fmt: on


# The split ------------------------------------------------------------------------------------------------------------


def read_split(name, folder):
    """The split of dataset `name` in its folder: {"train", "val", "test"}, lists of [path, label, class name].

    It is CoOp's split file, else the one that `keep_split` saved, else a new one of the dataset's own lists.
    FileNotFoundError: none is there. ValueError: it is broken. Both say what to get, and from where.
    """
    path = find_split_file(name, folder)
    if path is None:
        return split_by_rule(own_lists(name, folder))
    advice = "it needs lists 'train' and 'test' of [path, label, class name]; get CoOp's own again"
    split = read_json(path, SPLIT, ("train", "test"), advice)
    if path == made_split(name, folder):
        tell_of_made_split(name, folder, path, split)
    return split


def find_split_file(name, folder):
    """The path of CoOp's split file, else of the one that `keep_split` saved, else None."""
    split = LAYOUTS[name].split
    if split is not None:
        for path in (folder / split, made_split(name, folder)):
            if path.is_file():
                return path
    return None


def made_split(name, folder):
    """Where `keep_split` saves a split: "split_seed1_EuroSAT.json" beside CoOp's "split_zhou_EuroSAT.json"."""
    return folder / LAYOUTS[name].split.replace("zhou", "seed1")


def keep_split(name, folder, split):
    """Saves a split that was made here, with a warning: where CoOp has a split file, and neither is there.

    To be called when the split is found to be good: a saved one is read on every later run.
    """
    file = LAYOUTS[name].split
    if file is None or find_split_file(name, folder) is not None:  # without one, the lists are a final split
        return
    path = made_split(name, folder)
    try:
        write(path, json.dumps(split))
        saved = f"into {path.name}"
    except OSError as error:
        saved = f"but not saved ({error})"
    warn(f"no {file} in {folder}: split by CoOp's rule, seed 1, {saved}; the digits then differ from the paper's split")


def tell_of_made_split(name, folder, path, split):
    """Warns that a saved split is ours, and where the dataset's folder has changed since it was made."""
    text = f"{path} is a split made here, not CoOp's: the digits differ from the paper's"
    try:
        now = {item[0] for items in own_lists(name, folder).values() for item in items}
    except (ValueError, OSError):  # the lists are gone: the split stands for them
        now = None
    then = {item[0] for items in split.values() for item in items}
    if now is not None and now != then:
        text += (
            f"; the folder has changed since, {len(now - then)} images are new and {len(then - now)} missing: "
            f"delete {path.name} to split it anew"
        )
    warn(text)


def own_lists(name, folder):
    """What the dataset's reader returns, its errors as one sentence: FileNotFoundError or ValueError."""
    layout, by_hand = LAYOUTS[name], where_to_get(name, folder)
    try:
        lists = layout.lists(folder)
        return check(
            lists, dict.fromkeys(lists, ITEMS), (), "what they hold", "each line needs a path, a label, a name"
        )
    except FileNotFoundError as error:
        looked_for = f"{error.filename} is not there"
        if layout.split is not None:
            looked_for = f"neither {folder / layout.split} nor {error.filename} is there"
        advice = f"get {by_hand}; or point --root at the folder that holds '{layout.folder}'"
        if name in FETCHED:
            advice = f"add --download, or {advice}"
        raise FileNotFoundError(f"{looked_for}: {advice}") from error
    except Exception as error:  # of every kind, on lists and tables that are something else
        raise ValueError(
            f"the lists of {name} in {folder} cannot be read ({error}): get the dataset again, {by_hand}"
        ) from error


def split_by_rule(lists, seed=1):
    """CoOp's rule for lists without a val list: its functions read_and_split_data and split_trainval.

    lists: what a reader returns. Classes are shuffled one after the other, in the order of their first item. Of "all",
    50% of each class go to train, 20% to val, the rest to test; of "trainval" 20% to val, the rest to train. Numbers
    are rounded. Returns {"train", "val", "test"}.
    """
    rng = random.Random(seed)
    split = {part: list(lists.get(part, [])) for part in ("train", "val", "test")}  # what is final already
    for group in by_label(lists.get("all", [])):
        rng.shuffle(group)
        train, val = round(len(group) * 0.5), round(len(group) * 0.2)
        if len(group) == 3:  # CoOp's rule leaves none to test
            val = 0
        split["train"] += group[:train]
        split["val"] += group[train : train + val]
        split["test"] += group[train + val :]
    for group in by_label(lists.get("trainval", [])):
        rng.shuffle(group)
        val = round(len(group) * 0.2)
        split["val"] += group[:val]
        split["train"] += group[val:]
    return split


def by_label(items):
    """Lists of [path, label, class name], one per label, in the order of the labels' first appearance."""
    groups = {}
    for item in items:
        groups.setdefault(item[1], []).append(item)
    return list(groups.values())


# Downloads ------------------------------------------------------------------------------------------------------------

# fmt: off
ARCHIVES = {  # torchvision's class, where its files then lie, and which of them CoOp's folder has (None: all)
    "caltech101": ("Caltech101", "caltech101", ["101_ObjectCategories"]),
    "oxford_pets": ("OxfordIIITPet", "oxford-iiit-pet", ["annotations", "images"]),
    "oxford_flowers": ("Flowers102", "flowers-102", ["imagelabels.mat", "jpg"]),
    "food101": ("Food101", "food-101", ["meta", "images"]),
    "fgvc_aircraft": ("FGVCAircraft", "fgvc-aircraft-2013b/data", None),
    "dtd": ("DTD", "dtd/dtd", ["images"]),
    "eurosat": ("EuroSAT", "eurosat", ["2750"]),
}
MIDFRAMES = "10Jqome3vtUA2keJkNanAiFpgbyC9Hc2O"  # of UCF101: UCF-101-midframes.zip at Google Drive, by CoOp's authors
FETCHED = [*ARCHIVES, "ucf101"]  # whose images a program can fetch
DRIVE = {  # what else CoOp's authors share at Google Drive: name under the dataset's folder, id
    "imagenet": {"classnames.txt": "1-61f_ol79pViBFDG_IDlUQSwoLcn2XXF"},
    "caltech101": {"split_zhou_Caltech101.json": "1hyarUivQE36mY6jSomru6Fjd-JzwcCzN"},
    "oxford_pets": {"split_zhou_OxfordPets.json": "1501r8Ber4nNKvmlFVQZ8SeUHTcdTTEqs"},
    "stanford_cars": {"split_zhou_StanfordCars.json": "1ObCFbaAgVu0I-k_Au-gIUcefirdAuizT"},
    "oxford_flowers": {"split_zhou_OxfordFlowers.json": "1Pp0sRXzZFZq15zVOzKjKBu4A9i01nozT",
                       "cat_to_name.json": "1AkcxCXeK_RCGCEC_GvmWxjcjaNhu-at0"},
    "food101": {"split_zhou_Food101.json": "1QK0tGi096I0Ba6kggatX1ee6dJFIcEJl"},
    "sun397": {"split_zhou_SUN397.json": "1y2RD81BYuiyvebdN-JymPfyWYcd8_MUq"},
    "dtd": {"split_zhou_DescribableTextures.json": "1u3_QfB467jqHgNXC00UIzbLZRQCg2S7x"},
    "eurosat": {"split_zhou_EuroSAT.json": "1Ip7yaCWFi0eaOFUGga0lUdVi_DDQth1o"},
    "ucf101": {"split_zhou_UCF101.json": "1I0S0q91hJfsV9Gf4xDIjgDq4AqBNJb1y"},
}
ADDRESSES = {  # where a person gets the images
    "imagenet": "the train and val images of ILSVRC 2012 (https://image-net.org, with an account), one folder per "
                "class (n01440764, ...), into images/train and images/val",
    "caltech101": "101_ObjectCategories of https://data.caltech.edu/records/mzrjq-6wc02",
    "oxford_pets": "images and annotations of https://www.robots.ox.ac.uk/~vgg/data/pets",
    "stanford_cars": "cars_train and cars_test, devkit and cars_test_annos_withlabels.mat (their first address, "
                     "https://ai.stanford.edu/~jkrause/cars/car_dataset.html, is dead: look for a copy)",
    "oxford_flowers": "jpg and imagelabels.mat of https://www.robots.ox.ac.uk/~vgg/data/flowers/102",
    "food101": "food-101.tar.gz of https://data.vision.ee.ethz.ch/cvl/datasets_extra/food-101",
    "fgvc_aircraft": "the folder data of https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft",
    "sun397": "SUN397.tar.gz (37 GB, you accept its license) and Partitions.zip of "
              "https://vision.princeton.edu/projects/2010/SUN",
    "dtd": "dtd-r1.0.1.tar.gz of https://www.robots.ox.ac.uk/~vgg/data/dtd",
    "eurosat": "EuroSAT.zip of https://huggingface.co/datasets/torchgeo/eurosat",
    "ucf101": "UCF-101-midframes.zip of CoOp's list of datasets "
              "(https://drive.google.com/file/d/10Jqome3vtUA2keJkNanAiFpgbyC9Hc2O)",
}
# fmt: on


def where_to_get(name, folder):
    """What a person must put where, in the middle of a sentence. folder: the dataset's, under --root."""
    text = ADDRESSES[name]
    for file, file_id in DRIVE.get(name, {}).items():
        purpose = "for the very split of the paper " if file == LAYOUTS[name].split else ""
        text += f"; {purpose}{file} of https://drive.google.com/file/d/{file_id}"
    return f"{text}: unpacked into {folder}, so that the images are in {folder / LAYOUTS[name].images}"


def fetch(name, folder):
    """Fetches what dataset `name` lacks, with a progress bar. folder: the dataset's, under --root.

    Everything arrives in a folder beside its place and is moved in when it is whole. A small file that cannot be had
    is warned about. FileNotFoundError: the images cannot be had; says what to get by hand.
    ValueError: --root is a file.
    """
    root, part = folder.parent, folder.parent / f".{folder.name}.part"
    if root.exists() and not root.is_dir():
        raise ValueError(f"--root {root} is a file: give the folder that holds '{folder.name}'")
    new_root = not root.exists()
    try:
        if not (folder / LAYOUTS[name].images).is_dir():
            part.mkdir(parents=True, exist_ok=True)
            fetch_images(name, folder, part)
        for file, file_id in DRIVE.get(name, {}).items():
            if not (folder / file).exists():
                part.mkdir(exist_ok=True)
                fetch_file(file, file_id, folder, part)
    finally:
        shutil.rmtree(part, ignore_errors=True)
        if new_root and root.is_dir() and not any(root.iterdir()):
            root.rmdir()


def fetch_images(name, folder, part):
    """The images into `folder` by way of `part`. FileNotFoundError: they cannot be had; says what to get by hand."""
    try:
        arrived = download_images(name, part)
        folder.mkdir(exist_ok=True)
        for path in arrived:
            os.replace(path, folder / path.name)
    except Exception as error:  # urllib, http, tarfile, zipfile, torchvision and gdown each raise their own
        raise FileNotFoundError(
            f"{name} is not in {folder} and could not be downloaded ({reason(error)}): "
            f"get by hand {where_to_get(name, folder)}; or point --root at CoOp's data folder"
        ) from error


def download_images(name, part):
    """Downloads and unpacks a dataset's images into the folder `part`. Returns the paths to move into CoOp's folder.

    OSError: no program can fetch them. Others: as the network, torchvision and gdown raise them.
    """
    if name == "ucf101":
        shutil.unpack_archive(from_drive(MIDFRAMES, part / "midframes.zip"), part)
        return [part / "UCF-101-midframes"]
    if name not in ARCHIVES:
        raise OSError("a program cannot fetch it")
    class_name, place, entries = ARCHIVES[name]
    getattr(datasets, class_name)(str(part), download=True)
    return [part / place / entry for entry in entries or os.listdir(part / place)]


def fetch_file(file, file_id, folder, part):
    """A small file of CoOp's authors into `folder` by way of `part`; a warning where it cannot be had."""
    try:
        from_drive(file_id, part / file)
        os.replace(part / file, folder / file)
    except Exception as error:  # requests and gdown raise their own
        warn(
            f"{file} could not be downloaded ({reason(error)}): "
            f"get https://drive.google.com/file/d/{file_id} by hand, into {folder}"
        )


def from_drive(file_id, path):
    """A file of Google Drive into `path`, with a progress bar. Returns the path. Errors: requests' and gdown's own."""
    import gdown  # takes half a second, which few runs need to wait

    return gdown.download(id=file_id, output=str(path))


def reason(error):
    """Why a download failed, in one line."""
    if type(error).__name__ == "ConnectionError":  # of requests, whose text is long and does not say that
        return "no connection"
    return (str(error).strip() or type(error).__name__).splitlines()[0]
