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
from mao import base_step, full_step

SIZES = {"coop": {"n_ctx": 4}}


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
            parameter.copy_(draw(name, parameter.shape, 0.05 if name.endswith("proj") else 0.02))
    return model


@pytest.fixture(scope="module", params=sorted(SIZES))
def case(request):
    """(the authors' figures, our learner, images, labels) of a backbone."""
    figures = np.load(pathlib.Path(__file__).parent / "parity" / f"{request.param}.npz")
    meta = json.loads(str(figures["meta"]))
    learner = BACKBONES[request.param](frozen_clip(meta["clip"]), meta["classnames"], **SIZES[request.param])
    learner.double()
    assert {name: list(p.shape) for name, p in learner.named_parameters()} == meta["learnable"]
    with torch.no_grad():
        for name, parameter in learner.named_parameters():
            parameter.copy_(draw("learnable." + name, parameter.shape, 0.02))
    return figures, learner, draw("images", (6, 3, 48, 48), 1.0), torch.tensor(meta["labels"])


def close(ours, theirs, tolerance=1e-6):
    ours = ours.detach().numpy()
    assert np.abs(ours - theirs).max() <= tolerance * np.abs(theirs).max()


def test_logits(case):
    figures, learner, images, _ = case
    close(learner(images), figures["logits"])


@pytest.mark.parametrize("name, step", [("full_ce", full_step), ("alterable_ce", base_step)])
def test_losses_and_gradients(case, name, step):
    figures, learner, images, labels = case
    learner.zero_grad()
    loss = step(learner, images, labels)
    loss.backward()
    close(loss, figures[f"{name}.loss"])
    for parameter_name, parameter in learner.named_parameters():
        theirs = figures[f"{name}.grad.{parameter_name}"]
        close(parameter.grad[: len(theirs)], theirs)
        close(parameter.grad.norm(), figures[f"{name}.gradnorm.{parameter_name}"])


def test_float32_follows(case):
    figures, learner, images, labels = case
    clip_model = learner.clip_model
    try:
        clip_model.float()
        learner.float().set_classes(json.loads(str(figures["meta"]))["classnames"])
        close(learner(images.float()), figures["logits"], 1e-4)
    finally:
        clip_model.double()
        learner.double().set_classes(json.loads(str(figures["meta"]))["classnames"])
