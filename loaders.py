"""Pictures as a model sees them: reading, CLIP's transforms, and the loaders of both phases.

Every random choice comes from a seed, never from a loader's worker: the same bits for any number of workers.
"""

import pathlib
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from tqdm import tqdm

PICTURES = {".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp"}
PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)


class UnreadableImage(ValueError):
    """One sentence, also when a loader's worker raised it (PyTorch then hands on the whole traceback as text)."""

    def __init__(self, text):
        super().__init__(text.strip().splitlines()[-1].removeprefix("loaders.UnreadableImage: "))


class FolderReader(NamedTuple):
    """Reads a picture by its path in a folder. UnreadableImage with the path: missing or broken.

    decode=False: only looks whether there is a picture.
    """

    folder: pathlib.Path

    def __call__(self, path, decode=True):
        try:
            with Image.open(self.folder / path) as picture:
                return picture.convert("RGB") if decode else None
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:
            raise UnreadableImage(
                f"cannot read the image {self.folder / path} "
                f"({'no such file' if isinstance(error, FileNotFoundError) else error}): "
                "replace it, or take it out") from error


def train_transform(pixels, crop_scale):
    """Random resized crop (bicubic) and flip, CoOp's: picture -> uint8 [3, pixels, pixels]."""
    return transforms.Compose([
        transforms.RandomResizedCrop(pixels, scale=crop_scale, interpolation=transforms.InterpolationMode.BICUBIC),
        transforms.RandomHorizontalFlip(), transforms.PILToTensor()])


def test_transform(pixels):
    """CLIP's own preprocessing: picture -> uint8 [3, pixels, pixels]."""
    return transforms.Compose([
        transforms.Resize(pixels, interpolation=transforms.InterpolationMode.BICUBIC),
        transforms.CenterCrop(pixels), transforms.PILToTensor()])


def model_input(images):
    """What a loader brings, in float32 as CLIP wants it: uint8 pixels [B, 3, h, w] normalised, features [B, d] kept."""
    if images.ndim == 2:
        return images.float()
    return transforms.functional.normalize(images.float() / 255, PIXEL_MEAN, PIXEL_STD)


class Images(Dataset):
    """Pictures by path: (image, label), or (image, index) where there are no labels.

    A key is an index, or (index, augmentation seed): then the transform's random choices come from that seed.
    """

    def __init__(self, paths, read, transform, labels=None):
        self.paths, self.read, self.transform, self.labels = paths, read, transform, labels

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, key):
        index, seed = key if isinstance(key, tuple) else (key, 0)
        generator = torch.default_generator  # torchvision's transforms draw from it; nobody else sees the seed
        state = generator.get_state()
        try:
            generator.manual_seed(seed)
            image = self.transform(self.read(self.paths[index]))
        finally:
            generator.set_state(state)
        return image, (index if self.labels is None else self.labels[index])


class CachedViews(Dataset):
    """V augmented views of each picture of an `Images`, encoded once: (features [d], label or index).

    encode: uint8 images [B, 3, h, w] -> features [B, d] of the frozen image encoder, kept in half precision. A key is
    (index, augmentation seed), which picks the view. The views come from `seed` and `phase` alone.
    """

    def __init__(self, images, views, encode, seed, phase, workers=0):
        keys = [(index, augmentation_seed(seed, phase, 0, view * len(images) + index))
                for view in range(views) for index in range(len(images))]
        batches = [keys[i : i + 128] for i in range(0, len(keys), 128)]
        width = encode(images[keys[0]][0][None]).shape[1]
        size = f"{len(keys) * width * 2 / 2**20:.1f} MiB"
        loader = tqdm(DataLoader(images, batch_sampler=batches, num_workers=workers), f"caching {views} views, {size}")
        features, labels = zip(*((encode(pictures).half().cpu(), labels) for pictures, labels in loader))
        self.features = torch.cat(features).unflatten(0, (views, -1))  # [V, N, d]
        self.labels = torch.cat(labels)[: len(images)]

    def __len__(self):
        return self.features.shape[1]

    def __getitem__(self, key):
        index, seed = key
        return self.features[seed % len(self.features), index], self.labels[index]


class ShuffledBatches:
    """Batches of a random order; a last incomplete one is dropped where a full one exists (notes: the release's)."""

    def __init__(self, count, batch_size, seed):
        self.count, self.batch_size, self.seed, self.epoch = count, min(batch_size, count), seed, 1

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return self.count // self.batch_size

    def __iter__(self):
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.count).tolist()
        self.epoch += 1
        for start in range(0, len(self) * self.batch_size, self.batch_size):
            yield order[start : start + self.batch_size]


def augmentation_seed(*parts):
    """One seed from (run's seed, phase, epoch, position): the same wherever and whenever the image is loaded."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


class SeededBatches:
    """A batch sampler whose keys carry an augmentation seed, from (seed, phase, epoch, position).

    So an image's augmentation does not depend on which worker loads it, or when.
    """

    def __init__(self, batches, seed, phase):
        self.batches, self.seed, self.phase = batches, seed, phase

    def set_epoch(self, epoch):
        self.batches.set_epoch(epoch)

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        position, epoch = 0, self.batches.epoch
        for batch in self.batches:
            keys = []
            for index in batch:
                keys.append((index, augmentation_seed(self.seed, self.phase, epoch, position)))
                position += 1
            yield keys


def training_loader(images, batches, seed, phase, workers=0, pin_memory=False, views=None, encode=None):
    """The loader of a phase (1 or 2); `loader.batch_sampler.set_epoch(e)` starts epoch e. Workers stay up.

    views, encode: as of `CachedViews`, whose features then take the images' place.
    """
    if views:
        images, workers = CachedViews(images, views, encode, seed, phase, workers), 0
    return DataLoader(images, batch_sampler=SeededBatches(batches, seed, phase), num_workers=workers,
                      persistent_workers=workers > 0, pin_memory=pin_memory)
