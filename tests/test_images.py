"""An image is what a viewer shows: depth, transparency, orientation and frames; what a folder holds; broken ones."""

import itertools
import os
import pickle
import zlib

import numpy as np
import pytest
import torch
from conftest import draw, succeeds, table
from PIL import Image, ImageCms

from harness import image_files, images, layouts, runs

GRAY = np.arange(256, dtype=np.uint8).reshape(16, 16)
WIDE = np.stack([GRAY, GRAY.T, GRAY[::-1]], axis=2)[:12]  # [12, 16, 3]
DEEP = GRAY.astype(np.uint16) * 257


def shown(folder, name, plain=False):
    return np.asarray(image_files.FolderReader(folder, plain)(name))


def test_16_bits_are_scaled_to_8(tmp_path):
    for ending in ("png", "tif", "pgm"):
        Image.fromarray(DEEP).save(tmp_path / f"deep.{ending}")
        assert (shown(tmp_path, f"deep.{ending}") == GRAY[:, :, None]).all()
    Image.frombytes("I;16B", (16, 16), DEEP.astype(">u2").tobytes()).save(tmp_path / "other.tif")  # order of bytes
    assert (shown(tmp_path, "other.tif") == GRAY[:, :, None]).all()
    Image.fromarray(DEEP).save(tmp_path / "clear.png", transparency=0)
    seen = shown(tmp_path, "clear.png")
    assert (seen[0, 0] == 255).all() and (seen[1:] == GRAY[1:, :, None]).all()


def test_32_bits_are_refused(tmp_path):
    """Their range is not known. decode=False is the check before a run."""
    for values, decode in itertools.product((GRAY.astype(np.int32), GRAY.astype(np.float32) / 255), (True, False)):
        Image.fromarray(values).save(tmp_path / "counts.tiff")
        with pytest.raises(image_files.UnreadableImage, match="counts.tiff .*32-bit"):
            image_files.FolderReader(tmp_path)("counts.tiff", decode)


@pytest.mark.parametrize("name", ["a.png", "a.webp", "a.tif", "la.png", "la.tif", "p.png", "p.gif", "rgb.png", "l.png"])
def test_transparency_is_white(name, tmp_path):
    """The left half is transparent, with black below; the right half is of one color."""
    half = np.zeros((8, 8, 4), np.uint8)
    half[:, 4:] = 90, 90, 90, 255
    image, palette = Image.fromarray(half), Image.fromarray(half[:, :, 3] // 255).convert("P")
    palette.putpalette([0, 0, 0, 90, 90, 90] + [0] * 762)
    kinds = {"a": image, "la": image.convert("LA"), "p": palette, "rgb": image.convert("RGB"), "l": image.convert("L")}
    kind, clear = name.split(".")[0], {"p": 0, "rgb": (0, 0, 0), "l": 0}
    options = {"transparency": clear[kind]} if kind in clear else {"lossless": True}
    kinds[kind].save(tmp_path / name, **options)
    seen = shown(tmp_path, name)
    assert (seen[:, :4] == 255).all() and (seen[:, 4:] == 90).all()
    assert (shown(tmp_path, name, plain=True)[:, :4] == 0).all()  # as CoOp reads its datasets


def test_orientation_and_frames(tmp_path):
    """A turned image is turned back; the first frame counts; broken EXIF does not hide an image."""
    exif, stripe = Image.Exif(), np.zeros((8, 16, 3), np.uint8)
    exif[0x0112], stripe[:4] = 6, 255  # a viewer turns it to the right
    for ending in ("jpg", "png", "tif", "webp"):
        Image.fromarray(stripe).save(tmp_path / f"turned.{ending}", exif=exif)
        seen = shown(tmp_path, f"turned.{ending}")
        assert seen.shape == (16, 8, 3) and seen[:, 5:].min() > 200 and seen[:, :3].max() < 50
        if ending != "tif":  # Pillow turns those itself
            assert shown(tmp_path, f"turned.{ending}", plain=True).shape == (8, 16, 3)
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    for ending in ("gif", "tif", "webp"):
        frames[0].save(tmp_path / f"two.{ending}", save_all=True, append_images=frames[1:])
        assert shown(tmp_path, f"two.{ending}")[0, 0].argmax() == 0
    Image.fromarray(WIDE).save(tmp_path / "a.png", exif=b"Exif\x00\x00II*\x00\xff\xff\xff\xff garbage")
    assert np.array_equal(shown(tmp_path, "a.png"), WIDE)


def test_ordinary_modes_are_as_before(tmp_path):
    modes = [Image.fromarray(WIDE).convert(mode) for mode in ("1", "L", "P", "RGB", "CMYK", "YCbCr")]
    for image in (*modes, Image.new("LAB", (4, 4), (120, 128, 128))):
        image.save(tmp_path / "a.tif")
        assert np.array_equal(shown(tmp_path, "a.tif"), shown(tmp_path, "a.tif", plain=True))


def test_broken_images_are_named(tmp_path):
    draw(tmp_path / "short.jpg")
    content = (tmp_path / "short.jpg").read_bytes()
    (tmp_path / "short.jpg").write_bytes(content[: len(content) // 2])
    (tmp_path / "text.jpg").write_bytes(b"not a JPEG")
    for name in ("short.jpg", "text.jpg", "missing.jpg"):
        with pytest.raises(image_files.UnreadableImage, match=f"cannot read the image .*{name}"):
            image_files.FolderReader(tmp_path)(name)


def said(capsys, folder):
    """What the command says of the images in a folder."""
    image_files.find_images(folder)
    return capsys.readouterr().err


@pytest.mark.parametrize("name, mode", [("a.png", "RGB"), ("a.jpg", "L"), ("a.webp", "RGB"), ("a.tif", "RGBA")])
def test_color_profiles_are_followed(name, mode, tmp_path, capsys):
    """sRGB with a gamma of 1, whose name says sRGB. sRGB's own, a broken one, or one for CMYK changes nothing."""
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    linear, gray = bytearray(srgb), Image.new("L", (8, 8), 100)
    for at in range(132, 132 + 12 * srgb[131], 12):  # the tags: name, start, length
        if srgb[at + 1 : at + 4] == b"TRC":
            start = int.from_bytes(srgb[at + 4 : at + 8], "big")
            linear[start : start + 14] = b"curv\0\0\0\0\0\0\0\1\1\0"
    bright = 255 * (1.055 * (100 / 255) ** (1 / 2.4) - 0.055)
    other = [b"broken", srgb.replace(b"RGB XYZ", b"CMYKXYZ")]
    for profile in (None, srgb, bytes(linear), *other):
        gray.convert(mode).save(tmp_path / name, icc_profile=profile)
        assert abs(shown(tmp_path, name) - (bright if profile == linear else 100)).max() < 1
        assert ("1 of 1 images have a color profile that is broken" in said(capsys, tmp_path)) == (profile in other)


def test_what_a_header_says_is_used_or_said(tmp_path, capsys):
    """12 bits in 16, a white of zero, a fourth band, and what is not followed: a line with the number."""
    twelve, rgb, exif = Image.fromarray(GRAY.astype(np.uint16) * 16), Image.fromarray(WIDE), Image.Exif()
    infrared, opaque = (Image.fromarray(np.dstack([WIDE, np.full((12, 16), band, np.uint8)])) for band in (25, 255))
    exif.get_ifd(0x8769)[0xA005] = {1: "R03"}
    for words, name, image, options in (
        ("use less than a quarter of 16 bits", "a.png", twelve, {}),
        ("use less than a quarter of 16 bits", "a.tif", twelve, {"tiffinfo": {281: 9}}),  # TIFF: not for display
        ("", "a.png", Image.fromarray(DEEP), {}),
        ("are mostly half transparent", "a.tif", infrared, {}),
        ("", "a.tif", opaque, {}),
        ("are CMYK without a color profile", "a.jpg", rgb.convert("CMYK"), {}),
        ("have pixels that are not square", "a.jpg", rgb, {"dpi": (72, 144)}),
        ("have several frames", "a.gif", rgb, {"save_all": True, "append_images": [rgb.rotate(180)]}),
        ("name a color space by cICP, gAMA, cHRM or EXIF", "a.jpg", rgb, {"exif": exif}),
    ):
        image.save(tmp_path / name, **options)
        found = said(capsys, tmp_path)
        assert f"1 of 1 images {words}" in found if words else found == ""
        assert image is not twelve or abs(shown(tmp_path, name)[:, :, 0].astype(int) - GRAY).max() <= 1
        (tmp_path / name).unlink()
    Image.fromarray(DEEP).save(tmp_path / "a.tif", tiffinfo={262: 0})
    assert (shown(tmp_path, "a.tif")[:, :, 0] == 255 - GRAY).all()
    usual, odd = [b"gAMA\0\0\xb1\x8f", b"cICP\1\r\0\1"], [b"gAMA\0\1\x86\xa0", b"cICP\x09\x10\0\1"]
    for chunk in usual + odd:
        rgb.save(tmp_path / "a.png")
        content, checksum = (tmp_path / "a.png").read_bytes(), zlib.crc32(chunk).to_bytes(4, "big")
        (tmp_path / "a.png").write_bytes(content[:33] + b"\0\0\0\4" + chunk + checksum + content[33:])
        assert said(capsys, tmp_path).count("1 of 2 images name a color space") == (chunk in odd)


def test_a_line_and_heic_are_unreadable(tmp_path, monkeypatch, capsys):
    """A resize of 1 x 60000 pixels would fill the memory. Without pillow-heif the sentence names it."""
    Image.new("L", (60000, 1)).save(tmp_path / "line.png")
    monkeypatch.delitem(Image.EXTENSION, ".heic", raising=False)
    (tmp_path / "a.heic").write_bytes(b"ftypheic")
    assert "1 .heic; pip install pillow-heif" in said(capsys, tmp_path)
    for name, words in (("line.png", "60000 x 1 pixels"), ("a.heic", "pip install pillow-heif")):
        for plain in (True, False):
            with pytest.raises(image_files.UnreadableImage, match=f"{name} .*{words}"):
                image_files.FolderReader(tmp_path, plain)(name, False)


# What a folder holds --------------------------------------------------------------------------------------------------


def test_which_files_are_images(tmp_path, capsys):
    """Hidden files and folders are left out, links followed but not in a circle, other files counted in one line."""
    photos = tmp_path / "photos"
    for name in ("a.jfif", "b.gif", "c.PPM", "deep/er/d.webp", "._a.jpg", ".thumbs/e.jpg", "__MACOSX/f.jpg"):
        (photos / name).parent.mkdir(parents=True, exist_ok=True)
        (photos / name).touch()
    (photos / "notes.txt").write_text("no image")
    (photos / "deep" / "list").write_text("no image")
    draw(tmp_path / "elsewhere" / "g.png")
    os.symlink(tmp_path / "elsewhere", photos / "linked")
    os.symlink(photos, photos / "deep" / "circle")
    assert image_files.find_images(photos) == ["a.jfif", "b.gif", "c.PPM", "deep/er/d.webp", "linked/g.png"]
    err = capsys.readouterr().err
    assert "2 files are left out" in err and ": 1 .txt, 1 no ending\n" in err and err.count("\n") == 1


def test_which_folders_are_classes(tmp_path, capsys):
    photos = tmp_path / "photos"
    for path in (photos / "cat" / "1.png", photos / "dog" / "1.png", tmp_path / "elsewhere" / "1.png"):
        draw(path)
    for link, target in (("again", photos), ("up", tmp_path), ("yak", tmp_path / "elsewhere")):
        os.symlink(target, photos / link)
    (photos / ".DS_Store").write_text("hidden")
    (photos / "list.txt").write_text("shown")
    items = layouts.class_folders(photos)["all"]
    err = capsys.readouterr().err
    assert "1 files are left out" in err and err.endswith(": 1 .txt\n") and err.count("\n") == 1
    assert [name for _, _, name in items] == ["cat", "dog", "yak"]


# Other systems --------------------------------------------------------------------------------------------------------


def test_what_workers_get_can_be_pickled(tmp_path):
    """As where workers are spawned, on Windows and macOS; and the images are the same."""
    draw(tmp_path / "a.png")
    reader = images.KeptImages(image_files.FolderReader(tmp_path), ["a.png"])
    for transform in (images.train_transform(32, (0.5, 1.0)), images.Views(images.randaugment_transform(32), 2)):
        dataset = images.Images(["a.png"], reader, transform)
        pairs = zip(dataset[0, 11][0], pickle.loads(pickle.dumps(dataset))[0, 11][0])
        assert all(torch.equal(one, other) for one, other in pairs)


def test_without_the_module_resource(monkeypatch, tune):
    """Windows has none: the peak memory is then not known, and nothing else changes."""
    monkeypatch.setattr(runs, "resource", None)
    out, *_ = succeeds(tune("--method zeroshot"))
    assert table(out)[0][-1] == "-"
