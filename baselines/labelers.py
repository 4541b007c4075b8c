"""Other pseudo-labels of the new phase than the paper's (`--labeler`), by the same foundation CLIP.

Each takes (learner, task, args) as the labelers in run.py do, and returns (label, task): `label` is a function from a
batch, images and their indices in task.new_train [B], to the images, indices and targets that phase 2 tunes on; `task`
holds those images.
"""

import dataclasses

import torch
from torch.nn import functional as F

from backbones import ZeroShot
from harness.features import frozen_features
from mao import other_losses, similarity_logits
from pseudolabel import PseudoLabeler

THRESHOLD = 0.9  # of `confident`


def foundation(learner, task):
    """Eq. 7's labeler: the foundation CLIP on the new classes."""
    return PseudoLabeler(ZeroShot(learner.clip_model, task.new_names, task.label_template))


def confident(learner, task, args):
    """Eq. 7's labels with a confidence of at least `THRESHOLD`; the other images of a batch are left out."""
    labeler = foundation(learner, task)

    def label(images, indices):
        labels, confidences = labeler(images)
        keep = confidences >= THRESHOLD  # [B]
        kept = tuple(part[keep] for part in images) if isinstance(images, tuple) else images[keep]
        return kept, indices[keep.cpu()], labels[keep]

    return label, task


def soft(learner, task, args):
    """All probabilities [B, C_n] as targets, which is distillation from the foundation CLIP: `soft_new_loss`."""
    labeler = foundation(learner, task)
    return lambda images, indices: (images, indices, labeler.probabilities(images)), task


def whole(learner, task, args):
    """Eq. 7's labels of whole images, as CLIP's own preprocessing shows them, instead of each augmented view."""
    labels = of_whole_images(learner, task, args).argmax(dim=-1)  # [N]
    return lambda images, indices: (images, indices, labels[indices]), task


def balanced(learner, task, args):
    """The same number of images for each new class (UPL), labeled once as whole images: `most_confident`."""
    p = of_whole_images(learner, task, args)
    chosen, labels = most_confident(p, args.unlabeled_shots)
    task = dataclasses.replace(task, new_train=[task.new_train[i] for i in chosen])
    if task.new_answers is not None:
        task.new_answers = [task.new_answers[i] for i in chosen]
    labels = labels.to(p.device)
    return lambda images, indices: (images, indices, labels[indices]), task


def most_confident(probabilities, count):
    """The `count` most confident images of each class, of p [N, C_n] over all N images.

    They are images whose Top-1 is the class; where there are fewer, other images follow, by their probability of the
    class (FPL). So an image may come up for two classes. Returns indices and labels, int64 [C_n * count]; `count` is at
    most N.
    """
    top1, indices = probabilities.argmax(dim=-1), []
    for label in range(probabilities.shape[1]):
        rank = probabilities[:, label] + (top1 == label)  # its own come first, as p <= 1
        indices.append(rank.argsort(descending=True, stable=True)[:count])
    labels = torch.arange(len(indices)).repeat_interleave(len(indices[0]))
    return torch.cat(indices).cpu(), labels


@torch.no_grad()
def of_whole_images(learner, task, args):
    """The foundation CLIP's p [N, C_n] of all unlabeled images, each seen once and whole."""
    labeler, images = foundation(learner, task), (learner.clip_model, task.new_train, task.new_read)
    on, cache = (args.device, args.workers, "unlabeled images"), (args, args.clip_sha256)
    return torch.cat([labeler.probabilities(F.normalize(f, dim=-1)) for f in frozen_features(*images, *on, cache)])


def soft_new_loss(learner, images, probabilities):
    """As `mao.new_loss`, with the labeler's probabilities [B, C_n] as targets: a scalar with a gradient."""
    f = learner.image_features(images)  # f(P_v, I_n)             [B, d]
    logits = similarity_logits(f, learner.text_features(), learner.logit_scale)  # [B, C_n]
    loss = F.cross_entropy(logits, probabilities.to(logits))
    return loss + other_losses(learner, images, f)


LABELERS = {"balanced": balanced, "confident": confident, "soft": soft, "whole": whole}
