"""What is special in the six baseline learners, and the other samplers and labelers: baselines/.

test_parity.py compares the learners with their authors' modules; test_backbones.py tests what all nine promise.
"""

import types

import numpy as np
import pytest
import torch
from test_backbones import NAMES, SENTENCES, build
from test_method import Plain

from backbones import ZeroShot
from baselines import TCP, CoCoOp, CoPrompt, DePT, KgCoOp, ProDA, labelers, samplers
from data import Task
from encoders import encode_text, encode_text_fast, load_clip, tokenize, zero_shot_text_features
from harness import demo, images
from mao import backbone_loss, base_loss, new_loss
from pseudolabel import PseudoLabeler


@pytest.fixture(scope="module")
def small():
    return load_clip("demo")[0]


# KgCoOp, TCP and CoPrompt ---------------------------------------------------------------------------------------------


def test_starting_values(small):
    tokens, _ = tokenize(small, ["a photo of a"])
    words = small.token_embedding(tokens[0, 1:5])  # [4, w]
    kgcoop, tcp, coprompt = (learner_class(small, NAMES) for learner_class in (KgCoOp, TCP, CoPrompt))
    assert torch.equal(kgcoop.ctx, words) and kgcoop.other_losses(None, None).abs() < 1e-4  # the words of the anchor
    assert 0.018 < tcp.ctx.std() < 0.022 and tcp.insert_before == 2  # of 4 layers
    assert 0.04 < tcp.meta_net.linear1.weight.std() < 0.06  # PyTorch's own, uniform in +-1/sqrt(128)
    assert torch.equal(coprompt.ctx, words[:2]) and torch.equal(coprompt.fixed, words[2:])
    assert len(coprompt.text_prompts) == 3  # all 4 layers, where the authors have 12
    first, *others = coprompt.projections
    assert all(torch.equal(first.weight, other.weight) for other in others)
    assert not torch.equal(first.weight, coprompt.proj.weight)
    assert (coprompt.adapter_text(torch.randn(5, 128)) >= 0).all()  # a ReLU after the second layer too


@pytest.mark.parametrize("learner_class", [KgCoOp, TCP])
def test_anchors_are_those_of_the_classes(learner_class, small):
    learner = learner_class(small, NAMES, template="a sketch of a {}.")
    for names in (NAMES, ["gray moon"]):
        learner.set_classes(names)
        assert torch.equal(learner.anchors, zero_shot_text_features(small, names, ["a sketch of a {}."]))


def test_tcp_is_its_formula_in_clips_own_encoder(small):
    """T_c before layer 2 of 4, in all 77 positions of every prompt."""
    learner, _ = build("tcp", small)
    net, w0 = learner.meta_net, zero_shot_text_features(small, NAMES, ["a photo of a {}."])
    hidden = w0 @ net.linear1.weight.T + net.linear1.bias
    inserted = hidden * (1.702 * hidden).sigmoid() @ net.linear2.weight.T + net.linear2.bias
    g = encode_text(small, *learner.prompts(), [None, inserted.reshape(3, 4, 128)])
    assert torch.allclose(learner.text_features(), g / g.norm(dim=1, keepdim=True), atol=1e-5)


def test_coprompt_takes_two_views(small):
    learner, first = build("coprompt", small)
    second = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        f = learner.image_features(first)
        assert torch.equal(learner.image_features((first, second)), f)
        pair, single = learner.other_losses((first, second), f), learner.other_losses(first, f)
    assert learner.other_losses((first, first), f) == single and pair > 0 and not torch.allclose(single, pair)
    assert learner.views == 2 and "appendix D" in learner.new_phase_refused


def test_coprompts_sentences(small):
    CoPrompt(small, demo.CLASSNAMES[:3]).check()  # the demo's captions are known
    learner, images = build("coprompt", small)
    learner.check()
    f = learner.image_features(images).detach()
    with torch.no_grad():
        fixed = []
        for learner.sentence in (0, 1):
            fixed.append(learner.other_losses(images, f).item())
        learner.sentence = None
        drawn = {learner.other_losses(images, f).item() for _ in range(12)}  # one of the two, by chance
    assert drawn == set(fixed) and len(drawn) == 2
    assert learner.bank.shape == (2, 3, 128) and not learner.bank.requires_grad
    assert torch.allclose(learner.bank, torch.nn.functional.normalize(learner.bank, dim=-1))
    assert torch.allclose(learner.bank[1, 2], zero_shot_text_features(small, ["it is green"], ["{}"])[0], atol=1e-5)
    learner.set_classes(["gray moon", "red star"])
    assert learner(images).shape == (2, 2)  # scores need no sentences
    with pytest.raises(ValueError, match="none for the class 'gray moon'"):
        learner.other_losses(images, f)


@pytest.mark.parametrize(
    "of_green, message",
    [
        (None, "coprompt needs sentences on the classes"),
        ([], "none for the class 'green_hexagon'"),
        (["six sides", "flat", "green"], "as many sentences for each class"),
        (["six sides", "flat " * 80], "one for the class 'green_hexagon' that is too long"),
    ],
)
def test_coprompt_needs_sentences(of_green, message, small):
    sentences = None if of_green is None else {**SENTENCES, "green hexagon": of_green}
    learner, images = CoPrompt(small, NAMES, sentences=sentences), torch.randn(2, 3, 32, 32)
    for use in (learner.check, lambda: backbone_loss(learner, images, torch.tensor([0, 1]))):
        with pytest.raises(ValueError, match=message):
            use()


# CoCoOp, DePT and ProDA, whose scores are more than one similarity ----------------------------------------------------


def test_cocoop_runs_the_shared_prefix_once_per_image(small, monkeypatch):
    calls, learner = [], CoCoOp(small, NAMES)

    def counted(clip_model, prefix, suffix, *rest):
        calls.append((len(prefix), len(suffix)))
        return encode_text_fast(clip_model, prefix, suffix, *rest)

    monkeypatch.setattr("baselines.cocoop.encode_text_fast", counted)
    with pytest.raises(ValueError, match="call image_features before text_features"):
        learner.text_features()
    base_loss(learner, torch.randn(3, 3, 32, 32), torch.tensor([2, 0, 2])).backward()
    assert calls == [(5, 2)] * 3  # start and 4 contexts, 2 candidates; 3 images


def test_depts_head_answers_for_its_own_classes_alone(small):
    learner, images = DePT(small, NAMES), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        learner.head.bias.fill_(1000.0)
        base = learner(images)
        learner.set_classes(["gray moon", "pink cross"])
        new = learner(images)
    assert base.min() > 500 and new.abs().max() <= learner.logit_scale
    new_loss(learner, images, torch.tensor([0, 1])).backward()
    assert learner.head.weight.grad is None and learner.ctx.grad.abs().max() > 0


def test_prodas_names_stand_in_front_in_the_middle_or_at_the_end(small):
    assert [ProDA(small, NAMES).place(k) for k in range(32)] == [0] * 8 + [8] * 8 + [16] * 16
    learner = ProDA(small, ["star"], n_ctx=2, prompts=4)
    tokens, _ = tokenize(small, ["a big"])  # as contexts they must give what the tokenizer's own prompts do
    with torch.no_grad():
        learner.ctx.copy_(small.token_embedding(tokens[0, 1:3]).expand(4, -1, -1))
        for k, text in enumerate(["star a big.", "a star big.", "a big star.", "a big star."]):
            assert torch.allclose(learner.encode_prompt(k), zero_shot_text_features(small, [text], ["{}"]), atol=1e-5)


def test_proda_tells_training_from_test_by_gradients(small):
    """With them g is that of the drawn prompts; without, the mean over all, whose length is below 1."""
    torch.manual_seed(1)
    learner, classes = ProDA(small, NAMES, n_ctx=4, prompts=8), torch.tensor([2, 0])
    with torch.no_grad():
        every = torch.stack([learner.encode_prompt(k, classes) for k in range(8)])  # [8, 2, d]
        mean = learner.text_features(classes)
    assert torch.equal(mean, every.mean(dim=0)) and (mean.norm(dim=-1) < 1).all()
    for _ in range(3):  # rounds
        drawn = torch.cat([learner.text_features(classes), learner.text_features(classes)])
        assert drawn.requires_grad and len(learner.order) == 0
        nearest = torch.cdist(drawn.flatten(1), every.flatten(1)).argmin(dim=1)
        assert sorted(nearest.tolist()) == list(range(8))  # every prompt once a round
    f = learner.image_features(torch.randn(2, 3, 32, 32))
    assert torch.equal(learner.logits(f, mean), learner.logit_scale * f @ mean.T)


# Samplers and labelers ------------------------------------------------------------------------------------------------

BASE = ["blue circle", "blue ring", "red star", "red cross", "green hexagon", "gray moon"]
NEW = ["pink heart", "cyan square"]


@pytest.fixture
def task():
    """Two images of the demo for each of six base and two new classes."""
    base, new = ([[f"ice/train/{c}/{i:02}", k, c] for k, c in enumerate(cs) for i in range(2)] for cs in (BASE, NEW))
    return Task((0.7, 1), BASE, base, demo.read, {}, NEW, [path for path, _, _ in new], demo.read, [0, 0, 1, 1])


def call(function, clip_model, task, **settings):
    """What a sampler's or a labeler's function returns."""
    args = {"anchors": 2, "top_k": 3, "seed": 1, "workers": 0, "unlabeled_shots": 2, "device": "cpu"} | settings
    args = types.SimpleNamespace(**args, cache="none", clip_sha256="0")
    return function(types.SimpleNamespace(clip_model=clip_model), task, args)


@pytest.mark.parametrize("name", samplers.SAMPLERS)
def test_every_sampler_gives_each_anchor_k_classes(name, task, small):
    labels, kind = np.arange(12) // 2, samplers.SAMPLERS[name]
    sampler, again, other = call(kind, small, task), call(kind, small, task), call(kind, small, task, seed=2)
    assert len(sampler) == 6 and sampler.batch_size == 6
    epochs, drawn = [list(sampler) for _ in range(5)], set()
    for epoch in epochs:
        groups = np.array(epoch).reshape(12, 3)  # 6 batches of b*K images, the anchor's first
        assert sorted(groups[:, 0]) == list(range(12))  # each image is an anchor once
        drawn |= {(labels[anchor], *sorted(labels[others])) for anchor, *others in groups}
    assert all(len(set(classes)) == 3 for classes in drawn)
    assert len(drawn) > 20 if name == "random-classes" else len(drawn) == 6  # drawn anew, or the same each time
    assert len({image for epoch in epochs for anchor, *others in np.reshape(epoch, (12, 3)) for image in others}) > 6
    again.set_epoch(2)
    assert list(again) == epochs[1] != epochs[0] != list(other)


def test_clip_text_takes_clips_own_features(task, small):
    g = zero_shot_text_features(small, BASE, [task.label_template])
    expected = (g @ g.T).argsort(dim=1, descending=True)[:, :3]
    assert call(samplers.clip_text, small, task).neighbors.tolist() == expected.tolist()


def test_clip_confusion_by_hand(task, small, monkeypatch):
    """Class 0 is mistaken for 1 in one image and for 2, more often, in the other."""
    p = torch.full((12, 6), 1 / 6)
    p[0], p[1] = torch.tensor([0.3, 0.5, 0.1, 0.1, 0, 0]), torch.tensor([0.2, 0.1, 0.6, 0.1, 0, 0])
    monkeypatch.setattr(ZeroShot, "forward", lambda self, images: p.log())
    neighbors = call(samplers.clip_confusion, small, task).neighbors.tolist()
    assert neighbors == [[0, 2, 1], [1, 0, 2], [2, 0, 1], [3, 0, 1], [4, 0, 1], [5, 0, 1]]


@pytest.mark.parametrize("pair", [False, True])
def test_confident_and_soft_labels_by_hand(pair, task, monkeypatch):
    """Images are features and 1/tau is 10: their confidences are 0.99995, 0.88 and 0.9989."""
    foundation = types.SimpleNamespace(logit_scale=10, text_features=lambda: torch.eye(2))
    foundation.image_features = lambda images: images[1] if pair else images
    monkeypatch.setattr(labelers, "ZeroShot", lambda *arguments: foundation)
    f, indices = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.28, 0.96]]), torch.tensor([3, 0, 1])
    images = (torch.arange(3), f) if pair else f
    label, same = call(labelers.confident, None, task)
    kept, *rest = label(images, indices)
    assert same is task and [part.tolist() for part in rest] == [[3, 1], [0, 1]]
    assert torch.equal(kept[1] if pair else kept, f[[0, 2]]) and (not pair or kept[0].tolist() == [0, 2])
    label, same = call(labelers.soft, None, task)
    kept, indices, p = label(images, indices)
    assert same is task and kept is images and indices.tolist() == [3, 0, 1]
    assert torch.allclose(p, (10 * f).softmax(dim=-1))


def test_the_soft_loss_by_hand():
    learner, images = Plain([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    own, other = torch.tensor([2.0, 0.0]).log_softmax(dim=0).tolist()  # log p of its own class, of the other
    loss = labelers.soft_new_loss(learner, images, torch.tensor([[0.75, 0.25], [0.0, 1.0]]))
    assert loss.item() == pytest.approx(-(0.75 * own + 0.25 * other + own) / 2, abs=1e-6)
    hard = labelers.soft_new_loss(learner, images, torch.eye(2))
    assert torch.allclose(hard, new_loss(learner, images, torch.tensor([0, 1])))
    learner.other_losses = lambda images, f: 1.0
    assert torch.allclose(labelers.soft_new_loss(learner, images, torch.eye(2)), hard + 1)


def test_whole_images_are_labeled_once(task, small):
    pixels = torch.stack([images.test_transform(32)(demo.read(path)) for path in task.new_train])
    expected = PseudoLabeler(ZeroShot(small, NEW))(images.model_input(pixels))[0]
    assert len(set(expected.tolist())) == 2
    label, same = call(labelers.whole, small, task)
    kept, indices, labels = label(pixels[:2], torch.tensor([3, 0]))  # the augmented views do not matter
    assert same is task and len(kept) == 2 and labels.tolist() == expected[[3, 0]].tolist()


def test_balanced_labels_by_hand(task, monkeypatch):
    """A class's own images come first, then others by its probability: class 0 has image 0, before image 1's 0.4."""
    p = torch.tensor([[0.34, 0.33, 0.33], [0.4, 0.5, 0.1], [0.05, 0.6, 0.35], [0.1, 0.1, 0.8]])
    monkeypatch.setattr(labelers, "of_whole_images", lambda *arguments: p)
    label, chosen = call(labelers.balanced, None, task)
    assert chosen.new_train == [task.new_train[i] for i in (0, 1, 2, 1, 3, 2)]
    assert chosen.new_answers == [0, 0, 1, 0, 1, 1] and len(task.new_train) == len(task.new_answers) == 4
    assert label(None, torch.arange(6).flip(0))[2].tolist() == [2, 2, 1, 1, 0, 0]
    assert len(labelers.most_confident(p, 9)[0]) == 3 * 4
