"""The frozen CLIP as we run it equals clip's own; prompt learners hold their prompts alone."""

import clip
import pytest
import safetensors.torch
import torch

import demo
import data
from backbones import CoOp, ZeroShot, encode_images, load_clip, tokenize

NAMES = ["blue circle", "red star", "green_hexagon"]


@pytest.fixture(scope="module")
def small():
    return load_clip(demo.WEIGHTS)[0]


def clips_own(features):
    return features / features.norm(dim=-1, keepdim=True)


def test_we_run_clip_as_clip_does(small):
    images = torch.randn(3, 3, 32, 32)
    texts = clip.tokenize([f"a photo of a {name.replace('_', ' ')}." for name in NAMES])
    assert torch.allclose(encode_images(small, images), clips_own(small.encode_image(images)), atol=1e-6)
    assert torch.allclose(ZeroShot(small, NAMES).text_features(), clips_own(small.encode_text(texts)), atol=1e-6)


def test_we_see_pixels_as_clip_does(small):
    _, preprocess = clip.load(str(demo.WEIGHTS), device="cpu")
    picture = demo.read("ice/test/blue circle/00").resize((50, 40))
    ours = data.normalise_pixels(data.test_transform(32)(picture)[None])[0]
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
