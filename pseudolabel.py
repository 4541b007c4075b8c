"""Rapid pseudo-labeling of the new phase (section 3.3, "Data-Driven Enhancement", Eq. 7).

This file depends only on PyTorch, so you can copy it.
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
