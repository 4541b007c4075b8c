"""The eleven datasets in tiny trees of their real layouts, against lists worked out by CoOp's rule."""

import json
import random

import numpy as np
import pytest
import scipy.io

import data
import layouts


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


def oxford_flowers(folder):
    labels = [3, 3, 1, 2, 1, 3, 2, 1, 2, 3, 1, 1, 2, 2, 3]  # of image_00001.jpg, ..., from 1
    names = {"1": "pink primrose", "2": "colt's foot", "3": "globe-flower"}
    images = [f"image_{i:05d}.jpg" for i in range(1, 16)]
    touch(folder / "jpg", images)
    scipy.io.savemat(folder / "imagelabels.mat", {"labels": np.array([labels], dtype=np.uint8)})
    (folder / "cat_to_name.json").write_text(json.dumps(names))
    groups = []
    for label in (3, 1, 2):  # in the order of their first image
        found = [image for image, image_label in zip(images, labels) if image_label == label]
        groups.append((label - 1, names[str(label)], found))
    return {"all": groups}


def oxford_pets(folder):
    breeds = {"Abyssinian": (0, "abyssinian"), "american_bulldog": (1, "american_bulldog"), "Bombay": (2, "bombay")}
    lists = {}
    for part, file, count in (("trainval", "trainval.txt", 6), ("test", "test.txt", 3)):
        images = {breed: [f"{breed}_{i}" for i in range(count * 10, count * 11)] for breed in breeds}
        write_lines(
            folder / "annotations" / file,
            [f"{image} {label + 1} 1 {label + 1}" for breed, (label, _) in breeds.items() for image in images[breed]],
        )
        touch(folder / "images", [f"{image}.jpg" for found in images.values() for image in found])
        lists[part] = [(*breeds[breed], [f"{image}.jpg" for image in images[breed]]) for breed in breeds]
    return lists


def stanford_cars(folder):
    names = ["AM General Hummer SUV 2000", "Acura RL Sedan 2012", "smart fortwo Convertible 2012"]
    read = ["2000 AM General Hummer SUV", "2012 Acura RL Sedan", "2012 smart fortwo Convertible"]
    (folder / "devkit").mkdir(parents=True)
    scipy.io.savemat(folder / "devkit" / "cars_meta.mat", {"class_names": np.array([names], dtype=object)})
    lists = {}
    for part, images, path in (
        ("trainval", "cars_train", "devkit/cars_train_annos.mat"),
        ("test", "cars_test", "cars_test_annos_withlabels.mat"),
    ):
        labels = [i % 3 if part == "trainval" else i // 6 for i in range(18)]
        rows = [(39, 116, 569, 375, 1 + label, f"{i:05d}.jpg") for i, label in enumerate(labels, 1)]
        fields = [(name, object) for name in ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class", "fname")]
        scipy.io.savemat(folder / path, {"annotations": np.array([rows], dtype=fields)})
        touch(folder / images, [row[-1] for row in rows])
        lists[part] = [
            (label, read[label], [f"{images}/{i:05d}.jpg" for i, found in enumerate(labels, 1) if found == label])
            for label in range(3)
        ]
    return lists


def sun397(folder):
    places = ["/a/abbey", "/b/bazaar/indoor", "/b/bazaar/outdoor"]
    names = ["abbey", "indoor bazaar", "outdoor bazaar"]
    write_lines(folder / "ClassName.txt", places)
    lists = {}
    for part, file in (("trainval", "Training_01.txt"), ("test", "Testing_01.txt")):
        images = {place: [f"{place}/sun_{part}{i}.jpg" for i in range(7)] for place in reversed(places)}
        write_lines(folder / file, [image for found in images.values() for image in found])
        touch(folder / "SUN397", [image[1:] for found in images.values() for image in found])
        lists[part] = [(label, names[label], [image[1:] for image in images[places[label]]]) for label in (2, 1, 0)]
    return lists


def ucf101(folder):
    actions = {"ApplyEyeMakeup": "Apply_Eye_Makeup", "Archery": "Archery", "YoYo": "Yo_Yo"}
    write_lines(folder / "ucfTrainTestlist" / "classInd.txt", [f"{i} {name}" for i, name in enumerate(actions, 1)])
    lists = {}
    for part, file in (("trainval", "trainlist01.txt"), ("test", "testlist01.txt")):
        videos = {action: [f"v_{action}_g{i:02d}_{part}" for i in range(8)] for action in actions}
        rows = []
        for label, action in enumerate(actions, 1):
            ending = f" {label}" if part == "trainval" else ""
            rows += [f"{action}/{video}.avi{ending}" for video in videos[action]]
        write_lines(folder / "ucfTrainTestlist" / file, rows)
        lists[part] = [
            (label, name, [f"{name}/{video}.jpg" for video in videos[action]])
            for label, (action, name) in enumerate(actions.items())
        ]
        touch(folder / "UCF-101-midframes", [path for _, _, paths in lists[part] for path in paths])
    return lists


def fgvc_aircraft(folder):
    names = ["707-320", "Boeing 717", "DHC-8-100"]
    write_lines(folder / "variants.txt", names)
    lists = {}
    for number, part in enumerate(("train", "val", "test")):
        paths = [[f"{number}{label}{i}" for i in range(5)] for label in range(3)]
        write_lines(
            folder / f"images_variant_{part}.txt",
            [f"{image} {name}" for name, found in zip(names, paths) for image in found],
        )
        lists[part] = [
            (label, name, [f"{image}.jpg" for image in found]) for label, (name, found) in enumerate(zip(names, paths))
        ]
        touch(folder / "images", [path for _, _, found in lists[part] for path in found])
    return lists


def imagenet(folder):
    names = {"n01440764": "tench", "n01443537": "goldfish", "n01484850": "great white shark"}
    write_lines(folder / "classnames.txt", [f"{wnid} {name}" for wnid, name in names.items()])
    lists = {"val": []}
    for part, images in (("train", "train"), ("test", "val")):
        lists[part] = [
            (label, name, [f"{images}/{wnid}/{wnid}_{i}.JPEG" for i in range(1, 9)])
            for label, (wnid, name) in enumerate(names.items())
        ]
        touch(folder / "images", [path for _, _, paths in reversed(lists[part]) for path in reversed(paths)])
    return lists


TREES = {
    "imagenet": ("imagenet", imagenet),
    "caltech101": ("caltech-101", caltech101),
    "oxford_pets": ("oxford_pets", oxford_pets),
    "stanford_cars": ("stanford_cars", stanford_cars),
    "oxford_flowers": ("oxford_flowers", oxford_flowers),
    "food101": ("food-101", plain_folders),
    "fgvc_aircraft": ("fgvc_aircraft", fgvc_aircraft),
    "sun397": ("sun397", sun397),
    "dtd": ("dtd", plain_folders),
    "eurosat": ("eurosat", eurosat),
    "ucf101": ("ucf101", ucf101),
}


def items(groups):
    return [[path, label, name] for label, name, paths in groups for path in paths]


def by_coops_rule(lists):
    """The rule as notes on CoOp state it, by Python's global generator, seed 1."""
    if "train" in lists:
        return {part: items(lists[part]) for part in ("train", "val", "test")}
    random.seed(1)
    split = {"train": [], "val": [], "test": items(lists.get("test", []))}
    for label, name, paths in lists.get("all") or lists["trainval"]:
        found = [[path, label, name] for path in paths]
        random.shuffle(found)
        val = round(0.2 * len(found))
        if "all" in lists:
            train = round(0.5 * len(found))
            for part, start, end in (("train", 0, train), ("val", train, train + val), ("test", train + val, None)):
                split[part] += found[start:end]
        else:
            split["val"] += found[:val]
            split["train"] += found[val:]
    return split


@pytest.mark.parametrize("name", layouts.LAYOUTS)
def test_lists_draws_and_halves_are_coops(name, tmp_path, capsys):
    folder, make = TREES[name]
    lists = make(tmp_path / folder)
    source = data.open_dataset(name, tmp_path)
    expected = by_coops_rule(lists)
    assert source.split == expected
    assert all((source.image_folder / path).is_file() for part in expected.values() for path, _, _ in part)
    made = name not in ("imagenet", "fgvc_aircraft")
    assert ("the digits then differ" in capsys.readouterr().err) == made
    assert data.open_dataset(name, tmp_path).split == expected  # ours, kept beside
    assert ("is a split made here, not CoOp's" in capsys.readouterr().err) == made

    # With CoOp's own split file in place, that one.
    if made:
        theirs = {part: found[1:] if part != "test" else found for part, found in expected.items()}
        (tmp_path / folder / layouts.LAYOUTS[name].split).write_text(json.dumps(theirs))
        assert data.open_dataset(name, tmp_path).split == theirs
        expected = theirs

    for seed in (1, 2, 3):
        random.seed(seed)
        drawn = {}
        for part, shots in (("train", 2), ("val", 2)):
            drawn[part] = []
            for label in dict.fromkeys(label for _, label, _ in expected[part]):
                of_label = [item for item in expected[part] if item[1] == label]
                drawn[part] += random.sample(of_label, shots) if len(of_label) >= shots else of_label
        assert data.few_shot(data.open_dataset(name, tmp_path).split, 2, seed) == drawn
        task = data.open_task(data.open_dataset(name, tmp_path), 2, seed=seed)
        names = [name for _, name, _ in sorted(next(iter(lists.values())) or lists["train"])]
        assert (task.base_names, task.new_names) == (names[:2], names[2:3])
        assert task.base_train == [item for item in drawn["train"] if item[1] < 2]
        assert task.new_train == [path for path, label, _ in drawn["train"] if label == 2]
        assert task.tests["new"].items == [[path, 0, name] for path, label, name in expected["test"] if label == 2]


def test_templates():
    assert [layout.template.format("x") for layout in layouts.LAYOUTS.values()] == [
        "a photo of a x.",
        "a photo of a x.",
        "a photo of a x, a type of pet.",
        "a photo of a x.",
        "a photo of a x, a type of flower.",
        "a photo of x, a type of food.",
        "a photo of a x, a type of aircraft.",
        "a photo of a x.",
        "x texture.",
        "a centered satellite photo of x.",
        "a photo of a person doing x.",
    ]


@pytest.mark.parametrize("name", layouts.LAYOUTS)
def test_what_is_missing_is_one_sentence(name, tmp_path, command):
    code, out, err = command("data.py", name, "--root", tmp_path)
    assert code == 2 and out == "" and err.count("\n") == 1 and "get " in err and "http" in err
    assert str(tmp_path / TREES[name][0]) in err and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "name, file, content",
    [
        ("oxford_flowers", "imagelabels.mat", b"not MATLAB"),
        ("oxford_flowers", "cat_to_name.json", b"{}"),
        ("stanford_cars", "devkit/cars_meta.mat", b""),
        ("sun397", "ClassName.txt", b"/a/abbey\n"),
        ("ucf101", "ucfTrainTestlist/classInd.txt", b"Archery\n"),
        ("fgvc_aircraft", "variants.txt", b"\xff"),
        ("oxford_pets", "annotations/test.txt", b"Abyssinian_1\n"),
        ("imagenet", "classnames.txt", b"n01440764\n"),
    ],
)
def test_broken_lists_are_one_sentence(name, file, content, tmp_path, command):
    folder, make = TREES[name]
    make(tmp_path / folder)
    (tmp_path / folder / file).write_bytes(content)
    code, _, err = command("data.py", name, "--root", tmp_path)
    assert code == 2 and err.count("\n") == 1 and "cannot be read" in err and not list(tmp_path.rglob("split_*"))


def test_imagenets_validation_images_lying_flat(tmp_path):
    folder = tmp_path / "imagenet"
    for place in ("train/n01440764", "val"):
        (folder / "images" / place).mkdir(parents=True)
        (folder / "images" / place / "ILSVRC2012_val_00000001.JPEG").write_bytes(b"")
    (folder / "classnames.txt").write_text("n01440764 tench\n")
    with pytest.raises(ValueError, match="if the images lie there flat, sort them with the script valprep.sh"):
        layouts.read_split("imagenet", folder)
