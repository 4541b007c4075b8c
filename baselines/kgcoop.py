"""KgCoOp [5], "Visual-Language Prompt Tuning with Knowledge-guided Context Optimization".

Compared with CoOp it adds one loss, which keeps the tuned text features w_c near those of hand-written words, w0_c:

    L = CE + 8 * (1 - mean over all C classes of cos(w_c, w0_c))

Settings: the authors' code (htyao89/KgCoOp @ c43ccc3). The weight 8 is that of their scripts; the paper writes squared
distances, where it would be 4. Each of their datasets has its own template; here it is
"a photo of a {}.".
"""

from torch.nn import functional as F

from backbones import AllTextFeatures, PromptLearner
from encoders import zero_shot_text_features


class KgCoOp(AllTextFeatures, PromptLearner):
    """KgCoOp: `n_ctx` context vectors, which start as "a photo of a" (from 5 on, at random).

    weight: of the anchor loss. template: of w0. Under MAO the anchor stays over all classes.
    """

    recipe = {"optimizer": "sgd", "epochs": 100, "lr": 0.002, "batch_size": 128}  # vit_b16_ep100_ctxv1.yaml

    def __init__(self, clip_model, classnames, n_ctx: int = 4, weight: float = 8.0, template: str = "a photo of a {}."):
        self.weight, self.template = weight, template
        super().__init__(clip_model, classnames, n_ctx, "a photo of a" if n_ctx <= 4 else None)

    def set_classes(self, classnames):
        super().set_classes(classnames)
        self.anchors = zero_shot_text_features(self.clip_model, classnames, [self.template])  # w0 [C, d]

    def other_losses(self, images, f):
        """The anchor loss over all classes, weighted: a scalar. It does not depend on the images."""
        w = self.take_text_features()
        return self.weight * (1 - F.cosine_similarity(w, self.anchors.to(w)).mean())
