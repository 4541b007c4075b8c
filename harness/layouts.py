"""The eleven datasets of the paper: where their files lie, how they are split, and how they are downloaded.

Folders, lists and splits are CoOp's (section 4.1). This file is not called datasets.py, because that name would hide
Hugging Face's package `datasets` from sentence-transformers.
"""

import collections
import os
import random
import re
import shutil
from collections.abc import Callable
from typing import NamedTuple

import msgspec

from harness.cli import warn
from harness.files import Items, Split, read_json
from harness.image_files import hidden, image_paths, leads_back, needs_package, warn_left_out

COOP = "https://github.com/KaiyangZhou/CoOp/blob/main/DATASETS.md"
DRIVE = "https://drive.google.com/file/d/"
PARTS = {"train": "train training", "val": "val valid validation dev eval evaluation", "test": "test testing"}

# A dataset's own lists ------------------------------------------------------------------------------------------------
#
# A reader takes the dataset's folder and returns lists of [path, label, class name], with paths relative to the images:
# {"all"} of class folders, or {"train", "val", "test"}, a final split. FileNotFoundError if a file is missing; an error
# of any type if one is broken.


def subfolders(folder):
    """The folders in a folder, sorted: neither hidden ones nor links back to one above. None in what is no folder."""
    names = [entry.name for entry in os.scandir(folder) if entry.is_dir()] if folder.is_dir() else []
    return [folder / name for name in sorted(names) if not hidden(name) and not leads_back(folder / name)]


def unwrapped(folder):
    """The folder of several folders that lies in `folder`, such as an archive's own, or else `folder` itself."""
    inner = subfolders(folder)
    return unwrapped(inner[0]) if len(inner) == 1 and subfolders(inner[0]) else folder


def parts_of(folder):
    """{"train", "val", "test": folder} of the subfolders that are named so: Train, testing, valid, train2017, seg_test.

    ValueError: two are of one part, or none is for training.
    """
    usual, found = {word: part for part, words in PARTS.items() for word in words.split()}, {}
    names = {path: re.sub("sets?|data|images?|imgs?", " ", path.name.lower()) for path in subfolders(folder)}
    words = {path: set(re.findall("[a-z]+", name)) for path, name in names.items()}
    shared = set.intersection(*words.values()) if len(words) > 1 else set()
    for path, own in words.items():
        part = usual.get(" ".join(own - shared))
        if part is not None and found.setdefault(part, path) != path:
            raise ValueError(f"{path} and {found[part]} both look like the {part} part: move one away")
    if found and "train" not in found:
        raise ValueError(f"{next(iter(found.values()))} looks like a part, but there is no folder train beside it")
    return found if len(found) > 1 or len(words) == 1 else {}  # or "train" is a class of vehicles


def class_folders(images, renamed=None, ignored=()):
    """Lists a folder of class folders in sorted order: {"all"}. A class has its folder's name, or that of `renamed`.

    The subfolders of a class folder are searched too; an archive's own folder around all of them is seen. Warns about
    files that are not used.
    FileNotFoundError: no such folder. ValueError: it holds no class folder, or one without images.
    """
    place, items, others, label = unwrapped(images), [], collections.Counter(), 0
    wanted = f"the layout is {images}/<class name>/*.jpg"
    if not images.is_dir():
        raise FileNotFoundError(f"{images} is not a folder: {wanted}")
    for path in sorted(place.iterdir()):
        if hidden(path.name) or path.name in ignored or leads_back(path):
            continue
        if not path.is_dir():
            others[path.suffix.lower() or "no ending"] += 1
            continue
        found, others_here = image_paths(path)
        if not found:
            advice = needs_package(others_here) or "add some, or remove it"
            raise ValueError(f"the class folder {path} holds no images: {advice} ({wanted})")
        name, inside = (renamed or {}).get(path.name, path.name), path.relative_to(images).as_posix()
        items += [[f"{inside}/{image}", label, name] for image in found]
        others, label = others + others_here, label + 1
    if not items:
        files = f" but {', '.join(f'{count} {ending}' for ending, count in sorted(others.items()))}" if others else ""
        raise ValueError(f"{images} holds no class folders{files}: {wanted}")
    inner = {os.path.dirname(path) for path, _, _ in items}
    if place != images or not inner & {path.relative_to(images).as_posix() for path in subfolders(place)}:
        where = f"in {len(inner)} folders such as {min(inner)}"
        warn(f"the {label} classes are the folders of {place}, whose images lie {where}")
    warn_left_out(images, others, "that are not images in a class folder")
    return {"all": items}


def read_lines(path):
    """A text file's lines, stripped, without empty ones. OSError: it cannot be read. UnicodeDecodeError: not UTF-8."""
    stripped = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]  # sig: a byte order mark
    return [line for line in stripped if line]


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


def fgvc_aircraft(folder):
    """{"train", "val", "test"}: lines like "1025794 707-320", an image and its class."""
    label_of, lists = {name: label for label, name in enumerate(read_lines(folder / "variants.txt"))}, {}
    for part in ("train", "val", "test"):
        lines = [line.split(" ", 1) for line in read_lines(folder / f"images_variant_{part}.txt")]
        lists[part] = [[f"{image}.jpg", label_of[name], name] for image, name in lines]
    return lists


def imagenet(folder):
    """{"train", "val", "test"}: folders like n01440764, named in classnames.txt. The validation images are the test.

    CoOp takes a folder's files as the disk lists them. Here they are sorted, so that every machine draws the same.
    """
    names = dict(line.split(" ", 1) for line in read_lines(folder / "classnames.txt"))  # n01440764 tench
    lists = {"val": []}
    for part, place in (("train", "train"), ("test", "val")):
        items = class_folders(folder / "images" / place)["all"]
        lists[part] = [[f"{place}/{path}", label, names[wnid]] for path, label, wnid in items]
    return lists


# The layouts ----------------------------------------------------------------------------------------------------------


class Layout(NamedTuple):
    """Where a dataset lies under --root in CoOp's layout, and where it comes from."""

    folder: str
    images: str  # under the folder; the split's paths are relative to it
    template: str  # of zero-shot CLIP
    lists: Callable | None  # a reader above, where CoOp's split file is not needed
    archive: str | None  # a class of torchvision that downloads it, or a zip file's id on Google Drive
    drive: dict  # {file in the folder: id on Google Drive}, shared by CoOp's authors; a split file is the first

    @property
    def split(self):
        """The name of CoOp's split file; None if CoOp has none."""
        return next((file for file in self.drive if file.startswith("split_")), None)


# fmt: off
LAYOUTS = {
    "imagenet": Layout("imagenet", "images", "a photo of a {}.", imagenet, None,
                       {"classnames.txt": "1-61f_ol79pViBFDG_IDlUQSwoLcn2XXF"}),
    "caltech101": Layout("caltech-101", "101_ObjectCategories", "a photo of a {}.", caltech101, "Caltech101",
                         {"split_zhou_Caltech101.json": "1hyarUivQE36mY6jSomru6Fjd-JzwcCzN"}),
    "oxford_pets": Layout("oxford_pets", "images", "a photo of a {}, a type of pet.", None, "OxfordIIITPet",
                          {"split_zhou_OxfordPets.json": "1501r8Ber4nNKvmlFVQZ8SeUHTcdTTEqs"}),
    "stanford_cars": Layout("stanford_cars", ".", "a photo of a {}.", None, None,
                            {"split_zhou_StanfordCars.json": "1ObCFbaAgVu0I-k_Au-gIUcefirdAuizT"}),
    "oxford_flowers": Layout("oxford_flowers", "jpg", "a photo of a {}, a type of flower.", None, "Flowers102",
                             {"split_zhou_OxfordFlowers.json": "1Pp0sRXzZFZq15zVOzKjKBu4A9i01nozT"}),
    "food101": Layout("food-101", "images", "a photo of {}, a type of food.", images_folder, "Food101",
                      {"split_zhou_Food101.json": "1QK0tGi096I0Ba6kggatX1ee6dJFIcEJl"}),
    "fgvc_aircraft": Layout("fgvc_aircraft", "images", "a photo of a {}, a type of aircraft.", fgvc_aircraft,
                            "FGVCAircraft", {}),
    "sun397": Layout("sun397", "SUN397", "a photo of a {}.", None, None,
                     {"split_zhou_SUN397.json": "1y2RD81BYuiyvebdN-JymPfyWYcd8_MUq"}),
    "dtd": Layout("dtd", "images", "{} texture.", images_folder, "DTD",
                  {"split_zhou_DescribableTextures.json": "1u3_QfB467jqHgNXC00UIzbLZRQCg2S7x"}),
    "eurosat": Layout("eurosat", "2750", "a centered satellite photo of {}.", eurosat, "EuroSAT",
                      {"split_zhou_EuroSAT.json": "1Ip7yaCWFi0eaOFUGga0lUdVi_DDQth1o"}),
    "ucf101": Layout("ucf101", "UCF-101-midframes", "a photo of a person doing {}.", None,
                     "10Jqome3vtUA2keJkNanAiFpgbyC9Hc2O",  # UCF-101-midframes.zip, by CoOp's authors
                     {"split_zhou_UCF101.json": "1I0S0q91hJfsV9Gf4xDIjgDq4AqBNJb1y"}),
}
# fmt: on


# The split ------------------------------------------------------------------------------------------------------------


def read_split(name, folder):
    """The split of dataset `name` in its folder: {"train", "val", "test"}, lists of [path, label, class name].

    It comes from CoOp's split file; if that is missing, from class folders by CoOp's rule, with a warning.
    ValueError: neither is there, or it is broken; says what to get, and from where.
    """
    layout = LAYOUTS[name]
    if layout.split is not None and (folder / layout.split).is_file():
        advice = "it needs lists 'train' and 'test' of [path, label, class name]; get CoOp's own again"
        return {"train": [], "val": [], "test": []} | read_json(folder / layout.split, Split, advice)
    try:
        if layout.lists is None:
            raise FileNotFoundError(f"{folder / layout.split} is not there")
        lists = layout.lists(folder)
        msgspec.convert(lists, dict[str, Items])
    except Exception as error:  # broken lists raise errors of every type
        download = "add --download, or " if layout.archive is not None else ""
        raise ValueError(
            f"the lists of {name} in {folder} cannot be read ({error}): {download}get {how_to_get(name, folder)}; "
            f"or point --root at the folder that holds '{layout.folder}'"
        ) from error
    if layout.split is not None:
        warn(f"no {layout.split} in {folder}: split by CoOp's rule, seed 1; scores then differ from the paper's split")
    return split_by_rule(lists)


def how_to_get(name, folder):
    """What a person must download, and into which folder, as part of a sentence."""
    links = "".join(f", {file} from {DRIVE}{file_id}" for file, file_id in LAYOUTS[name].drive.items())
    return f"{name} as {COOP} describes{links}, into {folder}"


def split_by_rule(lists, seed=1):
    """CoOp's rule for class folders, its function read_and_split_data: {"train", "val", "test"}.

    lists: what a reader returns. Classes are shuffled one after the other, in the order of their first item. Of "all",
    50% of each class go to train, 20% to val, the rest to test; numbers are rounded. A final split stays as it is.
    """
    rng = random.Random(seed)
    split = {part: list(lists.get(part, [])) for part in ("train", "val", "test")}  # what is final already
    for group in by_label(lists.get("all", [])):
        rng.shuffle(group)
        train, val = round(len(group) * 0.5), round(len(group) * 0.2)
        val = val if len(group) != 3 else 0  # CoOp's rule would leave none for the test
        split["train"] += group[:train]
        split["val"] += group[train : train + val]
        split["test"] += group[train + val :]
    return split


def by_label(items):
    """Lists of [path, label, class name], one list per label, in the order of the labels' first appearance."""
    groups = {}
    for item in items:
        groups.setdefault(item[1], []).append(item)
    return list(groups.values())


# Downloads ------------------------------------------------------------------------------------------------------------


def fetch(name, folder):
    """Downloads what dataset `name` lacks, with a progress bar. folder: the dataset's, under --root.

    Everything arrives in a folder beside its place, and is moved in when it is complete. A small file that cannot be
    downloaded causes a warning. FileNotFoundError: the images cannot be downloaded; says what to get by hand.
    """
    layout, part = LAYOUTS[name], folder.with_name(f".{folder.name}.part")
    for needed in (layout.images, *layout.drive):
        if (folder / needed).exists():
            continue
        try:
            part.mkdir(parents=True, exist_ok=True)
            if needed == layout.images:
                arrived = download_images(layout, part)
            else:
                arrived = [from_drive(layout.drive[needed], part / needed)]
            folder.mkdir(exist_ok=True)
            for path in arrived:
                os.replace(path, folder / path.name)
        except Exception as error:  # urllib, http, tarfile, zipfile, requests, torchvision and gdown have their own
            reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            what = "its images" if needed == layout.images else needed
            text = f"{name}: {what} could not be downloaded ({reason}): get {how_to_get(name, folder)}"
            if needed == layout.images:
                raise FileNotFoundError(text) from error
            warn(text)
        finally:
            shutil.rmtree(part, ignore_errors=True)


def download_images(layout, part):
    """Downloads and unpacks a dataset's images into the folder `part`. Returns the paths to move into CoOp's folder.

    OSError: no program can download them. The network, torchvision and gdown raise further errors.
    """
    if layout.archive is None:
        raise OSError("no program can download it")
    from torchvision import datasets  # its import takes four seconds, and reading lists does not need it

    if hasattr(datasets, layout.archive):
        getattr(datasets, layout.archive)(str(part), download=True)
    else:
        shutil.unpack_archive(from_drive(layout.archive, part / "images.zip"), part)
    beside = next(part.rglob(layout.images)).parent.iterdir()
    return [path for path in beside if path.suffix not in (".gz", ".tgz", ".zip")]


def from_drive(file_id, path):
    """Downloads a file of Google Drive to `path`, with a progress bar. Returns the path. requests and gdown raise."""
    import gdown  # its import takes half a second, and few runs need it

    gdown.download(id=file_id, output=str(path))
    return path
