"""CoCoOp [8], "Conditional Prompt Learning for Vision-Language Models".

Compared with CoOp the context depends on the image: a small net, the meta-net, turns the image's feature into one
vector pi, which is added to all contexts. So every image has its own text features:

    pi(I) = W2 ReLU(W1 f(I) + b1) + b2,  P(I) = [theta_1 + pi(I)] ... [theta_L + pi(I)],  L = CE

Settings: the authors' code (KaiyangZhou/CoOp @ ff61507). With their batch of one image MAO's candidates would be one
class, so that MAO needs batches of more; its own b*K images are.
"""

import torch
from torch import nn
from torch.nn import functional as F

from backbones import PromptLearner
from encoders import encode_text_fast, frozen_image_features


class CoCoOp(PromptLearner):
    """CoCoOp: `n_ctx` context vectors, which start as "a photo of a" (from 5 on, at random), shifted for each image."""

    recipe = {"optimizer": "sgd", "epochs": 10, "lr": 0.002, "batch_size": 1}  # vit_b16_c4_ep10_batch1_ctxv1.yaml
    text_depends_on_image = True
    tuned_labeler_refused = "its text depends on the image"

    def __init__(self, clip_model, classnames, n_ctx: int = 4):
        super().__init__(clip_model, classnames, n_ctx, "a photo of a" if n_ctx <= 4 else None)
        width, features = self.ctx.shape[1], clip_model.text_projection.shape[1]
        self.meta_net = nn.Sequential()
        self.meta_net.add_module("linear1", nn.Linear(features, features // 16))  # W1, b1
        self.meta_net.add_module("relu", nn.ReLU())
        self.meta_net.add_module("linear2", nn.Linear(features // 16, width))  # W2, b2
        self.meta_net.to(self.ctx)
        self.f = None  # f(I) [B, d] of the batch at hand

    def image_features(self, images):
        """f(I) [B, d], CLIP's own, kept for `text_features`."""
        self.f = frozen_image_features(self.clip_model, images)
        return self.f

    def text_features(self, classes=None):
        """w(I) [B, C, d] for the images last given to `image_features`, or of the classes in an index tensor [B, H, d].

        The tokens that an image's prompts share run once per image, not once per image and class. ValueError: there
        was no image yet.
        """
        if self.f is None:
            raise ValueError("CoCoOp's text depends on the image: call image_features before text_features")
        suffix, ends = self.suffix, self.ends  # [C, S, w], [C]
        if classes is not None:
            suffix, ends = suffix[classes], ends[classes.cpu()]  # [H, S, w], [H]
        shifts = self.meta_net(self.f.to(self.ctx))  # pi(I) [B, w]
        of_images = []
        for pi in shifts:
            prefix = torch.cat([self.start, self.ctx + pi, self.fixed])  # [1 + L, w]
            of_images.append(encode_text_fast(self.clip_model, prefix, suffix, ends))  # [H, d]
        return F.normalize(torch.stack(of_images), dim=-1)
