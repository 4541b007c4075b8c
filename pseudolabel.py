"""Rapid pseudo-labelling of the new phase (section 3.3, "Data-Driven Enhancement", Eq. 7).

This file needs PyTorch alone: copy it.
"""

import torch


class PseudoLabeler:
    """The Top-1 of a frozen classifier over all new classes C_n, with its confidence (Eq. 7).

    classifier: any object with `text_features()` -> [N, d], `image_features(images)` -> [B, d], both unit length,
    and `logit_scale` (1/tau): the foundation CLIP on "a photo of a {}." in the paper (Table 5). Its text features
    are computed once, here.
    """

    def __init__(self, classifier):
        self.classifier = classifier
        self.logit_scale = float(classifier.logit_scale)
        with torch.no_grad():
            self.text_features = classifier.text_features().float()  # g(c), c in C_n  [N, d]

    @torch.no_grad()
    def __call__(self, images):
        """Labels int64 [B] of images [B, 3, h, w], and their confidences [B] in (0, 1]."""
        return self.label_features(self.classifier.image_features(images))  # f(i_n)  [B, d]

    @torch.no_grad()
    def label_features(self, f):
        """The same of the classifier's image features f(i_n) [B, d], unit length, where the caller has them already."""
        with torch.autocast(f.device.type, enabled=False):  # 1/tau is 100: half precision would not do here
            p = (self.logit_scale * f.float() @ self.text_features.T).softmax(dim=-1)  # Eq. 7  [B, N]
        confidences, labels = p.max(dim=-1)  # t^_n
        return labels, confidences
