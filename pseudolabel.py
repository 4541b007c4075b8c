"""Rapid pseudo-labeling of the new phase (section 3.3, "Data-Driven Enhancement", Eq. 7).

This file needs PyTorch alone: copy it.
"""

import torch


class PseudoLabeler:
    """The Top-1 of a classifier over all N new classes C_n, with its confidence (Eq. 7).

    classifier: any object with `text_features()` -> [N, d] and `image_features(images)` -> [B, d],
    both of unit length, and `logit_scale` (1/tau). In the paper it is the foundation CLIP with
    "a photo of a {}." (Table 5). Its text features are computed here, once.
    """

    def __init__(self, classifier):
        self.classifier = classifier
        self.logit_scale = float(classifier.logit_scale)
        with torch.no_grad():
            self.text_features = classifier.text_features().float()  # g(c), c in C_n        [N, d]

    @torch.no_grad()
    def __call__(self, images):
        """Of images [B, 3, h, w]: labels, int64 [B] in 0..N-1, and confidences [B], 0 to 1."""
        return self.label_features(self.classifier.image_features(images))

    @torch.no_grad()
    def label_features(self, f):
        """The same, of the classifier's image features f(i_n) [B, d], unit length."""
        with torch.autocast(f.device.type, enabled=False):  # float32: logits reach 100 (see mao.py)
            logits = self.logit_scale * f.float() @ self.text_features.T  # <f, g> / tau     [B, N]
            confidences, labels = logits.softmax(dim=-1).max(dim=-1)  # Top-1, t^_n of Eq. 7 [B]
        return labels, confidences
