"""The frozen CLIP as we run it equals clip's own; prompt learners hold their prompts alone."""

import math

import clip
import pytest
import safetensors.torch
import torch

import demo
import loaders
from backbones import (BACKBONES, TEMPLATES, CoOp, MaPLe, PromptLearner, PromptSRC, ZeroShot, load_clip, tokenize)
from mao import base_step

NAMES = ["blue circle", "red star", "green_hexagon"]


@pytest.fixture(scope="module")
def small():
    return load_clip(demo.WEIGHTS)[0]


def clips_own(features):
    return features / features.norm(dim=-1, keepdim=True)


def test_we_run_clip_as_clip_does(small):
    images = torch.randn(3, 3, 32, 32)
    texts = clip.tokenize([f"a photo of a {name.replace('_', ' ')}." for name in NAMES])
    zero_shot = ZeroShot(small, NAMES)
    assert torch.allclose(zero_shot.image_features(images), clips_own(small.encode_image(images)), atol=1e-6)
    assert torch.allclose(zero_shot.text_features(), clips_own(small.encode_text(texts)), atol=1e-6)


def test_we_see_pixels_as_clip_does(small):
    _, preprocess = clip.load(str(demo.WEIGHTS), device="cpu")
    picture = demo.read("ice/test/blue circle/00").resize((50, 40))
    ours = loaders.model_input(loaders.test_transform(32)(picture)[None])[0]
    assert torch.allclose(ours, preprocess(picture), atol=1e-6)


def test_clip_itself_opens_our_weights(small):
    assert demo.WEIGHTS.stat().st_size <= 18e6
    theirs, _ = clip.load(str(demo.WEIGHTS), device="cpu")
    assert all(torch.equal(a, b) for a, b in zip(theirs.state_dict().values(), small.state_dict().values()))


def test_the_savings_on_the_text_side_change_nothing(monkeypatch):
    """All 77 positions, every prompt whole, every layer in full by clip's own modules: the same, in float64."""
    monkeypatch.setattr(clip.model.LayerNorm, "forward", torch.nn.LayerNorm.forward)  # no cast to float32
    model = load_clip(demo.WEIGHTS)[0].double()
    learner = CoOp(model, NAMES).double()
    tokens = clip.tokenize(["X X X X " + name.replace("_", " ") + "." for name in NAMES])
    embedded = model.token_embedding(tokens)  # [3, 77, w]
    x = torch.cat([embedded[:, :1], learner.ctx.expand(3, -1, -1), embedded[:, 5:]], dim=1) + model.positional_embedding
    x = model.ln_final(model.transformer(x.transpose(0, 1)).transpose(0, 1))
    whole = clips_own(x[torch.arange(3), tokens.argmax(-1)] @ model.text_projection)
    ours = learner.text_features()
    assert torch.allclose(ours, whole, rtol=0, atol=1e-12)
    weights = torch.randn_like(ours)
    gradients = [torch.autograd.grad((features * weights).sum(), learner.ctx)[0] for features in (ours, whole)]
    assert torch.allclose(*gradients, rtol=0, atol=1e-12)


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
    assert torch.equal(learner(images, torch.tensor([2, 0])), logits[:, [2, 0]])
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


class Evil:
    def __reduce__(self):
        return (print, ("code ran",))


def test_checkpoints(tmp_path, small, capsys):
    torch.save({"weights": Evil()}, tmp_path / "evil.pt")
    (tmp_path / "broken.pt").write_bytes(demo.WEIGHTS.read_bytes()[:100_000])
    torch.save({"some.other.model": torch.ones(3)}, tmp_path / "foreign.pt")
    for name in ("evil.pt", "broken.pt", "foreign.pt"):
        with pytest.raises(ValueError, match=f"{name} is not a CLIP checkpoint"):
            load_clip(str(tmp_path / name))
    assert "code ran" not in capsys.readouterr().out
    with pytest.raises(FileNotFoundError, match="there is no CLIP 'ViT-B/17'"):
        load_clip("ViT-B/17")
    safetensors.torch.save_file(small.state_dict(), tmp_path / "good.safetensors")
    again, _ = load_clip(str(tmp_path / "good.safetensors"))
    assert torch.equal(again.text_projection, small.text_projection)


def test_a_resnet_clip_takes_coop():
    model = clip.model.CLIP(64, 32, (1, 1, 1, 1), 16, None, 77, 49408, 64, 1, 2).eval().requires_grad_(False)
    features = CoOp(model, NAMES).image_features(torch.randn(2, 3, 32, 32))
    assert torch.allclose(features.norm(dim=-1), torch.ones(2))


def test_tokens_are_cut_after_the_longest(small):
    tokens, ends = tokenize(small, ["a", "a photo of a blue circle."])
    assert tokens.shape[1] == ends.max() + 1 and (tokens[torch.arange(2), ends] == 49407).all()


@pytest.mark.parametrize("backbone", sorted(BACKBONES))
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
    assert learner.prompts_images == any(p.grad is not None for p in learner.parameters()
                                         if learner.image_features(images).requires_grad
                                         and not learner.image_features(images).sum().backward())


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
    count = {name: sum(p.numel() for p in cls(large, NAMES, **options).parameters())
             for name, cls, options in (("coop", CoOp, {"n_ctx": 16}), ("maple", MaPLe, {}), ("src", PromptSRC, {}))}
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
    calls = []
    learner = PromptSRC(small, NAMES)
    monkeypatch.setattr(PromptSRC, "text_features",
                        lambda self, classes=None: calls.append(classes) or PromptLearner.text_features(self, classes))
    loss = base_step(learner, torch.randn(2, 3, 32, 32), torch.tensor([2, 0]))
    assert calls == [None] and loss.requires_grad
    # Frozen features that the caller has already are taken as they are.
    images = torch.randn(2, 3, 32, 32)
    f, g = learner.image_features(images), PromptLearner.text_features(learner)
    frozen = ZeroShot(small, NAMES).image_features(images)
    assert torch.equal(learner.other_losses(images, f, g), learner.other_losses(None, f, g, frozen_features=frozen))
