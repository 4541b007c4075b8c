"""TCP [20], "Textual-based Class-aware Prompt tuning".

Against CoOp it puts each class's own text into its prompt. A small net turns the words' feature w0_c into contexts T_c,
which overwrite the learned ones before a later layer of the text encoder, and KgCoOp's loss keeps w_c near w0_c:

    T_c = W2 g(W1 w0_c + b1) + b2,  g(x) = x sigmoid(1.702 x),  as [L, w]
    L = CE + 8 * (1 - mean over all C classes of cos(w_c, w0_c))

Settings: the authors' code (htyao89/Textual-based_Class-aware_prompt_tuning @ bd97bec), where layer 8 and weight 8 are
fixed. Their words differ between datasets; here they are "a photo of a {}." and "{}.".
"""

import torch
from torch import nn
from torch.nn import functional as F

from backbones import PromptLearner
from encoders import clip, encode_text_fast, frozen_image_features, zero_shot_text_features


class TCP(PromptLearner):
    """TCP: `n_ctx` context vectors from N(0, 0.02^2), overwritten by T_c before text layer `insert_before` (from 0).

    insert_before: 8, the ninth of twelve layers; a CLIP with fewer than 9 takes two thirds of its layers. weight: of
    the anchor loss, which stays over all classes under MAO. template: the words of w0. ValueError: `insert_before` is
    not one of the layers 1, 2, ...
    """

    # vit_b16_ep100_ctxv1.yaml, eps by their README; train.py sets 50 epochs, and 25 for ImageNet and SUN397
    recipe = {"optimizer": "adam", "eps": 1e-3, "epochs": 50, "lr": 0.002, "batch_size": 32}

    def __init__(self, clip_model, classnames, n_ctx=4, insert_before=8, weight=8.0, template="a photo of a {}."):
        layers = clip_model.transformer.layers
        if insert_before == 8 and layers < 9:
            insert_before = layers * 2 // 3
        if not 1 <= insert_before < layers:
            raise ValueError(f"--insert-before {insert_before} does not fit: this CLIP takes 1 to {layers - 1}")
        self.insert_before, self.weight, self.template = insert_before, weight, template
        super().__init__(clip_model, classnames, n_ctx)
        width, hidden = self.ctx.shape[1], self.anchors.shape[1] // 4
        self.meta_net = nn.Sequential()
        self.meta_net.add_module("linear1", nn.Linear(self.anchors.shape[1], hidden))  # W1, b1
        self.meta_net.add_module("activation", clip.model.QuickGELU())  # g
        self.meta_net.add_module("linear2", nn.Linear(hidden, n_ctx * width))  # W2, b2
        self.meta_net.to(self.ctx)

    def set_classes(self, classnames):
        super().set_classes(classnames)
        self.anchors = zero_shot_text_features(self.clip_model, classnames, [self.template])  # w0 [C, d]

    def text_features(self, classes=None):
        """w of all classes [C, d], or of those in an index tensor [H, d]; unit length. All C are encoded, once.

        The first layers read the learned contexts; what later tokens have read of them stays when T_c comes in.
        """
        inserted = self.meta_net(self.anchors.to(self.ctx)).unflatten(1, self.ctx.shape)  # T [C, L, w]
        suffix = torch.cat([self.ctx.expand(len(self.suffix), -1, -1), self.suffix], dim=1)  # [C, L + S, w]
        ends, deep = len(self.ctx) + self.ends, [None] * (self.insert_before - 1) + [inserted]
        self.encoded = F.normalize(encode_text_fast(self.clip_model, self.start, suffix, ends, deep), dim=-1)
        return self.encoded if classes is None else self.encoded[classes]

    def image_features(self, images):
        """f(I) [B, d] of images [B, 3, h, w]; frozen features [B, d] pass as they are."""
        return frozen_image_features(self.clip_model, images)

    def other_losses(self, images, f):
        """The anchor loss over all classes, weighted: a scalar. It does not depend on the images."""
        w = self.take_encoded().to(self.ctx.dtype)  # as mao.py: float32
        return self.weight * (1 - F.cosine_similarity(w, self.anchors.to(w)).mean())
