"""Datasets: their lists, CoOp's few-shot draw and its base/new halves.

    python data.py eurosat --root DIR               what a run would see: classes, halves, images, (b, K)
    python data.py eurosat --root DIR --list base   one image a line: path, label, class name
    python data.py dtd --root DIR --download        fetches it first, where it has an open address

Layout, splits and draws are CoOp's, which the paper and everyone it compares with use (section 4.1).
"""

import difflib
import json
import math
import os
import pathlib
import random
import re
from typing import Callable, NamedTuple

import demo
from command import Parser, at_least, end, warn
from download import BY_PROGRAM, fetch, where_to_get
from loaders import PICTURES, FolderReader
from record import write
from sampler import paper_batch

# Where no split file is there: a dataset's own lists -----------------------------------------------------------------
#
# A reader takes the dataset's folder and gives lists of [path, label, class name], paths relative to its images: "all",
# which CoOp splits by shares; "trainval" and "test", where there is an official test list; or "train", "val", "test".


def class_folders(images, renamed=(), ignored=()):
    """A folder of class folders, all in sorted order: {"all"}. ValueError: no class folder, or one without images."""
    folders = sorted(path for path in images.iterdir() if path.is_dir() and not path.name.startswith("."))
    items, renamed = [], dict(renamed)
    for label, folder in enumerate(folder for folder in folders if folder.name not in ignored):
        found = pictures(folder)
        if not found:
            raise ValueError(f"the class folder {folder} holds no images: add some, or take it out "
                             f"(what is wanted: {images}/<class name>/*.jpg)")
        items += [[f"{folder.name}/{name}", label, renamed.get(folder.name, folder.name)] for name in found]
    if not items:
        raise ValueError(f"{images} holds no class folders: what is wanted is {images}/<class name>/*.jpg")
    return {"all": items}


def pictures(folder):
    """Names of the pictures in a folder, sorted; hidden ones are left out."""
    return sorted(entry.name for entry in os.scandir(folder)
                  if os.path.splitext(entry.name)[1].lower() in PICTURES and not entry.name.startswith("."))


def lines(path):
    """A text file's lines, stripped, the empty ones left out."""
    return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def mat(path):
    """A MATLAB file. ValueError: it is broken."""
    from scipy.io import loadmat  # two datasets have such files, and need them only without a split file

    with open(path, "rb") as file:
        try:
            return loadmat(file)
        except Exception as error:  # scipy raises its own on a broken file
            raise ValueError(f"{path.name}: {error}") from error


def caltech101(folder):
    renamed = {"airplanes": "airplane", "Faces": "face", "Leopards": "leopard", "Motorbikes": "motorbike"}
    return class_folders(folder / "101_ObjectCategories", renamed, ("BACKGROUND_Google", "Faces_easy"))


def images_folder(folder):  # DTD, Food101
    return class_folders(folder / "images")


def eurosat(folder):
    return class_folders(folder / "2750", EUROSAT_NAMES)


EUROSAT_NAMES = {
    "AnnualCrop": "Annual Crop Land", "Forest": "Forest", "HerbaceousVegetation": "Herbaceous Vegetation Land",
    "Highway": "Highway or Road", "Industrial": "Industrial Buildings", "Pasture": "Pasture Land",
    "PermanentCrop": "Permanent Crop Land", "Residential": "Residential Buildings", "River": "River",
    "SeaLake": "Sea or Lake",
}


def oxford_flowers(folder):
    names = json.loads((folder / "cat_to_name.json").read_text(encoding="utf-8"))  # "1": "pink primrose"
    labels = mat(folder / "imagelabels.mat")["labels"][0]  # of image_00001.jpg, image_00002.jpg, ..., from 1
    return {"all": [[f"image_{number:05d}.jpg", int(label) - 1, names[str(label)]]
                    for number, label in enumerate(labels, 1)]}


def oxford_pets(folder):
    def read(name):  # a line: Abyssinian_100 1 1 1, the second is the label
        parts = [line.split() for line in lines(folder / "annotations" / name)]
        return [[f"{image}.jpg", int(label) - 1, image.rsplit("_", 1)[0].lower()] for image, label, *_ in parts]

    return {"trainval": read("trainval.txt"), "test": read("test.txt")}


def stanford_cars(folder):
    names = [name[0] for name in mat(folder / "devkit" / "cars_meta.mat")["class_names"][0]]

    def read(images, path):  # "Audi TTS Coupe 2012" reads "2012 Audi TTS Coupe"
        items = []
        for row in mat(folder / path)["annotations"][0]:
            label = int(row["class"][0, 0]) - 1
            car, year = names[label].rsplit(" ", 1)
            items.append([f"{images}/{row['fname'][0]}", label, f"{year} {car}"])
        return items

    return {"trainval": read("cars_train", "devkit/cars_train_annos.mat"),
            "test": read("cars_test", "cars_test_annos_withlabels.mat")}


def sun397(folder):
    label_of = {name: label for label, name in enumerate(lines(folder / "ClassName.txt"))}  # /b/bazaar/indoor

    def read(name):  # a line: /b/bazaar/indoor/sun_aabb.jpg, its class reads "indoor bazaar"
        items = []
        for path in lines(folder / name):
            place = path.rsplit("/", 1)[0]
            items.append([path[1:], label_of[place], " ".join(reversed(place.split("/")[2:]))])
        return items

    return {"trainval": read("Training_01.txt"), "test": read("Testing_01.txt")}


def ucf101(folder):
    lists = folder / "ucfTrainTestlist"
    label_of = {name: int(number) - 1 for number, name in map(str.split, lines(lists / "classInd.txt"))}

    def read(name):  # a line: YoYo/v_YoYo_g01_c01.avi 101, its middle frame is Yo_Yo/v_YoYo_g01_c01.jpg
        items = []
        for line in lines(lists / name):
            action, video = line.split()[0].split("/")
            words = "_".join(re.findall("[A-Z][^A-Z]*", action))
            items.append([f"{words}/{video.replace('.avi', '.jpg')}", label_of[action], words])
        return items

    return {"trainval": read("trainlist01.txt"), "test": read("testlist01.txt")}


def fgvc_aircraft(folder):
    label_of = {name: label for label, name in enumerate(lines(folder / "variants.txt"))}

    def read(part):  # a line: 1025794 707-320
        parts = [line.split(" ", 1) for line in lines(folder / f"images_variant_{part}.txt")]
        return [[f"{image}.jpg", label_of[name], name] for image, name in parts]

    return {part: read(part) for part in ("train", "val", "test")}


def imagenet(folder):
    """Its validation images are the test list. CoOp takes a folder's files as the disk lists them, we sort them."""
    names = dict(line.split(" ", 1) for line in lines(folder / "classnames.txt"))  # n01440764 tench

    def read(part):
        wnids = sorted(entry.name for entry in os.scandir(folder / "images" / part) if entry.is_dir())
        return [[f"{part}/{wnid}/{picture}", label, names[wnid]]
                for label, wnid in enumerate(wnids) for picture in pictures(folder / "images" / part / wnid)]

    return {"train": read("train"), "val": [], "test": read("val")}


class Layout(NamedTuple):
    """Where a dataset lies under --root, as CoOp lays it out."""

    folder: str
    images: str  # under the folder; the split's paths are relative to it
    split: str | None  # file name, {"train", "val", "test"}: [[path, label, class name], ...]
    template: str  # of zero-shot CLIP
    lists: Callable  # the dataset's own lists, for where no split file is


LAYOUTS = {
    "imagenet": Layout("imagenet", "images", None, "a photo of a {}.", imagenet),
    "caltech101": Layout("caltech-101", "101_ObjectCategories", "split_zhou_Caltech101.json", "a photo of a {}.",
                         caltech101),
    "oxford_pets": Layout("oxford_pets", "images", "split_zhou_OxfordPets.json", "a photo of a {}, a type of pet.",
                          oxford_pets),
    "stanford_cars": Layout("stanford_cars", ".", "split_zhou_StanfordCars.json", "a photo of a {}.", stanford_cars),
    "oxford_flowers": Layout("oxford_flowers", "jpg", "split_zhou_OxfordFlowers.json",
                             "a photo of a {}, a type of flower.", oxford_flowers),
    "food101": Layout("food-101", "images", "split_zhou_Food101.json", "a photo of {}, a type of food.",
                      images_folder),
    "fgvc_aircraft": Layout("fgvc_aircraft", "images", None, "a photo of a {}, a type of aircraft.", fgvc_aircraft),
    "sun397": Layout("sun397", "SUN397", "split_zhou_SUN397.json", "a photo of a {}.", sun397),
    "dtd": Layout("dtd", "images", "split_zhou_DescribableTextures.json", "{} texture.", images_folder),
    "eurosat": Layout("eurosat", "2750", "split_zhou_EuroSAT.json", "a centered satellite photo of {}.", eurosat),
    "ucf101": Layout("ucf101", "UCF-101-midframes", "split_zhou_UCF101.json", "a photo of a person doing {}.",
                     ucf101),
}
DEMOS = ["demo"] + [f"demo-{domain}" for domain in demo.LIGHTS]
DATASETS = [*DEMOS, *LAYOUTS, "folder"]


# A dataset's train, val and test lists --------------------------------------------------------------------------------


class Source(NamedTuple):
    """A dataset as its files state it: `split` maps "train", "val" and "test" to lists of [path, label, class name]."""

    split: dict
    image_folder: pathlib.Path | None  # None: the demo, whose images are drawn
    template: str
    crop_scale: tuple = (0.08, 1.0)  # of the random resized crop, as shares of the area

    @property
    def read(self):
        """path -> RGB picture."""
        return demo.read if self.image_folder is None else FolderReader(self.image_folder)


def open_dataset(name, root="data", download=False):
    """The lists of dataset `name` under `root`; `download` fetches what is missing where that can be done.

    name: of `DATASETS`; "folder" is any folder, `root`/<class name>/*.jpg or `root`/train and `root`/test with such
    class folders. Reads lists alone, never an image. ValueError: unknown name, or a broken list. FileNotFoundError: the
    dataset is not there; says what was looked for and where to get it.
    """
    if name in DEMOS:
        domain = name.removeprefix("demo-") if name != "demo" else demo.DEFAULT
        return Source(demo.split(domain), None, demo.TEMPLATE, demo.CROP_SCALE)
    if name == "folder":
        return checked(Source(folder_lists(pathlib.Path(root)), pathlib.Path(root), "a photo of a {}."))
    if name not in LAYOUTS:
        near = difflib.get_close_matches(name, DATASETS) or DATASETS
        raise ValueError(f"there is no dataset '{name}': did you mean {' or '.join(near)}?")
    layout = LAYOUTS[name]
    folder = pathlib.Path(root) / layout.folder
    if download:
        fetch(name, folder, folder / layout.images)
    return checked(Source(read_split(name, layout, folder), folder / layout.images, layout.template))


def read_split(name, layout, folder):
    """CoOp's split file; else the dataset's own lists, split by CoOp's rule where they have no val list (then kept)."""
    ours = folder / (layout.split or "").replace("zhou", "seed1")
    path = next((path for path in (folder / (layout.split or ""), ours) if path.is_file()), None)
    if path is None:
        by_hand = where_to_get(name, folder, folder / layout.images)
        try:
            lists = layout.lists(folder)
        except FileNotFoundError as error:
            looked_for = f"neither {folder / layout.split} nor {error.filename} is" if layout.split else \
                f"{error.filename} is not"
            raise FileNotFoundError(
                f"{looked_for} there: {'add --download, or ' * (name in BY_PROGRAM)}get {by_hand}; or point --root at "
                f"the folder that holds '{layout.folder}'") from error
        except (ValueError, KeyError, IndexError, TypeError, NotADirectoryError) as error:
            raise ValueError(f"the lists of {name} in {folder} cannot be read ({error}): get the dataset again, "
                             f"{by_hand}") from error
        split = split_by_rule(lists)
        if layout.split:
            saved = f"into {ours.name}"
            try:
                write(ours, json.dumps(split))
            except OSError as error:
                saved = f"but not saved ({error})"
            warn(f"no {layout.split} in {folder}: split by CoOp's rule, seed 1, {saved}; "
                 "the digits then differ from the paper's split")
        return split
    try:
        split = json.loads(path.read_text(encoding="utf-8"))
        items = [*split["train"], *split.get("val", ()), *split["test"]]
        if not split["train"] or not split["test"] or not all([*map(type, item)] == [str, int, str] for item in items):
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a split file: it needs lists 'train' and 'test' of "
                         "[path, label, class name]; get CoOp's own again") from error
    return split


def class_names(source):
    """{label: name} of a `Source`, in the order of the labels."""
    return dict(sorted({label: name for _, label, name in reversed(source.split["train"])}.items()))


def checked(source):
    """The source. ValueError: a class has no training or no test image. Two classes of one name are warned about."""
    names = class_names(source)
    test_names = {label: name for _, label, name in source.split["test"]}
    for part, here, there in (("test", names, test_names), ("training", test_names, names)):
        for label in sorted(here.keys() - there.keys()):
            raise ValueError(f"the class '{here[label]}' has no {part} image: add some, or take the class out")
    label_of = {}
    for label, name in names.items():
        first = label_of.setdefault(name.replace("_", " "), label)
        if first != label:
            warn(f"the classes {first} and {label} are both named '{name}': no prompt can tell them apart")
    return source


def by_label(items):
    """Lists of [path, label, class name], one a label, in the order of the labels' first appearance."""
    groups = {}
    for item in items:
        groups.setdefault(item[1], []).append(item)
    return groups.values()


def split_by_rule(lists, seed=1):
    """CoOp's rule for lists without a val list: classes shuffled one after the other, numbers rounded.

    "all": 50% of each class to train, 20% to val, 30% to test. "trainval": 80% to train, 20% to val.
    """
    rng = random.Random(seed)
    split = {part: list(lists.get(part, ())) for part in ("train", "val", "test")}  # what is final already
    for group in by_label(lists.get("all", ())):
        rng.shuffle(group)
        train, val = round(len(group) * 0.5), round(len(group) * 0.2)
        split["train"] += group[:train]
        split["val"] += group[train : train + val]
        split["test"] += group[train + val :]
    for group in by_label(lists.get("trainval", ())):
        rng.shuffle(group)
        val = round(len(group) * 0.2)
        split["val"] += group[:val]
        split["train"] += group[val:]
    return split


def folder_lists(root):
    """Lists of a folder of one's own: `root`/train and `root`/test, or class folders split by CoOp's rule."""
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is not a folder: give --root the folder of your class folders")
    if not (root / "train").is_dir() or not (root / "test").is_dir():
        return split_by_rule(class_folders(root))
    parts = {part: class_folders(root / part)["all"] for part in ("train", "test")}
    names = sorted({name for items in parts.values() for _, _, name in items})
    return {"val": [], **{part: [[f"{part}/{path}", names.index(name), name] for path, _, name in items]
                          for part, items in parts.items()}}


# The few-shot draw and the halves -------------------------------------------------------------------------------------


def few_shot(split, shots, seed):
    """CoOp's draw: {"train", "val"} of `shots` and min(shots, 4) items a class, all where there are fewer.

    One generator draws first from the train list, then from the val list, in the order of the labels there.
    """
    rng, drawn = random.Random(seed), {}
    for part, count in (("train", shots), ("val", min(shots, 4))):
        drawn[part] = [item for group in by_label(split.get(part, ()))
                       for item in (rng.sample(group, count) if len(group) >= count else group)]
    return drawn


def halves(items):
    """The labels of a dataset, sorted: the first ceil(n/2) are base classes, the rest are new (section 4.2)."""
    labels = sorted({label for _, label, _ in items})
    middle = math.ceil(len(labels) / 2)
    return labels[:middle], labels[middle:]


def select(items, labels):
    """The items of some classes, with labels that restart at 0."""
    position = {label: index for index, label in enumerate(labels)}
    return [[path, position[label], name] for path, label, name in items if label in position]


# ---------------------------------------------------------------------------------------------------------------------


def main():
    parser = Parser("data.py", __doc__)
    parser.add_argument("name", help=f"one of {', '.join(DATASETS)}")
    parser.add_argument("--root", default="data", metavar="DIR", help="the folder of the datasets "
                        "(default: data); of 'folder' that of the class folders")
    parser.add_argument("--download", action="store_true", help="fetch what is missing of the dataset")
    parser.add_argument("--shots", type=at_least(1), default=16, metavar="N", help="images a class (default: 16)")
    parser.add_argument("--seed", type=at_least(0), default=1, metavar="N", help="of the few-shot draw (default: 1)")
    parser.add_argument("--list", choices=["train", "val", "base", "new", "test"],
                        help="one image a line, path<TAB>label<TAB>class name, in the order drawn: the whole draw "
                        "(train, val) or test list with the split's labels, or a half of the draw with labels from 0")
    args = parser.parse_args()
    source = open_dataset(args.name, args.root, args.download)
    names, drawn, test = class_names(source), few_shot(source.split, args.shots, args.seed), source.split["test"]
    base, new = halves(source.split["train"])
    items = {**drawn, "base": select(drawn["train"], base), "new": select(drawn["train"], new), "test": test}
    if args.list:
        for path, label, name in items[args.list]:
            print(path, label, name, sep="\t")
        return
    anchors, top_k = paper_batch(len(base))
    print(f"{args.name}: {len(names)} classes, '{source.template}'")
    print(f"images: {source.image_folder or 'drawn by demo.py'}")
    for half, labels, how in (("base", base, "few-shot"), ("new", new, "few-shot (unlabelled)")):
        print(f"{half}: {len(labels)} classes, {len(items[half])} {how} and {len(select(test, labels))} test images: "
              f"{', '.join(names[label] for label in labels)}")
    print(f"base phase: b = {anchors} anchors, K = {top_k} classes each")


if __name__ == "__main__":
    end("data.py", main)
