"""TCP [20], "Textual-based Class-aware Prompt tuning".

Compared with CoOp it puts each class's own text into its prompt. A small net turns the class's zero-shot feature w0_c
into contexts T_c, which overwrite the learned ones before a later layer of the text encoder. KgCoOp's loss keeps w_c
near w0_c:

    T_c = W2 g(W1 w0_c + b1) + b2,  g(x) = x sigmoid(1.702 x),  as [L, w]
    L = CE + 8 * (1 - mean over all C classes of cos(w_c, w0_c))

Settings: the authors' code (htyao89/Textual-based_Class-aware_prompt_tuning @ bd97bec), where layer 8 and weight 8 are
fixed. Their templates differ between datasets; here they are "a photo of a {}." and "{}.".
"""

import torch
from torch import nn
from torch.nn import functional as F

from backbones import PromptLearner
from baselines.kgcoop import KgCoOp
from encoders import clip, encode_text_fast


class TCP(KgCoOp):
    """TCP: `n_ctx` context vectors from N(0, 0.02^2), overwritten by T_c before text layer `insert_before` (from 0).

    insert_before: 8, the ninth of twelve layers; a CLIP with fewer than 9 takes two thirds of its layers. weight: of
    KgCoOp's loss, which stays over all classes under MAO. template: of w0.
    ValueError: `insert_before` is not one of the layers 1, 2, ...
    """

    # vit_b16_ep100_ctxv1.yaml, eps by their README; train.py sets 50 epochs, and 25 for ImageNet and SUN397
    recipe = {"optimizer": "adam", "eps": 1e-3, "epochs": 50, "lr": 0.002, "batch_size": 32}

    def __init__(
        self,
        clip_model,
        classnames,
        n_ctx: int = 4,
        insert_before: int = 8,
        weight: float = 8.0,
        template: str = "a photo of a {}.",
    ):
        layers = clip_model.transformer.layers
        if insert_before == 8 and layers < 9:
            insert_before = layers * 2 // 3
        if not 1 <= insert_before < layers:
            raise ValueError(f"--learner insert_before={insert_before} does not fit: this CLIP takes 1 to {layers - 1}")
        self.insert_before, self.weight, self.template = insert_before, weight, template
        PromptLearner.__init__(self, clip_model, classnames, n_ctx)  # no words to start from
        width, hidden = self.ctx.shape[1], self.anchors.shape[1] // 4
        self.meta_net = nn.Sequential()
        self.meta_net.add_module("linear1", nn.Linear(self.anchors.shape[1], hidden))  # W1, b1
        self.meta_net.add_module("activation", clip.model.QuickGELU())  # g
        self.meta_net.add_module("linear2", nn.Linear(hidden, n_ctx * width))  # W2, b2
        self.meta_net.to(self.ctx)

    def encode_all(self):
        """w of all classes [C, d], unit length.

        The first layers read the learned contexts; what later tokens have read of them stays when T_c comes in.
        """
        inserted = self.meta_net(self.anchors.to(self.ctx)).unflatten(1, self.ctx.shape)  # T [C, L, w]
        suffix = torch.cat([self.ctx.expand(len(self.suffix), -1, -1), self.suffix], dim=1)  # [C, L + S, w]
        ends, deep = len(self.ctx) + self.ends, [None] * (self.insert_before - 1) + [inserted]
        return F.normalize(encode_text_fast(self.clip_model, self.start, suffix, ends, deep), dim=-1)
