"""Prompt learners: they hold their prompts alone, move between classes, and have the paper's sizes."""

import math

import clip
import pytest
import torch

from backbones import BACKBONES, TEMPLATES, CoOp, MaPLe, PromptLearner, PromptSRC
from encoders import ZeroShot, load_clip
from mao import base_loss

NAMES = ["blue circle", "red star", "green_hexagon"]


@pytest.fixture(scope="module")
def small():
    return load_clip("demo")[0]


def test_a_prompt_learner_saves_its_prompts_alone(small):
    learner = CoOp(small, NAMES)
    assert {name: tuple(value.shape) for name, value in learner.state_dict().items()} == {"ctx": (4, 128)}
    assert sum(p.numel() for p in CoOp(small, NAMES, n_ctx=16).parameters()) == 16 * 128
    assert not any(p.requires_grad for p in small.parameters())


def test_the_same_prompts_move_to_other_classes(small):
    torch.manual_seed(1)
    learner = CoOp(small, NAMES)
    images = torch.randn(2, 3, 32, 32)
    logits = learner(images)
    assert torch.allclose(learner(images, torch.tensor([2, 0])), logits[:, [2, 0]], atol=1e-4)  # other matrix sizes
    learner.set_classes(NAMES[1:] + ["gray moon"])
    assert torch.allclose(learner(images)[:, :2], logits[:, 1:], atol=1e-5)
    assert torch.equal(learner(learner.image_features(images)), learner(images))  # features in place of images


def test_words_as_context_are_the_zero_shot_prompt(small):
    learner = CoOp(small, NAMES, ctx_init="a photo of a")
    assert learner.ctx.shape == (4, 128)
    zero_shot = ZeroShot(small, NAMES, "a photo of a {}.")
    assert torch.allclose(learner.text_features(), zero_shot.text_features(), atol=1e-5)
    assert learner.logit_scale == pytest.approx(small.logit_scale.exp().item())


def test_a_name_that_does_not_fit(small):
    with pytest.raises(ValueError, match="does not fit CLIP's 77 positions"):
        CoOp(small, ["blue " * 80])
    with pytest.raises(ValueError, match="does not fit CLIP's 77 positions"):
        CoOp(small, NAMES, n_ctx=75)
    with pytest.raises(ValueError, match="at least 1 is needed"):
        CoOp(small, NAMES, n_ctx=0)


def test_a_resnet_clip_takes_coop():
    model = clip.model.CLIP(64, 32, (1, 1, 1, 1), 16, None, 77, 49408, 64, 1, 2).eval().requires_grad_(False)
    features = CoOp(model, NAMES).image_features(torch.randn(2, 3, 32, 32))
    assert torch.allclose(features.norm(dim=-1), torch.ones(2))


@pytest.mark.parametrize("backbone", ["coop", "maple", "promptsrc"])  # the rivals' own tests say what theirs do
def test_every_backbone_moves_between_classes_and_candidates(small, backbone):
    torch.manual_seed(1)
    learner = BACKBONES[backbone](small, NAMES)
    images = torch.randn(2, 3, 32, 32)
    logits = learner(images)
    assert torch.allclose(learner(images, torch.tensor([2, 0])), logits[:, [2, 0]], atol=1e-4)
    learner.set_classes(NAMES[1:] + ["gray moon"])
    assert torch.allclose(learner(images)[:, :2], logits[:, 1:], atol=1e-4)
    before = {name: value.clone() for name, value in learner.state_dict().items()}
    other = BACKBONES[backbone](small, NAMES)
    other.load_state_dict(before)
    assert torch.allclose(other(images), logits, atol=1e-4)
    assert learner.prompts_images == any(
        p.grad is not None
        for p in learner.parameters()
        if learner.image_features(images).requires_grad and not learner.image_features(images).sum().backward()
    )


def test_depths_come_from_the_model(small):
    assert len(MaPLe(small, NAMES).text_prompts) == 3  # of 4 layers, the first is ctx
    assert len(PromptSRC(small, NAMES).visual_prompts) == 4
    assert MaPLe(small, NAMES, depth=1).deep_text() == []
    for refused in (lambda: MaPLe(small, NAMES, depth=5), lambda: PromptSRC(small, NAMES, depth_vision=5)):
        with pytest.raises(ValueError, match="a prompt depth of 5 does not fit: this CLIP takes 1 to 4 layers"):
            refused()


def test_the_papers_parameter_counts():
    """At ViT-B/16's sizes: Table 3 has 8K for CoOp with 16 vectors and 3.55M for MaPLe."""
    with torch.device("meta"):
        large = clip.model.CLIP(512, 224, 12, 768, 16, 77, 49408, 512, 8, 12)
    large.token_embedding = torch.nn.Embedding(49408, 512)  # the one part that a constructor computes with
    large.positional_embedding = torch.nn.Parameter(torch.zeros(77, 512))
    count = {
        name: sum(p.numel() for p in cls(large, NAMES, **options).parameters())
        for name, cls, options in (("coop", CoOp, {"n_ctx": 16}), ("maple", MaPLe, {}), ("src", PromptSRC, {}))
    }
    assert count == {"coop": 8192, "maple": 3_555_072, "src": 4 * 9 * (512 + 768)}


def test_a_resnet_cannot_take_image_prompts():
    model = clip.model.CLIP(64, 32, (1, 1, 1, 1), 16, None, 77, 49408, 64, 1, 2).eval().requires_grad_(False)
    for cls in (MaPLe, PromptSRC):
        with pytest.raises(ValueError, match="this CLIP has a ResNet"):
            cls(model, NAMES)


def test_promptsrc_averages_its_epochs(small):
    """Gaussian weights around epoch 15: of two epochs the second weighs 1 / (1 + exp(-13.5))."""
    learner = PromptSRC(small, NAMES)
    with torch.no_grad():
        for epoch, value in ((1, 0.0), (2, 1.0)):
            for parameter in learner.parameters():
                parameter.fill_(value)
            learner.epoch_end(epoch, 2)
    assert learner.ctx.flatten()[0].item() == pytest.approx(1 / (1 + math.exp(-13.5)), abs=1e-7)
    assert len(set(TEMPLATES)) == 60 and all(template.count("{}") == 1 for template in TEMPLATES)


def test_promptsrc_under_mao_encodes_all_classes_once(small, monkeypatch):
    calls, encode = [], PromptLearner.text_features

    def counted(self, classes=None):
        calls.append(classes)
        return encode(self, classes)

    monkeypatch.setattr(PromptLearner, "text_features", counted)
    learner = PromptSRC(small, NAMES)
    loss = base_loss(learner, torch.randn(2, 3, 32, 32), torch.tensor([2, 0]))
    assert calls == [None] and loss.requires_grad
    # Frozen features that the caller has already are taken as they are.
    images = torch.randn(2, 3, 32, 32)
    f = learner.image_features(images)
    frozen = ZeroShot(small, NAMES).image_features(images)
    assert torch.equal(learner.image_features((images, frozen)), f)
    assert torch.equal(learner.other_losses(images, f), learner.other_losses((None, frozen), f))
    assert learner.other_losses((None, frozen + 1), f) > learner.other_losses((None, frozen), f)  # they are used
