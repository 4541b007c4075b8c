"""Fetches the datasets that have an open address into CoOp's layout, and says where a person gets the others.

Everything arrives in a folder beside its place and is moved in when it is whole.
"""

import os
import shutil

from torchvision import datasets

from command import warn

ARCHIVES = {  # torchvision's class, where its files then lie, and which of them CoOp's folder has (None: all)
    "caltech101": ("Caltech101", "caltech101", ["101_ObjectCategories"]),
    "oxford_pets": ("OxfordIIITPet", "oxford-iiit-pet", ["annotations", "images"]),
    "oxford_flowers": ("Flowers102", "flowers-102", ["imagelabels.mat", "jpg"]),
    "food101": ("Food101", "food-101", ["meta", "images"]),
    "fgvc_aircraft": ("FGVCAircraft", "fgvc-aircraft-2013b/data", None),
    "dtd": ("DTD", "dtd/dtd", ["images"]),
    "eurosat": ("EuroSAT", "eurosat", ["2750"]),
}
DRIVE = {  # what CoOp's authors share at Google Drive: name under the dataset's folder, id
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
BY_PROGRAM = {*ARCHIVES, "ucf101"}  # whose images `fetch` can fetch
MIDFRAMES = "10Jqome3vtUA2keJkNanAiFpgbyC9Hc2O"  # UCF-101-midframes.zip, there too
ADDRESSES = {
    "imagenet": "the train and val images of ILSVRC 2012 (https://image-net.org, with an account), a folder a class "
                "(n01440764, ...), into images/train and images/val",
    "caltech101": "101_ObjectCategories of https://data.caltech.edu/records/mzrjq-6wc02",
    "oxford_pets": "images and annotations of https://www.robots.ox.ac.uk/~vgg/data/pets",
    "stanford_cars": "cars_train and cars_test, devkit and cars_test_annos_withlabels.mat (their first address, "
                     "https://ai.stanford.edu/~jkrause/cars/car_dataset.html, is dead: look for a copy)",
    "oxford_flowers": "jpg and imagelabels.mat of https://www.robots.ox.ac.uk/~vgg/data/flowers/102",
    "food101": "food-101.tar.gz of https://data.vision.ee.ethz.ch/cvl/datasets_extra/food-101",
    "fgvc_aircraft": "the folder data of https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft",
    "sun397": "SUN397.tar.gz (37 GB, you accept its licence) and Partitions.zip of "
              "https://vision.princeton.edu/projects/2010/SUN",
    "dtd": "dtd-r1.0.1.tar.gz of https://www.robots.ox.ac.uk/~vgg/data/dtd",
    "eurosat": "EuroSAT.zip of https://huggingface.co/datasets/torchgeo/eurosat",
    "ucf101": "UCF-101-midframes.zip of CoOp's list of datasets "
              "(https://drive.google.com/file/d/10Jqome3vtUA2keJkNanAiFpgbyC9Hc2O)",
}


def where_to_get(name, folder, images):
    """What a person must put where: the middle of a sentence."""
    drive = "".join(f"; {'for the very split of the paper ' * file.startswith('split')}{file} of "
                    f"https://drive.google.com/file/d/{id}" for file, id in DRIVE.get(name, {}).items())
    return f"{ADDRESSES[name]}{drive}: unpacked into {folder}, so that the images are in {images}"


def fetch(name, folder, images):
    """Fetches what dataset `name` lacks, with a progress bar. folder: CoOp's, under --root. images: in it.

    A split file that cannot be had is warned about; images that cannot be had are an error, FileNotFoundError: no
    address that a program can use, no network, or the download broke off. ValueError: --root is a file.
    """
    root, part = folder.parent, folder.parent / f".{folder.name}.part"
    if root.exists() and not root.is_dir():
        raise ValueError(f"--root {root} is a file: give the folder that holds '{folder.name}'")
    made = not root.exists()
    try:
        if not images.is_dir():
            part.mkdir(parents=True, exist_ok=True)
            fetch_images(name, folder, part, images)
        for file, id in DRIVE.get(name, {}).items():
            if not (folder / file).exists():
                part.mkdir(exist_ok=True)
                fetch_file(file, id, folder, part)
    finally:
        shutil.rmtree(part, ignore_errors=True)
        if made and root.is_dir() and not any(root.iterdir()):
            root.rmdir()


def fetch_images(name, folder, part, images):
    """The images into `folder` by way of `part`. FileNotFoundError: what a person must get by hand."""
    try:
        if name in ARCHIVES:
            dataset, below, entries = ARCHIVES[name]
            getattr(datasets, dataset)(str(part), download=True)
        elif name == "ucf101":
            below, entries = ".", ["UCF-101-midframes"]
            shutil.unpack_archive(from_drive(MIDFRAMES, part / "midframes.zip"), part)
        else:
            raise OSError("a program cannot fetch it")
        folder.mkdir(exist_ok=True)
        for entry in entries or os.listdir(part / below):
            os.replace(part / below / entry, folder / entry)
    except Exception as error:  # urllib, http, tarfile, zipfile, torchvision and gdown each raise their own
        raise FileNotFoundError(f"{name} is not in {folder} and could not be downloaded ({reason(error)}): "
                                f"get by hand {where_to_get(name, folder, images)}; or point --root at CoOp's data "
                                "folder") from error


def fetch_file(file, id, folder, part):
    """A small file of CoOp's authors into `folder` by way of `part`; a warning where it cannot be had."""
    try:
        from_drive(id, part / file)
        os.replace(part / file, folder / file)
    except Exception as error:  # requests and gdown raise their own
        warn(f"{file} could not be downloaded ({reason(error)}): "
             f"get https://drive.google.com/file/d/{id} by hand, into {folder}")


def reason(error):
    """Why a download failed, in a line."""
    name = type(error).__name__  # requests' own says everything but that
    return "no connection" if name == "ConnectionError" else (str(error).strip().splitlines() or [name])[0]


def from_drive(id, path):
    """A file of Google Drive into `path`, with a progress bar."""
    import gdown  # half a second, for what few runs need

    return gdown.download(id=id, output=str(path))
