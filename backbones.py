"""The frozen CLIP, run with prompts, and the prompt learners.

CLIP is the `clip` package's own model with its own weights; only the way of running its transformers is ours, because a
prompt has to be put in. A prompt learner gives `text_features(classes=None)`, `image_features(images)` and
`logit_scale`, as mao.py wants them; its parameters, and so its `state_dict()`, are its prompts alone.
"""

import copy
import hashlib
import pathlib
import warnings

import safetensors.torch
import torch
from torch import nn
from torch.nn import functional as F

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # clip imports pkg_resources, which warns of its own end
    import clip
    import clip.model

# The frozen CLIP ------------------------------------------------------------------------------------------------------


def load_clip(name="ViT-B/16", device="cpu"):
    """The frozen CLIP: (clip.model.CLIP in float32, SHA-256 of its file).

    name: a published model (downloaded by the clip package on first use, its SHA-256 checked), or a checkpoint file:
    a published archive, a state dict by torch.save, or .safetensors. Other pickles are refused.
    FileNotFoundError: no such file, or it cannot be downloaded. ValueError: not a CLIP checkpoint.
    """
    published = {model: url.split("/")[-2] for model, url in clip.clip._MODELS.items()}  # the SHA-256 is in the address
    path = pathlib.Path(name)
    if name in published:
        sha256 = published[name]
    elif path.is_file():
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    else:
        raise FileNotFoundError(f"there is no CLIP '{name}': give a checkpoint file or one of "
                                f"{', '.join(published)}")
    try:
        if sha256 in published.values():
            model, _ = clip.load(str(name), device="cpu")
        elif path.suffix == ".safetensors":
            model = clip.model.build_model(safetensors.torch.load_file(path))
        else:
            model = clip.model.build_model(dict(torch.load(path, map_location="cpu", weights_only=True)))
    except OSError as error:
        raise FileNotFoundError(f"CLIP {name} could not be downloaded ({error}): connect to the network once, or give "
                                "a checkpoint file with --clip") from error
    except Exception as error:  # torch, pickle and safetensors each raise their own on a broken file
        raise ValueError(f"{name} is not a CLIP checkpoint: it needs the state dict of a clip.model.CLIP; "
                         "get the file again, or give another with --clip") from error
    return model.float().eval().requires_grad_(False).to(device), sha256


def layer_norm(norm, x):
    """LayerNorm in x's own type (clip's own casts to float32)."""
    return F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


def project(block, x):
    """Queries, keys and values of a transformer block: x [..., T, w] -> three of [..., heads, T, w/heads]."""
    qkv = F.linear(layer_norm(block.ln_1, x), block.attn.in_proj_weight, block.attn.in_proj_bias)
    return qkv.unflatten(-1, (3, block.attn.num_heads, -1)).movedim(-3, 0).transpose(-2, -3)


def finish(block, x, attended):
    """The rest of a block: x [..., T, w] and what its tokens attended to [..., heads, T, w/heads] -> [..., T, w]."""
    x = x + block.attn.out_proj(attended.transpose(-2, -3).flatten(-2))
    return x + block.mlp(layer_norm(block.ln_2, x))


def encode_prompts(clip_model, prefix, suffix, ends, deep=()):
    """The text encoder g on prompts that start alike: features [H, d].

    prefix: embeddings [P, w] that all H prompts share, from the start token on. suffix: [H, S, w], what differs.
    ends: int64 [H], where in its suffix a prompt's end-of-text token stands. deep: contexts [n, w]; the i-th (from 0)
    replaces what stands after the start token before layer i + 1.

    Attention is causal, which makes three savings exact: the prefix is run once, not H times; what comes after a
    prompt's end-of-text token is left out (N suffix tokens stay); the last layer is run for the end tokens alone.
    """
    (P, _), (H, S, _) = prefix.shape, suffix.shape
    position, device, ends = clip_model.positional_embedding, prefix.device, ends.cpu()
    real = (torch.arange(S) <= ends[:, None]).flatten()  # [H*S]
    kept = real.nonzero()[:, 0].to(device)  # [N], which suffix tokens are packed
    rows = (P - 1 + real.cumsum(0)).to(device)  # [H*S], where they are then; what follows an end points to that end
    mask = torch.ones(S, P + S, dtype=torch.bool, device=device).tril(P)  # a token sees the prefix and its past
    x = torch.cat([prefix + position[:P], (suffix + position[P : P + S]).flatten(0, 1)[kept]])  # [P + N, w]

    def unpacked(k):  # [heads, P + N, .] -> [heads, H, S, .]
        return k.index_select(1, rows).unflatten(1, (H, S))

    def with_prefix(k):  # a suffix's keys or values behind the shared ones: [heads, P + N, .] -> [heads, H, P + S, .]
        return torch.cat([k[:, None, :P].expand(-1, H, -1, -1), unpacked(k)], dim=2)

    layers = clip_model.transformer.resblocks
    for layer, block in enumerate(layers):
        if 0 < layer <= len(deep):
            x = torch.cat([x[:1], deep[layer - 1], x[1 + len(deep[layer - 1]) :]])
        q, k, v = project(block, x)  # [heads, P + N, w/heads]
        if block is layers[-1]:
            break
        p = F.scaled_dot_product_attention(q[None, :, :P], k[None, :, :P], v[None, :, :P], is_causal=True)[0]
        s = F.scaled_dot_product_attention(unpacked(q), with_prefix(k), with_prefix(v), mask)
        x = finish(block, x, torch.cat([p, s.flatten(1, 2).index_select(1, kept)], dim=1))
    end_rows = rows[S - 1 :: S]  # [H]
    q = q.index_select(1, end_rows).unsqueeze(2)  # [heads, H, 1, w/heads]
    s = F.scaled_dot_product_attention(q, with_prefix(k), with_prefix(v), mask[ends][:, None])
    x = finish(block, x[end_rows], s.squeeze(2))  # [H, w]
    return layer_norm(clip_model.ln_final, x) @ clip_model.text_projection


def encode_images(clip_model, images, context=None, deep=()):
    """The image encoder f on images [B, 3, h, w]: features [B, d]. Any ViT; a ResNet runs as clip has it.

    context: [n, w], put after the patch tokens. deep: contexts [n, w]; the i-th replaces it before layer i + 1.
    """
    visual = clip_model.visual
    if not hasattr(visual, "transformer"):
        return visual(images)
    x = visual.conv1(images).flatten(2).transpose(1, 2)  # [B, patches, w]
    x = torch.cat([visual.class_embedding.expand(len(x), 1, -1), x], dim=1) + visual.positional_embedding
    if context is not None:
        x = torch.cat([x, context.expand(len(x), -1, -1)], dim=1)
    x = layer_norm(visual.ln_pre, x)  # [B, T, w], T = 1 + patches + n
    layers = visual.transformer.resblocks
    for layer, block in enumerate(layers):
        if 0 < layer <= len(deep):
            x = torch.cat([x[:, : -len(context)], deep[layer - 1].expand(len(x), -1, -1)], dim=1)
        q, k, v = project(block, x)  # [B, heads, T, w/heads]
        if block is layers[-1]:
            break
        x = finish(block, x, F.scaled_dot_product_attention(q, k, v))
    x = finish(block, x[:, :1], F.scaled_dot_product_attention(q[:, :, :1], k, v))  # the class token alone is read
    return layer_norm(visual.ln_post, x[:, 0]) @ visual.proj


def tokenize(clip_model, texts):
    """CLIP's tokens of texts, cut after the longest: (int64 [C, T], the end-of-text tokens' positions [C] on the CPU).

    ValueError: a text is longer than CLIP's context.
    """
    try:
        tokens = clip.tokenize(texts, context_length=clip_model.context_length)
    except RuntimeError as error:
        longest = max(texts, key=len)
        raise ValueError(f"the prompt '{longest[:20]} ... {longest[-40:]}' does not fit CLIP's "
                         f"{clip_model.context_length} positions: take fewer contexts or a shorter name") from error
    ends = tokens.argmax(dim=-1)
    return tokens[:, : ends.max() + 1].to(clip_model.positional_embedding.device), ends


# Zero-shot CLIP -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def zero_shot_text_features(clip_model, classnames, templates):
    """Frozen CLIP's text features of C class names, `_` read as a space, unit length: [C, d].

    templates: strings with {} for the name; the mean over them is taken before the features are scaled to length 1.
    """
    texts = [template.format(name.replace("_", " ")) for name in classnames for template in templates]
    parts = []
    for first in range(0, len(texts), 256):
        tokens, ends = tokenize(clip_model, texts[first : first + 256])
        embedded = clip_model.token_embedding(tokens)  # [256, T, w]
        parts.append(encode_prompts(clip_model, embedded[0, :1], embedded[:, 1:], ends - 1))
    return F.normalize(torch.cat(parts).unflatten(0, (len(classnames), -1)).mean(dim=1), dim=-1)


@torch.no_grad()
def frozen_image_features(clip_model, images):
    """Frozen CLIP's f(I), unit length [B, d], of images [B, 3, h, w]; features [B, d] pass as they are."""
    return images if images.ndim == 2 else F.normalize(encode_images(clip_model, images), dim=-1)


class ZeroShot(nn.Module):
    """The foundation CLIP on fixed prompts, "a photo of a {}." in the paper: nothing is learned (section 2)."""

    prompts_images = False

    def __init__(self, clip_model, classnames, template="a photo of a {}."):
        super().__init__()
        self.__dict__["clip_model"] = clip_model  # not a submodule: frozen, shared, and not to be saved
        self.set_classes(classnames, template)

    def set_classes(self, classnames, template=None):
        """Takes these classes instead, in the same words or in others; their text features are computed here, once."""
        self.template = template or self.template
        self.features = zero_shot_text_features(self.clip_model, classnames, [self.template])  # g(c)  [C, d]

    @property
    def logit_scale(self):
        return self.clip_model.logit_scale.exp()  # 1/tau

    def text_features(self, classes=None):
        """[C, d], or [H, d] for an index tensor of H classes."""
        return self.features if classes is None else self.features[classes]

    def image_features(self, images):
        """f(I) [B, d], as `frozen_image_features`."""
        return frozen_image_features(self.clip_model, images)


# Prompt learners ------------------------------------------------------------------------------------------------------


class PromptLearner(nn.Module):
    """What all prompt learners here share: "{context} {class name}." before frozen CLIP, the context learned.

    The contract of a backbone stands in mao.py; this is one way to meet it, the README shows another.

    clip_model: frozen, of `load_clip`. classnames: C names, `_` read as a space. n_ctx: L, context vectors, drawn from
    N(0, 0.02^2). ctx_init: words; the context is then their first L token embeddings (all where n_ctx is None) and
    the others stay text. ValueError: no context, or a name that is left no room in CLIP's 77 positions.
    """

    prompts_images = False

    def __init__(self, clip_model, classnames, n_ctx, ctx_init=None):
        super().__init__()
        self.__dict__["clip_model"] = clip_model  # not a submodule: frozen, shared, and not to be saved
        if n_ctx is not None and n_ctx < 1:
            raise ValueError(f"{n_ctx} context vectors: at least 1 is needed")
        self.words = ctx_init or " ".join("X" * n_ctx)  # X: one token, a placeholder
        tokens, ends = tokenize(clip_model, [self.words])
        words = clip_model.token_embedding(tokens[0, 1 : ends[0]])  # [tokens, w]
        context = words[:n_ctx].clone() if ctx_init else self.random(n_ctx, words.shape[1])
        self.ctx = nn.Parameter(context)  # P = [theta]_1 ... [theta]_L, Eq. 1  [L, w]
        self.fixed = words[len(context) :]  # stays text  [tokens - L, w]
        self.set_classes(classnames)

    def random(self, *shape):
        """N(0, 0.02^2), from PyTorch's generator, in CLIP's type and on its device."""
        weight = self.clip_model.positional_embedding
        return torch.randn(shape, dtype=weight.dtype).to(weight.device) * 0.02

    @torch.no_grad()
    def set_classes(self, classnames):
        """The same prompts before other class names: C of them."""
        tokens, ends = tokenize(self.clip_model, [f"{self.words} {name.replace('_', ' ')}." for name in classnames])
        embedded, length = self.clip_model.token_embedding(tokens), 1 + len(self.ctx) + len(self.fixed)
        self.start, self.suffix, self.ends = embedded[0, :1], embedded[:, length:], ends - length  # suffix [C, S, w]

    @property
    def logit_scale(self):
        return self.clip_model.logit_scale.exp()  # 1/tau

    def deep_text(self):
        """The contexts [L, w] that replace the first before layers 1, 2, ..."""
        return ()

    def text_features(self, classes=None):
        """g(P_t), the prompts of all classes [C, d], or of an index tensor of H classes [H, d]; unit length."""
        suffix, ends = self.suffix, self.ends  # [CLASS] . [end]  [C, S, w]
        if classes is not None:
            suffix, ends = suffix[classes], ends[classes.cpu()]  # [H, S, w]
        prefix = torch.cat([self.start, self.ctx, self.fixed])  # [start] P  [1 + L, w]
        return F.normalize(encode_prompts(self.clip_model, prefix, suffix, ends, self.deep_text()), dim=-1)

    def forward(self, images, classes=None):
        """Logits [B, H] of images over all classes or the candidates `classes` [H] (Eq. 3)."""
        return self.logit_scale * self.image_features(images) @ self.text_features(classes).T


def prompt_depth(transformer, depth):
    """How many layers to prompt: `depth`, else 9 or all where there are fewer. ValueError: too many, or a ResNet."""
    if transformer is None:
        raise ValueError("this backbone prompts a ViT's image side, and this CLIP has a ResNet: give a ViT with --clip")
    if depth is not None and not 1 <= depth <= transformer.layers:
        raise ValueError(f"a prompt depth of {depth} does not fit: this CLIP takes 1 to {transformer.layers} layers")
    return depth or min(9, transformer.layers)


class CoOp(PromptLearner):
    """CoOp [4]: context vectors on the text side, shared by all classes; the image side is CLIP's own."""

    def __init__(self, clip_model, classnames, n_ctx=4, ctx_init=None):
        super().__init__(clip_model, classnames, None if ctx_init else n_ctx, ctx_init)

    def image_features(self, images):
        """f(I) [B, d], as `frozen_image_features`."""
        return frozen_image_features(self.clip_model, images)


class MaPLe(PromptLearner):
    """MaPLe [9]: contexts on both sides before each of the first `depth` layers (9, or all where there are fewer); the
    visual one is a Linear of the textual one. The text starts as "a photo of a", its first n_ctx tokens are learned
    (from 5 on, they start at random).
    """

    prompts_images = True

    def __init__(self, clip_model, classnames, n_ctx=2, depth=None):
        depth = min(prompt_depth(getattr(clip_model.visual, "transformer", None), depth),
                    prompt_depth(clip_model.transformer, depth))
        super().__init__(clip_model, classnames, n_ctx, "a photo of a" if n_ctx <= 4 else None)
        width, image_width = self.ctx.shape[1], clip_model.visual.class_embedding.shape[0]
        self.proj = nn.Linear(width, image_width).to(self.ctx)  # couples the first contexts
        self.text_prompts = nn.ParameterList(self.random(n_ctx, width) for _ in range(depth - 1))
        deep = nn.Linear(width, image_width).to(self.ctx)  # couples the deep ones: all start as copies of this
        self.projections = nn.ModuleList(copy.deepcopy(deep) for _ in range(depth - 1))

    def deep_text(self):
        return list(self.text_prompts)

    def image_features(self, images):
        """f(P_v, I) [B, d] of images [B, 3, h, w], P_v coupled to the text side's contexts."""
        deep = [coupling(context) for coupling, context in zip(self.projections, self.text_prompts)]
        return F.normalize(encode_images(self.clip_model, images, self.proj(self.ctx), deep), dim=-1)


class PromptSRC(PromptLearner):
    """PromptSRC [6]: independent contexts on both sides of the first layers (9, or all where there are fewer), held
    near frozen CLIP by three losses and averaged over the epochs. The text starts as "a photo of a" (from 5
    contexts on, at random).

    text_weight, image_weight: of the L1 losses. average_mean, average_std: of the Gaussian over epochs; MAO's phases
    have 10, of which the last one weighs 0.996, so that aggregation is nearly off, as in the authors' release.
    """

    prompts_images = True

    def __init__(self, clip_model, classnames, n_ctx=4, n_ctx_vision=4, depth=None, depth_vision=None,
                 text_weight=25.0, image_weight=10.0, average_mean=15.0, average_std=1.0):
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
        self.classnames, self.frozen_text = classnames, None  # computed where a loss needs them

    def deep_text(self):
        return [self.text_prompts[str(layer)] for layer in range(1, 1 + len(self.text_prompts))]

    def image_features(self, images):
        """f(P_v, I) [B, d] of images [B, 3, h, w]."""
        context, *deep = self.visual_prompts
        return F.normalize(encode_images(self.clip_model, images, context, deep), dim=-1)

    def other_losses(self, images, image_features, text_features, frozen_features=None):
        """The self-consistency losses over all C classes, a scalar: L1 of text and image features and KL of the
        probabilities, each against frozen CLIP, whose text features are means over 60 templates.

        frozen_features: [B, d], frozen CLIP's of the images [B, 3, h, w], where the caller has them.
        """
        if self.frozen_text is None:
            self.frozen_text = zero_shot_text_features(self.clip_model, self.classnames, TEMPLATES)  # [C, d]
        if frozen_features is None:
            frozen_features = frozen_image_features(self.clip_model, images)
        every = image_features, text_features, frozen_features, self.frozen_text
        f, g, f_0, g_0 = (features.to(self.ctx.dtype) for features in every)
        with torch.autocast(f.device.type, enabled=False):
            prompted = (self.logit_scale * f @ g.T).log_softmax(dim=-1)  # [B, C]
            frozen = (self.logit_scale * f_0 @ g_0.T).log_softmax(dim=-1)
        divergence = F.kl_div(prompted, frozen, reduction="sum", log_target=True) / prompted.numel()
        return self.text_weight * F.l1_loss(g, g_0) + self.image_weight * F.l1_loss(f, f_0) + divergence

    @torch.no_grad()
    def epoch_end(self, epoch, epochs):
        """Gaussian-weighted sum of the prompts after epochs 1..N; after the last it becomes the prompts."""
        weights = (-((torch.arange(1, epochs + 1) - self.average_mean) / self.average_std).double() ** 2 / 2).softmax(0)
        if epoch == 1:
            self.average = {name: torch.zeros_like(value) for name, value in self.state_dict().items()}
        for name, value in self.state_dict().items():
            self.average[name] += weights[epoch - 1].item() * value
        if epoch == epochs:
            self.load_state_dict(self.average)


BACKBONES = {"coop": CoOp, "maple": MaPLe, "promptsrc": PromptSRC}

# OpenAI's prompts for ImageNet, the 60 that PromptSRC's release takes.
TEMPLATES = [template.strip() for template in """
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
    a embroidered {}. | a pixelated photo of a {}. | itap of the {}.""".split("|")]
