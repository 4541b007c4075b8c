"""A prompt learner of your own: visual prompts beside the patch tokens, and frozen CLIP's text (docs/backbone.md).

    python examples/vpt.py --backbone vpt --shots 2 --epochs 4            three rows of the table, on the demo
    python examples/vpt.py --eval runs/demo-vpt-mao-seed1-shots2-...      scores one of them again

What the class leaves out, such as CLIP's temperature, has its default in `backbones.Learner`.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))  # the project's root: run this from anywhere

import torch
from torch.nn import functional as F

import run
from backbones import BACKBONES, Learner, pixels
from encoders import encode_images_fast, zero_shot_text_features
from harness.cli import run_main


class VPT(Learner):
    """VPT: `n_ctx` context vectors after the patch tokens, from N(0, 0.02^2). The text is frozen CLIP's."""

    prompts_images = True  # so that it always gets pixels, and not CLIP's features alone

    def __init__(self, clip_model, classnames, n_ctx: int = 4):
        super().__init__(clip_model)
        token = clip_model.visual.class_embedding  # [w]
        self.context = torch.nn.Parameter(0.02 * torch.randn(n_ctx, len(token)).to(token))  # P_v, all that is learned
        self.set_classes(classnames)

    def set_classes(self, classnames):
        self.g = zero_shot_text_features(self.clip_model, classnames, ["a photo of a {}."])  # [C, d]

    def text_features(self, classes=None):
        """g of all C classes [C, d], or of those in an index tensor [H, d]."""
        return self.g if classes is None else self.g[classes]

    def image_features(self, images):
        """f(P_v, I) [B, d]. images: [B, 3, h, w], or a pair of them and frozen CLIP's features of them."""
        return F.normalize(encode_images_fast(self.clip_model, pixels(images), self.context), dim=-1)


if __name__ == "__main__":
    BACKBONES["vpt"] = VPT
    run_main("vpt.py", run.main)
