"""The frozen CLIP, run with prompts, and the prompt learners.

CLIP is the `clip` package's own model with its own weights; only the way of running its transformers is ours, because a
prompt has to be put in. A prompt learner gives `text_features(classes=None)`, `image_features(images)` and
`logit_scale`, as mao.py wants them; its parameters, and so its `state_dict()`, are its prompts alone.
"""

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

# ---------------------------------------------------------------------------------------------------------------------
# The frozen CLIP


def load_clip(name="ViT-B/16", device="cpu"):
    """The frozen CLIP: (clip.model.CLIP in float32, SHA-256 of its file).

    name: a published model (downloaded by the clip package on first use, its SHA-256 checked), or a checkpoint file:
    a published archive, a state dict by torch.save, or .safetensors. Other pickles are refused.
    FileNotFoundError: no such file, or it cannot be downloaded. ValueError: not a CLIP checkpoint.
    """
    published = {url.split("/")[-2]: model for model, url in clip.clip._MODELS.items()}
    path = pathlib.Path(name)
    if name in clip.available_models():
        sha256 = next(sha256 for sha256, model in published.items() if model == name)
    elif path.is_file():
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    else:
        raise FileNotFoundError(f"there is no CLIP '{name}': give a checkpoint file or one of "
                                f"{', '.join(clip.available_models())}")
    try:
        if sha256 in published:
            model, _ = clip.load(name, device="cpu")
        else:
            read = safetensors.torch.load_file if path.suffix == ".safetensors" else torch.load
            options = {} if path.suffix == ".safetensors" else {"map_location": "cpu", "weights_only": True}
            model = clip.model.build_model(dict(read(path, **options)))
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


def encode_prompts(clip_model, prefix, suffix, ends):
    """The text encoder g on prompts that start alike: unit features [H, d].

    prefix: embeddings [P, w] that all H prompts share, from the start token on. suffix: [H, S, w], what differs.
    ends: int64 [H], where in its suffix a prompt's end-of-text token stands.

    Attention is causal, which makes three savings exact: the prefix is run once, not H times; what comes after the
    longest end-of-text token is left out (P + S positions, not 77); the last layer is run for the end tokens alone.
    """
    (P, _), (H, S, _) = prefix.shape, suffix.shape
    position = clip_model.positional_embedding
    x = torch.cat([prefix + position[:P], (suffix + position[P : P + S]).flatten(0, 1)])  # packed: [P + H*S, w]
    mask = torch.ones(S, P + S, dtype=torch.bool, device=x.device).tril(P)  # a token sees the prefix and its past
    end_rows = P + S * torch.arange(H, device=x.device) + ends

    def with_prefix(k):  # a suffix's keys or values behind the shared ones: [heads, P + H*S, .] -> [heads, H, P + S, .]
        return torch.cat([k[:, None, :P].expand(-1, H, -1, -1), k[:, P:].unflatten(1, (H, S))], dim=2)

    *blocks, last = clip_model.transformer.resblocks
    for block in blocks:
        q, k, v = project(block, x)  # [heads, P + H*S, w/heads]
        p = F.scaled_dot_product_attention(q[None, :, :P], k[None, :, :P], v[None, :, :P], is_causal=True)[0]
        s = F.scaled_dot_product_attention(q[:, P:].unflatten(1, (H, S)), with_prefix(k), with_prefix(v), mask)
        x = finish(block, x, torch.cat([p, s.flatten(1, 2)], dim=1))
    q, k, v = project(last, x)
    q = q[:, end_rows, None]  # [heads, H, 1, w/heads]
    s = F.scaled_dot_product_attention(q, with_prefix(k), with_prefix(v), mask[ends][:, None])
    x = finish(last, x[end_rows], s.squeeze(2))  # [H, w]
    return F.normalize(layer_norm(clip_model.ln_final, x) @ clip_model.text_projection, dim=-1)


def encode_images(clip_model, images):
    """The image encoder f on images [B, 3, h, w]: unit features [B, d]. Any ViT; a ResNet runs as clip has it."""
    visual = clip_model.visual
    if not hasattr(visual, "transformer"):
        return F.normalize(visual(images), dim=-1)
    x = visual.conv1(images).flatten(2).transpose(1, 2)  # [B, patches, w]
    x = torch.cat([visual.class_embedding.expand(len(x), 1, -1), x], dim=1) + visual.positional_embedding
    x = layer_norm(visual.ln_pre, x)
    *blocks, last = visual.transformer.resblocks
    for block in blocks:
        x = finish(block, x, F.scaled_dot_product_attention(*project(block, x)))  # [B, 1 + patches, w]
    q, k, v = project(last, x)
    x = finish(last, x[:, :1], F.scaled_dot_product_attention(q[:, :, :1], k, v))  # the class token alone is read
    return F.normalize(layer_norm(visual.ln_post, x[:, 0]) @ visual.proj, dim=-1)


def tokenize(clip_model, texts):
    """CLIP's tokens of texts, cut after the longest: (int64 [C, T], positions of the end-of-text tokens [C]).

    ValueError: a text is longer than CLIP's context.
    """
    try:
        tokens = clip.tokenize(texts, context_length=clip_model.context_length)
    except RuntimeError as error:
        longest = max(texts, key=len)
        raise ValueError(f"the prompt '{longest}' does not fit CLIP's {clip_model.context_length} positions: shorten "
                         "the class name or the context") from error
    ends = tokens.argmax(dim=-1)
    device = clip_model.positional_embedding.device
    return tokens[:, : ends.max() + 1].to(device), ends.to(device)


# ---------------------------------------------------------------------------------------------------------------------
# Zero-shot CLIP


class ZeroShot(nn.Module):
    """The foundation CLIP on fixed prompts, "a photo of a {}." in the paper: nothing is learned (section 2).

    clip_model: frozen, of `load_clip`. classnames: C names, `_` read as a space. template: with {} for the name.
    """

    def __init__(self, clip_model, classnames, template="a photo of a {}."):
        super().__init__()
        self.__dict__["clip_model"] = clip_model  # not a submodule: frozen, shared, and not to be saved
        self.template = template
        self.set_classes(classnames)

    @torch.no_grad()
    def set_classes(self, classnames):
        """Takes these classes instead; their text features are computed here, once."""
        texts = [self.template.format(name.replace("_", " ")) for name in classnames]
        parts = []
        for first in range(0, len(texts), 256):
            tokens, ends = tokenize(self.clip_model, texts[first : first + 256])
            embedded = self.clip_model.token_embedding(tokens)  # [C, T, w]
            parts.append(encode_prompts(self.clip_model, embedded[0, :1], embedded[:, 1:], ends - 1))
        self.features = torch.cat(parts)  # g(c)  [C, d]

    @property
    def logit_scale(self):
        return self.clip_model.logit_scale.exp()  # 1/tau

    def text_features(self, classes=None):
        """[C, d], or [H, d] for an index tensor of H classes."""
        return self.features if classes is None else self.features[classes]

    @torch.no_grad()
    def image_features(self, images):
        """f(I) [B, d] of images [B, 3, h, w]; features [B, d] of the frozen CLIP pass as they are."""
        return images if images.ndim == 2 else encode_images(self.clip_model, images)


# ---------------------------------------------------------------------------------------------------------------------
# Prompt learners


class CoOp(nn.Module):
    """CoOp [4]: M context vectors on the text side, shared by all classes; the image side is CLIP's own.

    clip_model: frozen, of `load_clip`. classnames: C names, `_` read as a space. n_ctx: M. ctx_init: words whose
    embeddings the context starts from (M is then their number of tokens); without, N(0, 0.02^2).
    ValueError: a context below 1, or one that leaves a class name no room in CLIP's 77 positions.
    """

    prompts_images = False  # so `image_features` takes features of the frozen f in place of images

    def __init__(self, clip_model, classnames, n_ctx=4, ctx_init=None):
        super().__init__()
        self.__dict__["clip_model"] = clip_model  # not a submodule: frozen, shared, and not to be saved
        weight = clip_model.token_embedding.weight
        if ctx_init:
            tokens, ends = tokenize(clip_model, [ctx_init])
            context = clip_model.token_embedding(tokens[0, 1 : ends[0]])
        elif n_ctx >= 1:
            context = torch.randn(n_ctx, weight.shape[1], dtype=weight.dtype).to(weight.device) * 0.02
        else:
            raise ValueError(f"{n_ctx} context vectors: at least 1 is needed")
        self.ctx = nn.Parameter(context)  # P = [theta]_1 ... [theta]_L, Eq. 1  [L, w]
        self.set_classes(classnames)

    @torch.no_grad()
    def set_classes(self, classnames):
        """The same prompts before other class names: C of them."""
        placeholder = " ".join("X" * len(self.ctx))  # one token each, replaced by the context
        texts = [f"{placeholder} {name.replace('_', ' ')}." for name in classnames]
        tokens, ends = tokenize(self.clip_model, texts)  # [C, T], [C]
        embedded, length = self.clip_model.token_embedding(tokens), 1 + len(self.ctx)
        self.start, self.suffix, self.ends = embedded[0, :1], embedded[:, length:], ends - length

    @property
    def logit_scale(self):
        return self.clip_model.logit_scale.exp()  # 1/tau

    def text_features(self, classes=None):
        """g(P_t), the prompts of all classes [C, d], or of an index tensor of H classes [H, d]; unit length."""
        suffix, ends = self.suffix, self.ends  # [CLASS] . [end]  [C, S, w]
        if classes is not None:
            suffix, ends = suffix[classes], ends[classes]  # [H, S, w]
        prefix = torch.cat([self.start, self.ctx])  # [start] P  [1 + L, w]
        return encode_prompts(self.clip_model, prefix, suffix, ends)

    @torch.no_grad()
    def image_features(self, images):
        """f(I) [B, d] of images [B, 3, h, w]; features [B, d] of the frozen CLIP pass as they are."""
        return images if images.ndim == 2 else encode_images(self.clip_model, images)

    def forward(self, images, classes=None):
        """Logits [B, H] of images over all classes or the candidates `classes` [H] (Eq. 3)."""
        return self.logit_scale * self.image_features(images) @ self.text_features(classes).T


BACKBONES = {"coop": CoOp}
