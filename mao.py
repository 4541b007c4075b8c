"""The losses of MAO: the backbone's own (section 3.1), reg-B (section 3.2) and reg-N (section 3.3).

This file depends only on PyTorch, so you can copy it. Symbols, here and in the other files:

    I, f(I)    an image, and its feature; f: [B, d] are those of a batch of B images
    C, g(C)    the classes a learner holds, C_b base or C_n new ones, and their text features.
               In a shape or a range, C is how many classes: g: [C, d]
    P          a context: L learned vectors (Eq. 1)
    P_t, P_v   the textual prompt: start token, context, class name; and the visual one: a context
               beside the patch tokens
    tau        CLIP's temperature; logit_scale is 1/tau, 100 for the released CLIPs
    b, K, H    base phase: anchors per batch, classes per anchor, candidates of a batch

A prompt learner, the paper's "backbone", is any object with

    text_features(classes=None)  g: [H, d], of the classes in the index tensor `classes` [H];
                                 [C, d], of all classes, where it is None
    image_features(images)       f: [B, d], of images as the loader brings them
    logit_scale                  1/tau
    other_losses(images, f)      optional: its losses besides the cross-entropy, summed, a scalar;
                                 called last in a step, so that it may use what the step computed
    cross_entropy(f, g, targets, classes)
                                 optional: replaces `alterable_cross_entropy`, for learners with a
                                 second set of scores (DePT's head); classes: None for all

f and g may have any length: `similarity_logits` scales them. Text that depends on the image is
[B, H, d]; image_features is called before text_features. docs/backbone.md says what run.py needs
besides.
"""

import torch
from torch.nn import functional as F

# 3.1 Preliminaries: the cross-entropy of a prompt learner, Eqs. 2 and 3.


def similarity_logits(image_features, text_features, logit_scale):
    """The exponents of Eq. 3, <g, f> / tau with <,> the cosine: [B, H] (Eqs. 3 and 5).

    image_features: f [B, d]. text_features: g [H, d], a row per candidate, or [B, H, d] where text
    depends on the image. logit_scale: 1/tau. ValueError: their shapes do not match.

    Features are normalized here because learners of other projects may not return unit length.
    Everything runs in float32 at least: logits reach 100, where half precision has steps of 1/16.
    """
    check_features(image_features, text_features)
    dtype = torch.promote_types(image_features.dtype, torch.float32)  # float64 stays float64
    with torch.autocast(image_features.device.type, enabled=False):
        f = F.normalize(image_features.to(dtype), dim=-1)  # f(I) / ||f(I)||         [B, d]
        g = F.normalize(text_features.to(dtype), dim=-1)  # g(C) / ||g(C)||, Eq. 5  [H, d]
        if g.ndim == 2:
            return logit_scale * f @ g.T  #                                         [B, H]
        return logit_scale * (g @ f[:, :, None]).squeeze(2)  # each image's own g   [B, H]


def alterable_cross_entropy(image_features, text_features, targets, logit_scale):
    """Cross-entropy over the candidate classes at hand, whichever they are (Eqs. 2, 6 and 8).

    targets: int64 [B], the row of each image's class in text_features. The other arguments are
    those of `similarity_logits`. Returns the mean over the batch, in nats.
    """
    check_labels(targets)
    logits = similarity_logits(image_features, text_features, logit_scale)  # [B, H]
    return F.cross_entropy(logits, targets.to(logits.device).long())  # mean of -log p(y | I)


# The two optional parts of a learner, for objects of other projects, which may lack them.


def cross_entropy(learner, f, g, targets, classes=None):
    """The learner's own cross-entropy over the candidates, or `alterable_cross_entropy`.

    f, g: what it returned for the batch and for `classes` [H] (None: all). targets: int64 [B].
    """
    own = getattr(learner, "cross_entropy", None)
    if own is not None:
        return own(f, g, targets, classes)
    return alterable_cross_entropy(f, g, targets, learner.logit_scale)


def other_losses(learner, images, f):
    """The learner's other losses, "maintained unchanged" (end of section 3.2): a scalar; 0 if none.

    images: as its image_features takes them. f: [B, d], what that returned.
    """
    own = getattr(learner, "other_losses", None)
    return 0.0 if own is None else own(images, f)


def backbone_loss(learner, images, labels):
    """The backbone without MAO: cross-entropy over all its classes, plus its other losses (Eq. 2).

    images: B of them, as the learner's image_features takes them. labels: int64 [B], in 0..C-1.
    Returns a scalar with a gradient.
    """
    f = learner.image_features(images)  # f(P_v, I)               [B, d]
    g = learner.text_features()  # g(P_t) of all classes          [C, d]
    loss = cross_entropy(learner, f, g, labels)  # Eqs. 2 and 3
    return loss + other_losses(learner, images, f)


# 3.2 Base classes. "Data-Driven Enhancement" is sampler.py; "Alterable Regularization" is reg-B.
# Appendix A reads the changing candidates as a regularizer; its Eqs. 9 and 10 have no code.


def candidates(labels):
    """The candidate set C~'_b of a batch: its classes without duplicates (section 3.2).

    There are H <= b*K, since a class may come up twice; the paper's "b log K" is a slip.
    labels: int64 [b*K]. Returns `classes` [H], the sorted unique labels, and `targets` [b*K], the
    labels as positions in `classes`: classes[targets] == labels.
    ValueError: labels is not a 1-D integer tensor.
    """
    check_labels(labels)
    return labels.unique(return_inverse=True)


def base_loss(learner, images, labels):
    """reg-B: cross-entropy over the classes present in a batch of hard negatives only (Eq. 6).

    images: I'_b, b*K of them, as `HardNegativeSampler` picks them and the learner's image_features
    takes them. labels: int64 [b*K], base classes. Returns a scalar with a gradient. ValueError: the
    learner ignores `classes`, which would make the loss wrong.
    """
    classes, targets = candidates(labels)  # C~'_b [H], and each image's class in it [b*K]
    f = learner.image_features(images)  # f(P_v, I'_b)            [b*K, d]
    g = learner.text_features(classes)  # g(C~'_b)                [H, d]
    if g.shape[-2] != len(classes):
        raise ValueError(f"text_features gave {g.shape[-2]} rows for {len(classes)} `classes`")
    # `similarity_logits` scales g to unit length (Eq. 5); then the mean of -log p over H (Eq. 6)
    loss = cross_entropy(learner, f, g, targets, classes)
    return loss + other_losses(learner, images, f)  # these: over all base classes, unchanged


# 3.3 New classes. "Data-Driven Enhancement" is pseudolabel.py; "Alterable Regularization" is reg-N.


def new_loss(learner, images, pseudo_labels):
    """reg-N: cross-entropy over all new classes C_n, which supersede the base classes (Eq. 8).

    images: I_n, B of them without labels, as the learner's image_features takes them.
    pseudo_labels: int64 [B], t^_n of Eq. 7, in 0..C_n-1. The learner already holds the new classes:
    run.py calls `set_classes` before the phase, which tokenizes the names once. Features are
    normalized in each loss. Returns a scalar with a gradient.
    """
    f = learner.image_features(images)  # f(P_v, I_n)             [B, d]
    g = learner.text_features()  # g(C_n), the new classes alone  [C_n, d]
    loss = cross_entropy(learner, f, g, pseudo_labels)  # Eq. 8
    return loss + other_losses(learner, images, f)


# Without these checks, wrong shapes would silently broadcast to a wrong loss.


def check_features(f, g):
    """ValueError: shapes other than f [B, d] and g [H, d], or g [B, H, d]."""
    one_width = f.ndim == 2 and g.ndim in (2, 3) and g.shape[-1] == f.shape[1]
    if not one_width or (g.ndim == 3 and len(g) != len(f)):
        shapes = f"{tuple(f.shape)} and text features {tuple(g.shape)}"
        raise ValueError(f"image features {shapes} must be [B, d] and [H, d] or [B, H, d]")


def check_labels(labels):
    """ValueError: labels other than ints in one dimension, [B]."""
    if labels.ndim != 1 or labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(f"labels must be ints [B], not {labels.dtype} {tuple(labels.shape)}")
