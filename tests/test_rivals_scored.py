"""CoCoOp, DePT and ProDA, whose scores are more than one similarity: what test_rivals.py leaves open.

Restricted terms one by one, candidates, frozen features, cost, names in other places, prompts kept for other classes.
"""

import json
import pathlib

import numpy as np
import pytest
import torch
from test_parity import close, draw, draw_prompts, frozen_clip

import rivals.cocoop
from encoders import encode_text, load_clip, tokenize
from mao import base_loss, candidates, cross_entropy
from rivals import CoCoOp, DePT, ProDA

NAMES = ["blue circle", "red star", "green_hexagon"]
SCORED = {"cocoop": (CoCoOp, {"n_ctx": 4}), "dept": (DePT, {"n_ctx": 4}), "proda": (ProDA, {"n_ctx": 4, "prompts": 8})}


@pytest.fixture(scope="module")
def small():
    return load_clip("demo")[0]


@pytest.fixture(scope="module", params=sorted(SCORED))
def case(request):
    """(name, figures, our learner in float64, image features [6, d], labels [6]) of a rival."""
    figures = dict(np.load(pathlib.Path(__file__).parent / "parity" / f"{request.param}.npz"))
    meta = json.loads(str(figures["meta"]))
    cls, options = SCORED[request.param]
    learner = cls(frozen_clip(meta["clip"]), meta["classnames"], **options)
    draw_prompts(learner, meta["one_plus"])
    learner.drawn = meta["settings"].get("drawn")  # of ProDA
    return request.param, figures, learner, learner.image_features(draw("images", (6, 3, 48, 48), 1.0)), meta["labels"]


def test_each_cross_entropy_over_the_candidates(case):
    name, figures, learner, f, labels = case
    classes, targets = candidates(torch.tensor(labels))
    g = learner.text_features(classes)
    if name == "dept":
        for weight, term in ((0, "ce_similarity"), (1, "ce_linear")):
            learner.linear_weight = weight
            close(cross_entropy(learner, f, g, targets, classes), figures[f"alterable_{term}"], 1e-12)
        learner.linear_weight = 0.7
    else:
        close(cross_entropy(learner, f, g, targets, classes), figures["alterable_ce"], 1e-12)


def test_candidates_are_rows_of_all_classes(case):
    """Encoding H classes gives what encoding all and slicing does. [H, d]; CoCoOp [B, H, d]; ProDA [P, H, d]."""
    _, _, learner, _, _ = case
    classes = torch.tensor([5, 0, 3])
    close(learner.text_features(classes), learner.text_features()[..., classes, :].detach().numpy(), 1e-12)


@pytest.mark.parametrize("cls", [CoCoOp, ProDA])
def test_frozen_features_in_place_of_images(small, cls):
    learner, images = cls(small, NAMES), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        features = learner.image_features(images)
        assert not cls.prompts_images and torch.equal(learner(features), learner(images))


def test_cocoop_runs_the_shared_prefix_once_per_image(small, monkeypatch):
    calls, encode = [], rivals.cocoop.encode_text_fast

    def counted(clip_model, prefix, suffix, *rest):
        calls.append((len(prefix), len(suffix)))
        return encode(clip_model, prefix, suffix, *rest)

    monkeypatch.setattr(rivals.cocoop, "encode_text_fast", counted)
    base_loss(CoCoOp(small, NAMES), torch.randn(3, 3, 32, 32), torch.tensor([2, 0, 2])).backward()
    assert calls == [(5, 2)] * 3  # start and 4 contexts, 2 candidates; 3 images


def test_depts_features_keep_their_length(small):
    """Its head takes them so; the similarity does not depend on it."""
    learner = DePT(small, NAMES)
    f, g = learner.image_features(torch.randn(2, 3, 32, 32)), learner.text_features()
    assert DePT.prompts_images
    assert not any(torch.allclose(x.norm(dim=-1), torch.ones(len(x)), atol=1e-2) for x in (f, g))
    learner.linear_weight = 0
    assert torch.allclose(learner.logits(f, g), learner.logits(3 * f, 2 * g), atol=1e-3)


def test_depts_prompts_load_while_it_holds_other_classes(small):
    """The head keeps the size of its own classes."""
    torch.manual_seed(1)
    trained, images = DePT(small, NAMES), torch.randn(2, 3, 32, 32)
    other = DePT(small, NAMES)
    other.set_classes(["gray moon", "pink cross"])
    other.load_state_dict(trained.state_dict())
    other.set_classes(NAMES)
    with torch.no_grad():
        assert torch.equal(other(images), trained(images))
    assert other.head.weight.shape == (3, 128)


def test_prodas_names_stand_in_front_in_the_middle_or_at_the_end(small):
    assert [ProDA(small, NAMES).place(k) for k in range(32)] == [0] * 8 + [8] * 8 + [16] * 16
    learner = ProDA(small, ["star"], n_ctx=2, prompts=4)
    words = ("a", "big")  # as contexts they must give what the tokenizer's own prompts do
    tokens, _ = tokenize(small, [" ".join(words)])
    with torch.no_grad():
        learner.ctx.copy_(small.token_embedding(tokens[0, 1:3]).expand(4, -1, -1))
        for k, text in enumerate(["star a big.", "a star big.", "a big star.", "a big star."]):
            tokens, ends = tokenize(small, [text])
            embedded = small.token_embedding(tokens)  # [1, T, w]
            padded = torch.nn.functional.pad(embedded, (0, 0, 0, small.context_length - embedded.shape[1]))
            plain = encode_text(small, padded, ends)  # [1, d]
            plain = plain / plain.norm(dim=-1, keepdim=True)
            assert torch.allclose(learner.encode_prompt(k), plain, atol=1e-5), text


def test_proda_tells_training_from_test_by_gradients(small):
    """With them g is that of the drawn prompts; without, the mean over all, whose length is below 1."""
    torch.manual_seed(1)
    learner = ProDA(small, NAMES, n_ctx=4, prompts=8)
    learner.drawn = list(range(8))
    drawn = learner.text_features(torch.tensor([2, 0]))
    assert drawn.shape == (8, 2, 128) and drawn.requires_grad
    with torch.no_grad():
        mean = learner.text_features(torch.tensor([2, 0]))
    assert torch.allclose(mean, drawn.mean(dim=0), atol=1e-6) and (mean.norm(dim=-1) < 1).all()
    f = learner.image_features(torch.randn(2, 3, 32, 32))
    assert torch.equal(learner.logits(f, mean), learner.logit_scale * f @ mean.T)
