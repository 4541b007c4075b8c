"""The frozen CLIP of section 3.1: the text encoder g and the image encoder f, with learned prompts inserted.

The model is the `clip` package's own, with its own weights. `load_clip` turns its gradients off, so a loss reaches only
the prompts. Each encoder is implemented twice. The plain form runs every position through clip's own modules, as the
authors' releases do. The fast form below it computes the same numbers with less work; tuning and scoring run the fast
form. tests/test_encoders.py checks that they agree, values and gradients, in float64.

Sizes: w is a transformer's width, d that of a feature. Layers count from 0, in clip's order.
"""

import torch
from torch.nn import functional as F

from harness.clips import clip
from harness.clips import load_clip as load_clip  # re-exported

# The text encoder g ---------------------------------------------------------------------------------------------------


def encode_text(clip_model, prompts, ends, deep=()):
    """g, plain: all positions of every prompt, through clip's own transformer (section 3.1).

    prompts: embedded prompts P_t, padded to CLIP's 77 positions [H, 77, w]. ends: int64 [H], the positions of their
    end-of-text tokens, whose outputs are the features. deep: contexts [L, w] (MaPLe, PromptSRC), or [H, L, w] where
    each prompt has its own (TCP). deep[i] replaces the outputs of layer i at positions 1..L; None replaces nothing
    (TCP). Returns [H, d], not normalized.
    """
    x = (prompts + clip_model.positional_embedding).transpose(0, 1)  # [77, H, w], as clip's modules want it
    for layer, block in enumerate(clip_model.transformer.resblocks):
        if 0 < layer <= len(deep) and deep[layer - 1] is not None:
            context = deep[layer - 1].expand(x.shape[1], -1, -1).transpose(0, 1)  # [L, H, w]
            x = torch.cat([x[:1], context, x[1 + len(context) :]])
        x = block(x)
    x = clip_model.ln_final(x.transpose(0, 1))  # [H, 77, w]
    return x[torch.arange(len(x)), ends] @ clip_model.text_projection  # [H, d]


# The halves of a transformer block, for the fast forms. Matrices are multiplied in the type of their weights
# (`clips.in_precision`). The activations between the layers, the layer norms and the features are float32.


def project(block, x):
    """First half of a block: LayerNorm, queries, keys, values: x [..., T, w] -> three of [..., heads, T, w/heads]."""
    weight = block.attn.in_proj_weight
    qkv = F.linear(layer_norm(block.ln_1, x).to(weight.dtype), weight, block.attn.in_proj_bias)
    if not qkv.is_cuda:
        qkv = qkv.to(x.dtype)  # on a CPU, the backward pass of bfloat16 attention is 15 times slower
    return qkv.unflatten(-1, (3, block.attn.num_heads, -1)).movedim(-3, 0).transpose(-2, -3)


def finish(block, x, attended):
    """Second half of a block: output projection, residual, MLP, residual.

    x: [..., T, w]. attended: what its tokens attended to [..., heads, T, w/heads]. Returns [..., T, w].
    """
    out = block.attn.out_proj
    x = x + out(attended.transpose(-2, -3).flatten(-2).to(out.weight.dtype))
    return x + block.mlp(layer_norm(block.ln_2, x).to(block.mlp.c_fc.weight.dtype))


def layer_norm(norm, x):
    """LayerNorm in the type of x, where clip's own casts to float32."""
    return F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


def encode_text_fast(clip_model, prefix, suffix, ends, deep=()):
    """The same features of prompts that share their first A tokens.

    prefix: [A, w], the shared tokens: start token and context. suffix: [H, S, w], what follows in each prompt. ends:
    int64 [H], the end-of-text tokens' positions in the suffix. deep: as in `encode_text`. Returns [H, d]. ValueError:
    a context for each prompt [H, L, w], but more is shared than the start token.

    Attention is causal, so a token depends on earlier ones only, and three savings are exact. The prefix runs once
    instead of H times. Tokens after a prompt's end are left out; the T kept suffix tokens are packed one after the
    other. The last layer runs for the end tokens alone.
    """
    (A, _), (H, S, _) = prefix.shape, suffix.shape
    position, device, ends = clip_model.positional_embedding, prefix.device, ends.cpu()
    # Example: A = 5, S = 4, ends = [1, 3]: kept = [0, 1, 4, 5, 6, 7], rows = [5, 6, 6, 6, 7, 8, 9, 10].
    real = (torch.arange(S) <= ends[:, None]).flatten()  # [H*S], whether a suffix token is kept
    kept = real.nonzero()[:, 0].to(device)  # [T], which are
    rows = (A - 1 + real.cumsum(0)).to(device)  # [H*S], each token's row in x; a token behind the end has the end's
    mask = torch.ones(S, A + S, dtype=torch.bool, device=device).tril(A)  # suffix token s sees columns 0..A+s
    x = torch.cat([prefix + position[:A], (suffix + position[A : A + S]).flatten(0, 1)[kept]])  # [A + T, w]

    def unpacked(k):  # queries, keys or values prompt by prompt: [heads, A + T, .] -> [heads, H, S, .]
        return k.index_select(1, rows).unflatten(1, (H, S))

    def with_prefix(k):  # the same behind the shared tokens: [heads, A + T, .] -> [heads, H, A + S, .]
        return torch.cat([k[:, None, :A].expand(-1, H, -1, -1), unpacked(k)], dim=2)

    layers = clip_model.transformer.resblocks
    for layer, block in enumerate(layers):
        context = deep[layer - 1] if 0 < layer <= len(deep) else None
        if context is not None and context.ndim == 2:  # [L, w], shared
            x = torch.cat([x[:1], context, x[1 + len(context) :]])
        elif context is not None:  # [H, L, w], at the start of each suffix
            if A != 1:
                raise ValueError(f"contexts of each prompt's own need a prefix of the start token alone, not of {A}")
            own = rows.unflatten(0, (H, S))[:, : context.shape[1]].flatten()  # [H*L], rows in x
            x = x.index_copy(0, own, context.flatten(0, 1).to(x.dtype))  # x's type, should a caller use autocast
        q, k, v = project(block, x)  # [heads, A + T, w/heads]
        if block is layers[-1]:
            break
        p = F.scaled_dot_product_attention(q[None, :, :A], k[None, :, :A], v[None, :, :A], is_causal=True)[0]
        s = F.scaled_dot_product_attention(unpacked(q), with_prefix(k), with_prefix(v), mask)
        x = finish(block, x, torch.cat([p, s.flatten(1, 2).index_select(1, kept)], dim=1))
    end_rows = rows[S - 1 :: S]  # [H]: each prompt's last column has its end token's row (here 6 and 10)
    q = q.index_select(1, end_rows).unsqueeze(2)  # [heads, H, 1, w/heads]
    s = F.scaled_dot_product_attention(q, with_prefix(k), with_prefix(v), mask[ends][:, None])  # the end tokens' rows
    x = finish(block, x[end_rows], s.squeeze(2))  # [H, w]
    weight = clip_model.text_projection
    return (layer_norm(clip_model.ln_final, x).to(weight.dtype) @ weight).to(x.dtype)


# The image encoder f --------------------------------------------------------------------------------------------------


def image_tokens(visual, images, context=None):
    """(P_v, I) before a ViT's first layer: class token, patch tokens and visual prompt [B, 1 + patches + L, w].

    The paper calls P_v a prefix of the patch tokens. The authors' backbones put it after them, and so does this. It
    makes no difference: position embeddings are added before, and attention here does not see the order of tokens.
    """
    x = visual.conv1(images.to(visual.conv1.weight.dtype)).flatten(2).transpose(1, 2)  # [B, patches, w]
    x = torch.cat([visual.class_embedding.expand(x.shape[0], 1, -1), x], dim=1) + visual.positional_embedding
    if context is not None:
        x = torch.cat([x, context.expand(x.shape[0], -1, -1)], dim=1)  # (I, P_v)
    return x


def encode_images(clip_model, images, context=None, deep=()):
    """f, plain: a ViT's layers by clip's own modules; a ResNet runs as clip has it (section 3.1).

    images: [B, 3, h, w]. context: the visual prompt P_v [L, w], or None. deep: contexts [L, w]; deep[i]
    replaces the outputs of layer i at the context's positions, the last L. Returns [B, d], not normalized.
    """
    visual = clip_model.visual
    if not hasattr(visual, "transformer"):
        return visual(images)
    x = visual.ln_pre(image_tokens(visual, images, context)).transpose(0, 1)  # [T, B, w], T = 1 + patches + L
    for layer, block in enumerate(visual.transformer.resblocks):
        if 0 < layer <= len(deep):
            x = torch.cat([x[: -len(context)], deep[layer - 1][:, None].expand(-1, x.shape[1], -1)])
        x = block(x)
    return visual.ln_post(x[0]) @ visual.proj  # the class token's output [B, d]


def encode_images_fast(clip_model, images, context=None, deep=()):
    """The same features: arguments and result as `encode_images`.

    Batch-first tensors and fused attention, and the last layer runs for the class token alone.
    """
    visual = clip_model.visual
    if not hasattr(visual, "transformer"):
        return visual(images).to(images.dtype)
    x = layer_norm(visual.ln_pre, image_tokens(visual, images, context))  # [B, T, w], T = 1 + patches + L
    layers = visual.transformer.resblocks
    for layer, block in enumerate(layers):
        if 0 < layer <= len(deep):
            x = torch.cat([x[:, : -len(context)], deep[layer - 1].expand(x.shape[0], -1, -1)], dim=1)
        q, k, v = project(block, x)  # [B, heads, T, w/heads]
        if block is layers[-1]:
            break
        x = finish(block, x, F.scaled_dot_product_attention(q, k, v))
    x = finish(block, x[:, :1], F.scaled_dot_product_attention(q[:, :, :1], k, v))  # [B, 1, w]
    return (layer_norm(visual.ln_post, x[:, 0]).to(visual.proj.dtype) @ visual.proj).to(x.dtype)


# Tokens ---------------------------------------------------------------------------------------------------------------


def tokenize(clip_model, texts):
    """CLIP's tokens of C texts, cut after the longest: int64 [C, T]; and the positions of their end-of-text tokens,
    int64 [C] on the CPU.

    ValueError: a text is longer than CLIP's context.
    """
    try:
        tokens = clip.tokenize(texts, context_length=clip_model.context_length)
    except RuntimeError as error:
        longest = max(texts, key=lambda text: len(clip.clip._tokenizer.encode(text)))
        text, limit = f"{longest[:20]} ... {longest[-40:]}", clip_model.context_length
        raise ValueError(f"'{text}' does not fit CLIP's {limit} positions: fewer contexts or a shorter name") from error
    ends = tokens.argmax(dim=-1)  # the end-of-text token has the highest number
    return tokens[:, : ends.max() + 1].to(clip_model.positional_embedding.device), ends


# CLIP without learned prompts -----------------------------------------------------------------------------------------


@torch.no_grad()
def zero_shot_text_features(clip_model, classnames, templates):
    """Frozen CLIP's g of C class names in fixed words, unit length [C, d]; `_` in a name is read as a space.

    templates: strings with {} for the name; the mean over them is taken before features are scaled to length 1.
    """
    texts = [template.format(name.replace("_", " ")) for name in classnames for template in templates]
    parts = []
    for first in range(0, len(texts), 256):
        tokens, ends = tokenize(clip_model, texts[first : first + 256])
        embedded = clip_model.token_embedding(tokens)  # [up to 256, T, w]
        parts.append(encode_text_fast(clip_model, embedded[0, :1], embedded[:, 1:], ends - 1))
    return F.normalize(torch.cat(parts).unflatten(0, (len(classnames), -1)).mean(dim=1), dim=-1)


@torch.no_grad()
def frozen_image_features(clip_model, images):
    """Frozen CLIP's f(I), unit length [B, d].

    images: [B, 3, h, w]; or features that are already computed, [B, d], alone or as the second of a pair (images,
    features): returned unchanged; or a tuple of views, each [B, 3, h, w] (`Learner.views`): the first is encoded.
    """
    if isinstance(images, tuple):  # (images, features), or views
        images = images[1] if images[1].ndim == 2 else images[0]
    return images if images.ndim == 2 else F.normalize(encode_images_fast(clip_model, images), dim=-1)
