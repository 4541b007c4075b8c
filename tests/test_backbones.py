"""What all nine prompt learners promise, and what is special in the paper's three: backbones.py."""

import math

import clip
import pytest
import torch
from test_parity import LEARNERS

from backbones import TEMPLATES, CoOp, Learner, MaPLe, PromptSRC, ZeroShot
from encoders import encode_text_fast, frozen_image_features, load_clip
from mao import backbone_loss, base_loss, cross_entropy, similarity_logits

NAMES = ["blue circle", "red star", "green_hexagon"]
SENTENCES = {
    "blue circle": ["a round thing", "it is blue"],
    "red star": ["it has five tips", "it is red"],
    "green hexagon": ["it has six sides", "it is green"],
}


@pytest.fixture(scope="module")
def small():
    return load_clip("demo")[0]


def build(name, clip_model):
    """A learner away from its start, whose losses draw nothing; and two images."""
    torch.manual_seed(1)
    learner = LEARNERS[name](clip_model, NAMES)
    if name == "coprompt":
        learner.sentences, learner.sentence = SENTENCES, 1
    learner.drawn = [5, 0, 3, 6]  # of ProDA
    with torch.no_grad():
        for parameter in learner.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    return learner, torch.randn(2, 3, 32, 32)


# All nine -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LEARNERS)
def test_prompts_move_between_classes_and_candidates(name, small):
    learner, images = build(name, small)
    assert list(learner.state_dict()) == [parameter for parameter, _ in learner.named_parameters()]  # no CLIP, no text
    assert learner.image_features(images).requires_grad == (name in ("maple", "promptsrc", "coprompt"))
    other = LEARNERS[name](small, NAMES)
    with torch.no_grad():
        logits = learner(images)
        for classes in ([2, 0], [2, 0, 1]):
            assert torch.allclose(learner(images, torch.tensor(classes)), logits[:, classes], atol=1e-4)
        other.set_classes(["gray moon", "pink cross"])
        other.load_state_dict(learner.state_dict())  # DePT's head too, which keeps the size of its own classes
        other.set_classes(NAMES)
        assert torch.allclose(other(images), logits, atol=1e-4)
        learner.set_classes([*NAMES[1:], "gray moon", "pink cross"])
        moved = learner(images)
        assert moved.shape == (2, 4)
        if name != "dept":  # whose head is for the first classes
            assert torch.allclose(moved[:, :2], logits[:, 1:], atol=1e-4)
        learner.set_classes(NAMES)
        assert torch.allclose(learner(images), logits, atol=1e-4)


@pytest.mark.parametrize("name", LEARNERS)
def test_images_come_as_pixels_or_in_a_pair_or_as_features(name, small):
    learner, images = build(name, small)
    f_0 = frozen_image_features(small, images)
    f = learner.image_features(images)
    losses = learner.other_losses(images, f)
    assert torch.equal(learner.image_features((images, f_0)), f)
    assert learner.other_losses((images, f_0), f) == losses
    if not learner.prompts_images:
        with torch.no_grad():
            assert torch.equal(learner.image_features(f_0), f) and torch.equal(learner(f_0), learner(images))
        assert torch.equal(learner.image_features((images, -f_0)), -f)  # they are not encoded again
    if learner.needs_frozen_features or learner.views == 2:
        assert learner.other_losses((images, -f_0), f) > losses
        assert learner.other_losses((None, f_0), f) == losses


@pytest.mark.parametrize("name", ["promptsrc", "kgcoop", "tcp", "coprompt"])
def test_other_losses_see_all_classes_and_the_text_is_encoded_once_per_step(name, small, monkeypatch):
    learner, images = build(name, small)
    calls = []

    def counted(*arguments):
        calls.append(len(arguments[2]))
        return encode_text_fast(*arguments)

    for module in ("backbones", "baselines.tcp"):
        monkeypatch.setattr(f"{module}.encode_text_fast", counted)
    loss = base_loss(learner, images, torch.tensor([2, 0]))
    assert calls == [3] and learner.kept is None and loss.requires_grad
    backbone_loss(learner, images, torch.tensor([2, 0]))
    assert calls == [3, 3] and learner.kept is None
    f, g = learner.image_features(images), learner.text_features(torch.tensor([0, 2]))
    assert g.shape == (2, 128)
    expected = cross_entropy(learner, f, g, torch.tensor([1, 0])) + learner.other_losses(images, f)
    assert torch.allclose(loss, expected)
    exact = learner.other_losses(images, f)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = learner.other_losses(images, learner.image_features(images))
    assert rounded.dtype == torch.float32 and abs(rounded - exact) < 0.01  # half precision spares them
    learner.text_features()
    learner.set_classes([NAMES[0], NAMES[2]])  # other classes, other losses
    assert not torch.allclose(learner.other_losses(images, f), exact)


@pytest.fixture(scope="module")
def large():
    """A CLIP of ViT-B/16's sizes without its numbers."""
    with torch.device("meta"):
        model = clip.model.CLIP(512, 224, 12, 768, 16, 77, 49408, 512, 8, 12)
    model.token_embedding = torch.nn.Embedding(49408, 512)  # the parts that a constructor computes with
    model.positional_embedding = torch.nn.Parameter(torch.zeros(77, 512))
    return model


# In the order of LEARNERS. Table 3 has 8K for CoOp with 16 vectors and 3.55M for MaPLe.
COUNTS = [8_192, 3_555_072, 46_080, 35_360, 2_048, 262_144, 331_904, 11_779, 5_002_240]


@pytest.mark.parametrize("name, count", list(zip(LEARNERS, COUNTS)))
def test_the_papers_parameter_counts(name, count, large, monkeypatch):
    monkeypatch.setattr("baselines.kgcoop.zero_shot_text_features", lambda *arguments: torch.zeros(3, 512))
    learner = LEARNERS[name](large, NAMES, **({"n_ctx": 16} if name == "coop" else {}))
    assert sum(parameter.numel() for parameter in learner.parameters()) == count


# What PromptLearner and Learner give ----------------------------------------------------------------------------------


def test_what_a_learner_leaves_out_has_a_default(small):
    class Rows(Learner):
        def text_features(self, classes=None):
            return torch.eye(128)[:3] if classes is None else torch.eye(128)[classes]

    learner, images = Rows(small), torch.randn(2, 3, 32, 32)
    f = learner.image_features(images)
    assert torch.equal(f, frozen_image_features(small, images)) and not learner.state_dict()
    assert learner.logit_scale == pytest.approx(small.logit_scale.exp().item())
    assert torch.equal(learner(images), similarity_logits(f, torch.eye(128)[:3], learner.logit_scale))
    labels = torch.tensor([2, 0])
    expected = cross_entropy(learner, f, torch.eye(128)[[0, 2]], torch.tensor([1, 0]))
    assert base_loss(learner, images, labels) == expected < backbone_loss(learner, images, labels)
    learner.check()
    learner.epoch_end(1, 1)


def test_words_as_context_are_the_zero_shot_prompt(small):
    learner = CoOp(small, NAMES, ctx_init="a photo of a")
    assert learner.ctx.shape == CoOp(small, NAMES).ctx.shape == (4, 128)
    zero_shot = ZeroShot(small, NAMES, "a photo of a {}.")
    assert torch.allclose(learner.text_features(), zero_shot.text_features(), atol=1e-5)


def test_settings_that_do_not_fit(small):
    for names, n_ctx in ((["blue " * 80], 4), (NAMES, 75)):
        with pytest.raises(ValueError, match="does not fit CLIP's 77 positions"):
            CoOp(small, names, n_ctx=n_ctx)
    for learner_class in LEARNERS.values():
        with pytest.raises(ValueError, match="0 context vectors: at least 1 is needed"):
            learner_class(small, NAMES, n_ctx=0)
    for name, options in (("maple", {"depth": 5}), ("promptsrc", {"depth_vision": 5}), ("coprompt", {"depth": 5})):
        with pytest.raises(ValueError, match="depth of 5 does not fit: this CLIP takes 1 to 4 layers"):
            LEARNERS[name](small, NAMES, **options)
    assert len(PromptSRC(small, NAMES).visual_prompts) == 4  # 9, or all that there are
    assert MaPLe(small, NAMES, depth=1).deep_text() == []
    for layer in (0, 4):
        with pytest.raises(ValueError, match=f"insert_before={layer} does not fit: this CLIP takes 1 to 3"):
            LEARNERS["tcp"](small, NAMES, insert_before=layer)


def test_a_resnet_takes_coop_and_no_image_prompts():
    model = clip.model.CLIP(64, 32, (1, 1, 1, 1), 16, None, 77, 49408, 64, 1, 2).eval().requires_grad_(False)
    features = CoOp(model, NAMES).image_features(torch.randn(2, 3, 32, 32))
    assert torch.allclose(features.norm(dim=-1), torch.ones(2))
    for name in ("maple", "promptsrc", "coprompt"):
        with pytest.raises(ValueError, match="this CLIP has a ResNet"):
            LEARNERS[name](model, NAMES)


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
