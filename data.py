"""Datasets, CoOp's few-shot draw and base/new halves, and the loaders of both phases.

    python data.py eurosat --root DIR               what a run would see: classes, halves, images, (b, K)
    python data.py eurosat --root DIR --list base   one image a line: path, label, class name

Layout, splits and draws are CoOp's, which the paper and everyone it compares with use (section 4.1).
"""

import difflib
import json
import math
import os
import pathlib
import random
import shutil
import sys
from dataclasses import dataclass
from typing import Callable, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import datasets as torchvision_datasets
from torchvision import transforms
from tqdm import tqdm

import demo
from command import Parser, at_least, end
from sampler import paper_batch

PICTURES = {".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp"}
PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)


class Layout(NamedTuple):
    """Where a dataset lies under --root, as CoOp lays it out."""

    folder: str
    images: str  # under the folder; the split's paths are relative to it
    split: str  # file name, {"train", "val", "test"}: [[path, label, class name], ...]
    template: str  # of zero-shot CLIP
    source: str  # where a person gets it


LAYOUTS = {
    "eurosat": Layout("eurosat", "2750", "split_zhou_EuroSAT.json", "a centered satellite photo of {}.",
                      "https://huggingface.co/datasets/torchgeo/eurosat (EuroSAT.zip)"),
}
EUROSAT_NAMES = {  # CoOp's names for EuroSAT's folders
    "AnnualCrop": "Annual Crop Land", "Forest": "Forest", "HerbaceousVegetation": "Herbaceous Vegetation Land",
    "Highway": "Highway or Road", "Industrial": "Industrial Buildings", "Pasture": "Pasture Land",
    "PermanentCrop": "Permanent Crop Land", "Residential": "Residential Buildings", "River": "River",
    "SeaLake": "Sea or Lake",
}
DEMOS = ["demo"] + [f"demo-{domain}" for domain in demo.LIGHTS]
DATASETS = [*DEMOS, *LAYOUTS]


# A dataset's lists ----------------------------------------------------------------------------------------------------


class Source(NamedTuple):
    """A dataset as its files state it: `split` maps "train" and "test" to lists of [path, label, class name]."""

    split: dict
    image_folder: pathlib.Path | None  # None: the demo, whose images are drawn
    template: str
    crop_scale: tuple  # of the random resized crop, as shares of the area


def open_dataset(name, root="data", download=False):
    """The lists of dataset `name` under `root`; `download` fetches missing images where that can be done.

    Reads the split file alone, never an image. ValueError: unknown name, or a broken split file.
    FileNotFoundError: the dataset is not there; says what was looked for and where to get it.
    """
    if name in DEMOS:
        domain = name.removeprefix("demo-") if name != "demo" else demo.DEFAULT
        return Source(demo.split(domain), None, demo.TEMPLATE, demo.CROP_SCALE)
    if name not in LAYOUTS:
        near = difflib.get_close_matches(name, DATASETS) or DATASETS
        raise ValueError(f"there is no dataset '{name}': did you mean {' or '.join(near)}?")
    layout = LAYOUTS[name]
    folder = pathlib.Path(root) / layout.folder
    images = folder / layout.images
    if download and not images.is_dir():
        download_eurosat(folder, layout)
    return Source(read_split(folder, layout), images, layout.template, (0.08, 1.0))


def read_split(folder, layout):
    """CoOp's split file, or ours by CoOp's rule where it is missing (made once from the images, then kept)."""
    ours = folder / layout.split.replace("zhou", "seed1")
    path = next((path for path in (folder / layout.split, ours) if path.is_file()), None)
    if path is None:
        if not (folder / layout.images).is_dir():
            raise FileNotFoundError(
                f"neither {folder / layout.split} nor the images in {folder / layout.images} are there: "
                f"get them from {layout.source}, or point --root at the folder that holds '{layout.folder}'")
        split = split_folders(folder / layout.images, EUROSAT_NAMES)
        beside = ours.with_suffix(".part")
        beside.write_text(json.dumps(split))
        os.replace(beside, ours)
        print(f"no {layout.split} in {folder}: split by CoOp's rule, seed 1, into {ours.name}; "
              "the digits then differ from the paper's split", file=sys.stderr)
        return split
    try:
        split = json.loads(path.read_text())
        for part in ("train", "test"):
            if not split[part] or not all(isinstance(p, str) and isinstance(l, int) and isinstance(c, str)
                                          for p, l, c in split[part]):
                raise ValueError
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a split file: it needs lists 'train' and 'test' of "
                         "[path, label, class name]; get CoOp's own again") from error
    return split


def split_folders(images, names, seed=1):
    """CoOp's rule for a folder of class folders: sorted, shuffled per class, 50% train, 20% val, 30% test."""
    rng = random.Random(seed)
    split = {"train": [], "val": [], "test": []}
    folders = sorted(path for path in images.iterdir() if path.is_dir())
    if names and {folder.name for folder in folders} != set(names):
        raise ValueError(f"{images} does not hold the folders {', '.join(names)} and only those: get it again")
    for label, folder in enumerate(folders):
        files = sorted(f"{folder.name}/{path.name}" for path in folder.iterdir() if path.suffix.lower() in PICTURES)
        rng.shuffle(files)
        train, val = round(len(files) * 0.5), round(len(files) * 0.2)
        for part, chosen in zip(split, (files[:train], files[train : train + val], files[train + val :])):
            split[part] += [[path, label, names.get(folder.name, folder.name)] for path in chosen]
    return split


def download_eurosat(folder, layout):
    """Fetches EuroSAT by torchvision, beside its place, and moves it there when it is whole."""
    root = folder.parent
    if root.exists() and not root.is_dir():
        raise ValueError(f"--root {root} is a file: give the folder that holds '{folder.name}'")
    part, made = root / f".{folder.name}.part", not root.exists()
    try:
        part.mkdir(parents=True, exist_ok=True)
        torchvision_datasets.EuroSAT(str(part), download=True)
        folder.mkdir(exist_ok=True)
        os.replace(part / "eurosat" / "2750", folder / layout.images)
    except (OSError, RuntimeError) as error:
        raise FileNotFoundError(
            f"EuroSAT is not in {folder / layout.images} and could not be downloaded ({error}): get "
            f"{layout.source} by hand and unpack it there, or point --root at CoOp's data folder") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
        if made and root.is_dir() and not any(root.iterdir()):
            root.rmdir()


# The few-shot draw and the halves -------------------------------------------------------------------------------------


def few_shot(items, shots, seed):
    """CoOp's draw: `shots` of [path, label, class name] a class, all where there are fewer, in the order drawn."""
    rng = random.Random(seed)
    of_label = {}
    for item in items:
        of_label.setdefault(item[1], []).append(item)
    return [item for group in of_label.values()
            for item in (rng.sample(group, shots) if len(group) >= shots else group)]


def halves(items):
    """The labels of a dataset, sorted: the first ceil(n/2) are base classes, the rest are new (section 4.2)."""
    labels = sorted({label for _, label, _ in items})
    middle = math.ceil(len(labels) / 2)
    return labels[:middle], labels[middle:]


def select(items, labels):
    """The items of some classes, with labels that restart at 0."""
    position = {label: index for index, label in enumerate(labels)}
    return [[path, position[label], name] for path, label, name in items if label in position]


@dataclass
class Task:
    """A few-shot task: what training sees, and what only the evaluation reads."""

    template: str
    crop_scale: tuple
    read: Callable  # path -> RGB picture
    base_names: list
    new_names: list
    base_train: list  # [path, label, name] of the labelled base images
    new_train: list  # paths of the unlabelled new images, nothing else
    new_answers: list  # their labels: for evaluate.pseudo_label_accuracy, and nobody else
    base_test: list
    new_test: list


def open_task(source, shots=16, unlabeled_shots=None, seed=1):
    """Draws the few-shot task of a `Source` for a seed.

    ValueError: fewer than 2 base or 1 new classes, a class without training images, or shots below 1.
    """
    if min(shots, unlabeled_shots or shots) < 1:
        raise ValueError("at least 1 shot a class is needed: choose --shots and --unlabeled-shots of 1 or more")
    everything = source.split["train"] + source.split["test"]
    base, new = halves(everything)
    if len(base) < 2 or not new:
        raise ValueError(f"{len(base) + len(new)} classes are too few to halve into base and new: 3 are the least")
    name_of = {label: name for _, label, name in reversed(everything)}
    train_labels = {label for _, label, _ in source.split["train"]}
    test_labels = {label for _, label, _ in source.split["test"]}
    for label in [*base, *new]:
        for part, labels in (("training", train_labels), ("test", test_labels)):
            if label not in labels:
                raise ValueError(f"the class '{name_of[label]}' has no {part} image in the split: "
                                 "add some, or take the class out")
    new_items = select(few_shot(source.split["train"], unlabeled_shots or shots, seed), new)
    return Task(
        template=source.template, crop_scale=source.crop_scale,
        read=demo.read if source.image_folder is None else FolderReader(source.image_folder),
        base_names=[name_of[label] for label in base], new_names=[name_of[label] for label in new],
        base_train=select(few_shot(source.split["train"], shots, seed), base),
        new_train=[path for path, _, _ in new_items], new_answers=[label for _, label, _ in new_items],
        base_test=select(source.split["test"], base), new_test=select(source.split["test"], new))


# Images ---------------------------------------------------------------------------------------------------------------


class UnreadableImage(ValueError):
    """One sentence, also when a loader's worker raised it (PyTorch then hands on the whole traceback as text)."""

    def __init__(self, text):
        super().__init__(text.strip().splitlines()[-1].removeprefix("data.UnreadableImage: "))


class FolderReader(NamedTuple):
    """Reads a picture by its path in a folder. UnreadableImage with the path: missing or broken."""

    folder: pathlib.Path

    def __call__(self, path):
        try:
            with Image.open(self.folder / path) as picture:
                return picture.convert("RGB")
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:
            raise UnreadableImage(
                f"cannot read the image {self.folder / path} "
                f"({'no such file' if isinstance(error, FileNotFoundError) else error}): "
                "replace it, or take it out of the split") from error


def train_transform(pixels, crop_scale):
    """Random resized crop (bicubic) and flip, CoOp's: picture -> uint8 [3, pixels, pixels]."""
    return transforms.Compose([
        transforms.RandomResizedCrop(pixels, scale=crop_scale, interpolation=transforms.InterpolationMode.BICUBIC),
        transforms.RandomHorizontalFlip(), transforms.PILToTensor()])


def test_transform(pixels):
    """CLIP's own preprocessing: picture -> uint8 [3, pixels, pixels]."""
    return transforms.Compose([
        transforms.Resize(pixels, interpolation=transforms.InterpolationMode.BICUBIC),
        transforms.CenterCrop(pixels), transforms.PILToTensor()])


def model_input(images):
    """What a loader brings, in float32 as CLIP wants it: uint8 pixels [B, 3, h, w] normalised, features [B, d] kept."""
    if images.ndim == 2:
        return images.float()
    return transforms.functional.normalize(images.float() / 255, PIXEL_MEAN, PIXEL_STD)


class Images(Dataset):
    """Pictures by path: (image, label), or (image, index) where there are no labels.

    A key is an index, or (index, augmentation seed): then the transform's random choices come from that seed.
    """

    def __init__(self, paths, read, transform, labels=None):
        self.paths, self.read, self.transform, self.labels = paths, read, transform, labels

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, key):
        index, seed = key if isinstance(key, tuple) else (key, 0)
        generator = torch.default_generator  # torchvision's transforms draw from it; nobody else sees the seed
        state = generator.get_state()
        try:
            generator.manual_seed(seed)
            image = self.transform(self.read(self.paths[index]))
        finally:
            generator.set_state(state)
        return image, (index if self.labels is None else self.labels[index])


class CachedViews(Dataset):
    """V augmented views of each picture of an `Images`, encoded once: (features [d], label or index).

    encode: uint8 images [B, 3, h, w] -> features [B, d] of the frozen image encoder, kept in half precision. A key is
    (index, augmentation seed), which picks the view. The views come from `seed` and `phase` alone.
    """

    def __init__(self, images, views, encode, seed, phase, workers=0):
        keys = [(index, augmentation_seed(seed, phase, 0, view * len(images) + index))
                for view in range(views) for index in range(len(images))]
        batches = [keys[i : i + 128] for i in range(0, len(keys), 128)]
        width = encode(images[keys[0]][0][None]).shape[1]
        size = f"{len(keys) * width * 2 / 2**20:.1f} MiB"
        loader = tqdm(DataLoader(images, batch_sampler=batches, num_workers=workers), f"caching {views} views, {size}")
        features, labels = zip(*((encode(pictures).half().cpu(), labels) for pictures, labels in loader))
        self.features = torch.cat(features).unflatten(0, (views, -1))  # [V, N, d]
        self.labels = torch.cat(labels)[: len(images)]

    def __len__(self):
        return self.features.shape[1]

    def __getitem__(self, key):
        index, seed = key
        return self.features[seed % len(self.features), index], self.labels[index]


class ShuffledBatches:
    """Batches of a random order; a last incomplete one is dropped where a full one exists (notes: the release's)."""

    def __init__(self, count, batch_size, seed):
        self.count, self.batch_size, self.seed, self.epoch = count, min(batch_size, count), seed, 1

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return self.count // self.batch_size

    def __iter__(self):
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.count).tolist()
        self.epoch += 1
        for start in range(0, len(self) * self.batch_size, self.batch_size):
            yield order[start : start + self.batch_size]


def augmentation_seed(*parts):
    """One seed from (run's seed, phase, epoch, position): the same wherever and whenever the image is loaded."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


class SeededBatches:
    """A batch sampler whose keys carry an augmentation seed, from (seed, phase, epoch, position).

    So an image's augmentation does not depend on which worker loads it, or when.
    """

    def __init__(self, batches, seed, phase):
        self.batches, self.seed, self.phase = batches, seed, phase

    def set_epoch(self, epoch):
        self.batches.set_epoch(epoch)

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        position, epoch = 0, self.batches.epoch
        for batch in self.batches:
            keys = []
            for index in batch:
                keys.append((index, augmentation_seed(self.seed, self.phase, epoch, position)))
                position += 1
            yield keys


def training_loader(images, batches, seed, phase, workers=0, pin_memory=False, views=None, encode=None):
    """The loader of a phase (1 or 2); `loader.batch_sampler.set_epoch(e)` starts epoch e. Workers stay up.

    views, encode: as of `CachedViews`, whose features then take the images' place.
    """
    if views:
        images, workers = CachedViews(images, views, encode, seed, phase, workers), 0
    return DataLoader(images, batch_sampler=SeededBatches(batches, seed, phase), num_workers=workers,
                      persistent_workers=workers > 0, pin_memory=pin_memory)


# ---------------------------------------------------------------------------------------------------------------------


def main():
    parser = Parser("data.py", __doc__)
    parser.add_argument("name", help=f"one of {', '.join(DATASETS)}")
    parser.add_argument("--root", default="data", metavar="DIR", help="the folder of the datasets (default: data)")
    parser.add_argument("--shots", type=at_least(1), default=16, metavar="N", help="images a class (default: 16)")
    parser.add_argument("--seed", type=at_least(0), default=1, metavar="N", help="of the few-shot draw (default: 1)")
    parser.add_argument("--list", choices=["train", "base", "new", "test"],
                        help="one image a line, path<TAB>label<TAB>class name, in the order drawn: the whole draw "
                        "(train) or test list with the split's labels, or a half of the draw with labels from 0")
    args = parser.parse_args()
    source = open_dataset(args.name, args.root)
    task = open_task(source, args.shots, seed=args.seed)
    if args.list:
        drawn = few_shot(source.split["train"], args.shots, args.seed)
        _, new = halves(source.split["train"] + source.split["test"])
        items = {"train": drawn, "base": task.base_train, "new": select(drawn, new), "test": source.split["test"]}
        for path, label, name in items[args.list]:
            print(path, label, name, sep="\t")
        return
    anchors, top_k = paper_batch(len(task.base_names))
    print(f"{args.name}: {len(task.base_names) + len(task.new_names)} classes, '{source.template}'")
    print(f"images: {source.image_folder or 'drawn by demo.py'}")
    print(f"base: {len(task.base_names)} classes, {len(task.base_train)} few-shot and {len(task.base_test)} test "
          f"images: {', '.join(task.base_names)}")
    print(f"new: {len(task.new_names)} classes, {len(task.new_train)} few-shot (unlabelled) and {len(task.new_test)} "
          f"test images: {', '.join(task.new_names)}")
    print(f"base phase: b = {anchors} anchors, K = {top_k} classes each")


if __name__ == "__main__":
    end("data.py", main)
