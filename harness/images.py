"""Images as a model sees them: CLIP's transforms, and the loaders of both phases.

Every random choice comes from a seed, never from a loader's worker. So a run is bit-identical for any number of
workers.
"""

import contextlib
import functools
import os
import sys

import numpy as np
import psutil
import torch
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from tqdm import tqdm

from harness.image_files import UnreadableImage

PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)
BICUBIC = transforms.InterpolationMode.BICUBIC
KEPT_MIB = 1024  # memory for decoded training images, all workers together
WHOLE = 64  # whole images that are encoded at a time

# Transforms -----------------------------------------------------------------------------------------------------------


def train_transform(pixels, crop_scale):
    """CoOp's augmentation, a random resized crop (bicubic) and a flip: PIL image -> uint8 [3, pixels, pixels].

    crop_scale: the smallest and the largest share of the image's area that a crop takes.
    """
    crop = transforms.RandomResizedCrop(pixels, scale=crop_scale, interpolation=BICUBIC)
    return transforms.Compose([crop, transforms.RandomHorizontalFlip(), transforms.PILToTensor()])


def randaugment_transform(pixels):
    """CoPrompt's augmentation, a resize and RandAugment (N = 2, M = 10): PIL image -> uint8 [3, pixels, pixels]."""
    resize = transforms.Resize((pixels, pixels), interpolation=BICUBIC)
    return transforms.Compose([resize, transforms.RandAugment(2, 10), transforms.PILToTensor()])


class Views:
    """Several independent draws of a transform: PIL image -> a tuple of the transform's results."""

    def __init__(self, transform, count):
        self.transform, self.count = transform, count

    def __call__(self, image):
        return tuple(self.transform(image) for _ in range(self.count))


def augmentation(pixels, crop_scale, randaugment=False, views=1):
    """The transform of training images: PIL image -> uint8 [3, pixels, pixels], or a tuple of several views."""
    transform = randaugment_transform(pixels) if randaugment else train_transform(pixels, crop_scale)
    return Views(transform, views) if views > 1 else transform


def test_transform(pixels):
    """CLIP's own preprocessing: PIL image -> uint8 [3, pixels, pixels]."""
    resize = transforms.Resize(pixels, interpolation=BICUBIC)
    return transforms.Compose([resize, transforms.CenterCrop(pixels), transforms.PILToTensor()])


@functools.lru_cache
def pixel_statistics(device):
    """CLIP's mean and standard deviation of pixels on a device, each [3, 1, 1]. Copied there once, not per batch."""
    return tuple(torch.tensor(values)[:, None, None].to(device) for values in (PIXEL_MEAN, PIXEL_STD))


def model_input(images):
    """A loader's batch as float32 input for CLIP: uint8 images [B, 3, h, w] are normalized, features [B, d] are not."""
    if images.ndim == 2:
        return images.float()
    mean, std = pixel_statistics(images.device)
    return (images.float() / 255 - mean) / std


# Loaders --------------------------------------------------------------------------------------------------------------


def default_workers():
    """How many processes load images if the user gives no number: one per core that it may use, at most 8."""
    allowed = getattr(os, "sched_getaffinity", lambda process: range(os.cpu_count() or 1))  # macOS and Windows lack it
    return min(8, len(allowed(0)))


class Images(Dataset):
    """Images by path: (transformed image, label), or (transformed image, index) if there are no labels.

    paths: what `read` takes to return a PIL image. labels: one int per path, or None.
    A key is an index, or (index, augmentation seed): then the transform's random choices come from that seed.
    """

    def __init__(self, paths, read, transform, labels=None):
        self.paths, self.read, self.transform, self.labels = paths, read, transform, labels

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, key):
        index, seed = key if isinstance(key, tuple) else (key, 0)
        with torch.random.fork_rng(devices=[]):  # torchvision's transforms draw from the global generator
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would set the GPU's generator too
            image = self.transform(self.read(self.paths[index]))
        return image, (index if self.labels is None else self.labels[index])


def whole_images(clip_model, paths, read, device, workers=0, title="images"):
    """Yields batches of images as CLIP's own preprocessing shows them, normalized [B, 3, h, w], on the device.

    paths: what `read` takes to return a PIL image. title: of the progress bar.
    """
    images = Images(paths, read, test_transform(clip_model.visual.input_resolution))
    batches = loader(images, workers, batch_size=WHOLE, prefetch_factor=1)
    for batch, _ in tqdm(batches, title, unit="batch", disable=None):
        yield model_input(batch.to(device))


class KeptImages:
    """A reader that keeps decoded images in memory: training reads its few images again and again.

    It keeps up to `mib` MiB for all workers together, and never more than half of the free memory. paths: what will be
    read. Forked workers (Linux) share what is decoded here beforehand. Others (macOS, Windows) keep a share each.
    Callers must not change an image in place.
    """

    def __init__(self, read, paths, workers=0, mib=KEPT_MIB):
        self.read, self.kept, self.room = read, {}, min(mib * 2**20, psutil.virtual_memory().available / 2)
        if workers and torch.multiprocessing.get_start_method() == "fork":
            for path in paths:
                with contextlib.suppress(UnreadableImage):  # the loader reports it with its batch
                    self(path)
                if path not in self.kept:
                    break
            self.room = 0
        self.room /= max(1, workers)

    def __call__(self, path):
        """Returns the image, as `read` does."""
        image = self.kept.get(path)
        if image is None:
            image = self.read(path)
            size = 4 * image.width * image.height  # bytes that Pillow needs for RGB
            if size <= self.room:
                self.kept[path], self.room = image, self.room - size
        return image


class CachedViews(Dataset):
    """V augmented views of each image of an `Images`, made once and kept in memory.

    An item is (what is kept of a view, the image's label or index). Kept are the pixels, uint8 [3, h, w], if `pixels`
    is true; the features [d] in half precision, if `encode` is given; or the pair of both.
    encode: the frozen image encoder, uint8 images [B, 3, h, w] -> features [B, d].
    A key is (index, augmentation seed), and the seed picks the view. The views depend on `seed` and `phase` alone.
    ValueError: they do not fit into memory.
    """

    def __init__(self, images, views, pixels, encode, seed, phase, workers=0):
        def kept(batch):
            return ([batch] if pixels else []) + ([encode(batch).half().cpu()] if encode is not None else [])

        # All images' first view, then all images' second view, ...
        keys = [(i % len(images), augmentation_seed(seed, phase, 0, i)) for i in range(views * len(images))]
        first, what = kept(images[keys[0]][0][None]), f"{views} views of {len(images)} images"
        size = len(keys) * sum(part.nbytes for part in first) / 2**20
        room = psutil.virtual_memory().available / 2**20
        if size > room:
            raise ValueError(f"{what} take {size:,.0f} MiB; {room:,.0f} MiB of memory are free: lower --cache-views")
        parts, start = [torch.empty(len(keys), *part.shape[1:], dtype=part.dtype) for part in first], 0
        print(f"caching {what}, {size:,.1f} MiB", file=sys.stderr)
        for batch, _ in tqdm(loader(images, workers, sampler=keys, batch_size=128), "caching", disable=None):
            for part, rows in zip(parts, kept(batch)):
                part[start : start + len(batch)] = rows
            start += len(batch)
        self.parts = [part.unflatten(0, (views, -1)) for part in parts]  # [V, N, 3, h, w], [V, N, d]
        self.labels = range(len(images)) if images.labels is None else images.labels

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, key):
        index, seed = key
        found = [part[seed % len(part), index] for part in self.parts]
        return found[0] if len(found) == 1 else tuple(found), self.labels[index]


class ShuffledBatches:
    """Batches in random order. A last incomplete batch is dropped if a full one exists (as in the authors' release)."""

    def __init__(self, count, batch_size, seed):
        self.count, self.batch_size, self.seed, self.epoch = count, min(batch_size, count), seed, 1

    def set_epoch(self, epoch):
        """Sets the epoch that comes next, counted from 1."""
        self.epoch = epoch

    def __len__(self):
        return self.count // self.batch_size

    def __iter__(self):
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.count).tolist()
        self.epoch += 1
        for start in range(0, len(self) * self.batch_size, self.batch_size):
            yield order[start : start + self.batch_size]


def augmentation_seed(*parts):
    """One seed, an int, from (run's seed, phase, epoch, position), wherever and whenever the image is loaded."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


class SeededBatches:
    """A batch sampler whose keys are (index, augmentation seed from the run's seed, phase, epoch and position).

    So an image's augmentation does not depend on which worker loads it, or when. batches: a batch sampler of indices
    with `epoch` and `set_epoch`.
    """

    def __init__(self, batches, seed, phase):
        self.batches, self.seed, self.phase = batches, seed, phase

    def set_epoch(self, epoch):
        """Sets the epoch of `batches` that comes next."""
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
    """The loader of a phase (1 or 2): batches of items of `images`, uint8 [B, 3, h, w], with labels or indices [B].

    `loader.batch_sampler.set_epoch(e)` starts epoch e. images: an `Images`, or `CachedViews` of one, which needs no
    workers. batches: a batch sampler of indices.
    """
    workers = 0 if isinstance(images, CachedViews) else workers
    batches = SeededBatches(batches, seed, phase)
    # Workers persist; otherwise every epoch would start them again.
    return loader(images, workers, batch_sampler=batches, persistent_workers=workers > 0, pin_memory=pin_memory)


def loader(images, workers, prefetch_factor=2, **options):
    """A DataLoader of a `Dataset`. prefetch_factor: batches that each worker has ready. options: the DataLoader's."""
    own = torch.Generator().manual_seed(0)  # it seeds the workers; learners draw from the global one
    options["prefetch_factor"] = prefetch_factor if workers else None
    return DataLoader(images, num_workers=workers, generator=own, **options)
