"""KgCoOp, TCP and CoPrompt, which hold their features near frozen CLIP's: what test_rivals.py leaves open.

Loss terms one by one, losses over all classes, starting values, anchors and sentences of other classes, views.
"""

import json
import pathlib

import numpy as np
import pytest
import torch
from test_parity import close, draw, draw_prompts, frozen_clip

import rivals.tcp
from backbones import PromptLearner
from encoders import encode_text, load_clip, tokenize, zero_shot_text_features
from mao import base_loss, cross_entropy
from rivals import TCP, CoPrompt, KgCoOp

NAMES = ["blue circle", "red star", "green_hexagon"]
SENTENCES = {
    "blue circle": ["a round thing", "it is blue"],
    "red star": ["it has five tips", "it is red"],
    "green hexagon": ["it has six sides", "it is green"],
}


@pytest.fixture(scope="module")
def small():
    return load_clip("demo")[0]


def build(cls, clip_model):
    torch.manual_seed(1)
    learner = cls(clip_model, NAMES)
    if cls is CoPrompt:
        learner.sentences, learner.sentence = SENTENCES, 1
    return learner, torch.randn(2, 3, 32, 32)


def test_coprompts_terms_apart():
    figures = dict(np.load(pathlib.Path(__file__).parent / "parity" / "coprompt.npz"))
    meta = json.loads(str(figures["meta"]))
    learner = CoPrompt(frozen_clip(meta["clip"]), meta["classnames"], depth=3)
    views = draw("images", (6, 3, 48, 48), 1.0), draw("images2", (6, 3, 48, 48), 1.0)
    bank = draw("bank", (3, 7, 512), 1.0)
    draw_prompts(learner)
    with torch.no_grad():
        f, w = learner.image_features(views), learner.text_features()
        learner.bank, learner.sentence = w[None], 0  # the text is its own teacher: its term is 0
        image = learner.other_losses(views, f)
        close(image, 8 * figures["image_consistency"], 1e-12)
        learner.bank, learner.sentence, learner.encoded = bank / bank.norm(dim=-1, keepdim=True), 1, w
        close(learner.other_losses(views, f) - image, 8 * figures["text_consistency"], 1e-12)


@pytest.mark.parametrize("cls", [KgCoOp, TCP, CoPrompt])
def test_the_other_losses_see_all_classes_and_the_text_runs_once(cls, small, monkeypatch):
    learner, images = build(cls, small)
    calls = []
    for holder, name in ((PromptLearner, "unscaled_text_features"), (rivals.tcp, "encode_text_fast")):
        function = getattr(holder, name)
        monkeypatch.setattr(holder, name, lambda *a, function=function: calls.append(1) or function(*a))
    loss = base_loss(learner, images, torch.tensor([2, 0]))
    assert len(calls) == 1 and learner.encoded is None
    f = learner.image_features(images)
    g = learner.text_features(torch.tensor([0, 2]))
    assert g.shape == (2, 128) and learner.encoded.shape == (3, 128)
    expected = cross_entropy(learner, f, g, torch.tensor([1, 0])) + learner.other_losses(images, f)
    assert torch.allclose(loss, expected) and loss.requires_grad
    learner.set_classes([NAMES[0], NAMES[2]])  # other classes, other losses
    fewer = learner.other_losses(images, f)
    learner.set_classes(NAMES)
    assert cls is KgCoOp or not torch.allclose(fewer, learner.other_losses(images, f))


@pytest.mark.parametrize("cls", [KgCoOp, TCP, CoPrompt])
def test_half_precision_spares_the_other_losses(cls, small):
    learner, images = build(cls, small)
    with torch.no_grad():
        exact = learner.other_losses(images, learner.image_features(images))
        with torch.autocast("cpu", torch.bfloat16):
            rounded = learner.other_losses(images, learner.image_features(images))
    assert rounded.dtype == torch.float32 and abs(rounded - exact) < 0.01


def test_starting_values(small):
    tokens, _ = tokenize(small, ["a photo of a"])
    words = small.token_embedding(tokens[0, 1:5])  # [4, w]
    kgcoop, images = build(KgCoOp, small)
    assert torch.equal(kgcoop.ctx, words)
    assert kgcoop.other_losses(images, None).abs() < 1e-4  # the prompt is the anchor's words
    coprompt, _ = build(CoPrompt, small)
    assert torch.equal(coprompt.ctx, words[:2]) and torch.equal(coprompt.fixed, words[2:])
    assert len(coprompt.text_prompts) == 3  # all 4 layers, where the authors have 12
    first, *others = coprompt.projections
    assert all(torch.equal(first.weight, other.weight) for other in others)
    assert not torch.equal(first.weight, coprompt.proj.weight)
    assert (coprompt.adapter_text(torch.randn(5, 128)) >= 0).all()  # a ReLU after the second layer too
    tcp, _ = build(TCP, small)
    assert 0.018 < tcp.ctx.std() < 0.022
    assert 0.04 < tcp.meta_net.linear1.weight.std() < 0.06  # PyTorch's own, uniform in +-1/sqrt(128)


def test_tcp_is_its_formula_in_clips_own_encoder(small):
    """T_c before layer 2 of 4, in all 77 positions of every prompt."""
    learner, _ = build(TCP, small)
    net, w0 = learner.meta_net, zero_shot_text_features(small, NAMES, ["a photo of a {}."])
    hidden = w0 @ net.linear1.weight.T + net.linear1.bias
    inserted = hidden * (1.702 * hidden).sigmoid() @ net.linear2.weight.T + net.linear2.bias
    g = encode_text(small, *learner.prompts(), [None, inserted.reshape(3, 4, 128)])
    assert torch.allclose(learner.text_features(), g / g.norm(dim=1, keepdim=True), atol=1e-5)


@pytest.mark.parametrize("cls", [KgCoOp, TCP])
def test_anchors_are_those_of_the_classes(cls, small):
    learner = cls(small, NAMES, template="a sketch of a {}.")
    for names in (NAMES, ["gray moon"]):
        learner.set_classes(names)
        assert torch.equal(learner.anchors, zero_shot_text_features(small, names, ["a sketch of a {}."]))
    assert not learner.prompts_images and not learner.anchors.requires_grad


def test_coprompts_views(small):
    learner, first = build(CoPrompt, small)
    second = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        f = learner.image_features(first)
        for views in ((first, second), [first, second]):
            assert torch.equal(learner.image_features(views), f)
        pair = learner.other_losses([first, second], f)
        assert torch.equal(pair, learner.other_losses((first, second), f))
        assert torch.equal(learner.other_losses(first, f), learner.other_losses((first, first), f)) and pair > 0
        assert not torch.allclose(learner.other_losses(first, f), pair)
    assert learner.views == 2 and learner.prompts_images and "appendix D" in learner.new_phase_refused


def test_coprompts_sentences(small):
    learner, images = build(CoPrompt, small)
    f = learner.image_features(images).detach()
    learner.other_losses(images, f)
    assert learner.bank.shape == (2, 3, 128) and not learner.bank.requires_grad
    assert torch.allclose(learner.bank.norm(dim=-1), torch.ones(2, 3))
    assert torch.allclose(learner.bank[1, 2], zero_shot_text_features(small, ["it is green"], ["{}"])[0], atol=1e-5)
    with torch.no_grad():
        fixed = []
        for learner.sentence in (0, 1):
            fixed.append(learner.other_losses(images, f).item())
        learner.sentence = None
        drawn = {learner.other_losses(images, f).item() for _ in range(12)}  # one of the two, by chance
        assert drawn == set(fixed) and len(drawn) == 2
        learner.set_classes(["gray moon", "red star"])
        assert learner(images).shape == (2, 2)  # scores need no sentences
        with pytest.raises(ValueError, match="none for the class 'gray moon'"):
            learner.other_losses(images, f)


def test_settings_that_do_not_fit(small):
    with pytest.raises(ValueError, match="this CLIP takes 1 to 4 layers"):
        CoPrompt(small, NAMES, depth=12)
    with pytest.raises(ValueError, match="--insert-before 0 does not fit"):
        TCP(small, NAMES, insert_before=0)
    for cls in (KgCoOp, TCP, CoPrompt):
        with pytest.raises(ValueError, match="at least 1 is needed"):
            cls(small, NAMES, n_ctx=0)
