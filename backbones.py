"""Eq. 1: the three prompt learners of the paper, and the zero-shot CLIP. To add your own, see docs/backbone.md.

Read `Learner` and `PromptLearner` first, then any of the others alone. CLIP is frozen; it is in encoders.py.

A context is what is learned: L vectors, P of Eq. 1. A prompt is what an encoder reads. The textual prompt P_t is the
start token, a context and the class name; the visual prompt P_v is a context alone, beside the patch tokens. MaPLe and
PromptSRC have deep contexts too: after each of the first layers the next context overwrites the previous one. A
learner's `state_dict()` holds what is learned, and nothing else.
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


class Learner(nn.Module):
    """A prompt learner: `text_features(classes=None)`, `set_classes(classnames)`, and these parts, which have defaults.

    `images` of `image_features` and `other_losses` are [B, 3, h, w], or a pair of them and frozen CLIP's features
    [B, d], or where the image side is frozen these features alone.
    """

    prompts_images = False  # whether `image_features` depends on what is learned
    unscaled_images = False  # whether `image_features` is frozen CLIP's, as it leaves the encoder
    text_depends_on_image = False  # whether `text_features` is [B, H, d], of the images last given to `image_features`
    needs_frozen_features = False  # whether `other_losses` compares with frozen CLIP's image features
    cross_entropy = None  # or a method (f, g, targets, classes), which replaces mao.alterable_cross_entropy
    views = 1  # how many augmented views of each training image it takes, as a tuple
    recipe = {}  # how its authors tune it: epochs, lr, batch_size, optimizer, eps, lr_factors, augmentation
    carried = ()  # names of attributes beside the parameters that the next epoch depends on
    new_phase_refused = tuned_labeler_refused = None  # why it has no new phase, or cannot label for it: a sentence

    def __init__(self, clip_model):
        super().__init__()
        self.__dict__["clip_model"] = clip_model  # not a submodule: it is frozen and shared, and must not be saved

    @property
    def logit_scale(self):
        return self.clip_model.logit_scale.exp()  # 1/tau

    def image_features(self, images):
        """f(I) [B, d]: frozen CLIP's, unless the learner prompts the image side."""
        return frozen_image_features(self.clip_model, images)

    def other_losses(self, images, f):
        """Its losses besides the cross-entropy, summed: a scalar. images, f: as in mao.py."""
        return 0.0

    def check(self):
        """ValueError, FileNotFoundError: something that tuning on its classes needs is missing."""

    def epoch_end(self, epoch, epochs):
        """Called after each epoch 1..epochs of a phase."""

    def logits(self, f, g):
        """The scores at test [B, H] of image features f [B, d] and text features g [H, d] (Eq. 3)."""
        return similarity_logits(f, g, self.logit_scale)

    def forward(self, images, classes=None):
        """Logits [B, H] of images over all classes, or over those in an index tensor."""
        return self.logits(self.image_features(images), self.text_features(classes))


class ZeroShot(Learner):
    """CLIP on fixed prompts, nothing learned: the zero-shot CLIP of the table, and the foundation CLIP of Eq. 7.

    They differ in the template alone. The table's has that of each test set, Eq. 7's is "a photo of a {}.".

    clip_model: of `load_clip`. classnames: C names. template: "a photo of a {}." in the paper (section 2).
    """

    def __init__(self, clip_model, classnames, template="a photo of a {}."):
        super().__init__(clip_model)
        self.template = template
        self.set_classes(classnames)

    def set_classes(self, classnames, template=None):
        """Changes to these classes, with the same template or a new one."""
        if template is not None:
            self.template = template
        self.features = zero_shot_text_features(self.clip_model, classnames, [self.template])  # g(c)  [C, d]

    def text_features(self, classes=None):
        """g of all C classes [C, d], or of those in an index tensor [H, d]."""
        return self.features if classes is None else self.features[classes]


class PromptLearner(Learner):
    """What the prompt learners here share: the textual prompt "{context} {class name}." with the context learned.

    clip_model: frozen, of `encoders.load_clip`. classnames: C names, `_` read as a space. n_ctx: L, the number of
    context vectors, drawn from N(0, 0.02^2). ctx_init: words; the context then starts as their first L token embeddings
    (all of them where n_ctx is None), and the other words stay text. ValueError: no context, or a name for which CLIP's
    77 positions leave no room.
    """

    def __init__(self, clip_model, classnames, n_ctx, ctx_init=None):
        super().__init__(clip_model)
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
        """Keeps the prompts and switches to C other class names."""
        tokens, ends = tokenize(self.clip_model, [f"{self.words} {name.replace('_', ' ')}." for name in classnames])
        embedded, length = self.clip_model.token_embedding(tokens), 1 + len(self.ctx) + len(self.fixed)
        self.start = embedded[0, :1]  # the start token                              [1, w]
        self.suffix = embedded[:, length:]  # [CLASS], ".", end token, padding       [C, S, w]
        self.ends = ends - length  # the end token's position in its suffix          [C]

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
        if classes is None and len(self.suffix) > 1000 and not torch.is_grad_enabled():  # in parts, to save memory
            return torch.cat([self.unscaled_text_features(part) for part in torch.arange(len(self.suffix)).split(1000)])
        suffix, ends = self.suffix, self.ends  # [C, S, w], [C]
        if classes is not None:
            suffix, ends = suffix[classes], ends[classes.cpu()]  # [H, S, w], [H]
        return encode_text_fast(self.clip_model, self.prefix(), suffix, ends, self.deep_text())


class CoOp(PromptLearner):
    """CoOp [4]: L context vectors on the text side, shared by all classes; the image side is CLIP's own.

    n_ctx: 4 (Table 6). ctx_init: words to start from; L is then the number of their tokens.
    """

    def __init__(self, clip_model, classnames, n_ctx: int = 4, ctx_init: str | None = None):
        super().__init__(clip_model, classnames, None if ctx_init else n_ctx, ctx_init)


class MaPLe(PromptLearner):
    """MaPLe [9]: contexts on both sides before each of the first `depth` layers; a Linear of the textual context gives
    the visual one.

    n_ctx: 2 (Table 6), on both sides: the Linear maps each vector to one, and so Table 6's 4 on the visual side is
    impossible. The text starts as "a photo of a", of which the first n_ctx tokens are learned (from 5 on, the
    context starts at random). depth: 9 (Table 6), or all layers where there are fewer.
    """

    prompts_images = True

    def __init__(self, clip_model, classnames, n_ctx: int = 2, depth: int | None = None):
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
        """f(P_v, I) [B, d], unit length."""
        context, *deep = self.visual_contexts()
        return F.normalize(encode_images_fast(self.clip_model, pixels(images), context, deep), dim=-1)


class AllTextFeatures:
    """For a prompt learner whose other losses need g of all classes: it is encoded once per step, and kept for them."""

    kept = None  # g [C, d]

    def set_classes(self, classnames):
        super().set_classes(classnames)
        self.kept = None

    def encode_all(self):
        """g of all classes [C, d], unit length."""
        return super().text_features()

    def text_features(self, classes=None):
        """g of all C classes [C, d], or of those in an index tensor [H, d]. All are encoded."""
        self.kept = self.encode_all()
        return self.kept if classes is None else self.kept[classes]

    def take_text_features(self):
        """g of all classes [C, d] in the context's type: `kept`, or a new encoding. Forgets it, for the next step."""
        g = self.encode_all() if self.kept is None else self.kept
        self.kept = None
        return g.to(self.ctx.dtype)


class PromptSRC(AllTextFeatures, PromptLearner):
    """PromptSRC [6]: independent contexts on both sides before each of the first layers, held near frozen CLIP by three
    losses, and averaged over the epochs.

    n_ctx, n_ctx_vision: 4 and 4 (Table 6). The text starts as "a photo of a" (from 5 contexts on, at random). depth,
    depth_vision: 9 and 9, or all layers where there are fewer. text_weight, image_weight: of the L1 losses.
    average_mean, average_std: of the Gaussian over epochs. MAO's phases have 10 epochs, of which the last weighs 0.996:
    averaging is nearly off, as in the authors' release.
    """

    prompts_images = needs_frozen_features = True
    carried = ("average",)

    def __init__(
        self,
        clip_model,
        classnames,
        n_ctx: int = 4,
        n_ctx_vision: int = 4,
        depth: int | None = None,
        depth_vision: int | None = None,
        text_weight: float = 25.0,
        image_weight: float = 10.0,
        average_mean: float = 15.0,
        average_std: float = 1.0,
    ):
        depth_vision = prompt_depth(getattr(clip_model.visual, "transformer", None), depth_vision)
        depth = prompt_depth(clip_model.transformer, depth)
        super().__init__(clip_model, classnames, n_ctx, "a photo of a" if n_ctx <= 4 else None)
        width, image_width = self.ctx.shape[1], clip_model.visual.class_embedding.shape[0]
        # Keyed by their layers, from 1: the text side's context of layer 0 is ctx.
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

    def image_features(self, images):
        """f(P_v, I) [B, d], unit length."""
        context, *deep = self.visual_contexts()
        return F.normalize(encode_images_fast(self.clip_model, pixels(images), context, deep), dim=-1)

    def other_losses(self, images, f):
        """The three self-consistency losses over all C classes, each between prompted and frozen CLIP: a scalar.

        They are the L1 of text features, the L1 of image features, and KL(frozen || prompted) of the class
        probabilities, divided by B*C as in the authors' code; weighted and summed. f: [B, d].
        """
        f_0 = frozen_image_features(self.clip_model, images)
        if self.frozen_text is None:  # the mean over 60 templates
            self.frozen_text = zero_shot_text_features(self.clip_model, self.classnames, TEMPLATES)
        g = self.take_text_features()
        f, f_0, g_0 = (features.to(self.ctx.dtype) for features in (f, f_0, self.frozen_text))
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


def pixels(images):
    """The images [B, 3, h, w] of what `image_features` takes."""
    return images[0] if isinstance(images, tuple) else images


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
