"""DePT [10], "Decoupled Prompt Tuning", here on CoOp.

Compared with CoOp it adds a linear head z, trained beside the similarity scores a. The head can take up what only the
base classes need. FiLM layers, with scale s and shift b of each side, come before it. In training the head also
classifies the text features of the batch's labels. With u = f(I) and w_c as they leave the encoders, not normalized:

    a = <u, w_c> / tau (cosine),  z(x) = W x + c
    L = 0.3 * CE(a, y) + 0.7 * CE([z(s_t * w_y + b_t), z(s_i * u + b_i)], [y, y]);  at test 0.3 a + 0.7 z, base classes

Settings: the authors' code (Koorye/DePT @ d4ff416, under the GPL: this is written from its description alone). Head and
FiLM learn at 6.5 times the rate. Under MAO both cross-entropies run over the candidates. The head knows the classes it
was made for only; on others, and so in MAO's new phase, the similarity scores stand alone.
"""

import torch
from torch import nn
from torch.nn import functional as F

from backbones import PromptLearner, pixels
from encoders import encode_images_fast
from mao import alterable_cross_entropy, similarity_logits


class DePT(PromptLearner):
    """DePT on CoOp: `n_ctx` context vectors from N(0, 0.02^2) and a head for the classes given here.

    linear_weight: 0.7, of the head's cross-entropy and scores; the similarity's are the rest.
    """

    tuned_labeler_refused = "its scores are more than a cosine"
    unscaled_images = prompts_images = True  # tuning gives it images: the head takes features as they leave the encoder
    recipe = {  # of its CoOp host, for all datasets
        "optimizer": "sgd",
        "epochs": 10,
        "lr": 0.0035,
        "batch_size": 4,
        "lr_factors": {"film_image": 6.5, "film_text": 6.5, "head": 6.5},
    }

    def __init__(self, clip_model, classnames, n_ctx: int = 16, linear_weight: float = 0.7):
        self.head_classes, self.linear_weight = list(classnames), linear_weight
        super().__init__(clip_model, classnames, n_ctx)
        features = clip_model.text_projection.shape[1]
        self.film_image, self.film_text = FiLM(features).to(self.ctx), FiLM(features).to(self.ctx)
        self.head = nn.Linear(features, len(classnames)).to(self.ctx)  # W [C, d], c [C]

    def set_classes(self, classnames):
        super().set_classes(classnames)
        self.head_fits = list(classnames) == self.head_classes

    def text_features(self, classes=None):
        """w of all classes [C, d], or of those in an index tensor [H, d], as it leaves the encoder."""
        self.candidates = classes  # `logits` takes the head's columns of the same
        return self.unscaled_text_features(classes)

    @torch.no_grad()
    def image_features(self, images):
        """u [B, d], as it leaves the frozen encoder."""
        return encode_images_fast(self.clip_model, pixels(images))

    def cross_entropy(self, f, g, targets, classes):
        """0.3 CE(a) + 0.7 CE(z) over the candidates, or CE(a) where the head is for other classes: a scalar.

        f: u [B, d]. g: w [H, d]. targets: int64 [B], rows of g. classes: the candidates [H], or None for all.
        """
        similarity = alterable_cross_entropy(f, g, targets, self.logit_scale)
        if not self.head_fits:
            return similarity
        targets = targets.to(f.device)
        samples = torch.cat([self.film_text(g[targets]), self.film_image(f.to(g.dtype))])  # [2B, d]
        z = self.head(samples)  # [2B, C]
        if classes is not None:
            z = z[:, classes]  # [2B, H]
        linear = F.cross_entropy(z.to(self.ctx.dtype), targets.repeat(2))
        return (1 - self.linear_weight) * similarity + self.linear_weight * linear

    def logits(self, f, g):
        """The scores at test [B, H], of f [B, d] and g [H, d]: 0.3 a + 0.7 z, or a where the head is for others."""
        a = similarity_logits(f, g, self.logit_scale)
        if not self.head_fits:
            return a
        z = self.head(self.film_image(f.to(self.ctx)))  # [B, C]
        if self.candidates is not None:
            z = z[:, self.candidates]
        return (1 - self.linear_weight) * a + self.linear_weight * z


class FiLM(nn.Module):
    """A channel-wise scale, starting at 1, and bias, starting at 0: [B, d] -> [B, d]."""

    def __init__(self, features):
        super().__init__()
        self.scale, self.bias = nn.Parameter(torch.ones(features)), nn.Parameter(torch.zeros(features))

    def forward(self, x):
        return self.scale * x + self.bias
