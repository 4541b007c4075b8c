"""Images as a model sees them: image files, CLIP's transforms, and the loaders of both phases.

Every random choice comes from a seed, never from a loader's worker: the same bits for any number of workers.
"""

import collections
import contextlib
import os
import pathlib
import shutil
import sys
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from tqdm import tqdm

from cli import printable, warn

# Pillow reads .avif from 11.3 on, and .heic where pillow-heif is registered.
IMAGE_ENDINGS = {  # in lower case
    ".jpg", ".jpeg", ".jfif", ".jpe", ".png", ".apng", ".bmp", ".tif", ".tiff", ".webp", ".gif",
    ".avif", ".heic", ".heif", ".ppm", ".pgm", ".pbm", ".pnm",
}  # fmt: skip
PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)
BICUBIC = transforms.InterpolationMode.BICUBIC

# Image files ----------------------------------------------------------------------------------------------------------


class UnreadableImage(ValueError):
    """A missing or broken image, told in one sentence.

    PyTorch makes this error anew, with a worker's whole traceback as its text: then the last line is the sentence.
    """

    def __init__(self, text):
        super().__init__(text.strip().splitlines()[-1].removeprefix("images.UnreadableImage: "))


class FolderReader(NamedTuple):
    """Reads images by their paths in a folder.

    plain: by Pillow's `convert("RGB")` alone, as CoOp reads its datasets; else as a viewer shows them.
    """

    folder: pathlib.Path
    plain: bool = False

    def __call__(self, path, decode=True):
        """The RGB image (PIL), of several frames the first. decode=False: only looks whether there is an image.

        UnreadableImage, which names the path: the file is missing or broken, or its range of values is not known.
        """
        try:
            with Image.open(self.folder / path) as image:
                if not decode and (self.plain or image.mode not in ("I", "F")):  # those may have no known range
                    return None
                return image.convert("RGB") if self.plain else as_shown(image)
        except Exception as error:  # Pillow raises of every kind on broken files
            reason = "no such file" if isinstance(error, FileNotFoundError) else error
            raise UnreadableImage(
                printable(f"cannot read the image {self.folder / path} ({reason}): replace it, or take it out")
            ) from error


def as_shown(image):
    """A PIL image of any mode as a viewer shows it, in RGB: turned by its EXIF orientation, transparency on white.

    More than 8 bits per value are scaled to 8. ValueError: their range is not known.
    """
    image.load()
    with contextlib.suppress(Exception):  # of every kind where EXIF is broken; viewers then show an image unturned
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I") or image.mode == "F":
        image = to_8_bits(image)
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def to_8_bits(image):
    """A gray PIL image of 16 bits (I;16), 32-bit integers (I) or floats (F) in 8 bits (L).

    16 bits have a range of 0 to 65535, and so have PNG and PGM files in mode I; 32 bits, where they go so far, that of
    a signed integer; floats that of 0 to 1. Integers up to 255 are taken as they are. ValueError: other values.
    """
    values, transparent = np.asarray(image).astype(np.float64), image.info.get("transparency")
    least, most = values.min(), values.max()
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        top = 65535
    elif image.mode == "I" and least >= 0 and most <= 255:
        top = 255
    elif image.mode == "I" and least >= 0 and most >= 2**23:  # smaller values would all be black
        top = 2**31 - 1
    elif image.mode == "F" and least >= 0 and most <= 1:
        top = 1
    else:
        kind = "floats" if image.mode == "F" else "integers of 32 bits"
        raise ValueError(f"its values are {kind} from {least:g} to {most:g}, of a range that is not known; save 8 bits")
    gray = Image.fromarray(np.rint(values * (255 / top)).astype(np.uint8))
    if isinstance(transparent, int):  # the value that a PNG names as transparent
        gray.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    return gray


def hidden(name):
    """Whether a file or folder of this name is passed over without a word: `.name`, and macOS's `__MACOSX`."""
    return name.startswith(".") or name == "__MACOSX"


def files_below(folder, inner="", above=()):
    """Yields the paths of all files in a folder and its subfolders, relative to it. OSError: it cannot be listed.

    Hidden ones are left out. Links to folders are followed, but not back to `above`.
    """
    place = os.path.join(folder, inner)
    above = (*above, os.path.realpath(place))
    for name in os.listdir(place):
        path = os.path.join(inner, name)
        if hidden(name):
            continue
        if not os.path.isdir(os.path.join(folder, path)):
            yield path
        elif os.path.realpath(os.path.join(folder, path)) not in above:
            yield from files_below(folder, path, above)


def image_paths(folder):
    """(paths of the image files in a folder and its subfolders, relative to it, sorted; endings of its other files).

    The endings are counted, by `collections.Counter`. OSError: it cannot be listed.
    """
    found, others = [], collections.Counter()
    for path in files_below(folder):
        ending = os.path.splitext(path)[1].lower()
        if ending in IMAGE_ENDINGS and ending in Image.registered_extensions():  # of the Pillow at hand
            found.append(path)
        else:
            others[ending or "no ending"] += 1
    return sorted(found), others


def left_out(folder, others, why="that Pillow does not take for images"):
    """Warns, in one line, about files of a folder that are not taken. others: of `image_paths`. why: which they are."""
    if others:
        counts = ", ".join(f"{count} {ending}" for ending, count in sorted(others.items()))
        warn(f"{folder}: {sum(others.values())} files are left out {why}: {counts}")


def find_images(folder):
    """Paths of all image files in a folder and its subfolders, relative to it, sorted. Warns about other files.

    FileNotFoundError: no such folder. ValueError: it holds no image.
    """
    folder = pathlib.Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder: give one that holds images")
    found, others = image_paths(folder)
    if not found:
        raise ValueError(f"{folder} holds no images ({', '.join(sorted(IMAGE_ENDINGS))}): give a folder that does")
    left_out(folder, others)
    return found


# Transforms -----------------------------------------------------------------------------------------------------------


def train_transform(pixels, crop_scale):
    """CoOp's augmentation, a random resized crop (bicubic) and a flip: PIL image -> uint8 [3, pixels, pixels].

    crop_scale: least and largest share of the image's area that a crop takes.
    """
    crop = transforms.RandomResizedCrop(pixels, scale=crop_scale, interpolation=BICUBIC)
    return transforms.Compose([crop, transforms.RandomHorizontalFlip(), transforms.PILToTensor()])


def randaugment_transform(pixels):
    """CoPrompt's augmentation, a resize and RandAugment (N = 2, M = 10): PIL image -> uint8 [3, pixels, pixels]."""
    resize = transforms.Resize((pixels, pixels), interpolation=BICUBIC)
    return transforms.Compose([resize, transforms.RandAugment(2, 10), transforms.PILToTensor()])


class Views:
    """Several independent draws of a transform: PIL image -> a tuple of what `transform` gives."""

    def __init__(self, transform, count):
        self.transform, self.count = transform, count

    def __call__(self, image):
        return tuple(self.transform(image) for _ in range(self.count))


def test_transform(pixels):
    """CLIP's own preprocessing: PIL image -> uint8 [3, pixels, pixels]."""
    resize = transforms.Resize(pixels, interpolation=BICUBIC)
    return transforms.Compose([resize, transforms.CenterCrop(pixels), transforms.PILToTensor()])


def model_input(images):
    """What a loader brings, in float32 as CLIP wants it: uint8 images [B, 3, h, w] normalized, features [B, d] kept."""
    if images.ndim == 2:
        return images.float()
    return transforms.functional.normalize(images.float() / 255, PIXEL_MEAN, PIXEL_STD)


# Loaders --------------------------------------------------------------------------------------------------------------


def default_workers():
    """How many processes load images where the user names no number: one per core, at most 8."""
    return min(8, os.cpu_count() or 1)


class Images(Dataset):
    """Images by path: (transformed image, label), or (transformed image, index) where there are no labels.

    paths: what `read` takes and makes a PIL image of. labels: one int per path, or None.
    A key is an index, or (index, augmentation seed): then the transform's random choices come from that seed.
    """

    def __init__(self, paths, read, transform, labels=None):
        self.paths, self.read, self.transform, self.labels = paths, read, transform, labels

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, key):
        index, seed = key if isinstance(key, tuple) else (key, 0)
        generator = torch.default_generator  # torchvision's transforms draw from it, so it is set and put back
        state = generator.get_state()
        try:
            generator.manual_seed(seed)
            image = self.transform(self.read(self.paths[index]))
        finally:
            generator.set_state(state)
        return image, (index if self.labels is None else self.labels[index])


class KeptImages:
    """A reader that keeps the images it has decoded, up to `mib` MiB for all workers together, in half of what is free.

    Few-shot images are few, and read again and again. paths: what will be read. Workers that are forked (Linux) share
    what is decoded here beforehand; others (macOS, Windows) each keep their own share.
    """

    def __init__(self, read, paths, mib, workers):
        self.read, self.room, self.workers, self.kept = read, min(mib, free_mib() / 2) * 2**20, workers, {}
        if workers and torch.multiprocessing.get_start_method() == "fork":
            for path in paths:
                with contextlib.suppress(UnreadableImage):  # it is told where its batch is loaded
                    self(path)
                if path not in self.kept:
                    break
            self.room = 0

    def __call__(self, path):
        """The image, as of `read`; it is not to be changed in place."""
        image = self.kept.get(path)
        if image is None:
            image = self.read(path)
            size = 4 * image.width * image.height  # bytes that Pillow takes for RGB
            if size <= self.room:
                self.kept[path], self.room = image, self.room - size
        return image

    def __getstate__(self):
        """For a worker that is not forked: its share of the room, and nothing kept yet."""
        return {**vars(self), "kept": {}, "room": self.room / max(1, self.workers)}


class CachedViews(Dataset):
    """V augmented views of each image of an `Images`, made once and kept in memory.

    An item is (what is kept of the view, the image's label or index): its pixels, uint8 [3, h, w], where `pixels` is
    said; its features [d] in half precision, where `encode` is given; or both. encode: uint8 images [B, 3, h, w] ->
    features [B, d] of the frozen image encoder. A key is (index, augmentation seed), which picks the view. The views
    come from `seed` and `phase` alone. ValueError: memory will not hold them.
    """

    def __init__(self, images, views, pixels, encode, seed, phase, workers=0):
        keys = []  # all images' first view, then all images' second view, ...
        for position in range(views * len(images)):
            keys.append((position % len(images), augmentation_seed(seed, phase, 0, position)))
        batches = [keys[start : start + 128] for start in range(0, len(keys), 128)]
        first = images[keys[0]][0]
        size = first.nbytes if pixels else 0  # of a view
        if encode is not None:
            size += 2 * encode(first[None]).shape[1]
        size, room = size * len(keys) / 2**20, free_mib()
        if size > room:
            raise ValueError(
                f"{views} views of {len(images)} images take {size:,.0f} MiB, and {room:,.0f} MiB of memory are free: "
                "lower --cache-views"
            )
        self.parts, labels = [torch.empty(len(keys), *first.shape, dtype=torch.uint8)] if pixels else [], []
        features = []
        name = f"caching {views} views of {len(images)} images, {size:,.1f} MiB"
        for number, (batch, batch_labels) in enumerate(tqdm(loader(images, workers, batch_sampler=batches), name)):
            if pixels:
                self.parts[0][128 * number : 128 * number + len(batch)] = batch
            if encode is not None:
                features.append(encode(batch).half().cpu())
            labels.append(batch_labels)
        if features:
            self.parts.append(torch.cat(features))
        self.parts = [part.unflatten(0, (views, -1)) for part in self.parts]  # [V, N, 3, h, w], [V, N, d]
        self.views, self.labels = views, torch.cat(labels)[: len(images)]

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, key):
        index, seed = key
        found = [part[seed % self.views, index] for part in self.parts]
        return found[0] if len(found) == 1 else tuple(found), self.labels[index]


def free_mib():
    """The memory in MiB that this process may still take: what Linux calls available, and a container's own limit."""
    found = [sys.maxsize]
    try:
        lines = pathlib.Path("/proc/meminfo").read_text().splitlines()
        found += [int(line.split()[1]) / 1024 for line in lines if line.startswith("MemAvailable")]
        group = pathlib.Path("/sys/fs/cgroup")
        limit, used = ((group / f"memory.{name}").read_text().strip() for name in ("max", "current"))
        found += [] if limit == "max" else [(int(limit) - int(used)) / 2**20]
    except OSError:  # another system, or no limit
        pass
    return min(found)


class ShuffledBatches:
    """Batches of a random order; a last incomplete one is dropped where a full one exists (the authors' release)."""

    def __init__(self, count, batch_size, seed):
        self.count, self.batch_size, self.seed, self.epoch = count, min(batch_size, count), seed, 1

    def set_epoch(self, epoch):
        """Makes `epoch`, counted from 1, the one that comes next."""
        self.epoch = epoch

    def __len__(self):
        return self.count // self.batch_size

    def __iter__(self):
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.count).tolist()
        self.epoch += 1
        for start in range(0, len(self) * self.batch_size, self.batch_size):
            yield order[start : start + self.batch_size]


def augmentation_seed(*parts):
    """One seed, an int, of (run's seed, phase, epoch, position): the same wherever and whenever the image is loaded."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


class SeededBatches:
    """A batch sampler whose keys are (index, augmentation seed of this run's seed, phase, epoch and position).

    So an image's augmentation does not depend on which worker loads it, or when. batches: a batch sampler of indices.
    """

    def __init__(self, batches, seed, phase):
        self.batches, self.seed, self.phase, self.batch_size = batches, seed, phase, batches.batch_size

    def set_epoch(self, epoch):
        """As of the `batches`."""
        self.batches.set_epoch(epoch)

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        position, epoch = 0, self.batches.epoch
        for batch in self.batches:
            seeds = [augmentation_seed(self.seed, self.phase, epoch, position + i) for i in range(len(batch))]
            yield list(zip(batch, seeds))
            position += len(batch)


def training_loader(images, batches, seed, phase, workers=0, pin_memory=False):
    """The loader of a phase (1 or 2): batches of what `images` gives, uint8 [B, 3, h, w], with labels or indices [B].

    `loader.batch_sampler.set_epoch(e)` starts epoch e. images: an `Images`, or `CachedViews` of one, which no worker
    has to load. batches: a batch sampler of indices.
    """
    workers = 0 if isinstance(images, CachedViews) else workers
    batches = SeededBatches(batches, seed, phase)
    # Workers stay, else every epoch would start them again.
    return loader(images, workers, batch_sampler=batches, persistent_workers=workers > 0, pin_memory=pin_memory)


def loader(images, workers, prefetch_factor=2, **options):
    """A DataLoader whose workers' batches have room in the shared memory; where they have not, of fewer workers.

    images: a `Dataset` of images. prefetch_factor: batches that each worker has ready. options: of the DataLoader,
    `batch_size` or `batch_sampler` among them.
    """
    if workers:
        batch_size = options.get("batch_size") or getattr(options["batch_sampler"], "batch_size", 128)
        room = workers_with_room(images, batch_size * (1 + prefetch_factor))
        if room < workers:
            warn(f"the shared memory has room for the batches of {room} workers, not {workers} (docker run --shm-size)")
            workers = room
    if workers:
        options["prefetch_factor"] = prefetch_factor
    else:
        options["persistent_workers"] = False
    own = torch.Generator().manual_seed(0)  # it seeds the workers; the learners' own draws come from the global one
    return DataLoader(images, num_workers=workers, generator=own, **options)


def workers_with_room(images, count):
    """How many workers can each have `count` images in /dev/shm, where Linux passes them on; Docker gives it 64 MB."""
    try:
        free, image = shutil.disk_usage("/dev/shm").free, images[0][0]
    except (OSError, UnreadableImage):  # another system; or a broken image, which is told where it is read
        return sys.maxsize
    views = image if isinstance(image, (tuple, list)) else [image]
    return free // (count * sum(view.nbytes for view in views))
