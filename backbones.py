"""Eq. 1: the three prompt learners of the paper. A prompt learner of yours: docs/backbone.md.

Read `PromptLearner` first, and after it any of the three alone. A prompt learner gives `text_features(classes=None)`,
`image_features(images)` and `logit_scale`, as mao.py wants them. CLIP is frozen and stands in encoders.py.

A context is what is learned: L vectors, P of Eq. 1. A prompt is what an encoder reads. The textual prompt P_t is the
start token, a context and the class name; the visual prompt P_v is a context alone, beside the patch tokens. MaPLe and
PromptSRC have deep contexts too: after each of the first layers the next one takes the place of the last. A learner's
`state_dict()` holds its contexts, and what else it learns, alone.
"""

import copy

import torch
from torch import nn
from torch.nn import functional as F

from encoders import (
    encode_images_fast,
    encode_text,
    encode_text_fast,
    frozen_image_features,
    tokenize,
    zero_shot_text_features,
)
from mao import similarity_logits


class PromptLearner(nn.Module):
    """What the prompt learners here share: the textual prompt "{context} {class name}." with the context learned.

    clip_model: frozen, of `encoders.load_clip`. classnames: C names, `_` read as a space. n_ctx: L, the number of
    context vectors, drawn from N(0, 0.02^2). ctx_init: words; the context then starts as their first L token embeddings
    (all of them where n_ctx is None), and the other words stay text. ValueError: no context, or a name for which CLIP's
    77 positions leave no room.
    """

    prompts_images = False

    def __init__(self, clip_model, classnames, n_ctx, ctx_init=None):
        super().__init__()
        self.__dict__["clip_model"] = clip_model  # not a submodule: it is frozen, shared, and not to be saved
        if n_ctx is not None and n_ctx < 1:
            raise ValueError(f"{n_ctx} context vectors: at least 1 is needed")
        width = clip_model.positional_embedding.shape[1]  # w
        if ctx_init is not None:
            self.words = ctx_init
            tokens, ends = tokenize(clip_model, [ctx_init])
            if ends[0] < 2:
                raise ValueError(f"'{ctx_init}' has no word to start the context from: leave --ctx-init out")
            embedded = clip_model.token_embedding(tokens[0, 1 : ends[0]])  # a row for each word's token [., w]
            n_ctx = len(embedded) if n_ctx is None else n_ctx
            context, self.fixed = embedded[:n_ctx].clone(), embedded[n_ctx:]
        else:
            self.words = " ".join(["X"] * n_ctx)  # placeholders: X is one token
            context = self.random(n_ctx, width)
            self.fixed = context[:0]  # no further words
        self.ctx = nn.Parameter(context)  # P = [theta]_1 ... [theta]_L, Eq. 1  [L, w]
        self.set_classes(classnames)

    def random(self, *shape):
        """A draw from N(0, 0.02^2) by PyTorch's generator, in CLIP's type and on its device."""
        weight = self.clip_model.positional_embedding
        return torch.randn(shape, dtype=weight.dtype).to(weight.device) * 0.02

    @torch.no_grad()
    def set_classes(self, classnames):
        """The same prompts before C other class names."""
        tokens, ends = tokenize(self.clip_model, [f"{self.words} {name.replace('_', ' ')}." for name in classnames])
        embedded, length = self.clip_model.token_embedding(tokens), 1 + len(self.ctx) + len(self.fixed)
        self.start = embedded[0, :1]  # the start token                              [1, w]
        self.suffix = embedded[:, length:]  # [CLASS], ".", end token, padding       [C, S, w]
        self.ends = ends - length  # the end token's position in its suffix          [C]
        self.encoded = None  # a cache of g [C, d]: some learners' text_features fill it, `take_encoded` empties it

    @property
    def logit_scale(self):
        return self.clip_model.logit_scale.exp()  # 1/tau

    def deep_text(self):
        """Deep contexts [L, w] of the text side, for `encoders.encode_text`: none unless a learner has them."""
        return []

    def prefix(self):
        """The tokens that all textual prompts share: start token, P and fixed words [A, w]."""
        return torch.cat([self.start, self.ctx, self.fixed])

    def prompts(self):
        """The textual prompts P_t, whole: P and the [CLASS] tokens in one (section 3.1), padded [C, 77, w]; and the
        positions of their end tokens, int64 [C].
        """
        prefix = self.prefix()
        prompts = torch.cat([prefix.expand(len(self.suffix), -1, -1), self.suffix], dim=1)
        missing = self.clip_model.context_length - prompts.shape[1]
        return F.pad(prompts, (0, 0, 0, missing)), len(prefix) + self.ends

    def plain_text_features(self):
        """g(P_t) of all classes, unit length [C, d], plain: for reading, and to hold the fast form against."""
        return F.normalize(encode_text(self.clip_model, *self.prompts(), self.deep_text()), dim=-1)

    def text_features(self, classes=None):
        """The same features, fast: of all classes [C, d], or of those in an index tensor [H, d]."""
        return F.normalize(self.unscaled_text_features(classes), dim=-1)

    def unscaled_text_features(self, classes=None):
        """`text_features` as they leave the encoder, before they are scaled to unit length."""
        suffix, ends = self.suffix, self.ends  # [C, S, w], [C]
        if classes is not None:
            suffix, ends = suffix[classes], ends[classes.cpu()]  # [H, S, w], [H]
        return encode_text_fast(self.clip_model, self.prefix(), suffix, ends, self.deep_text())

    def take_encoded(self):
        """g of all classes [C, d] that the step's `text_features` kept in `encoded`, which is then empty again."""
        g = self.text_features() if self.encoded is None else self.encoded
        self.encoded = None
        return g

    def logits(self, f, g):
        """The scores at test [B, H] of image features f [B, d] and text features g [H, d] (Eq. 3)."""
        return similarity_logits(f, g, self.logit_scale)

    def forward(self, images, classes=None):
        """Logits [B, H] of images over all classes, or over those in an index tensor."""
        f = self.image_features(images)
        return self.logits(f, self.text_features(classes))


class CoOp(PromptLearner):
    """CoOp [4]: L context vectors on the text side, shared by all classes; the image side is CLIP's own.

    n_ctx: 4 (Table 6). ctx_init: words to start from; L is then the number of their tokens.
    """

    def __init__(self, clip_model, classnames, n_ctx=4, ctx_init=None):
        super().__init__(clip_model, classnames, None if ctx_init else n_ctx, ctx_init)

    def image_features(self, images):
        """f(I) [B, d] of images [B, 3, h, w]; frozen features [B, d] pass as they are."""
        return frozen_image_features(self.clip_model, images)


class MaPLe(PromptLearner):
    """MaPLe [9]: contexts on both sides before each of the first `depth` layers; a Linear of the textual context gives
    the visual one.

    n_ctx: 2 (Table 6), on both sides: the Linear maps each vector to one, and so Table 6's 4 on the visual side is
    impossible. The text starts as "a photo of a", of which the first n_ctx tokens are learned (from 5 on, the
    context starts at random). depth: 9 (Table 6), or all layers where there are fewer.
    """

    prompts_images = True

    def __init__(self, clip_model, classnames, n_ctx=2, depth=None):
        depth_vision = prompt_depth(getattr(clip_model.visual, "transformer", None), depth)
        depth = min(depth_vision, prompt_depth(clip_model.transformer, depth))
        super().__init__(clip_model, classnames, n_ctx, "a photo of a" if n_ctx <= 4 else None)
        width, image_width = self.ctx.shape[1], clip_model.visual.class_embedding.shape[0]
        self.proj = nn.Linear(width, image_width).to(self.ctx)  # couples the first contexts
        self.text_prompts = nn.ParameterList(self.random(n_ctx, width) for _ in range(depth - 1))
        deep = nn.Linear(width, image_width).to(self.ctx)  # couples the deep ones, which all start as copies of it
        self.projections = nn.ModuleList(copy.deepcopy(deep) for _ in range(depth - 1))

    def deep_text(self):
        return list(self.text_prompts)

    def visual_contexts(self):
        """P_v, coupled to the text's P, and the deep contexts of the image side: [L, image width] each."""
        deep = [coupling(context) for coupling, context in zip(self.projections, self.text_prompts)]
        return [self.proj(self.ctx), *deep]

    def image_features(self, images):
        """f(P_v, I) [B, d] of images [B, 3, h, w], unit length."""
        context, *deep = self.visual_contexts()
        return F.normalize(encode_images_fast(self.clip_model, images, context, deep), dim=-1)


class PromptSRC(PromptLearner):
    """PromptSRC [6]: independent contexts on both sides before each of the first layers, held near frozen CLIP by three
    losses, and averaged over the epochs.

    n_ctx, n_ctx_vision: 4 and 4 (Table 6). The text starts as "a photo of a" (from 5 contexts on, at random). depth,
    depth_vision: 9 and 9, or all layers where there are fewer. text_weight, image_weight: of the L1 losses.
    average_mean, average_std: of the Gaussian over epochs. MAO's phases have 10 epochs, of which the last weighs 0.996,
    so that averaging is nearly off, as in the authors' release.
    """

    prompts_images = True
    uses_frozen_features = True
    carried = ["average"]  # from epoch to epoch, beside the prompts

    def __init__(
        self,
        clip_model,
        classnames,
        n_ctx=4,
        n_ctx_vision=4,
        depth=None,
        depth_vision=None,
        text_weight=25.0,
        image_weight=10.0,
        average_mean=15.0,
        average_std=1.0,
    ):
        depth_vision = prompt_depth(getattr(clip_model.visual, "transformer", None), depth_vision)
        depth = prompt_depth(clip_model.transformer, depth)
        super().__init__(clip_model, classnames, n_ctx, "a photo of a" if n_ctx <= 4 else None)
        width, image_width = self.ctx.shape[1], clip_model.visual.class_embedding.shape[0]
        self.text_prompts = nn.ParameterDict({str(layer): self.random(n_ctx, width) for layer in range(1, depth)})
        self.visual_prompts = nn.ParameterList(self.random(n_ctx_vision, image_width) for _ in range(depth_vision))
        self.text_weight, self.image_weight = text_weight, image_weight
        self.average_mean, self.average_std = average_mean, average_std

    def set_classes(self, classnames):
        super().set_classes(classnames)
        self.classnames = classnames
        self.frozen_text = None  # g_0 [C, d], computed where a loss needs it

    def deep_text(self):
        return [self.text_prompts[str(layer)] for layer in range(1, 1 + len(self.text_prompts))]

    def visual_contexts(self):
        """P_v, and the deep contexts of the image side: [L, image width] each."""
        return list(self.visual_prompts)

    def text_features(self, classes=None):
        """g(P_t), as of any prompt learner. All C classes are encoded, once per step: `other_losses` needs them."""
        self.encoded = super().text_features()  # [C, d]
        return self.encoded if classes is None else self.encoded[classes]

    def image_features(self, images):
        """f(P_v, I) [B, d] of images [B, 3, h, w], or of a pair (images, frozen CLIP's features of them)."""
        images, _ = images if isinstance(images, tuple) else (images, None)
        context, *deep = self.visual_contexts()
        return F.normalize(encode_images_fast(self.clip_model, images, context, deep), dim=-1)

    def other_losses(self, images, f):
        """The three self-consistency losses over all C classes, each between prompted and frozen CLIP: a scalar.

        They are the L1 of text features, the L1 of image features, and KL(frozen || prompted) of the class
        probabilities, divided by B*C as in the authors' code; weighted and summed. images: as of `image_features`.
        f: [B, d], what that returned.
        """
        images, f_0 = images if isinstance(images, tuple) else (images, None)
        if f_0 is None:
            f_0 = frozen_image_features(self.clip_model, images)
        if self.frozen_text is None:  # the mean over 60 templates
            self.frozen_text = zero_shot_text_features(self.clip_model, self.classnames, TEMPLATES)
        g = self.take_encoded()
        f, g, f_0, g_0 = (features.to(self.ctx.dtype) for features in (f, g, f_0, self.frozen_text))
        with torch.autocast(f.device.type, enabled=False):
            prompted = (self.logit_scale * f @ g.T).log_softmax(dim=-1)  # [B, C]
            frozen = (self.logit_scale * f_0 @ g_0.T).log_softmax(dim=-1)
        divergence = F.kl_div(prompted, frozen, reduction="sum", log_target=True) / prompted.numel()
        return self.text_weight * F.l1_loss(g, g_0) + self.image_weight * F.l1_loss(f, f_0) + divergence

    @torch.no_grad()
    def epoch_end(self, epoch, epochs):
        """Adds the prompts after epoch 1..epochs to a Gaussian-weighted sum; after the last the sum is the prompts."""
        deviations = ((torch.arange(1, epochs + 1) - self.average_mean) / self.average_std).double()
        weights = (-(deviations**2) / 2).softmax(0)  # [epochs]
        if epoch == 1:
            self.average = {name: torch.zeros_like(value) for name, value in self.state_dict().items()}
        for name, value in self.state_dict().items():
            self.average[name] += weights[epoch - 1].item() * value
        if epoch == epochs:
            self.load_state_dict(self.average)


def prompt_depth(transformer, depth):
    """How many layers to prompt: `depth`, or where it is None 9, or all where there are fewer (Table 6).

    Table 6's "Depth of Prompt layer", 1 and 12, is not explained in the paper and has no code.
    ValueError: more than there are, or no transformer but a ResNet (None).
    """
    if transformer is None:
        raise ValueError("this backbone prompts a ViT's image side, and this CLIP has a ResNet: give a ViT with --clip")
    if depth is None:
        return min(9, transformer.layers)
    if not 1 <= depth <= transformer.layers:
        raise ValueError(f"a prompt depth of {depth} does not fit: this CLIP takes 1 to {transformer.layers} layers")
    return depth


BACKBONES = {"coop": CoOp, "maple": MaPLe, "promptsrc": PromptSRC}

# OpenAI's prompts for ImageNet, the 60 that PromptSRC's release takes
IMAGENET_TEMPLATES = """
    a photo of a {}. | a bad photo of a {}. | a photo of many {}. | a sculpture of a {}. |
    a photo of the hard to see {}. | a low resolution photo of the {}. | a rendering of a {}. | graffiti of a {}. |
    a bad photo of the {}. | a cropped photo of the {}. | a tattoo of a {}. | the embroidered {}. |
    a photo of a hard to see {}. | a bright photo of a {}. | a photo of a clean {}. | a photo of a dirty {}. |
    a dark photo of the {}. | a drawing of a {}. | a photo of my {}. | the plastic {}. | a photo of the cool {}. |
    a close-up photo of a {}. | a black and white photo of the {}. | a painting of the {}. | a painting of a {}. |
    a pixelated photo of the {}. | a sculpture of the {}. | a bright photo of the {}. | a cropped photo of a {}. |
    a plastic {}. | a photo of the dirty {}. | a jpeg corrupted photo of a {}. | a blurry photo of the {}. |
    a photo of the {}. | a good photo of the {}. | a rendering of the {}. | a {} in a video game. | a photo of one {}. |
    a doodle of a {}. | a close-up photo of the {}. | the origami {}. | the {} in a video game. | a sketch of a {}. |
    a doodle of the {}. | a origami {}. | a low resolution photo of a {}. | the toy {}. | a rendition of the {}. |
    a photo of the clean {}. | a photo of a large {}. | a rendition of a {}. | a photo of a nice {}. |
    a photo of a weird {}. | a blurry photo of a {}. | a cartoon {}. | art of a {}. | a sketch of the {}. |
    a embroidered {}. | a pixelated photo of a {}. | itap of the {}."""
TEMPLATES = [template.strip() for template in IMAGENET_TEMPLATES.split("|")]
