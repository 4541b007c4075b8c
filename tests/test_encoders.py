"""The frozen CLIP: our plain encoders equal clip's own, and our fast encoders equal the plain ones."""

import clip
import pytest
import torch

from backbones import CoOp, MaPLe, PromptSRC, ZeroShot
from encoders import encode_images, encode_images_fast, encode_text, encode_text_fast, load_clip, tokenize
from harness import demo, images
from harness.clips import DEMO_WEIGHTS
from harness.folders import name_finder

NAMES = ["blue circle", "red star", "green_hexagon"]


@pytest.fixture(scope="module")
def small():
    return load_clip("demo")[0]


@pytest.fixture
def double(monkeypatch):
    """The demo's CLIP in float64."""
    monkeypatch.setattr(clip.model.LayerNorm, "forward", torch.nn.LayerNorm.forward)  # no cast to float32
    torch.manual_seed(0)
    return load_clip("demo")[0].double()


def assert_close(plain, fast):
    assert torch.allclose(plain, fast, rtol=0, atol=1e-12) and plain.abs().max() > 0


def test_we_run_clip_as_clip_does(small):
    theirs, preprocess = clip.load(str(DEMO_WEIGHTS), device="cpu")
    assert DEMO_WEIGHTS.stat().st_size <= 18e6
    assert all(torch.equal(a, b) for a, b in zip(theirs.state_dict().values(), small.state_dict().values()))
    image = demo.read("ice/test/blue circle/00").resize((50, 40))
    pixels = images.model_input(images.test_transform(32)(image)[None])
    assert torch.allclose(pixels[0], preprocess(image), atol=1e-6)
    texts = clip.tokenize([f"a photo of a {name.replace('_', ' ')}." for name in NAMES])
    f, g, zero_shot = theirs.encode_image(pixels), theirs.encode_text(texts), ZeroShot(small, NAMES)
    assert torch.allclose(zero_shot.image_features(pixels), f / f.norm(dim=-1, keepdim=True), atol=1e-6)
    assert torch.allclose(zero_shot.text_features(), g / g.norm(dim=-1, keepdim=True), atol=1e-6)
    assert torch.equal(encode_text(small, small.token_embedding(texts), texts.argmax(-1)), g)  # plain: bit-identical
    assert torch.equal(encode_images(small, pixels), f)


@pytest.mark.parametrize("learner_class", [CoOp, MaPLe, PromptSRC])
def test_the_fast_encoders_equal_the_plain_ones(double, learner_class):
    """Values and the gradients of all prompts: all 77 positions and every layer in full, or the savings."""
    learner = learner_class(double, NAMES)
    deep = learner.deep_text()
    prompts, ends = learner.prompts()
    assert prompts.shape == (3, 77, 128) and len(deep) == (0 if learner_class is CoOp else 3)
    text = [
        encode_text(double, prompts, ends, deep),
        encode_text_fast(double, learner.prefix(), learner.suffix, learner.ends, deep),
    ]
    pixels = torch.randn(2, 3, 32, 32).double()
    context, *deep = learner.visual_contexts() if learner.prompts_images else [None]
    visual = [encode(double, pixels, context, deep) for encode in (encode_images, encode_images_fast)]
    weights, gradients = [torch.randn_like(features[0]) for features in (text, visual)], []
    for g, f in zip(text, visual):
        learner.zero_grad()
        ((g * weights[0]).sum() + (f * weights[1]).sum()).backward(retain_graph=True)
        gradients.append([p.grad.clone() for p in learner.parameters()])
    for plain, fast in [text, visual, *zip(*gradients)]:
        assert_close(plain, fast)
    unit = text[0] / text[0].norm(dim=-1, keepdim=True)
    assert_close(unit, learner.text_features())
    assert_close(unit, learner.plain_text_features())


def test_contexts_of_each_prompts_own(double):
    """[H, L, w] before one layer, nothing before another: fast equals plain, values and gradients."""
    learner = CoOp(double, NAMES)
    shared, own = (torch.randn(*shape, 4, 128).double().requires_grad_() for shape in ((), (3,)))
    prompts, ends = learner.prompts()
    suffix = torch.cat([learner.ctx.expand(3, -1, -1), learner.suffix], dim=1)
    of_all, of_each = (learner.prefix(), learner.suffix, learner.ends), (learner.start, suffix, 4 + learner.ends)
    for deep, parts in (([None, own], of_each), ([own, None, own], of_each), ([own[0], None], of_all)):
        plain, fast = encode_text(double, prompts, ends, deep), encode_text_fast(double, *parts, deep)
        weight, results = torch.randn_like(plain), []
        for g in (plain, fast):
            results.append([g, *torch.autograd.grad((g * weight).sum(), [learner.ctx, own], retain_graph=True)])
        for a, b in zip(*results):
            assert_close(a, b)
    repeated = encode_text(double, prompts, ends, [None, shared.expand(3, -1, -1)])
    assert torch.equal(repeated, encode_text(double, prompts, ends, [None, shared]))
    with pytest.raises(ValueError, match="need a prefix of the start token alone, not of 5"):
        encode_text_fast(double, *of_all, [None, own])
    # Autocast may give contexts another type than the tokens have; a GPU's does not make them equal.
    encode_text_fast(double, *of_each, [None, own.float()])


def test_tokens_end_after_the_longest_text_and_too_long_a_text_is_named(small):
    tokens, ends = tokenize(small, ["a", "a photo of a blue circle."])
    assert tokens.shape[1] == ends.max() + 1 and (tokens[torch.arange(2), ends] == 49407).all()
    long, many = "antidisestablishmentarianism " * 8, "1 2 3 4 5 6 7 8 9 " * 9
    assert len(long) > len(many)  # of the two, the one with the most tokens: digits and signs take one each
    with pytest.raises(ValueError, match=r"'1 2 3 4 5 6 7 8 9 1  \.\.\. .*' does not fit CLIP's 77 positions"):
        tokenize(small, [long, many])


def test_a_name_is_found_as_it_is_before_as_clip_reads_it():
    find = name_finder(["Old_Gate", "old gate", "moon"])
    assert [find(name) for name in ("old gate", "OLD gate", "Moon", "sun")] == ["old gate", "Old_Gate", "moon", None]
