"""The frozen CLIP: our plain encoders equal clip's own, our fast encoders equal the plain ones; checkpoints."""

import clip
import pytest
import torch

import demo
import images as images_module
from backbones import CoOp, MaPLe, PromptSRC
from encoders import (
    DEMO_WEIGHTS,
    ZeroShot,
    encode_images,
    encode_images_fast,
    encode_text,
    encode_text_fast,
    load_clip,
    name_finder,
    tokenize,
)

NAMES = ["blue circle", "red star", "green_hexagon"]


@pytest.fixture(scope="module")
def small():
    return load_clip("demo")[0]


def clips_own(features):
    return features / features.norm(dim=-1, keepdim=True)


def test_we_run_clip_as_clip_does(small):
    images = torch.randn(3, 3, 32, 32)
    texts = clip.tokenize([f"a photo of a {name.replace('_', ' ')}." for name in NAMES])
    zero_shot = ZeroShot(small, NAMES)
    assert torch.allclose(zero_shot.image_features(images), clips_own(small.encode_image(images)), atol=1e-6)
    assert torch.allclose(zero_shot.text_features(), clips_own(small.encode_text(texts)), atol=1e-6)
    embedded = small.token_embedding(texts)
    assert torch.equal(encode_text(small, embedded, texts.argmax(-1)), small.encode_text(texts))  # plain: the same bits
    assert torch.equal(encode_images(small, images), small.encode_image(images))


def test_we_see_pixels_as_clip_does(small):
    _, preprocess = clip.load(str(DEMO_WEIGHTS), device="cpu")
    image = demo.read("ice/test/blue circle/00").resize((50, 40))
    ours = images_module.model_input(images_module.test_transform(32)(image)[None])[0]
    assert torch.allclose(ours, preprocess(image), atol=1e-6)


def test_clip_itself_opens_our_weights(small):
    assert DEMO_WEIGHTS.stat().st_size <= 18e6
    theirs, _ = clip.load(str(DEMO_WEIGHTS), device="cpu")
    assert all(torch.equal(a, b) for a, b in zip(theirs.state_dict().values(), small.state_dict().values()))


@pytest.mark.parametrize("learner_class", [CoOp, MaPLe, PromptSRC])
def test_the_fast_encoders_equal_the_plain_ones(monkeypatch, learner_class):
    """Values and the gradients of all prompts, in float64: all 77 positions and every layer in full, or the savings."""
    monkeypatch.setattr(clip.model.LayerNorm, "forward", torch.nn.LayerNorm.forward)  # no cast to float32
    torch.manual_seed(0)
    model = load_clip("demo")[0].double()
    learner = learner_class(model, NAMES)
    deep = learner.deep_text()
    prompts, ends = learner.prompts()
    assert prompts.shape == (3, 77, 128) and len(deep) == (0 if learner_class is CoOp else 3)
    text = [
        encode_text(model, prompts, ends, deep),
        encode_text_fast(model, learner.prefix(), learner.suffix, learner.ends, deep),
    ]
    images = torch.randn(2, 3, 32, 32).double()
    context, *deep = learner.visual_contexts() if learner.prompts_images else [None]
    visual = [encode(model, images, context, deep) for encode in (encode_images, encode_images_fast)]
    weights = [torch.randn_like(features[0]) for features in (text, visual)]
    gradients = []
    for g, f in zip(text, visual):
        learner.zero_grad()
        ((g * weights[0]).sum() + (f * weights[1]).sum()).backward(retain_graph=True)
        gradients.append([p.grad.clone() for p in learner.parameters()])
    for plain, fast in [text, visual, *zip(*gradients)]:
        assert torch.allclose(plain, fast, rtol=0, atol=1e-12) and plain.abs().max() > 0


def test_contexts_of_each_prompts_own(monkeypatch, small):
    """[H, L, w] before one layer, nothing before another: fast equals plain in float64, values and gradients."""
    monkeypatch.setattr(clip.model.LayerNorm, "forward", torch.nn.LayerNorm.forward)  # no cast to float32
    torch.manual_seed(0)
    model = load_clip("demo")[0].double()
    learner = CoOp(model, NAMES)
    shared, own = (torch.randn(*shape, 4, 128).double().requires_grad_() for shape in ((), (3,)))
    prompts, ends = learner.prompts()
    suffix = torch.cat([learner.ctx.expand(3, -1, -1), learner.suffix], dim=1)
    results = []
    for deep in ([None, own], [own, None, own], [own[0], None]):
        plain = encode_text(model, prompts, ends, deep)
        if deep[0] is None or deep[0].ndim == 3:
            fast = encode_text_fast(model, learner.start, suffix, 4 + learner.ends, deep)
        else:  # one for all
            fast = encode_text_fast(model, learner.prefix(), learner.suffix, learner.ends, deep)
        weight = torch.randn_like(plain)
        for g in (plain, fast):
            results.append([g, *torch.autograd.grad((g * weight).sum(), [learner.ctx, own])])
    for plain, fast in zip(results[::2], results[1::2]):
        for a, b in zip(plain, fast):
            assert torch.allclose(a, b, rtol=0, atol=1e-12) and a.abs().max() > 0
    repeated = encode_text(model, prompts, ends, [None, shared.expand(3, -1, -1)])
    assert torch.equal(repeated, encode_text(model, prompts, ends, [None, shared]))
    with pytest.raises(ValueError, match="need a prefix of the start token alone, not of 5"):
        encode_text_fast(model, learner.prefix(), learner.suffix, learner.ends, [None, own])
    # Autocast may give contexts another type than the tokens have; a GPU's does not make them equal.
    encode_text_fast(model, learner.start, suffix, 4 + learner.ends, [None, own.float()])


def test_tokens_are_cut_after_the_longest(small):
    tokens, ends = tokenize(small, ["a", "a photo of a blue circle."])
    assert tokens.shape[1] == ends.max() + 1 and (tokens[torch.arange(2), ends] == 49407).all()


def test_the_name_with_the_most_tokens_is_named(small):
    """Not the longest text: digits and signs take a token each."""
    long, many = "antidisestablishmentarianism " * 8, "1 2 3 4 5 6 7 8 9 " * 9
    assert len(long) > len(many)
    with pytest.raises(ValueError, match=r"the prompt '1 2 3 4 5 6 7 8 9 1  ... .* does not fit CLIP's 77 positions"):
        tokenize(small, [long, many])


def test_a_name_is_found_as_it_is_before_as_clip_reads_it():
    find = name_finder(["Old_Gate", "old gate", "moon"])
    assert [find(name) for name in ("old gate", "OLD gate", "Moon", "sun")] == ["old gate", "Old_Gate", "moon", None]
