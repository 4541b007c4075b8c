"""CoOp's draw and halves, layouts, and loaders that show a label to nobody who must not see it."""

import json
import pathlib
import pickle
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

import data
import demo
import encoders
import evaluate
import images
import layouts
from experiments.pretrain import pretrain

EUROSAT_TRAIN = [1500, 1500, 1500, 1250, 1250, 1000, 1250, 1500, 1250, 1500]  # images per class in CoOp's split


@pytest.mark.parametrize(
    "seed, first, checksum",
    [
        (1, [275, 1165, 129, 522, 241], 981511515),
        (2, [115, 187, 173, 739, 346], 3137621565),
        (3, [487, 1213, 1114, 267, 757], 3529770246),
    ],
)
def test_the_draw_is_the_published_one(seed, first, checksum):
    """Positions within their class of EuroSAT's published 16-shot draws, and a checksum of all 160."""
    items = [[position, label, ""] for label, count in enumerate(EUROSAT_TRAIN) for position in range(count)]
    drawn = [position for position, _, _ in data.few_shot({"train": items}, 16, seed)["train"]]
    assert drawn[:5] == first and zlib.crc32(json.dumps(drawn).encode()) == checksum


def test_a_class_with_fewer_images_gives_all_and_draws_nothing():
    items = [["x0", 5, "x"], ["y0", 2, "y"], ["y1", 2, "y"], ["y2", 2, "y"], ["x1", 5, "x"]]
    drawn = data.few_shot({"train": items}, 3, 1)["train"]
    assert [path for path, _, _ in drawn[:2]] == ["x0", "x1"]
    assert sorted(path for path, _, _ in drawn[2:]) == ["y0", "y1", "y2"]


def test_halves_and_labels():
    items = [["a", 4, "four"], ["b", 0, "zero"], ["c", 2, "two"], ["d", 4, "four"], ["e", 9, "nine"], ["f", 7, "seven"]]
    base, new = data.halves(items)
    assert (base, new) == ([0, 2, 4], [7, 9])
    assert data.select(items, base) == [["a", 2, "four"], ["b", 0, "zero"], ["c", 1, "two"], ["d", 2, "four"]]


def test_the_eleven_demo_domains():
    assert len(demo.LIGHTS) == 11 and len(demo.CLASSNAMES) == 100
    task = data.open_task(data.open_dataset("demo-neon"))
    assert (len(task.base_names), len(task.new_names)) == (50, 50)
    assert (len(task.base_train), len(task.new_train)) == (800, 800)
    assert not {n.split()[0] for n in task.base_names} & {n.split()[0] for n in task.new_names}  # other colors
    assert not set(task.new_train) & {path for path, _, _ in task.tests["new"].items}
    path = task.tests["new"].items[0][0]
    assert demo.read(path).tobytes() == demo.read.__wrapped__(path).tobytes()  # drawn again, the same
    assert min(np.bincount([label for _, label, _ in task.tests["new"].items])) >= 20


def test_pretraining_is_deterministic(tmp_path):
    for name in ("one.pt", "two.pt"):
        pretrain(tmp_path / name, steps=2, pairs=16)
    assert (tmp_path / "one.pt").read_bytes() == (tmp_path / "two.pt").read_bytes()
    weights = torch.load(tmp_path / "one.pt", weights_only=True)
    ours = torch.load(encoders.DEMO_WEIGHTS, weights_only=True)
    assert {name: value.shape for name, value in weights.items()} == {name: value.shape for name, value in ours.items()}
    unused = weights["token_embedding.weight"][1000:1010]  # tokens that no caption has: as the seed drew them
    assert torch.equal(unused, ours["token_embedding.weight"][1000:1010])


def test_the_new_phase_has_no_labels():
    task = data.open_task(data.open_dataset("demo-plain"), shots=2, unlabeled_shots=3)
    assert all(isinstance(path, str) for path in task.new_train) and len(task.new_train) == 150
    dataset = images.Images(task.new_train, task.read, images.test_transform(32))
    loader = images.training_loader(dataset, images.ShuffledBatches(len(dataset), 32, 1), seed=1, phase=2)
    seen = [indices for _, indices in loader]
    assert len(loader) == 4 and len(set(torch.cat(seen).tolist())) == 128  # an index each, the last batch dropped
    right = torch.tensor(task.new_answers)[torch.cat(seen)]
    of = (task.new_answers, torch.arange(150), seen)
    assert evaluate.pseudo_label_accuracy(*of, [right]) == {"pseudo_label_accuracy": 100}
    right[:32] += 1
    assert evaluate.pseudo_label_accuracy(*of, [right]) == {"pseudo_label_accuracy": 75}
    assert evaluate.pseudo_label_accuracy(None, *of[1:], [right]) == {}


def test_a_small_set_makes_one_smaller_batch():
    assert [len(batch) for batch in images.ShuffledBatches(5, 32, 1)] == [5]


def test_augmentation_does_not_depend_on_workers():
    task = data.open_task(data.open_dataset("demo-ice"), shots=1)
    dataset = images.Images([path for path, _, _ in task.base_train], task.read, images.train_transform(32, (0.3, 1)))
    epochs = {}
    for workers in (0, 1, 2):
        loader = images.training_loader(dataset, images.ShuffledBatches(50, 8, 1), 1, 1, workers)
        for epoch in (1, 2):
            torch.manual_seed(workers)  # the global state must not matter
            loader.batch_sampler.set_epoch(epoch)
            epochs[workers, epoch] = torch.cat([batch for batch, _ in loader])
    for epoch in (1, 2):
        assert torch.equal(epochs[0, epoch], epochs[1, epoch]) and torch.equal(epochs[0, epoch], epochs[2, epoch])
    assert not torch.equal(epochs[0, 1], epochs[0, 2])


def test_decoded_images_are_kept_within_the_memory_given(tmp_path, monkeypatch):
    """The same bits, each image decoded once, in this process, in forked workers and in others."""
    for number in range(6):
        Image.radial_gradient("L").rotate(number).save(tmp_path / f"{number}.png")  # 256 x 256, decoded 0.25 MiB
    paths, decoded = [f"{number}.png" for number in range(6)], []

    def read(path):
        decoded.append(path)
        return images.FolderReader(tmp_path)(path)

    transform, found = images.train_transform(32, (0.3, 1)), {}
    for mib, workers, times in ((0, 0, [2] * 6), (1, 0, [1] * 4 + [2] * 2), (9, 0, [1] * 6), (1, 2, [1] * 5 + [0])):
        decoded.clear()
        dataset = images.Images(paths, images.KeptImages(read, paths, mib, workers), transform)
        for epoch in range(2):
            batches = images.loader(dataset, workers, batch_sampler=[[(index, epoch) for index in range(6)]])
            found.setdefault(epoch, []).append(next(iter(batches))[0])
        assert [decoded.count(path) for path in paths] == times, (mib, workers)  # those of a worker are not counted
    assert all(torch.equal(one, other[0]) for other in found.values() for one in other)
    assert not torch.equal(found[0][0], found[1][0])
    monkeypatch.setattr(torch.multiprocessing, "get_start_method", lambda: "spawn")  # macOS's
    kept = pickle.loads(pickle.dumps(images.KeptImages(images.FolderReader(tmp_path), paths, 1, 2)))
    assert [kept(path).size for path in paths] == [(256, 256)] * 6 and list(kept.kept) == paths[:2]  # its share


def test_loading_leaves_the_global_generator_alone():
    task = data.open_task(data.open_dataset("demo-ice"), shots=1)
    before = torch.random.get_rng_state()
    images.Images(task.new_train, task.read, images.train_transform(32, (0.3, 1)))[0, 7]
    assert torch.equal(before, torch.random.get_rng_state())


def test_eurosat_in_coops_layout(eurosat, command):
    source = data.open_dataset("eurosat", eurosat)
    task = data.open_task(source, shots=4)
    assert task.base_names == [
        "Annual Crop Land",
        "Forest",
        "Herbaceous Vegetation Land",
        "Highway or Road",
        "Industrial Buildings",
    ]
    code, out, _ = command("data.py", "eurosat", "--root", eurosat, "--shots", 4)
    assert code == 0 and "b = 2 anchors, K = 2 classes" in out and "20 few-shot" in out
    lists = {}
    for name in ("train", "base", "new", "test"):
        lists[name] = command("data.py", "eurosat", "--root", eurosat, "--shots", 4, "--list", name)[1].splitlines()
    assert [line.split("\t") for line in lists["train"]] == [
        [path, str(label), name] for path, label, name in data.few_shot(source.split, 4, 1)["train"]
    ]
    paths = {name: [line.split("\t")[0] for line in found] for name, found in lists.items()}
    assert paths["base"] + paths["new"] == paths["train"]
    assert lists["new"][0].split("\t")[1:] == ["0", "Pasture Land"] and len(lists["test"]) == 20


def test_no_split_file_means_coops_rule(eurosat, capsys):
    (eurosat / "eurosat" / "split_zhou_EuroSAT.json").unlink()
    first = data.open_dataset("eurosat", eurosat).split
    assert "the digits then differ" in capsys.readouterr().err
    assert [len(first[part]) for part in ("train", "val", "test")] == [40, 20, 20]  # of 8: 4, 2, 2
    assert data.open_dataset("eurosat", eurosat).split == first
    told = capsys.readouterr().err
    assert "is a split made here, not CoOp's" in told and "has changed" not in told


def test_a_download_is_moved_in_when_it_is_whole(eurosat, monkeypatch):
    def fetch(root, download):
        (pathlib.Path(root) / "eurosat").mkdir()
        (eurosat / "images").rename(pathlib.Path(root) / "eurosat" / "2750")

    (eurosat / "eurosat" / "2750").rename(eurosat / "images")
    monkeypatch.setattr(layouts.datasets, "EuroSAT", fetch)
    source = data.open_dataset("eurosat", eurosat, download=True)
    assert source.image_folder.is_dir() and sorted(path.name for path in eurosat.iterdir()) == ["eurosat"]


def split_file(content):
    """Damage to EuroSAT's folder: a split file with this content."""
    return lambda folder: (folder / "split_zhou_EuroSAT.json").write_text(content)


# fmt: off
@pytest.mark.parametrize("damage, message", [
    (lambda folder: folder.rename(folder.with_name("elsewhere")), "neither .*split_zhou_EuroSAT.json nor .*2750 is"),
    (split_file('{"train": [1]'), "is broken .*it needs lists"),
    (split_file('{"train": [["a", 0]], "test": []}'), "is broken .*it needs lists"),
    (split_file('{"train": [["a", 0, "x"], ["b", "1", "y"]], "test": [["c", 0, "x"]]}'), "is broken .*it needs lists"),
    (split_file('{"train": [["a", 0, "x"]], "val": [1], "test": [["c", 0, "x"]]}'), "is broken .*it needs lists"),
    (split_file("[1]"), "is broken .*it needs lists"),
    (split_file('{"train": [["a", 0, "x"], ["b", 1, "y"]], "test": [["c", 0, "x"], ["d", 1, "y"], ["e", 2, "z"]]}'),
     "the class 'z' has no training image"),
])
# fmt: on
def test_a_broken_root_is_one_sentence(eurosat, command, damage, message):
    damage(eurosat / "eurosat")
    code, out, err = command("data.py", "eurosat", "--root", eurosat)
    assert code == 2 and out == "" and err.count("\n") == 1
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        data.open_task(data.open_dataset("eurosat", eurosat))


def test_an_unreadable_image_is_named(eurosat):
    (eurosat / "eurosat" / "2750" / "Forest" / "Forest_1.jpg").write_bytes(b"not a JPEG")
    read = images.FolderReader(eurosat / "eurosat" / "2750")
    for path in ("Forest/Forest_1.jpg", "Forest/Forest_99.jpg"):
        with pytest.raises(images.UnreadableImage, match=path):
            read(path)
        dataset = images.Images([path] * 2, read, images.test_transform(32))
        loader = images.training_loader(dataset, images.ShuffledBatches(2, 2, 1), 1, 1, workers=1)
        with pytest.raises(images.UnreadableImage) as error:
            next(iter(loader))
        assert path in str(error.value) and "\n" not in str(error.value)
