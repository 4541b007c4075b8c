"""CoOp's draw and halves, and loaders that show a label to nobody who must not see it."""

import hashlib
import json
import pickle
import random
import zlib

import pytest
import torch
from conftest import refuses, succeeds
from PIL import Image

import data
from experiments.pretrain import pretrain
from harness import clips, demo, folders, image_files, images, options, scores

EUROSAT_TRAIN = [1500, 1500, 1500, 1250, 1250, 1000, 1250, 1500, 1250, 1500]  # images per class in CoOp's split
AUGMENT = images.train_transform(32, (0.3, 1))


def small_task(domain, *shots):
    return data.base_to_new_task(folders.open_dataset(f"demo-{domain}"), *shots, 1)


@pytest.mark.parametrize("seed, checksum", [(1, 981511515), (2, 3137621565), (3, 3529770246)])
def test_the_draw_is_the_published_one(seed, checksum):
    """A checksum of the positions, within their classes, of all 160 images of EuroSAT's published 16-shot draws."""
    items = [[position, label, ""] for label, count in enumerate(EUROSAT_TRAIN) for position in range(count)]
    drawn = [position for position, _, _ in data.few_shot({"train": items}, 16, seed)["train"]]
    assert zlib.crc32(json.dumps(drawn).encode()) == checksum


def test_a_class_with_fewer_images_gives_all_and_draws_nothing():
    items = [["x0", 5, "x"], ["y0", 2, "y"], ["y1", 2, "y"], ["y2", 2, "y"], ["x1", 5, "x"]]
    drawn = [path for path, _, _ in data.few_shot({"train": items}, 3, 1)["train"]]
    assert drawn == ["x0", "x1", *random.Random(1).sample(["y0", "y1", "y2"], 3)]


def test_a_draw_is_told_by_its_sha256():
    """By hand for two images, and for the demo's draw, which is the same in every protocol."""
    items, content = [["é/1.jpg", 1, "b"], ["a\n.jpg", 0, "a"]], b"\xc3\xa9/1.jpg\t1\na\\n.jpg\t0\n"
    digest = hashlib.sha256(content).hexdigest()[:12]
    assert data.describe_draw(items, 1, 3) == f"few-shot draw: 1 shot, seed 3, SHA-256 {digest}"
    for protocol in ("base-to-new", "few-shot", "cross-dataset"):
        task = data.open_task(options.Settings(protocol=protocol, unlabeled_shots=2))
        assert task.draw == "few-shot draw: 16 shots, seed 1, SHA-256 f7d857e0fb4c"


def test_the_eleven_demo_domains():
    assert len(demo.LIGHTS) == 11 and len(demo.CLASSNAMES) == 100
    task = small_task("neon", 16, 16)
    assert (len(task.base_names), len(task.new_names), len(task.base_train), len(task.new_train)) == (50, 50, 800, 800)
    assert not {n.split()[0] for n in task.base_names} & {n.split()[0] for n in task.new_names}  # other colors
    assert not set(task.new_train) & {path for path, _, _ in task.tests["new"].items}
    path = task.tests["new"].items[0][0]
    assert demo.read(path).tobytes() == demo.read.__wrapped__(path).tobytes()  # drawn again, the same


def test_pretraining_is_deterministic(tmp_path):
    for name in ("one.pt", "two.pt"):
        pretrain(tmp_path / name, steps=1, pairs=4)
    assert (tmp_path / "one.pt").read_bytes() == (tmp_path / "two.pt").read_bytes()
    weights, ours = (torch.load(path, weights_only=True) for path in (tmp_path / "one.pt", clips.DEMO_WEIGHTS))
    assert {name: value.shape for name, value in weights.items()} == {name: value.shape for name, value in ours.items()}
    unused = weights["token_embedding.weight"][1000:1010]  # tokens that no caption has: as the seed drew them
    assert torch.equal(unused, ours["token_embedding.weight"][1000:1010])


def test_the_new_phase_has_no_labels():
    task = small_task("plain", 2, 3)
    assert all(isinstance(path, str) for path in task.new_train) and len(task.new_train) == 150
    dataset = images.Images(task.new_train, task.read, images.test_transform(32))
    loader = images.training_loader(dataset, images.ShuffledBatches(len(dataset), 32, 1), seed=1, phase=2)
    seen = [indices for _, indices in loader]
    assert len(loader) == 4 and len(set(torch.cat(seen).tolist())) == 128  # an index each, the last batch dropped
    assert [len(batch) for batch in images.ShuffledBatches(5, 32, 1)] == [5]  # a small set makes one smaller batch
    labels = [torch.tensor(task.new_answers)[indices] for indices in seen]
    labels[0] += 1
    assert scores.pseudo_label_accuracy(task.new_answers, list(zip(seen, labels))) == {"pseudo_label_accuracy": 75}
    assert scores.pseudo_label_accuracy(None, list(zip(seen, labels))) == {}


def test_augmentation_depends_on_seed_and_epoch_alone():
    """Not on workers, nor on PyTorch's global generator, which stays as it is."""
    task = small_task("ice", 1, 1)
    dataset, epochs = images.Images([path for path, _, _ in task.base_train], task.read, AUGMENT), {}
    for workers in (0, 1, 2):
        loader = images.training_loader(dataset, images.ShuffledBatches(50, 8, 1), 1, 1, workers)
        for epoch in (1, 2):
            torch.manual_seed(workers)
            before = torch.random.get_rng_state()
            loader.batch_sampler.set_epoch(epoch)
            epochs[workers, epoch] = torch.cat([batch for batch, _ in loader])
            assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(found, epochs[0, epoch]) for (_, epoch), found in epochs.items())
    assert not torch.equal(epochs[0, 1], epochs[0, 2])


def test_cached_views_are_the_augmented_images():
    task = small_task("ice", 1, 1)
    dataset = images.Images(task.new_train, task.read, AUGMENT)
    cached = images.CachedViews(dataset, 4, True, lambda pixels: pixels.flatten(1) / 255, seed=1, phase=2)
    (pixels, features), index = cached[7, 13]
    again, _ = dataset[7, images.augmentation_seed(1, 2, 0, 1 * 50 + 7)]  # 13 % 4 = view 1 of image 7
    assert index == 7 and torch.equal(pixels, again) and (features.float() - again.flatten() / 255).abs().max() < 1e-3
    assert len({cached[7, view][0][0].numpy().tobytes() for view in range(4)}) == 4


def test_decoded_images_are_kept_within_the_memory_given(tmp_path, monkeypatch):
    """Bit-identical images, each decoded once, in this process, in forked workers and in others."""
    for number in range(6):
        Image.radial_gradient("L").rotate(number).save(tmp_path / f"{number}.png")  # 256 x 256, decoded 0.25 MiB
    paths, decoded, found = [f"{number}.png" for number in range(6)], [], {}

    def read(path):
        decoded.append(path)
        return image_files.FolderReader(tmp_path)(path)

    for mib, workers, times in ((0, 0, [2] * 6), (1, 0, [1] * 4 + [2] * 2), (9, 0, [1] * 6), (1, 2, [1] * 5 + [0])):
        decoded.clear()
        dataset = images.Images(paths, images.KeptImages(read, paths, workers, mib), AUGMENT)
        for epoch in range(2):
            batches = images.loader(dataset, workers, batch_sampler=[[(index, epoch) for index in range(6)]])
            found.setdefault(epoch, []).append(next(iter(batches))[0])
        assert [decoded.count(path) for path in paths] == times, (mib, workers)  # those of a worker are not counted
    assert all(torch.equal(one, other[0]) for other in found.values() for one in other)
    monkeypatch.setattr(torch.multiprocessing, "get_start_method", lambda: "spawn")  # macOS's
    kept = pickle.loads(pickle.dumps(images.KeptImages(image_files.FolderReader(tmp_path), paths, 2, 1)))
    assert [kept(path).size for path in paths] == [(256, 256)] * 6 and list(kept.kept) == paths[:2]  # its share


def test_what_data_py_shows(eurosat, command):
    out, _ = succeeds(command("data.py eurosat --shots 4 --root", eurosat))
    assert "b = 2 anchors, K = 2 classes" in out and "20 labeled images to tune" in out
    lists = {}
    for name in ("train", "base", "new", "test"):
        found = command(f"data.py eurosat --shots 4 --list {name} --root", eurosat)[1]
        lists[name] = [line.split("\t") for line in found.splitlines()]
    drawn = data.few_shot(folders.open_dataset("eurosat", eurosat).split, 4, 1)["train"]
    assert data.describe_draw(drawn, 4, 1) in out.splitlines()
    assert lists["train"] == [[path, str(label), name] for path, label, name in drawn]
    assert [path for path, _, _ in lists["base"] + lists["new"]] == [path for path, _, _ in drawn]
    assert lists["new"][0][1:] == ["0", "Pasture Land"] and len(lists["test"]) == 20


@pytest.mark.parametrize(
    "content, message",
    [
        ('{"train": [["a", 0, "x"]], "val": [1], "test": [["c", 0, "x"]]}', "split_zhou_EuroSAT.json is broken"),
        ('{"train": [["a", 0, "x"], ["b", 1, "y"]], "test": [["c", 0, "x"]]}', "the class 'y' has no test image"),
        ('{"train": [["a", 0, "x"]], "test": [["c", 0, "x"], ["e", 2, "z"]]}', "the class 'z' has no training image"),
        ('{"train": [["a", 0, "x"], ["b", 0, "y"]], "test": [["c", 0, "x"]]}', "names the class 0 'y' at b"),
    ],
)
def test_a_broken_split_is_one_sentence(content, message, eurosat, command):
    (eurosat / "eurosat" / "split_zhou_EuroSAT.json").write_text(content)
    refuses(command("data.py eurosat --root", eurosat), message)
