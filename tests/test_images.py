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

from harness import images, layouts, runs

GRAY = np.arange(256, dtype=np.uint8).reshape(16, 16)
WIDE = np.stack([GRAY, GRAY.T, GRAY[::-1]], axis=2)[:12]  # [12, 16, 3]
DEEP = GRAY.astype(np.uint16) * 257


def shown(folder, name, plain=False):
    return np.asarray(images.FolderReader(folder, plain)(name))


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
        with pytest.raises(images.UnreadableImage, match="counts.tiff .*32-bit"):
            images.FolderReader(tmp_path)("counts.tiff", decode)


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
        with pytest.raises(images.UnreadableImage, match=f"cannot read the image .*{name}"):
            images.FolderReader(tmp_path)(name)


SRGB = np.array([(0.4360, 0.2225, 0.0139), (0.3851, 0.7169, 0.0971), (0.1431, 0.0606, 0.7141)])  # XYZ of its primaries
PROPHOTO = np.array([(0.7977, 0.2880, 0), (0.1352, 0.7119, 0), (0.0313, 0.0001, 0.8252)])
SRGB_PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def color_profile(primaries, gamma):
    """A color profile of primaries, XYZ under D50, and a gamma: sRGB's, with its tags rewritten."""
    content = bytearray(SRGB_PROFILE)
    for at in range(132, 132 + 12 * content[131], 12):
        tag, start = bytes(content[at : at + 4]), int.from_bytes(content[at + 4 : at + 8], "big")
        if tag[1:] == b"XYZ":
            xyz = primaries[b"rgb".index(tag[:1])]
            content[start + 8 : start + 20] = np.rint(xyz * 65536).astype(">i4").tobytes()
        if tag[1:] == b"TRC":
            content[start : start + 14] = b"curv\0\0\0\0\0\0\0\1" + round(gamma * 256).to_bytes(2, "big")
    return bytes(content)


def in_srgb(color, primaries, gamma):
    """What a color of 8 bits under such a profile is in sRGB, by hand."""
    linear = (np.array(color) / 255) ** gamma @ primaries @ np.linalg.inv(SRGB)
    return 255 * np.where(linear < 0.0031308, 12.92 * linear, 1.055 * linear.clip(0) ** (1 / 2.4) - 0.055).clip(0, 1)


def said(capsys, folder):
    """What the command says of the odd images of a folder."""
    images.find_images(folder)
    return capsys.readouterr().err


@pytest.mark.parametrize("name, mode", [("a.png", "RGB"), ("a.jpg", "RGB"), ("a.webp", "RGB"), ("a.tif", "RGBA")])
def test_color_profiles_are_followed(name, mode, tmp_path, capsys):
    """The profile of sRGB, a broken one, or one for gray images changes nothing."""
    color, seen = (150, 100, 60), {}
    profiles = {"none": None, "sRGB": SRGB_PROFILE, "wide": color_profile(PROPHOTO, 1.8)}
    profiles |= {"linear sRGB": color_profile(SRGB, 1), "broken": b"broken"}
    profiles["gray"] = profiles["wide"].replace(b"RGB XYZ", b"GRAYXYZ")
    for kind, profile in profiles.items():
        Image.new("RGB", (8, 8), color).convert(mode).save(tmp_path / name, icc_profile=profile)
        seen[kind] = shown(tmp_path, name)[0, 0]
        warned = "1 of 1 images have a color profile that is broken" in said(capsys, tmp_path)
        assert warned == (kind in ("broken", "gray"))
        assert (seen[kind] == seen["none"]).all() or kind in ("wide", "linear sRGB")
    assert abs(seen["wide"] - in_srgb(color, PROPHOTO, 1.8)).max() < 6
    assert abs(seen["linear sRGB"] - in_srgb(color, SRGB, 1)).max() < 6


def test_what_a_header_says_is_used_or_said(tmp_path, capsys):
    """12 bits in 16, a white of zero, a fourth band, and what is not followed: one line each, with the number."""

    def only(name, image, **options):
        for path in tmp_path.iterdir():
            path.unlink()
        image.save(tmp_path / name, **options)
        return said(capsys, tmp_path)

    twelve, rgb = GRAY.astype(np.uint16) * 16, Image.fromarray(WIDE)
    for name in ("a.png", "a.tif"):
        assert "1 of 1 images use less than a quarter of 16 bits" in only(name, Image.fromarray(twelve))
        assert abs(shown(tmp_path, name)[:, :, 0].astype(int) - GRAY).max() <= 1
    assert only("a.tif", Image.fromarray(twelve), tiffinfo={281: 4095}) == ""
    assert only("a.png", Image.fromarray(DEEP)) == ""
    only("a.tif", Image.fromarray(DEEP), tiffinfo={262: 0})
    assert (shown(tmp_path, "a.tif")[:, :, 0] == 255 - GRAY).all()
    near_infrared = np.dstack([WIDE, np.full(WIDE.shape[:2], 25, np.uint8)])
    assert "1 of 1 images are mostly half transparent" in only("a.tif", Image.fromarray(near_infrared))
    near_infrared[:, 4:, 3] = 255
    assert only("a.png", Image.fromarray(near_infrared)) == ""
    assert "are CMYK without" in only("a.jpg", rgb.convert("CMYK"))
    assert "not square" in only("a.jpg", rgb, dpi=(72, 144)) and only("a.jpg", rgb, dpi=(72, 72)) == ""
    assert "several frames" in only("a.gif", rgb, save_all=True, append_images=[rgb.rotate(180)])
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0xA005] = {1: "R03"}
    assert "by cICP, gAMA, cHRM or EXIF" in only("a.jpg", rgb, exif=exif)
    only("a.png", rgb)
    content = (tmp_path / "a.png").read_bytes()
    linear, usual = (b"gAMA" + gamma.to_bytes(4, "big") for gamma in (100000, 45455))
    for chunk, expected in ((linear, True), (usual, False), (b"cICP\x09\x10\0\1", True), (b"cICP\1\x0d\0\1", False)):
        size, checksum = (len(chunk) - 4).to_bytes(4, "big"), zlib.crc32(chunk).to_bytes(4, "big")
        (tmp_path / "a.png").write_bytes(content[:33] + size + chunk + checksum + content[33:])
        assert ("by cICP, gAMA" in said(capsys, tmp_path)) == expected


def test_a_line_is_no_image(tmp_path):
    """A resize of 1 x 60000 pixels would fill the memory."""
    Image.new("L", (60000, 1)).save(tmp_path / "line.png")
    for plain, decode in itertools.product((True, False), repeat=2):
        with pytest.raises(images.UnreadableImage, match="line.png .*60000 x 1 pixels"):
            images.FolderReader(tmp_path, plain)("line.png", decode)


def test_heic_names_the_package(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(Image.EXTENSION, ".heic", "HEIF")  # as pillow-heif does it
    assert images.needs_package([".heic"]) == ""
    monkeypatch.delitem(Image.EXTENSION, ".heic")
    (tmp_path / "a.heic").write_bytes(b"ftypheic")
    draw(tmp_path / "b.png")
    assert "1 .heic; pip install pillow-heif" in said(capsys, tmp_path)
    with pytest.raises(images.UnreadableImage, match="pip install pillow-heif"):
        images.FolderReader(tmp_path)("a.heic")


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
    assert images.find_images(photos) == ["a.jfif", "b.gif", "c.PPM", "deep/er/d.webp", "linked/g.png"]
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
    reader = images.KeptImages(images.FolderReader(tmp_path), ["a.png"])
    for transform in (images.train_transform(32, (0.5, 1.0)), images.Views(images.randaugment_transform(32), 2)):
        dataset = images.Images(["a.png"], reader, transform)
        pairs = zip(dataset[0, 11][0], pickle.loads(pickle.dumps(dataset))[0, 11][0])
        assert all(torch.equal(one, other) for one, other in pairs)


def test_without_the_module_resource(monkeypatch, tune):
    """Windows has none: the peak memory is then not known, and nothing else changes."""
    monkeypatch.setattr(runs, "resource", None)
    out, *_ = succeeds(tune("--method zeroshot"))
    assert table(out)[0][-1] == "-"
