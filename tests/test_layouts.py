"""The eleven datasets in tiny trees of their real layouts, against lists worked out by CoOp's rule; and downloads."""

import json
import pathlib
import random
from unittest import mock

import gdown
import pytest
from conftest import refuses

import data
from harness import folders, layouts


def touch(folder, paths):
    """Images that nobody opens."""
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).touch()


# Each makes a tree and returns what CoOp reads of it: class -> (label, name, paths), in the order of the lists.


def class_folders(images, names, files):
    """Class folders in `images`, one per key of `names`, with the same files. "{}" in a file's name is the folder's."""
    groups = []
    for label, (folder, name) in enumerate(names.items()):
        groups.append((label, name, [f"{folder}/{file.format(folder)}" for file in files]))
        touch(images, groups[-1][2])
    return {"all": groups}


def caltech101(folder):
    images, files = folder / "101_ObjectCategories", [f"image_{i:04d}.jpg" for i in range(1, 11)]
    touch(images, ["BACKGROUND_Google/a.jpg", "Faces_easy/a.jpg", "ant/.DS_Store"])
    return class_folders(images, {"Faces": "face", "Leopards": "leopard", "ant": "ant"}, files)


def eurosat(folder):
    names = {"AnnualCrop": "Annual Crop Land", "Forest": "Forest", "SeaLake": "Sea or Lake"}
    return class_folders(folder / "2750", names, [f"{{}}_{i}.jpg" for i in range(1, 8)])


def plain_folders(folder):
    names = {name: name for name in ("banded", "blotchy", "zigzagged")}
    return class_folders(folder / "images", names, [f"{{}}_{i:04d}.jpg" for i in range(10, 23)])


def coops_split(images, split):
    """For a dataset that needs CoOp's split file: a function that makes the tree of such a file."""

    def make(folder):
        lists = {}
        for part in ("train", "val", "test"):
            names = {f"{part}/{name}": name for name in ("alpine sea", "b_c", "Zebra")}
            lists[part] = class_folders(folder / images, names, [f"{number}.jpg" for number in range(7)])["all"]
        content = {part: items(groups) for part, groups in lists.items()}
        (folder / f"split_zhou_{split}.json").write_text(json.dumps(content))
        return lists

    return make


def fgvc_aircraft(folder):
    names, lists = ["707-320", "Boeing 717", "DHC-8-100"], {}
    for number, part in enumerate(("train", "val", "test")):
        lists[part] = [(label, name, [f"{number}{label}{i}.jpg" for i in range(5)]) for label, name in enumerate(names)]
        rows = items(lists[part])
        touch(folder / "images", [path for path, _, _ in rows])
        (folder / f"images_variant_{part}.txt").write_text("\n".join(f"{path[:-4]} {name}" for path, _, name in rows))
    (folder / "variants.txt").write_text("\n".join(names))
    return lists


def imagenet(folder):
    names = {"n01440764": "tench", "n01443537": "goldfish", "n01484850": "great white shark"}
    lists = {"val": []}
    for part, place in (("train", "train"), ("test", "val")):
        of_place = {f"{place}/{wnid}": name for wnid, name in names.items()}
        lists[part] = class_folders(folder / "images", of_place, [f"{i}.JPEG" for i in range(1, 9)])["all"]
    (folder / "classnames.txt").write_text("\n".join(map(" ".join, names.items())))
    return lists


PLAIN = "a photo of a {}."
OF_TYPE = "a photo of a {{}}, a type of {}."
TREES = {
    "imagenet": ("imagenet", imagenet, PLAIN),
    "caltech101": ("caltech-101", caltech101, PLAIN),
    "oxford_pets": ("oxford_pets", coops_split("images", "OxfordPets"), OF_TYPE.format("pet")),
    "stanford_cars": ("stanford_cars", coops_split(".", "StanfordCars"), PLAIN),
    "oxford_flowers": ("oxford_flowers", coops_split("jpg", "OxfordFlowers"), OF_TYPE.format("flower")),
    "food101": ("food-101", plain_folders, "a photo of {}, a type of food."),
    "fgvc_aircraft": ("fgvc_aircraft", fgvc_aircraft, OF_TYPE.format("aircraft")),
    "sun397": ("sun397", coops_split("SUN397", "SUN397"), PLAIN),
    "dtd": ("dtd", plain_folders, "{} texture."),
    "eurosat": ("eurosat", eurosat, "a centered satellite photo of {}."),
    "ucf101": ("ucf101", coops_split("UCF-101-midframes", "UCF101"), "a photo of a person doing {}."),
}
BY_RULE = {"caltech101": "Caltech101", "food101": "Food101", "dtd": "DescribableTextures", "eurosat": "EuroSAT"}


def items(groups):
    return [[path, label, name] for label, name, paths in groups for path in paths]


def by_coops_rule(lists):
    """The rule as notes on CoOp state it, by Python's global generator, seed 1."""
    if "train" in lists:
        return {part: items(lists[part]) for part in ("train", "val", "test")}
    random.seed(1)
    split = {"train": [], "val": [], "test": []}
    for group in lists["all"]:
        found = items([group])
        random.shuffle(found)
        train, val = round(0.5 * len(found)), round(0.2 * len(found))
        split["train"] += found[:train]
        split["val"] += found[train : train + val]
        split["test"] += found[train + val :]
    return split


@pytest.mark.parametrize("name", layouts.LAYOUTS)
def test_lists_draws_and_halves_are_coops(name, tmp_path, command, capsys):
    folder, make, template = TREES[name]
    refuses(command(f"data.py {name} --root", tmp_path), "get ", "http", tmp_path / folder)
    lists = make(tmp_path / folder)
    source, expected = folders.open_dataset(name, tmp_path), by_coops_rule(lists)
    assert json.dumps(source.split) == json.dumps(expected) and source.read.plain and source.template == template
    assert all((source.image_folder / path).is_file() for part in expected.values() for path, _, _ in part)
    file = f"split_zhou_{BY_RULE.get(name)}.json"
    assert (f"no {file}" in capsys.readouterr().err) == (name in BY_RULE)
    if name in BY_RULE:  # with CoOp's own split file in place, that one
        expected = {part: found[1:] if part != "test" else found for part, found in expected.items()}
        (tmp_path / folder / file).write_text(json.dumps(expected))
        source = folders.open_dataset(name, tmp_path)
        assert json.dumps(source.split) == json.dumps(expected) and capsys.readouterr().err == ""
    names = [name for _, name, _ in next(iter(lists.values())) or lists["train"]]
    for seed in (1, 2, 3):
        random.seed(seed)
        drawn = {"train": [], "val": []}
        for part in drawn:
            for label in dict.fromkeys(label for _, label, _ in expected[part]):
                of_label = [item for item in expected[part] if item[1] == label]
                drawn[part] += random.sample(of_label, 2) if len(of_label) >= 2 else of_label
        assert json.dumps(data.few_shot(source.split, 2, seed)) == json.dumps(drawn)
        task = data.base_to_new_task(source, 2, 2, seed)
        assert (task.base_names, task.new_names) == (names[:2], names[2:3])
        assert task.base_train == [item for item in drawn["train"] if item[1] < 2]
        assert task.new_train == [path for path, label, _ in drawn["train"] if label == 2]
        assert task.tests["new"].items == [[path, 0, name] for path, label, name in expected["test"] if label == 2]


@pytest.mark.parametrize("place", ["dtd/dtd-r1.0.1", "dtd/images/..", "."])
def test_an_archive_one_level_off(place, tmp_path):
    plain_folders(tmp_path / place)
    source = folders.open_dataset("dtd", tmp_path)
    assert [len(source.split[part]) for part in source.split] == [18, 9, 12]
    assert (source.image_folder / source.split["test"][0][0]).is_file()


# Downloads ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dtd", "ucf101", "stanford_cars"])
def test_a_download_that_breaks_off_leaves_nothing(name, tmp_path, monkeypatch, command):
    """What cannot be downloaded says what to get, from where, into which folder."""
    broken = mock.Mock(side_effect=ConnectionResetError("the line is dead"))
    monkeypatch.setattr("torchvision.datasets.DTD", broken)
    monkeypatch.setattr(gdown, "download", broken)
    found = command(f"data.py {name} --download --root", tmp_path)
    refuses(found, f"into {tmp_path / name}", "http", "the line is dead" if name != "stanford_cars" else "")
    assert not list(tmp_path.iterdir())


def test_a_download_arrives_in_coops_layout(tmp_path, monkeypatch, capsys):
    """DTD by torchvision, its split file from Google Drive; where that fails, CoOp's rule and a line that says so."""
    paths = [f"{kind}/{kind}_{number}.jpg" for kind in ("banded", "dotted", "woven") for number in range(10)]

    def whole(root, download):
        touch(pathlib.Path(root) / "dtd" / "dtd" / "images", paths)

    def drive(id, output):
        if refused:
            raise gdown.exceptions.FileURLRetrievalError("Too many users\nhave viewed it")
        found = [[path, "bdw".index(path[0]), path.split("/")[0]] for path in paths]
        pathlib.Path(output).write_text(json.dumps({"train": found, "val": [], "test": found[::5]}))

    monkeypatch.setattr("torchvision.datasets.DTD", whole)
    monkeypatch.setattr(gdown, "download", drive)
    for refused, count in ((True, 15), (False, 30)):
        source, err = folders.open_dataset("dtd", tmp_path, download=True), capsys.readouterr().err
        assert len(source.split["train"]) == count and ("Too many users" in err) == refused
        assert err.count("\n") == 2 * refused
    assert sorted(path.name for path in tmp_path.glob("*/*")) == ["images", "split_zhou_DescribableTextures.json"]
