"""Logits, losses and gradients of the nine learners equal those of their authors' modules (ProDA: of a port).

`parity/*.npz` holds the authors' figures (float64, CPU). Weights and inputs are drawn here by the recipe that drew
theirs, so no pretrained weights are needed.
"""

import copy
import functools
import json
import pathlib
import zlib

import numpy as np
import pytest
import torch
from clip.model import CLIP

from backbones import BACKBONES
from baselines import BASELINES
from mao import alterable_cross_entropy, backbone_loss, base_loss, candidates, similarity_logits

LEARNERS = {**BACKBONES, **BASELINES}
SIZES = {  # of the authors' figures, where they are not our defaults
    "maple": {"depth": 3},
    "promptsrc": {"depth": 3, "depth_vision": 3},
    "coprompt": {"depth": 3},
    "dept": {"n_ctx": 4},
    "proda": {"n_ctx": 4, "prompts": 8},
}
PAPERS = ("coop", "maple", "promptsrc")


def draw(name, shape, scale):
    state = np.random.RandomState((zlib.crc32(name.encode()) + 1) % 2**32)
    return torch.from_numpy(state.standard_normal(int(np.prod(shape))).reshape(shape) * scale)


@functools.cache
def frozen_clip(**sizes):
    """A CLIP whose weights anyone can draw again."""
    model = CLIP(**sizes).double().eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if name == "logit_scale":
            parameter.fill_(np.log(100))
        elif name.endswith(".weight") and any(part.startswith("ln_") for part in name.split(".")):
            parameter.copy_(1 + draw(name, parameter.shape, 0.05))
        else:
            parameter.copy_(draw(name, parameter.shape, 0.05 if name.endswith(("proj", "text_projection")) else 0.02))
    return model


def drawn_case(name, dtype=torch.float64):
    """(name, the authors' figures, our learner, images [6, 3, h, w] or two views of them, labels [6])."""
    figures = dict(np.load(pathlib.Path(__file__).parent / "parity" / f"{name}.npz"))
    meta = json.loads(str(figures["meta"]))
    clip_model = copy.deepcopy(frozen_clip(**meta["clip"])).to(dtype)
    learner = LEARNERS[name](clip_model, meta["classnames"], **SIZES.get(name, {}))
    assert {name: list(p.shape) for name, p in learner.named_parameters()} == meta["learnable"]
    with torch.no_grad():
        for parameter_name, parameter in learner.named_parameters():
            start = 1 if parameter_name in meta.get("one_plus", ()) else 0
            parameter.copy_(start + draw("learnable." + parameter_name, parameter.shape, 0.02))
    images = draw("images", (6, 3, 48, 48), 1.0).to(dtype)
    if name == "coprompt":
        images, bank = (images, draw("images2", (6, 3, 48, 48), 1.0)), draw("bank", (3, 7, 512), 1.0)
        learner.bank, learner.sentence = bank / bank.norm(dim=-1, keepdim=True), meta["settings"]["sentence"]
    if name == "proda":
        learner.drawn = meta["settings"]["drawn"]
    return name, figures, learner, images, torch.tensor(meta["labels"])


@pytest.fixture(scope="module", params=list(LEARNERS))
def case(request):
    return drawn_case(request.param)


def close(ours, theirs, tolerance=1e-6):
    ours = ours.detach().numpy()
    assert np.abs(ours - theirs).max() <= tolerance * np.abs(theirs).max()


def test_logits(case):
    name, figures, learner, images, labels = case
    f, g = learner.image_features(images), learner.text_features()
    if name == "proda":
        close(learner.training_logits(f, g, labels), figures["logits"])
        close(learner.logit_scale * f @ g.mean(dim=0).T, figures["mean_logits"])
    elif name == "dept":
        close(similarity_logits(f, g, learner.logit_scale), figures["logits"])
        close(learner.head(torch.cat([learner.film_text(g[labels]), learner.film_image(f)])), figures["head_logits"])
    else:
        close(learner.logits(f, g), figures["logits"])
    with torch.no_grad():
        close(learner(images), figures.get("test_logits", figures["logits"]))


def cross_entropy(learner, images, labels, alterable):
    classes, targets = candidates(labels) if alterable else (None, labels)
    features = learner.image_features(images), learner.text_features(classes)
    return alterable_cross_entropy(*features, targets, learner.logit_scale)


LOSSES = {
    "full_ce": lambda *batch: cross_entropy(*batch, alterable=False),
    "alterable_ce": lambda *batch: cross_entropy(*batch, alterable=True),
    "full_loss": backbone_loss,
    "alterable_loss": base_loss,
}


@pytest.mark.parametrize("which", LOSSES)
def test_losses_and_gradients(case, which):
    name, figures, learner, images, labels = case
    tolerance = 1e-6 if name in PAPERS else 1e-12
    if name in ("dept", "proda") and which.endswith("_ce"):
        return  # they have no single similarity to take alone
    learner.zero_grad()
    loss = LOSSES[which](learner, images, labels)
    loss.backward()
    if name in ("coop", "maple"):  # without other losses: the step is the cross-entropy
        which = which.replace("loss", "ce")
    close(loss, figures[f"{which}.loss"], tolerance)
    for parameter_name, parameter in learner.named_parameters():
        theirs = figures[f"{which}.grad.{parameter_name}"]
        close(parameter.grad[: len(theirs)], theirs)
        close(parameter.grad.norm(), figures[f"{which}.gradnorm.{parameter_name}"], tolerance)


def test_each_loss_term(case):
    """The parts of the losses that test_losses_and_gradients has in sums alone."""
    name, figures, learner, images, labels = case
    f = learner.image_features(images)
    if name == "promptsrc":
        for text, image, terms in ((25, 0, ["scl_text", "scl_logits"]), (0, 10, ["scl_image", "scl_logits"])):
            learner.text_weight, learner.image_weight = text, image
            close(learner.other_losses(images, f), sum(figures[term] for term in terms))
        learner.text_weight, learner.image_weight = 25, 10
    if name == "coprompt":  # the image is its own teacher: its term is 0
        close(learner.other_losses((images[0], f.detach()), f), 8 * figures["text_consistency"], 1e-12)
    if name == "proda":
        close(learner.other_losses(images, f), 0.1 * figures["orthogonality"], 1e-12)
    for prefix, classes, targets in (("", None, labels), ("alterable_", *candidates(labels))):
        g = learner.text_features(classes)
        if name == "proda":
            close(learner.cross_entropy(f, g, targets, classes), figures[f"{prefix}ce"], 1e-12)
        if name == "dept":
            for learner.linear_weight, term in ((0, "ce_similarity"), (1, "ce_linear")):
                close(learner.cross_entropy(f, g, targets, classes), figures[prefix + term], 1e-12)
            learner.linear_weight = 0.7


@pytest.mark.parametrize("name", PAPERS)
def test_float32_follows(name):
    _, figures, learner, images, _ = drawn_case(name, torch.float32)
    close(learner(images), figures["logits"], 1e-4)
