"""Image files: found in folders, and read by Pillow as a viewer shows them, or as CoOp reads them.

This file does not import PyTorch, so that `python data.py` answers at once.
"""

import collections
import contextlib
import functools
import io
import os
import pathlib
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageChops, ImageCms, ImageOps

from harness.cli import printable, warn

with contextlib.suppress(ImportError):  # not required; Pillow alone does not read an iPhone's .heic
    import pillow_heif

    pillow_heif.register_heif_opener()

HEIF_ENDINGS = {".heic", ".heif"}
IMAGE_ENDINGS = {  # in lower case
    ".jpg", ".jpeg", ".jfif", ".jpe", ".png", ".apng", ".bmp", ".tif", ".tiff", ".webp", ".gif",
    ".avif", ".ppm", ".pgm", ".pbm", ".pnm",
} | HEIF_ENDINGS  # fmt: skip
LONGEST = 100  # an image's longer side, in shorter ones: the resize of a line one pixel wide would fill the memory
SRGB_CICP = (b"", b"\1\1", b"\1\r")  # primaries and transfer
SRGB, GRADIENT = ImageCms.createProfile("sRGB"), Image.linear_gradient("L")
COLORS = Image.merge("RGB", [GRADIENT, GRADIENT.rotate(90), Image.radial_gradient("L")])


class UnreadableImage(ValueError):
    """A missing or broken image; the message is one sentence.

    When a worker raises this error, PyTorch creates it again with the worker's whole traceback as its text. The
    traceback's last line is the sentence.
    """

    def __init__(self, text):
        super().__init__(text.strip().splitlines()[-1].removeprefix(f"{__name__}.UnreadableImage: "))


class FolderReader(NamedTuple):
    """Reads images by their paths in a folder.

    plain: whether Pillow's `convert("RGB")` alone reads an image, as CoOp reads its datasets. Otherwise an image looks
    as a viewer shows it (`as_shown`).
    """

    folder: pathlib.Path
    plain: bool = False

    def __call__(self, path, decode=True):
        """Returns the RGB image (PIL); of several frames, the first. decode=False only checks that Pillow can open it.

        UnreadableImage, which names the path: the file is missing or broken, has values of 32 bits, or is a line.
        """
        try:
            with Image.open(self.folder / path) as image:
                if max(image.size) > LONGEST * min(image.size):
                    raise ValueError(f"it has {image.width} x {image.height} pixels")
                if not decode and (self.plain or image.mode not in ("I", "F")):  # these modes may have an unknown range
                    return None
                return image.convert("RGB") if self.plain else as_shown(image)
        except Exception as error:  # Pillow raises errors of every type on broken files
            reason = "no such file" if isinstance(error, FileNotFoundError) else error
            advice = needs_package([os.path.splitext(path)[1].lower()]) or "replace it, or remove it"
            text = f"cannot read the image {self.folder / path} ({reason}): {advice}"
            raise UnreadableImage(printable(text)) from error


def as_shown(image):
    """Converts a PIL image of any mode to RGB as a viewer shows it.

    EXIF's orientation and the color profile are applied, transparency is on white, and values of 16 bits are scaled to
    8 bits. ValueError: values of 32 bits.
    """
    image.load()
    with contextlib.suppress(Exception):  # broken EXIF raises errors of every type; viewers then do not rotate
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I") or image.mode == "F":
        image = to_8_bits(image)
    if not image.has_transparency_data:
        return in_srgb(image)
    alpha = image.convert("RGBA").getchannel("A")
    image = in_srgb(image)
    image.putalpha(alpha)
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def in_srgb(image):
    """An RGB image (PIL) of one of any mode with at most 8 bits, its transparency left out, its colors in sRGB."""
    mode, transform = to_srgb(image.info.get("icc_profile"), image.mode) or (None, None)
    return image.convert("RGB") if transform is None else ImageCms.applyTransform(image.convert(mode), transform)


@functools.lru_cache(maxsize=64)
def to_srgb(profile, mode):
    """(mode to convert to, transform to sRGB or None) of images of a mode that carry a color profile, bytes or None.

    The transform is None where it would change nothing. Returns None where there is no profile, or it is broken or for
    another kind of image: viewers then ignore it.
    """
    for kind in ("CMYK",) if mode == "CMYK" else ("L", "RGB") if mode in ("1", "L", "LA") else ("RGB",):
        with contextlib.suppress(ImageCms.PyCMSError, OSError, TypeError):
            transform, before = ImageCms.buildTransform(io.BytesIO(profile), SRGB, kind, "RGB"), COLORS.convert(kind)
            change = ImageChops.difference(ImageCms.applyTransform(before, transform), before.convert("RGB"))
            # The name does not tell: there is a linear sRGB too.
            return kind, transform if max(highest for _, highest in change.getextrema()) > 2 else None
    return None


def to_8_bits(image):
    """Scales a gray PIL image of 16 bits to 8 bits (L): mode I;16, and mode I of PNG and PGM files.

    White is what the file says, or 4095 or 1023 where no value is higher: a camera's 12 or 10 bits. ValueError: 32-bit
    integers or floats, whose range is not known.
    """
    if image.mode in ("I", "F") and image.format not in ("PNG", "PPM"):
        raise ValueError(f"its values are 32-bit {'floats' if image.mode == 'F' else 'integers'}; save it in 8 bits")
    values, transparent = np.asarray(image).astype(np.float64), image.info.get("transparency")
    white = white_of(image, values.max(initial=0))
    scaled = np.rint(values * (255 / white)).astype(np.uint8)
    if getattr(image, "tag_v2", {}).get(262) == 0:  # a TIFF whose white is zero
        scaled = 255 - scaled
    gray = Image.fromarray(scaled)
    if isinstance(transparent, int):  # the value that a PNG declares transparent
        gray.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    gray.info = {key: value for key, value in image.info.items() if key != "transparency"}
    return gray


def white_of(image, highest=65535):
    """The value of white in a gray image of 16 bits whose highest value is given."""
    stated = 2 ** getattr(image, "tag_v2", {}).get(258, [16])[0] - 1  # a TIFF's BitsPerSample
    return next((white for white in (1023, 4095) if highest <= white < stated == 65535), stated)


def oddities(image, head):
    """What may be shown otherwise than its maker thinks in an opened image (PIL): phrases that continue "images ...".

    head: the first bytes of its file.
    """
    info, gray, clear = image.info, image.mode.startswith("I"), False
    bare, red = not {"icc_profile", "srgb"} & info.keys(), info.get("chromaticity", [0.64] * 3)[2]
    other = not 0.43 < info.get("gamma", 0.4545) < 0.48 or abs(red - 0.64) > 0.01
    other = other or image.format == "JPEG" and image.getexif().get_ifd(0xA005).get(1) == "R03"  # Adobe RGB
    cicp = head.partition(b"cICP")[2][:2] if image.format == "PNG" else b""
    across, down = info.get("jfif_density") or info.get("dpi") or info.get("aspect") or (1, 1)
    unusable = "icc_profile" in info and to_srgb(info["icc_profile"], "L" if gray else image.mode) is None
    frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
    dark = ";16" in str(image.tile)
    if dark:
        dark = np.asarray(image if gray else image.convert("RGB")).max() < 0.25 * (white_of(image) if gray else 255)
    if image.has_transparency_data and not gray:
        alpha = np.asarray(image.convert("RGBA"))[:, :, 3]
        clear = alpha.max() < 255 or np.isin(alpha, (0, 255)).mean() < 0.5
    phrases = {
        "use less than a quarter of 16 bits: gray ones up to 4095 are scaled as 12 bits, others look dark": dark,
        "are mostly half transparent, so that white shows through: is their last band transparency?": clear,
        "have a color profile that is broken or for another kind of image: shown as sRGB": unusable,
        "are CMYK without a color profile: their colors are a guess": image.mode == "CMYK" and bare,
        "name a color space by cICP, gAMA, cHRM or EXIF: shown as sRGB": bare and other or cicp not in SRGB_CICP,
        "have pixels that are not square: shown as if they were": not 0.95 * down <= across <= 1.05 * down,
        "have several frames: the first one is used": frames > 1,
    }
    return [phrase for phrase, holds in phrases.items() if holds]


def warn_of_odd_images(paths):
    """Warns about image files that say more about how to show them than is used here: a line for each kind.

    paths: a list; of a long one, about 300 are looked at.
    """
    looked_at, found = paths[:: len(paths) // 300 + 1], collections.defaultdict(list)
    for path in looked_at:
        with contextlib.suppress(Exception), open(path, "rb") as file:  # a broken one: who reads it says so
            head = file.read(4096)
            for phrase in oddities(Image.open(file), head):
                found[phrase].append(path)
    for phrase, odd in found.items():
        warn(f"{len(odd)} of {len(looked_at)} images {phrase} (for example {odd[0]})")


def needs_package(endings):
    """What to install so that files with these endings can be read, a sentence; "" where nothing helps."""
    needed = HEIF_ENDINGS & set(endings) - set(Image.registered_extensions())
    return f"pip install pillow-heif, which reads {', '.join(sorted(needed))}" if needed else ""


def hidden(name):
    """Whether a file or folder of this name is ignored without a warning: `.name`, and macOS's `__MACOSX`."""
    return name.startswith(".") or name == "__MACOSX"


def leads_back(folder):
    """Whether a folder (pathlib.Path) is a link to a folder that contains it."""
    return folder.resolve() in [above.resolve() for above in folder.absolute().parents]


def image_paths(folder):
    """Finds image files: (their paths relative to `folder`, sorted; a Counter of the endings of all other files).

    Subfolders and links to folders are searched; hidden ones, and links back to a folder above, are not.
    FileNotFoundError: no such folder. OSError: a folder cannot be listed.
    """

    def fail(error):
        raise error

    if not os.path.isdir(folder):
        raise FileNotFoundError(f"{folder} is not a folder: give one that holds images")
    found, others, start = [], collections.Counter(), len(os.path.join(folder, ""))
    for place, inner, names in os.walk(folder, onerror=fail, followlinks=True):
        inner[:] = [name for name in inner if not hidden(name) and not leads_back(pathlib.Path(place, name))]
        for name in names:
            ending = os.path.splitext(name)[1].lower()
            if ending in IMAGE_ENDINGS and ending in Image.registered_extensions() and not hidden(name):
                found.append(os.path.join(place, name)[start:])
            elif not hidden(name):
                others[ending or "no ending"] += 1
    return sorted(found), others


def warn_left_out(folder, others, why="because Pillow does not read them as images"):
    """Warns in one line about files of a folder that are not used. others: the Counter that `image_paths` returns."""
    if others:
        counts = ", ".join(f"{count} {ending}" for ending, count in sorted(others.items()))
        advice = needs_package(others)
        warn(f"{folder}: {sum(others.values())} files are left out {why}: {counts}{advice and '; '}{advice}")


def find_images(folder):
    """Returns the paths of all images in a folder and its subfolders, relative to it, sorted. Warns about other files.

    FileNotFoundError: no such folder. ValueError: it holds no image.
    """
    found, others = image_paths(folder)
    if not found:
        advice = needs_package(others) or "give a folder that does"
        raise ValueError(f"{folder} holds no images ({', '.join(sorted(IMAGE_ENDINGS))}): {advice}")
    warn_left_out(folder, others)
    warn_of_odd_images([os.path.join(folder, path) for path in found])
    return found
