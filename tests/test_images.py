"""An image is what a viewer shows: depth, transparency, orientation and frames; what a folder holds; broken ones."""

import json
import os

import images
import layouts
import numpy as np
import pytest
import record
import torch
from PIL import Image
from torch.utils.data import DataLoader

import data

GRAY = np.arange(256, dtype=np.uint8).reshape(16, 16)
WIDE = np.stack([GRAY, GRAY.T, GRAY[::-1]], axis=2)[:12]  # [12, 16, 3]


def shown(folder, name, plain=False):
    return np.asarray(images.FolderReader(folder, plain)(name))


def gray(values):
    return np.repeat(values[:, :, None], 3, axis=2)


@pytest.mark.parametrize("ending", ["png", "tif", "pgm"])
def test_16_bits_are_scaled_to_8(ending, tmp_path):
    Image.fromarray(GRAY.astype(np.uint16) * 257).save(tmp_path / f"deep.{ending}")
    assert np.array_equal(shown(tmp_path, f"deep.{ending}"), gray(GRAY))


def test_integers_and_floats_by_their_range(tmp_path):
    """Full 32 bits, 0 to 255, and 0 to 1 are known; anything else is refused by name."""
    taken = {"full": (GRAY * ((2**31 - 1) / 255)).astype(np.int32), "bytes": GRAY.astype(np.int32)}
    taken["floats"] = (GRAY / 255).astype(np.float32)
    for name, values in taken.items():
        Image.fromarray(values).save(tmp_path / f"{name}.tiff")
        assert np.abs(shown(tmp_path, f"{name}.tiff").astype(int) - gray(GRAY)).max() <= 1
    refused = {"counts": GRAY.astype(np.int32) * 200, "negative": GRAY.astype(np.int32) - 9}
    refused.update(bytes_as_floats=GRAY.astype(np.float32), nan=np.full((2, 2), np.nan, np.float32))
    for name, values in refused.items():
        Image.fromarray(values).save(tmp_path / f"{name}.tiff")
        for decode in (True, False):  # before a run, too
            with pytest.raises(images.UnreadableImage, match=f"{name}.tiff .*range that is not known"):
                images.FolderReader(tmp_path)(f"{name}.tiff", decode)


@pytest.mark.parametrize("name", ["a.png", "a.webp", "a.tif", "la.png", "la.tif", "p.png", "p.gif", "rgb.png", "l.png"])
def test_transparency_is_white(name, tmp_path):
    """The left half is transparent, with black below; the right half is of one color."""
    half = np.zeros((8, 8, 4), np.uint8)
    half[:, 4:] = 90, 90, 90, 255
    image, options = Image.fromarray(half), {"lossless": True} if name.endswith("webp") else {}
    if name.startswith("la"):
        image = image.convert("LA")
    elif name.startswith("p"):
        image = Image.fromarray(half[:, :, 3] // 255).convert("P")
        image.putpalette([0, 0, 0, 90, 90, 90] + [0] * 762)
        options = {"transparency": 0}
    elif not name.startswith("a"):
        image = image.convert(name.split(".")[0].upper())
        options = {"transparency": 0 if image.mode == "L" else (0, 0, 0)}
    image.save(tmp_path / name, **options)
    seen = shown(tmp_path, name)
    assert (seen[:, :4] == 255).all() and (seen[:, 4:] == 90).all()
    assert (shown(tmp_path, name, plain=True)[:, :4] == 0).all()  # as CoOp reads its datasets


def test_16_bits_with_a_transparent_value(tmp_path):
    Image.fromarray(GRAY.astype(np.uint16) * 257).save(tmp_path / "deep.png", transparency=0)
    seen = shown(tmp_path, "deep.png")
    assert (seen[0, 0] == 255).all() and np.array_equal(seen[1:], gray(GRAY)[1:])


@pytest.mark.parametrize("ending", ["jpg", "png", "tif", "webp"])
def test_a_turned_image_is_turned_back(ending, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # a viewer turns it to the right
    stripe = np.zeros((8, 16, 3), np.uint8)
    stripe[:4] = 255
    Image.fromarray(stripe).save(tmp_path / f"turned.{ending}", exif=exif)
    seen = shown(tmp_path, f"turned.{ending}")
    assert seen.shape == (16, 8, 3) and seen[:, 5:].min() > 200 and seen[:, :3].max() < 50
    if ending != "tif":  # Pillow turns those itself
        assert shown(tmp_path, f"turned.{ending}", plain=True).shape == (8, 16, 3)


def test_the_first_frame_counts(tmp_path):
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    for ending in ("gif", "tif", "webp"):
        frames[0].save(tmp_path / f"two.{ending}", save_all=True, append_images=frames[1:])
        assert shown(tmp_path, f"two.{ending}")[0, 0].argmax() == 0


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr", "LAB"])
def test_ordinary_modes_are_as_before(mode, tmp_path):
    image = Image.new("LAB", (4, 4), (120, 128, 128)) if mode == "LAB" else Image.fromarray(WIDE).convert(mode)
    image.save(tmp_path / "a.tif")
    assert np.array_equal(shown(tmp_path, "a.tif"), shown(tmp_path, "a.tif", plain=True))


def test_a_dataset_of_the_eleven_is_read_as_coop_reads_it(eurosat):
    assert data.open_dataset("eurosat", eurosat).read.plain
    assert not data.open_dataset("folder", eurosat / "eurosat" / "2750").read.plain


def make(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(WIDE).save(path)


def test_what_a_folder_holds(tmp_path, capsys):
    """Hidden files and folders are left out, links followed but not in a circle, other files counted in one line."""
    for name in ("a.jfif", "b.gif", "c.PPM", "deep/er/d.webp", "._a.jpg", ".thumbs/e.jpg", "__MACOSX/f.jpg"):
        target = tmp_path / "photos" / name
        make(target.with_suffix(".jpeg"))
        target.with_suffix(".jpeg").rename(target)
    (tmp_path / "photos" / "notes.txt").write_text("no image")
    (tmp_path / "photos" / "deep" / "list").write_text("no image")
    make(tmp_path / "elsewhere" / "g.png")
    os.symlink(tmp_path / "elsewhere", tmp_path / "photos" / "linked")
    os.symlink(tmp_path / "photos", tmp_path / "photos" / "deep" / "circle")
    found = images.find_images(tmp_path / "photos")
    assert found == ["a.jfif", "b.gif", "c.PPM", "deep/er/d.webp", "linked/g.png"]
    err = capsys.readouterr().err
    assert "2 files are left out that Pillow does not take for images: 1 .txt, 1 no ending" in err
    assert err.count("\n") == 1


def test_a_class_folder_that_leads_back_is_no_class(tmp_path, capsys):
    for name in ("cat", "dog", "owl"):
        for number in range(4):
            make(tmp_path / "photos" / name / f"{number}.png")
    os.symlink(tmp_path / "photos", tmp_path / "photos" / "again")
    os.symlink(tmp_path, tmp_path / "photos" / "up")
    make(tmp_path / "elsewhere" / "1.png")
    os.symlink(tmp_path / "elsewhere", tmp_path / "photos" / "yak")
    (tmp_path / "photos" / ".DS_Store").write_text("hidden")
    (tmp_path / "photos" / "list.txt").write_text("shown")
    items = layouts.class_folders(tmp_path / "photos")["all"]
    assert capsys.readouterr().err.endswith(": 1 files are left out that lie beside the class folders: 1 .txt\n")
    assert len(items) == 13 and {name for _, _, name in items} == {"cat", "dog", "owl", "yak"}


def test_workers_that_are_spawned(tmp_path):
    """As on Windows and macOS: what a worker gets can be pickled, and the images are the same."""
    for number in range(4):
        make(tmp_path / f"{number}.png")
    dataset = images.Images(
        images.find_images(tmp_path), images.FolderReader(tmp_path), images.train_transform(32, (0.5, 1.0))
    )
    batches = [[(0, 11), (1, 12)], [(2, 13), (3, 14)]]
    found = []
    for workers in ({"num_workers": 0}, {"num_workers": 1, "multiprocessing_context": "spawn"}):
        found.append([batch for batch, _ in DataLoader(dataset, batch_sampler=batches, **workers)])
    assert all(torch.equal(one, other) for one, other in zip(*found))


def test_without_the_module_resource(monkeypatch, command, tmp_path):
    """Windows has none: the peak memory is then not known, and nothing else changes."""
    monkeypatch.setattr(record, "resource", None)
    ask = ["run.py", "--shots", 1, "--epochs", 2, "--method", "backbone", "--workers", 0, "--out", tmp_path]
    code, out, err = command(*ask)
    assert code == 0 and out.splitlines()[3].split()[-1] == "-", err
    (run,) = tmp_path.iterdir()
    assert json.loads((run / "result.json").read_text())["peak_mib"] is None
    code, again, _ = command("run.py", "--eval", run)
    assert code == 0 and again.splitlines()[3] == out.splitlines()[3]


def test_a_broken_exif_does_not_hide_an_image(tmp_path):
    Image.fromarray(WIDE).save(tmp_path / "a.png", exif=b"Exif\x00\x00II*\x00\xff\xff\xff\xff garbage")
    assert np.array_equal(shown(tmp_path, "a.png"), WIDE)


def test_16_bits_in_the_other_order_of_bytes(tmp_path):
    values = (GRAY.astype(np.uint16) * 257).astype(">u2")
    Image.frombytes("I;16B", (16, 16), values.tobytes()).save(tmp_path / "a.tif")
    assert np.array_equal(shown(tmp_path, "a.tif"), gray(GRAY))
