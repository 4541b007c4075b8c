"""The eleven datasets in tiny trees of their real layouts, against lists worked out by CoOp's rule; and downloads."""

import json
import pathlib
import random

import gdown
import pytest
from conftest import draw, refuses

import data
from harness import folders, layouts


def touch(folder, paths):
    """Images that nobody opens."""
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).touch()


def write_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")


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
    class_folders(images, {"BACKGROUND_Google": "", "Faces_easy": ""}, files)
    lists = class_folders(images, {"Faces": "face", "Leopards": "leopard", "ant": "ant"}, files)
    (images / "ant" / ".DS_Store").touch()
    return lists


def eurosat(folder):
    names = {"AnnualCrop": "Annual Crop Land", "Forest": "Forest", "SeaLake": "Sea or Lake"}
    return class_folders(folder / "2750", names, [f"{{}}_{i}.jpg" for i in range(1, 8)])


def plain_folders(folder):
    names = {name: name for name in ("banded", "blotchy", "zigzagged")}
    return class_folders(folder / "images", names, [f"{{}}_{i:04d}.jpg" for i in range(10, 23)])


def coops_split(images, file):
    """For a dataset that needs CoOp's split file: a function that makes the tree of such a file."""

    def make(folder):
        lists, names = {}, list(enumerate(("alpine sea", "b_c", "Zebra")))
        for part in ("train", "val", "test"):
            paths = [[f"{part}/{name}_{number}.jpg" for number in range(7)] for _, name in names]
            lists[part] = [(label, name, found) for (label, name), found in zip(names, paths)]
            touch(folder / images, sum(paths, []))
        (folder / file).write_text(json.dumps({part: items(groups) for part, groups in lists.items()}))
        return lists

    return make


def fgvc_aircraft(folder):
    names, lists = ["707-320", "Boeing 717", "DHC-8-100"], {}
    write_lines(folder / "variants.txt", names)
    for number, part in enumerate(("train", "val", "test")):
        groups = [(label, name, [f"{number}{label}{i}.jpg" for i in range(5)]) for label, name in enumerate(names)]
        rows = [f"{path[:-4]} {name}" for _, name, paths in groups for path in paths]
        write_lines(folder / f"images_variant_{part}.txt", rows)
        touch(folder / "images", [path for _, _, paths in groups for path in paths])
        lists[part] = groups
    return lists


def imagenet(folder):
    names = {"n01440764": "tench", "n01443537": "goldfish", "n01484850": "great white shark"}
    write_lines(folder / "classnames.txt", [f"{wnid} {name}" for wnid, name in names.items()])
    lists = {"val": []}
    for part, images in (("train", "train"), ("test", "val")):
        groups = class_folders(folder / "images" / images, names, [f"{{}}_{i}.JPEG" for i in range(1, 9)])["all"]
        lists[part] = [(label, name, [f"{images}/{path}" for path in paths]) for label, name, paths in groups]
    return lists


TREES = {
    "imagenet": ("imagenet", imagenet),
    "caltech101": ("caltech-101", caltech101),
    "oxford_pets": ("oxford_pets", coops_split("images", "split_zhou_OxfordPets.json")),
    "stanford_cars": ("stanford_cars", coops_split(".", "split_zhou_StanfordCars.json")),
    "oxford_flowers": ("oxford_flowers", coops_split("jpg", "split_zhou_OxfordFlowers.json")),
    "food101": ("food-101", plain_folders),
    "fgvc_aircraft": ("fgvc_aircraft", fgvc_aircraft),
    "sun397": ("sun397", coops_split("SUN397", "split_zhou_SUN397.json")),
    "dtd": ("dtd", plain_folders),
    "eurosat": ("eurosat", eurosat),
    "ucf101": ("ucf101", coops_split("UCF-101-midframes", "split_zhou_UCF101.json")),
}
BY_RULE = {
    "caltech101": "split_zhou_Caltech101.json",
    "food101": "split_zhou_Food101.json",
    "dtd": "split_zhou_DescribableTextures.json",
    "eurosat": "split_zhou_EuroSAT.json",
}


def items(groups):
    return [[path, label, name] for label, name, paths in groups for path in paths]


def as_lists(found):
    return json.loads(json.dumps(found))


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
def test_lists_draws_and_halves_are_coops(name, tmp_path, capsys):
    folder, make = TREES[name]
    lists = make(tmp_path / folder)
    source, expected = folders.open_dataset(name, tmp_path), by_coops_rule(lists)
    assert as_lists(source.split) == expected and source.read.plain
    assert all((source.image_folder / path).is_file() for part in expected.values() for path, _, _ in part)
    assert (f"no {BY_RULE.get(name)}" in capsys.readouterr().err) == (name in BY_RULE)
    if name in BY_RULE:  # with CoOp's own split file in place, that one
        expected = {part: found[1:] if part != "test" else found for part, found in expected.items()}
        (tmp_path / folder / BY_RULE[name]).write_text(json.dumps(expected))
        source = folders.open_dataset(name, tmp_path)
        assert as_lists(source.split) == expected and capsys.readouterr().err == ""
    names = [name for _, name, _ in next(iter(lists.values())) or lists["train"]]
    for seed in (1, 2, 3):
        random.seed(seed)
        drawn = {"train": [], "val": []}
        for part in drawn:
            for label in dict.fromkeys(label for _, label, _ in expected[part]):
                of_label = [item for item in expected[part] if item[1] == label]
                drawn[part] += random.sample(of_label, 2) if len(of_label) >= 2 else of_label
        assert as_lists(data.few_shot(source.split, 2, seed)) == drawn
        task = data.base_to_new_task(source, 2, 2, seed)
        assert (task.base_names, task.new_names) == (names[:2], names[2:3])
        assert task.base_train == [item for item in drawn["train"] if item[1] < 2]
        assert task.new_train == [path for path, label, _ in drawn["train"] if label == 2]
        assert task.tests["new"].items == [[path, 0, name] for path, label, name in expected["test"] if label == 2]


def test_templates():
    templates = {name: layout.template for name, layout in layouts.LAYOUTS.items()}
    own = {
        "oxford_pets": "a photo of a {}, a type of pet.",
        "oxford_flowers": "a photo of a {}, a type of flower.",
        "food101": "a photo of {}, a type of food.",
        "fgvc_aircraft": "a photo of a {}, a type of aircraft.",
        "dtd": "{} texture.",
        "eurosat": "a centered satellite photo of {}.",
        "ucf101": "a photo of a person doing {}.",
    }
    assert templates == {**dict.fromkeys(TREES, "a photo of a {}."), **own} and list(templates) == list(TREES)


@pytest.mark.parametrize("name", layouts.LAYOUTS)
def test_what_is_missing_is_one_sentence(name, tmp_path, command):
    refuses(command(f"data.py {name} --root", tmp_path), "get ", "http", tmp_path / TREES[name][0])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "name, file, content", [("fgvc_aircraft", "variants.txt", b"\xff"), ("imagenet", "classnames.txt", b"n01440764\n")]
)
def test_broken_lists_are_one_sentence(name, file, content, tmp_path, command):
    folder, make = TREES[name]
    make(tmp_path / folder)
    (tmp_path / folder / file).write_bytes(content)
    refuses(command(f"data.py {name} --root", tmp_path), "cannot be read", tmp_path / folder)


# Downloads ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dtd", "ucf101", "stanford_cars"])
def test_a_download_that_breaks_off_leaves_nothing(name, tmp_path, monkeypatch, command):
    """What cannot be downloaded says what to get, from where, into which folder."""

    def broken(root=None, download=True, **_):
        if root is not None:
            draw(pathlib.Path(root) / "dtd" / "dtd" / "images" / "banded" / "1.jpg")
        raise ConnectionResetError("the line is dead")

    monkeypatch.setattr(layouts.datasets, "DTD", broken)
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

    monkeypatch.setattr(layouts.datasets, "DTD", whole)
    monkeypatch.setattr(gdown, "download", drive)
    for refused, count in ((True, 15), (False, 30)):
        source, err = folders.open_dataset("dtd", tmp_path, download=True), capsys.readouterr().err
        assert len(source.split["train"]) == count and ("Too many users" in err) == refused
        assert err.count("\n") == 2 * refused
    assert sorted(map(str, tmp_path.glob("*/*"))) == [f"{tmp_path}/dtd/images", f"{tmp_path}/dtd/{BY_RULE['dtd']}"]
