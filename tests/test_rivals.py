"""The six rivals: logits, losses and gradients equal those of their authors' modules (ProDA: of a port); their sizes.

The figures lie in `parity/*.npz`; weights and inputs are drawn as in test_parity.py.
"""

import json
import pathlib

import clip
import numpy as np
import pytest
import torch
from test_parity import LOSSES, close, draw, draw_prompts, frozen_clip

from encoders import ZeroShot, load_clip
from mao import backbone_loss, base_loss, new_loss
from rivals import RIVALS

NAMES = ["blue circle", "red star", "green_hexagon"]
SIZES = {
    "cocoop": {"n_ctx": 4},
    "kgcoop": {"n_ctx": 4},
    "tcp": {"n_ctx": 4, "insert_before": 8},
    "coprompt": {"n_ctx": 2, "depth": 3},
    "dept": {"n_ctx": 4},
    "proda": {"n_ctx": 4, "prompts": 8},
}


@pytest.fixture(scope="module")
def small():
    return load_clip("demo")[0]


@pytest.fixture(scope="module", params=sorted(SIZES))
def case(request):
    """(name, figures, our learner in float64, images or views, labels) of a rival."""
    figures = dict(np.load(pathlib.Path(__file__).parent / "parity" / f"{request.param}.npz"))
    meta = json.loads(str(figures["meta"]))
    learner = RIVALS[request.param](frozen_clip(meta["clip"]), meta["classnames"], **SIZES[request.param])
    assert {name: list(p.shape) for name, p in learner.named_parameters()} == meta["learnable"]
    draw_prompts(learner, meta["one_plus"])
    images = draw("images", (6, 3, 48, 48), 1.0)
    if request.param == "coprompt":
        images = images, draw("images2", (6, 3, 48, 48), 1.0)
        bank = draw("bank", (3, 7, 512), 1.0)
        learner.bank, learner.sentence = bank / bank.norm(dim=-1, keepdim=True), meta["settings"]["sentence"]
    if request.param == "proda":
        learner.drawn = meta["settings"]["drawn"]
    return request.param, figures, learner, images, torch.tensor(meta["labels"])


def test_logits(case):
    name, figures, learner, images, labels = case
    f = learner.image_features(images)
    g = learner.text_features()
    if name == "proda":
        close(learner.training_logits(f, g, labels), figures["logits"])
        close(learner.logit_scale * f @ g.mean(dim=0).T, figures["mean_logits"])
    elif name == "dept":
        similarity = learner.logit_scale * (f / f.norm(dim=1, keepdim=True)) @ (g / g.norm(dim=1, keepdim=True)).T
        close(similarity, figures["logits"])
        close(learner.head(torch.cat([learner.film_text(g[labels]), learner.film_image(f)])), figures["head_logits"])
    else:
        close(learner.logits(f, g), figures["logits"])
    with torch.no_grad():
        close(learner(images), figures.get("test_logits", figures["logits"]))


@pytest.mark.parametrize("which", LOSSES)
def test_losses_and_gradients(case, which):
    name, figures, learner, images, labels = case
    if f"{which}.loss" not in figures:
        assert name in ("dept", "proda") and which.endswith("_ce")  # they have no single similarity to take alone
        return
    learner.zero_grad()
    loss = LOSSES[which](learner, images, labels)
    loss.backward()
    close(loss, figures[f"{which}.loss"], 1e-12)
    for parameter_name, parameter in learner.named_parameters():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        if f"{which}.grad.{parameter_name}" not in figures:
            assert which.endswith("_ce") and parameter.grad.abs().max() == 0, parameter_name
            continue
        theirs = figures[f"{which}.grad.{parameter_name}"]
        close(parameter.grad[: len(theirs)], theirs)
        close(parameter.grad.norm(), figures[f"{which}.gradnorm.{parameter_name}"], 1e-12)


def test_each_loss_term(case):
    name, figures, learner, images, labels = case
    f, g = learner.image_features(images), learner.text_features()
    if name in ("kgcoop", "tcp"):
        close(learner.other_losses(images, f), 8 * figures["anchor"], 1e-12)
    elif name == "coprompt":
        close(learner.other_losses(images, f), 8 * (figures["text_consistency"] + figures["image_consistency"]), 1e-12)
    elif name == "proda":
        close(learner.other_losses(images, f), 0.1 * figures["orthogonality"], 1e-12)
        close(learner.cross_entropy(f, g, labels, None), figures["ce"], 1e-12)
    elif name == "dept":
        for weight, term in ((0, "ce_similarity"), (1, "ce_linear")):
            learner.linear_weight = weight
            close(learner.cross_entropy(f, g, labels, None), figures[term], 1e-12)
        learner.linear_weight = 0.7


@pytest.fixture(scope="module")
def large():
    """A CLIP of ViT-B/16's sizes without its numbers."""
    with torch.device("meta"):
        model = clip.model.CLIP(512, 224, 12, 768, 16, 77, 49408, 512, 8, 12)
    model.token_embedding = torch.nn.Embedding(49408, 512)  # the parts that a constructor computes with
    model.positional_embedding = torch.nn.Parameter(torch.zeros(77, 512))
    return model


@pytest.mark.parametrize(
    "name, count",
    [
        ("cocoop", 35_360),
        ("kgcoop", 2_048),
        ("tcp", 331_904),
        ("dept", 8_192 + 2_048 + 513 * 3),
        ("proda", 262_144),
        ("coprompt", 4_740_096 + 262_144),
    ],
)
def test_parameter_counts(name, count, large, monkeypatch):
    for module in ("kgcoop", "tcp"):  # no numbers, no anchors
        monkeypatch.setattr(f"rivals.{module}.zero_shot_text_features", lambda *arguments: torch.zeros(len(NAMES), 512))
    learner = RIVALS[name](large, NAMES)
    assert sum(p.numel() for p in learner.parameters()) == count


@pytest.mark.parametrize("name", sorted(RIVALS))
def test_moves_between_classes_and_candidates(small, name):
    torch.manual_seed(1)
    learner = RIVALS[name](small, NAMES)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        logits = learner(images)
        other = RIVALS[name](small, NAMES)
        other.load_state_dict(learner.state_dict())
        assert torch.allclose(other(images), logits, atol=1e-4)
        for classes in ([2, 0], [2, 0, 1]):
            assert torch.allclose(learner(images, torch.tensor(classes)), logits[:, classes], atol=1e-4)
        learner.set_classes(NAMES[1:] + ["gray moon"])
        moved = learner(images)
        assert moved.shape == (2, 3)
        if name != "dept":  # whose head is for the first classes
            assert torch.allclose(moved[:, :2], logits[:, 1:], atol=1e-4)
        learner.set_classes(NAMES)
        assert torch.allclose(learner(images), logits, atol=1e-4)


def test_depts_head_answers_for_its_own_classes_alone(small):
    learner = RIVALS["dept"](small, NAMES)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        learner.head.bias.fill_(1000.0)
        base = learner(images)
        learner.set_classes(["gray moon", "pink cross"])
        new = learner(images)
    assert base.min() > 500 and new.abs().max() <= learner.logit_scale
    new_loss(learner, images, torch.tensor([0, 1])).backward()
    assert learner.head.weight.grad is None and learner.ctx.grad.abs().max() > 0


def test_cocoop_wants_images_first(small):
    with pytest.raises(ValueError, match="call image_features before text_features"):
        RIVALS["cocoop"](small, NAMES).text_features()


def test_proda_draws_every_prompt_once_a_round(small):
    learner = RIVALS["proda"](small, NAMES, n_ctx=4, prompts=8)
    seen = []
    learner.encode_prompt = lambda k, classes=None: seen.append(k) or torch.zeros(3, 128)
    for _ in range(2):
        learner.text_features()
    assert sorted(seen) == list(range(8))


def test_coprompt_needs_sentences(small):
    learner = RIVALS["coprompt"](small, NAMES)
    images = torch.randn(2, 3, 32, 32)
    with pytest.raises(ValueError, match="coprompt needs sentences"):
        backbone_loss(learner, images, torch.tensor([0, 1]))
    learner.sentences = {"blue circle": ["round"], "red star": ["five tips"]}
    with pytest.raises(ValueError, match="none for the class 'green_hexagon'"):
        backbone_loss(learner, images, torch.tensor([0, 1]))
    learner.sentences["green hexagon"] = ["six sides", "flat"]
    with pytest.raises(ValueError, match="as many sentences for each class"):
        backbone_loss(learner, images, torch.tensor([0, 1]))
    learner.sentences["green hexagon"] = ["six sides"]
    assert backbone_loss(learner, images, torch.tensor([0, 1])).isfinite()


def test_tcp_refuses_a_layer_that_is_not_there(small):
    assert RIVALS["tcp"](small, NAMES).insert_before == 2
    with pytest.raises(ValueError, match="--insert-before 4 does not fit: this CLIP takes 1 to 3"):
        RIVALS["tcp"](small, NAMES, insert_before=4)


def test_a_learner_that_ignores_the_candidates_is_caught(small):
    """Its loss would be wrong without a word."""
    learner = ZeroShot(small, NAMES)
    learner.text_features = lambda classes=None: learner.features
    with pytest.raises(ValueError, match="gave 3 rows for 2 classes"):
        base_loss(learner, torch.randn(2, 3, 32, 32), torch.tensor([2, 0]))
