"""Other batches of the base phase than the paper's, to see what its hard negatives are worth (`--sampler`).

Each takes (learner, task, args) as the samplers in run.py do: the learner with its frozen CLIP, the `data.Task`, and
settings with anchors (b), top_k (K) and seed. Each gives batches of b anchors with K - 1 images of other classes.
"""

import numpy as np
import torch
from torch.nn import functional as F

from backbones import ZeroShot
from encoders import zero_shot_text_features
from harness.features import frozen_features
from sampler import HardNegativeSampler


class RandomClassSampler(HardNegativeSampler):
    """The other K - 1 classes of each anchor are drawn at random, anew each time."""

    def __iter__(self):
        rng = np.random.default_rng([self.seed, self.epoch])
        self.epoch += 1
        anchors, count = rng.permutation(len(self.labels)), len(self.images_of)
        for step in range(len(self)):
            batch = []
            for anchor in anchors[step * self.anchors : (step + 1) * self.anchors]:
                others = np.delete(np.arange(count), self.labels[anchor])
                batch.append(int(anchor))
                for label in rng.choice(others, self.top_k - 1, replace=False):
                    batch.append(int(rng.choice(self.images_of[label])))
            yield batch


def random_classes(learner, task, args):
    """K - 1 random other classes per anchor: what is left of Eq. 4 without the names."""
    # Any embedding does, as the neighbors are never read.
    return of_task(RandomClassSampler, task, args, lambda names: torch.eye(len(names)))


def clip_text(learner, task, args):
    """Hard negatives by the cosine of frozen CLIP's text features, in place of MiniLM's embeddings of the names."""

    def encoder(names):
        return zero_shot_text_features(learner.clip_model, names, [task.label_template]).float().cpu()

    return of_task(HardNegativeSampler, task, args, encoder)


def clip_confusion(learner, task, args):
    """Hard negatives by what frozen CLIP confuses on the few-shot images. Skip Tuning chooses such classes per image.

    The neighbors of a class are the classes with the highest mean probability over its own images.
    """
    sampler = of_task(HardNegativeSampler, task, args, lambda names: torch.eye(len(names)))
    p = confusion(learner.clip_model, task, sampler.labels, args)  # [C_b, C_b]
    p.fill_diagonal_(2)  # a class comes first
    sampler.neighbors = p.argsort(dim=1, descending=True, stable=True)[:, : args.top_k].numpy()
    return sampler


def of_task(kind, task, args, encoder):
    """A sampler of a class `kind` on a task's labeled images."""
    labels = [label for _, label, _ in task.base_train]
    return kind(labels, task.base_names, args.anchors, args.top_k, args.seed, encoder)


@torch.no_grad()
def confusion(clip_model, task, labels, args):
    """Frozen CLIP's mean probabilities over the few-shot images of each base class: [C_b, C_b]."""
    zero_shot = ZeroShot(clip_model, task.base_names, task.label_template)
    paths, cache = [path for path, _, _ in task.base_train], (args, args.clip_sha256)
    features = frozen_features(clip_model, paths, task.read, args.device, args.workers, "labeled images", cache)
    p = torch.cat([zero_shot(F.normalize(f, dim=-1)).softmax(dim=-1).cpu() for f in features])
    labels = torch.as_tensor(labels)
    return torch.stack([p[labels == label].mean(dim=0) for label in range(len(task.base_names))])


SAMPLERS = {"random-classes": random_classes, "clip-text": clip_text, "clip-confusion": clip_confusion}
