"""ProDA [19], "Prompt Distribution Learning".

Compared with CoOp it learns many prompts, and tunes the distribution of each class's text features over them: their
mean m_c and covariance A, in an upper bound of the expected loss. P prompts are drawn per step. u_ck are their features
of unit length, y the image's class, s = 1/tau. Per feature dimension d, A_d[i, j] is the covariance of classes i, j:

    A_d[i, j] = sum_k (u_ikd - m_id)(u_jkd - m_jd) / (P + 1),  R[i, j] = sum_d f_d^2 A_d[i, j]
    logit_c = s <f, m_c> + s^2 / 2 (R[y, y] + R[c, c] - 2 R[y, c]);  L = CE + 0.1 * mean over j != k of |cos(q_j, q_k)|

q_k is the feature of prompt k without a name. At test logit_c = s <f, m_c>, m_c the mean over all prompts.
ProDA's authors published no code of this. The file stands on ports that agree with each other
(ml-stat-Sustech/CLIP_Calibration @ 5b68fb1, bhrqw/SADA @ 4f0ed9b), and so do its settings: all second-hand.
"""

import torch
from torch import nn
from torch.nn import functional as F

from backbones import PromptLearner
from encoders import encode_text_fast, tokenize


class ProDA(PromptLearner):
    """ProDA: `prompts` prompts of `n_ctx` vectors from N(0, 0.02^2), of which `prompt_batch` are drawn per step.

    The name stands before the context in the first quarter of the prompts, in its middle in the second, else behind it.
    `drawn` fixes the prompts of a step; None takes the next ones of a random order.
    """

    tuned_labeler_refused = "its scores are more than a cosine"
    carried = ("order",)
    recipe = {"optimizer": "sgd", "epochs": 100, "lr": 0.001, "batch_size": 4}  # of CLIP_Calibration's port

    def __init__(self, clip_model, classnames, n_ctx: int = 16, prompts: int = 32, prompt_batch: int = 4):
        super().__init__(clip_model, classnames, n_ctx)
        self.ctx = nn.Parameter(self.random(prompts, n_ctx, self.ctx.shape[1]))  # [K, L, w]
        self.prompt_batch, self.order, self.drawn = min(prompt_batch, prompts), [], None
        tokens, _ = tokenize(clip_model, ["X."])  # start, X, ".", end
        self.nameless = clip_model.token_embedding(tokens[0, 2:])  # ".", end [2, w]

    @torch.no_grad()
    def set_classes(self, classnames):
        """As of any prompt learner; the suffix holds the name, "." and end token of each class."""
        texts = [f"{self.words} {name.replace('_', ' ')}." for name in classnames]
        tokens, ends = tokenize(self.clip_model, texts)  # ValueError: no room for the contexts and a name
        embedded, first = self.clip_model.token_embedding(tokens), 1 + len(self.words.split())
        self.start, self.suffix, self.ends = embedded[0, :1], embedded[:, first:], ends - first

    def place(self, k):
        """How many contexts of prompt k stand before the name."""
        quarter, length = len(self.ctx) // 4, self.ctx.shape[1]
        if k < quarter:
            return 0
        return length // 2 if k < 2 * quarter else length

    def encode_prompt(self, k, classes=None):
        """u_k of all classes [C, d], or of those in an index tensor [H, d]; unit length."""
        suffix, ends, before = self.suffix, self.ends, self.place(k)
        if classes is not None:
            suffix, ends = suffix[classes], ends[classes.cpu()]  # name, ".", end [H, S, w]
        prefix, behind = torch.cat([self.start, self.ctx[k, :before]]), self.ctx[k, before:]
        rows = []
        for tokens, end in zip(suffix, ends.tolist()):  # the contexts behind go in before the "."
            rows.append(torch.cat([tokens[: end - 1], behind, tokens[end - 1 :]]))
        g = encode_text_fast(self.clip_model, prefix, torch.stack(rows), ends + len(behind))
        return F.normalize(g, dim=-1)

    def text_features(self, classes=None):
        """u of the drawn prompts [P, H, d]; without gradients, which is at test, the mean over all prompts [H, d]."""
        if not torch.is_grad_enabled():
            return torch.stack([self.encode_prompt(k, classes) for k in range(len(self.ctx))]).mean(dim=0)
        if self.drawn is not None:
            drawn = self.drawn
        else:
            if len(self.order) < self.prompt_batch:
                self.order = torch.randperm(len(self.ctx)).tolist()
            drawn, self.order = self.order[: self.prompt_batch], self.order[self.prompt_batch :]
        return torch.stack([self.encode_prompt(k, classes) for k in drawn])

    def training_logits(self, f, g, targets):
        """The upper bound's logits [B, H]. f: [B, d]. g: u [P, H, d]. targets: int64 [B], rows of each u."""
        s, m = self.logit_scale, g.mean(dim=0)  # m [H, d]
        centered = g - m  # [P, H, d]
        variance = centered.square().sum(dim=0)  # (P + 1) A_d[c, c]  [H, d]
        covariance = (centered[:, targets, None] * centered[:, None]).sum(dim=0)  # (P + 1) A_d[y, c]  [B, H, d]
        terms = variance[targets][:, None] + variance - 2 * covariance  # [B, H, d]
        bound = (terms @ f.square()[:, :, None]).squeeze(2) / (len(g) + 1)  # R[y, y] + R[c, c] - 2 R[y, c]
        return s * f @ m.T + s**2 / 2 * bound

    def logits(self, f, g):
        """The scores at test [B, H], of f [B, d] and the means m [H, d], which are shorter than unit length."""
        return self.logit_scale * f @ g.T

    def cross_entropy(self, f, g, targets, classes):
        """Of `training_logits`, over the candidates that g holds: a scalar."""
        f, targets = f.to(self.ctx.dtype), targets.to(f.device)
        with torch.autocast(f.device.type, enabled=False):
            return F.cross_entropy(self.training_logits(f, g.to(self.ctx.dtype), targets), targets)

    def other_losses(self, images, f):
        """0.1 times the mean |cos| between the nameless features of all prompts: a scalar. It names no class."""
        suffix = torch.cat([self.ctx, self.nameless.expand(len(self.ctx), -1, -1)], dim=1)  # [K, L + 2, w]
        ends = torch.full((len(self.ctx),), suffix.shape[1] - 1)
        q = F.normalize(encode_text_fast(self.clip_model, self.start, suffix, ends), dim=-1)  # [K, d]
        pairs = (q @ q.T).abs()
        return 0.1 * (pairs.sum() - pairs.diagonal().sum()) / (len(q) * (len(q) - 1))
