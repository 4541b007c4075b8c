"""Images as a model sees them: image files, CLIP's transforms, and the loaders of both phases.

Every random choice comes from a seed, never from a loader's worker: the same bits for any number of workers.
"""

import os
import pathlib
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from tqdm import tqdm

IMAGE_ENDINGS = {".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp"}
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
    """Reads images by their paths in a folder."""

    folder: pathlib.Path

    def __call__(self, path, decode=True):
        """The RGB image (PIL). decode=False: None, only looks whether there is an image.

        UnreadableImage, which names the path: the file is missing or broken.
        """
        try:
            with Image.open(self.folder / path) as image:
                return image.convert("RGB") if decode else None
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:
            reason = "no such file" if isinstance(error, FileNotFoundError) else error
            raise UnreadableImage(
                f"cannot read the image {self.folder / path} ({reason}): replace it, or take it out"
            ) from error


def image_names(folder):
    """Names of the image files in a folder, sorted; hidden files are left out. OSError: no such folder."""
    names = [name for name in sorted(os.listdir(folder)) if not name.startswith(".")]
    return [name for name in names if os.path.splitext(name)[1].lower() in IMAGE_ENDINGS]


def find_images(folder):
    """Paths of all image files in a folder and its subfolders, relative to it, sorted.

    FileNotFoundError: no such folder. ValueError: it holds no image.
    """
    folder = pathlib.Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder: give one that holds images")
    found = []
    for inner, _, _ in os.walk(folder):
        found += [os.path.relpath(os.path.join(inner, name), folder) for name in image_names(inner)]
    if not found:
        raise ValueError(f"{folder} holds no images ({', '.join(sorted(IMAGE_ENDINGS))}): give a folder that does")
    return sorted(found)


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


class CachedViews(Dataset):
    """V augmented views of each image of an `Images`, encoded once: (features [d] in half precision, label or index).

    encode: uint8 images [B, 3, h, w] -> features [B, d] of the frozen image encoder.
    A key is (index, augmentation seed), which picks the view. The views come from `seed` and `phase` alone.
    """

    def __init__(self, images, views, encode, seed, phase, workers=0):
        keys = []  # all images' first view, then all images' second view, ...
        for position in range(views * len(images)):
            keys.append((position % len(images), augmentation_seed(seed, phase, 0, position)))
        batches = [keys[start : start + 128] for start in range(0, len(keys), 128)]
        width = encode(images[keys[0]][0][None]).shape[1]
        size = f"{len(keys) * width * 2 / 2**20:.1f} MiB"
        features, labels = [], []
        loader = DataLoader(images, batch_sampler=batches, num_workers=workers)
        for batch, batch_labels in tqdm(loader, f"caching {views} views, {size}"):
            features.append(encode(batch).half().cpu())
            labels.append(batch_labels)
        self.features = torch.cat(features).unflatten(0, (views, -1))  # [V, N, d]
        self.labels = torch.cat(labels)[: len(images)]

    def __len__(self):
        return self.features.shape[1]

    def __getitem__(self, key):
        index, seed = key
        return self.features[seed % len(self.features), index], self.labels[index]


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
        self.batches, self.seed, self.phase = batches, seed, phase

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


def training_loader(images, batches, seed, phase, workers=0, pin_memory=False, views=None, encode=None):
    """The loader of a phase (1 or 2): batches of images [B, 3, h, w] uint8 with labels or indices [B].

    `loader.batch_sampler.set_epoch(e)` starts epoch e. images: an `Images`. batches: a batch sampler of indices.
    views, encode: of `CachedViews`, whose features [B, d] then take the images' place.
    """
    if views:
        images, workers = CachedViews(images, views, encode, seed, phase, workers), 0
    workers_stay = workers > 0  # else every epoch would start them again
    batches = SeededBatches(batches, seed, phase)
    return DataLoader(
        images, batch_sampler=batches, num_workers=workers, persistent_workers=workers_stay, pin_memory=pin_memory
    )
