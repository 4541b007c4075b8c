"""Logits, losses and gradients equal those of the authors' own modules (float64, CPU).

`parity/*.npz` holds their figures. Weights and inputs are drawn here by the recipe that drew theirs, so no pretrained
weights are needed.
"""

import json
import pathlib
import zlib

import numpy as np
import pytest
import torch
from clip.model import CLIP

from backbones import BACKBONES
from mao import alterable_cross_entropy, backbone_loss, base_loss, candidates

SIZES = {
    "coop": {"n_ctx": 4},
    "maple": {"n_ctx": 2, "depth": 3},
    "promptsrc": {"n_ctx": 4, "n_ctx_vision": 4, "depth": 3, "depth_vision": 3},
}


def draw(name, shape, scale):
    state = np.random.RandomState((zlib.crc32(name.encode()) + 1) % 2**32)
    return torch.from_numpy(state.standard_normal(int(np.prod(shape))).reshape(shape) * scale)


def frozen_clip(sizes):
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


def draw_prompts(learner, one_plus=()):
    """Puts the recipe's numbers into a learner; parameters in `one_plus` are drawn around 1."""
    with torch.no_grad():
        for name, parameter in learner.named_parameters():
            start = 1 if name in one_plus else 0
            parameter.copy_(start + draw("learnable." + name, parameter.shape, 0.02))


def prompt_learner(backbone, figures, dtype):
    meta = json.loads(str(figures["meta"]))
    learner = BACKBONES[backbone](frozen_clip(meta["clip"]).to(dtype), meta["classnames"], **SIZES[backbone])
    assert {name: list(p.shape) for name, p in learner.named_parameters()} == meta["learnable"]
    draw_prompts(learner)
    return learner, draw("images", (6, 3, 48, 48), 1.0).to(dtype), torch.tensor(meta["labels"])


@pytest.fixture(scope="module", params=sorted(SIZES))
def case(request):
    """(the authors' figures, our learner in float64, images, labels) of a backbone."""
    figures = dict(np.load(pathlib.Path(__file__).parent / "parity" / f"{request.param}.npz"))
    return figures, *prompt_learner(request.param, figures, torch.float64)


def close(ours, theirs, tolerance=1e-6):
    ours = ours.detach().numpy()
    assert np.abs(ours - theirs).max() <= tolerance * np.abs(theirs).max()


def test_logits(case):
    figures, learner, images, _ = case
    close(learner(images), figures["logits"])


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


@pytest.mark.parametrize("name", LOSSES)
def test_losses_and_gradients(case, name):
    figures, learner, images, labels = case
    if f"{name}.loss" not in figures:  # a backbone without other losses: the step is the cross-entropy
        figures = {key.replace("_ce.", "_loss."): value for key, value in figures.items() if "_ce." in key}
    learner.zero_grad()
    loss = LOSSES[name](learner, images, labels)
    loss.backward()
    close(loss, figures[f"{name}.loss"])
    for parameter_name, parameter in learner.named_parameters():
        theirs = figures[f"{name}.grad.{parameter_name}"]
        close(parameter.grad[: len(theirs)], theirs)
        close(parameter.grad.norm(), figures[f"{name}.gradnorm.{parameter_name}"])


@pytest.mark.parametrize("case", ["promptsrc"], indirect=True)
def test_self_consistency_losses(case):
    figures, learner, images, _ = case
    f = learner.image_features(images)
    for text, image, names in ((1, 0, ["scl_text", "scl_logits"]), (0, 1, ["scl_image", "scl_logits"])):
        learner.text_weight, learner.image_weight = 25 * text, 10 * image
        close(learner.other_losses(images, f), sum(figures[name] for name in names))
    learner.text_weight, learner.image_weight = 25, 10


@pytest.mark.parametrize("backbone", sorted(SIZES))
def test_float32_follows(backbone):
    figures = np.load(pathlib.Path(__file__).parent / "parity" / f"{backbone}.npz")
    learner, images, _ = prompt_learner(backbone, figures, torch.float32)
    close(learner(images), figures["logits"], 1e-4)
