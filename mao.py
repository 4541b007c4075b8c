"""MAO's alterable cross-entropy, and the loss of one batch in each of its two phases (sections 3.1 to 3.3).

This file needs PyTorch alone: copy it. A prompt learner, the paper's "backbone", is any object with

    text_features(classes=None)   [H, d], unit length; `classes` an index tensor [H] where the batch's labels are (a
                                  loader's: on the CPU), or None for all classes
    image_features(images)        [B, d], unit length
    logit_scale                   the multiplier 1/tau, 100 for the released CLIPs

and, where it has losses besides the cross-entropy,

    other_losses(images, image_features, text_features, **shared)
                                  their sum, a scalar; text_features [C, d] are those of all classes. shared: what the
                                  caller has computed already (run.py: frozen_features [B, d], frozen CLIP's)

run.py wants a little more: a torch.nn.Module whose parameters are the prompts, made as Class(clip_model, names), and

    set_classes(classnames)       moves the same prompts to other classes
    prompts_images                whether image_features depends on the prompts; if not, it also takes frozen features
    epoch_end(epoch, epochs)      optional: called after each of a phase's epochs, from 1
"""

import torch
from torch.nn import functional as F


def alterable_cross_entropy(image_features, text_features, targets, logit_scale):
    """Cross-entropy over the candidates at hand, whichever they are (Eqs. 3, 5, 6 and 8).

    image_features: [B, d]. text_features: [H, d], one row a candidate class. targets: int64 [B], rows of
    `text_features`. logit_scale: 1/tau. Returns the mean over the batch, a scalar, in nats.
    """
    full = torch.promote_types(image_features.dtype, torch.float32)  # 1/tau is 100: half precision would not do here
    with torch.autocast(image_features.device.type, enabled=False):
        f = F.normalize(image_features.to(full), dim=-1)  # f(I)         [B, d]
        g = F.normalize(text_features.to(full), dim=-1)  # g^(C~'), Eq. 5   [H, d]
        logits = logit_scale * f @ g.T  # <g, f> / tau, Eq. 3      [B, H]
        return F.cross_entropy(logits, targets)  # Eq. 6 with the batch's classes, Eq. 8 with all new ones


def full_step(learner, images, labels, **shared):
    """The backbone's own loss of a batch: cross-entropy over all classes of the learner (section 3.1, Eqs. 2 and 3).

    images: [B, 3, h, w]. labels: int64 [B], from 0 in the learner's classes. shared: handed on to the learner's
    `other_losses`, if it has any. Returns a scalar with a gradient.
    """
    f = learner.image_features(images)  # f(P_v, I)    [B, d]
    g = learner.text_features()  # g(P_t), all of C    [n, d]
    loss = alterable_cross_entropy(f, g, labels.to(f.device), learner.logit_scale)
    return loss + learner.other_losses(images, f, g, **shared) if hasattr(learner, "other_losses") else loss


def candidates(labels):
    """The candidate set of a batch: its classes without duplicates, H <= b*K of them (section 3.2, C~'_b).

    labels: int64 [B]. Returns `classes` [H], the sorted unique labels, and `targets` [B], the labels as
    positions in `classes`, so that `classes[targets] == labels`.
    """
    return labels.unique(return_inverse=True)


def base_step(learner, images, labels):
    """The loss of one batch of hard negatives, reg-B (section 3.2, Eqs. 5 and 6).

    images: [b*K, 3, h, w], as `HardNegativeSampler` brings them. labels: int64 [b*K], base classes. The text
    encoder runs for the H candidates only, but where the learner has other losses: those are "maintained
    unchanged", over all classes. Returns a scalar with a gradient.
    """
    classes, targets = candidates(labels)  # C~'_b [H], c_i [b*K]
    f = learner.image_features(images)  # f(I'_b)  [b*K, d]
    targets = targets.to(f.device)
    if not hasattr(learner, "other_losses"):
        g = learner.text_features(classes)  # g(C~'_b)  [H, d]
        return alterable_cross_entropy(f, g, targets, learner.logit_scale)
    g = learner.text_features()  # g(C_b)  [C_b, d]
    return alterable_cross_entropy(f, g[classes], targets, learner.logit_scale) + learner.other_losses(images, f, g)


def new_step(learner, images, pseudo_labels, **shared):
    """The loss of one batch of unlabelled images, reg-N (section 3.3, Eq. 8).

    images: [B, 3, h, w], of new classes. pseudo_labels: int64 [B], t^_n of Eq. 7. The learner holds the new
    classes: they replace the base classes as candidates, all of them. shared: as in `full_step`. Returns a scalar.
    """
    return full_step(learner, images, pseudo_labels, **shared)
