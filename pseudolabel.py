"""Rapid pseudo-labeling of the new phase (section 3.3, "Data-Driven Enhancement", Eq. 7).

This file needs PyTorch alone: copy it.
"""

import torch
from torch.nn import functional as F


class PseudoLabeler:
    """The Top-1 of a classifier over all new classes C_n, with its confidence (Eq. 7).

    classifier: any object with `text_features()` -> g [C_n, d], `image_features(images)` -> f
    [B, d], of any length, and `logit_scale`, 1/tau. In the paper it is the foundation CLIP with
    "a photo of a {}." (Table 5). Its text features are computed here, once.
    """

    def __init__(self, classifier):
        self.classifier = classifier
        self.logit_scale = float(classifier.logit_scale)
        with torch.no_grad():
            g = classifier.text_features()
            dtype = torch.promote_types(g.dtype, torch.float32)  # logits reach 100 (see mao.py)
            self.g = F.normalize(g.to(dtype), dim=-1)  # g(c) / ||g(c)||, c in C_n     [C_n, d]

    @torch.no_grad()
    def __call__(self, images):
        """Labels, int64 [B] in 0..C_n-1, and confidences [B], 0 to 1, of B images.

        images: as the classifier's image_features takes them. The method uses the labels alone.
        """
        confidences, labels = self.probabilities(images).max(dim=-1)  # Top-1: t^_n of Eq. 7  [B]
        return labels, confidences

    @torch.no_grad()
    def probabilities(self, images):
        """p [B, C_n] of B images over all new classes, whose maximum is Eq. 7's Top-1."""
        f = self.classifier.image_features(images)
        with torch.autocast(f.device.type, enabled=False):
            f = F.normalize(f.to(self.g.dtype), dim=-1)  # f(i_n) / ||f(i_n)||         [B, d]
            return (self.logit_scale * f @ self.g.T).softmax(dim=-1)  # <f, g> / tau   [B, C_n]


# What the paper does not do, for comparison: docs/results.md, "What the scores hide".


def confident(probabilities, threshold=0.9):
    """Which images of p [B, C_n] to take: bool [B], those whose Top-1 has at least `threshold`."""
    return probabilities.max(dim=-1).values >= threshold


def balanced(probabilities, count):
    """The same number of images for each new class (UPL), of p [N, C_n] over all N images.

    A class gets its `count` most confident images among those whose Top-1 it is; where there are
    fewer, other images follow, by their probability of that class (FPL). So an image may come up
    for two classes. Returns indices and labels, int64 [C_n * count]; `count` is at most N.
    """
    top1, indices = probabilities.argmax(dim=-1), []
    for label in range(probabilities.shape[1]):
        rank = probabilities[:, label] + (top1 == label)  # its own come first, as p <= 1
        indices.append(rank.argsort(descending=True, stable=True)[:count])
    labels = torch.arange(len(indices)).repeat_interleave(len(indices[0]))
    return torch.cat(indices).cpu(), labels
