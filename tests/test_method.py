"""The equations on cases worked by hand: mao.py, sampler.py, pseudolabel.py, and the scores of section 4.2."""

import math
import types
from itertools import islice

import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard

from harness import scores
from harness.options import paper_batch
from mao import alterable_cross_entropy, backbone_loss, base_loss, candidates, new_loss
from pseudolabel import PseudoLabeler
from sampler import HardNegativeSampler, minilm, nearest_classes


class Plain(torch.nn.Module):
    """A prompt learner of another project: what mao.py asks for and nothing else. Its images are features."""

    logit_scale = 2.0

    def __init__(self, text):
        super().__init__()
        self.text, self.asked = torch.nn.Parameter(torch.tensor(text)), []

    def text_features(self, classes=None):
        self.asked.append(classes)
        return self.text if classes is None else self.text[classes]

    def image_features(self, images):
        return images


# The losses -----------------------------------------------------------------------------------------------------------


def test_candidates_are_the_batch_classes_without_duplicates():
    classes, targets = candidates(torch.tensor([7, 2, 7, 4, 2, 2]))
    assert classes.tolist() == [2, 4, 7]  # H = 3 of 6
    assert targets.tolist() == [2, 0, 2, 1, 0, 0]


def test_alterable_cross_entropy_by_hand():
    # Unit features after Eq. 5: f = (1, 0), g = (0.6, 0.8) and (1, 0); 1/tau = 2; the first is right.
    f, g = torch.tensor([[3.0, 0.0]]), torch.tensor([[1.2, 1.6], [5.0, 0.0]])
    expected = math.log(math.exp(2 * 0.6) + math.exp(2 * 1.0)) - 2 * 0.6
    assert alterable_cross_entropy(f, g, torch.tensor([0]), 2.0).item() == pytest.approx(expected, abs=1e-6)


def test_base_loss_sees_the_candidates_only():
    learner = Plain([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8], [-1.0, 0.0]])
    images, labels = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([2, 0])
    loss = base_loss(learner, images, labels)
    # Over {0, 2}: similarities (1, 0.6) with 2 right, (0, 0.8) with 0 right.
    first = math.log(math.exp(2.0) + math.exp(1.2)) - 1.2
    second = math.log(math.exp(0.0) + math.exp(1.6)) - 0.0
    assert loss.item() == pytest.approx((first + second) / 2, abs=1e-6)
    assert learner.asked[0].tolist() == [0, 2]  # the text encoder ran for H = 2 classes
    loss.backward()
    assert learner.text.grad[[1, 3]].abs().sum() == 0  # absent classes have no gradient
    assert learner.text.grad[[0, 2]].abs().sum() > 0


def test_full_and_new_loss_see_every_class():
    learner = Plain([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
    images, labels = torch.tensor([[1.0, 0.0]]), torch.tensor([2])
    expected = math.log(math.exp(2.0) + math.exp(0.0) + math.exp(1.2)) - 1.2
    for loss in (backbone_loss, new_loss):
        assert loss(learner, images, labels).item() == pytest.approx(expected, abs=1e-6)
    assert learner.asked == [None, None]


def test_a_learners_optional_parts_are_used():
    learner = Plain([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
    learner.cross_entropy = lambda f, g, targets, classes: (len(g), targets.tolist(), classes)
    learner.other_losses = lambda images, f: (images is f,)
    images, labels = torch.randn(2, 2), torch.tensor([2, 1])
    assert backbone_loss(learner, images, labels) == new_loss(learner, images, labels) == (3, [2, 1], None, True)
    count, targets, classes, same = base_loss(learner, images, labels)
    assert (count, targets, classes.tolist(), same) == (2, [1, 0], [1, 2], True)


def test_wrong_shapes_are_refused():
    """They would broadcast to a wrong loss, or fail far from here."""
    f, targets = torch.randn(3, 2), torch.zeros(3).long()
    learner = Plain([[1.0, 0.0], [0.0, 1.0]])
    for labels in (torch.zeros(3), torch.zeros(3, 1).long(), torch.zeros(3).bool()):
        for loss in (backbone_loss, base_loss, new_loss):
            with pytest.raises(ValueError, match="labels must be ints"):
                loss(learner, f, labels)
    for shape in ((4, 5), (2, 4, 2), (2,), (1, 3, 4, 2), (3, 2)):
        with pytest.raises(ValueError, match="image features .* text features"):
            alterable_cross_entropy(f[None] if shape == (3, 2) else f, torch.randn(shape), targets, 1.0)
    same = alterable_cross_entropy(f, torch.ones(3, 4, 2), targets.int(), 1.0)  # int32 labels, text of each image
    assert same.item() == pytest.approx(math.log(4), abs=1e-6)
    learner.text_features = lambda classes=None: learner.text  # ignores the candidates: the loss would be wrong
    with pytest.raises(ValueError, match="gave 2 rows for 1"):
        base_loss(learner, f, targets)


# Pseudo-labels and scores ---------------------------------------------------------------------------------------------


def test_pseudo_labels_by_hand():
    clip = types.SimpleNamespace(logit_scale=2.0, calls=0)
    clip.image_features = lambda images: images.flatten(1)[:, :2]
    clip.text_features = lambda: setattr(clip, "calls", clip.calls + 1) or torch.tensor([[7.0, 0.0], [0.6, 0.8]])
    labeler = PseudoLabeler(clip)
    images = torch.tensor([[1.0, 0.0], [0.0, 5.0]]).reshape(2, 2, 1, 1)  # of any length, as the texts are
    labels, confidences = labeler(images)
    assert labels.tolist() == [0, 1]
    first, second = 1 / (1 + math.exp(-0.8)), 1 / (1 + math.exp(-1.6))
    assert confidences.tolist() == pytest.approx([first, second])
    assert labeler.probabilities(images).flatten().tolist() == pytest.approx([first, 1 - first, 1 - second, second])
    assert labeler(images)[0].tolist() == [0, 1] and clip.calls == 1


def test_generalized_accuracy_by_hand():
    """Three base and two new images; an image counts where its own class scores highest of both halves."""
    found = {  # the scores and classes of each image's best class of a half; its label
        ("base", "base", "base"): ([5.0, 3.0, 4.0], [0, 1, 0], [0, 1, 1]),
        ("base", "base", "new"): ([2.0, 6.0], [1, 1], [0, 1]),
        ("new", "new", "base"): ([4.0, 3.5, 1.0], [1, 0, 0], [0, 1, 1]),
        ("new", "new", "new"): ([3.0, 5.0], [0, 1], [0, 1]),
    }
    # Each has all of its own half's probability, so its confidence over both halves comes from the two scores alone.
    found = {key: (*map(torch.tensor, values), torch.ones(len(values[0]))) for key, values in found.items()}
    result, error = scores.generalized(found, "base")
    assert result["base"] == pytest.approx(100 / 3) and result["new"] == 50 and result["all"] == pytest.approx(40)
    assert result["h"] == pytest.approx(scores.harmonic_mean(100 / 3, 50)) == pytest.approx(40)
    p = 1 / (1 + (-torch.tensor([1.0, -0.5, 3.0, -1.0, 1.0]).abs()).exp())  # of the scores' differences
    right, bins = torch.tensor([1.0, 0, 0, 1, 0]), (p * 15).ceil()
    gaps = [(right - p)[bins == place].sum().abs() for place in bins.unique()]
    assert error == pytest.approx(100 * sum(gaps).item() / 5, abs=1e-4)


# The sampler ----------------------------------------------------------------------------------------------------------

LINE = {"a": 0.0, "b_b": 0.1, "c": 0.3, "d": 1.0}  # angles: nearest of a are b, c, d; of d are c, b, a


def on_a_line(names):
    angles = torch.tensor([LINE[name.replace(" ", "_")] for name in names])
    return torch.stack([angles.cos(), angles.sin()], dim=1)


def sampler_of(count, anchors=2):
    return HardNegativeSampler(np.arange(count) % 4, list(LINE), anchors, 3, seed=5, encoder=on_a_line)


def test_hard_negatives_are_the_nearest_names():
    sampler = sampler_of(4, anchors=1)
    assert sampler.neighbors.tolist() == [[0, 1, 2], [1, 0, 2], [2, 1, 0], [3, 2, 1]]
    assert sorted(map(tuple, sampler)) == [(0, 1, 2), (1, 0, 2), (2, 1, 0), (3, 2, 1)]  # one image per class: no choice
    seen = []  # underscores are read as spaces
    HardNegativeSampler([0, 1], ["sea_or_lake", "river"], 1, 2, encoder=lambda x: seen.extend(x) or torch.eye(2))
    assert seen == ["sea or lake", "river"]
    twins = HardNegativeSampler([0, 1, 2], ["x", "y", "z"], 1, 2, encoder=lambda names: torch.ones(3, 4))
    assert twins.neighbors[:, 0].tolist() == [0, 1, 2]  # a class comes first even beside its twin


@pytest.mark.parametrize("count, top_k", [(40, 40), (1025, 5), (2500, 3)])  # from 1024 classes on, in parts
def test_the_nearest_names_are_those_of_a_full_stable_sort(count, top_k):
    """The embeddings are 81 kinds of rows whose cosines are exact, so most classes have many equally near ones."""
    e = torch.eye(3).double()[torch.randint(3, (count, 4), generator=torch.Generator().manual_seed(1))].flatten(1)
    cosine = e @ e.T / 4
    twins = (int((cosine == 1).sum()) - count) // 2
    with pytest.warns(UserWarning, match=f"^{twins} of {count * (count - 1) // 2} pairs"):
        found = nearest_classes(["x"] * count, top_k, lambda names: e)
    plain = cosine.fill_diagonal_(2).argsort(dim=1, descending=True, stable=True)[:, :top_k]
    assert torch.equal(torch.from_numpy(found), plain)


def test_batches_hold_b_times_k_images_and_every_anchor_once():
    sampler = sampler_of(64, anchors=4)
    labels, epochs = sampler.labels, []
    for epoch in (1, 2, 1):
        sampler.set_epoch(epoch)
        epochs.append(list(sampler))
    assert len(epochs[0]) == len(sampler) == 16  # 16 * C_b / b steps
    for batch in epochs[0]:
        groups = np.array(batch).reshape(4, 3)
        assert (labels[groups] == sampler.neighbors[labels[groups[:, 0]]]).all()
    assert sorted(batch[i] for batch in epochs[0] for i in (0, 3, 6, 9)) == list(range(64))
    assert epochs[0] == epochs[2] != epochs[1]
    assert list(sampler) == epochs[1]  # without set_epoch, a pass moves on by itself
    drawn = {i for batch in epochs[0] + epochs[1] for i in np.reshape(batch, (4, 3))[:, 1:].flat}
    assert len(drawn) > 40  # of the 48 images of a, b_b and c: a neighbor's image varies
    assert [len(list(sampler_of(count, anchors=5))) for count in (4, 14)] == [1, 2]  # a full batch, or what there is


@pytest.mark.parametrize(
    "labels, b, k, rows, message",
    [
        ([0, 1], 1, 3, 2, "top-k is 3, but there are 2 classes"),
        ([0, 0], 1, 2, 2, "the class 'c' has no image"),
        ([0, 2], 1, 2, 2, r"labels must lie in 0\.\.1"),
        ([0, 1], 0, 2, 2, "0 anchors per batch"),
        ([[0], [1]], 1, 2, 2, "labels must be one int per image"),
        ([0.0, 1.0], 1, 2, 2, "labels must be one int per image"),
        (["0", "1"], 1, 2, 2, "labels must be one int per image"),
        ([0, 1], 1, 2, 3, r"encoder gave \(3, 2\) for 2 names"),
    ],
)
def test_sampler_refuses(labels, b, k, rows, message):
    with pytest.raises(ValueError, match=message):
        HardNegativeSampler(labels, ["a", "c"], b, k, encoder=lambda names: torch.randn(rows, 2))


def test_the_papers_batches():
    expected = {500: (4, 8), 32: (4, 8), 31: (2, 8), 16: (2, 8), 15: (2, 7), 5: (2, 2), 3: (2, 2)}
    assert {classes: paper_batch(classes) for classes in expected} == expected


def test_the_real_minilm_knows_colors_and_shapes(monkeypatch):
    names = ["red star", "blue circle", "blue ring", "purple circle", "green circle", "yellow triangle"]
    sampler = HardNegativeSampler(range(6), names, 1, 4)  # MiniLM is the default
    assert [names[i] for i in sampler.neighbors[1]] == ["blue circle", "blue ring", "purple circle", "green circle"]
    monkeypatch.setattr("sampler.MINILM_SHA256", "0" * 64)
    with pytest.raises(ValueError, match="SHA-256"):
        minilm(["a"])


# Under Accelerate and torchdata ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("processes", [2, 4])
def test_accelerate_gives_each_process_whole_batches(processes):
    """It compares each batch with `batch_size`, which is b*K: if that were b, it would drop nearly all of them."""

    def shards(count):
        return [BatchSamplerShard(sampler_of(count), processes, rank) for rank in range(processes)]

    whole, ranks = sampler_of(24), shards(24)
    for _ in range(2):  # epochs
        batches, shares = list(whole), [list(rank) for rank in ranks]
        assert [shares[step % processes][step // processes] for step in range(12)] == batches
        assert [len(share) for share in shares] == [12 // processes] * processes == list(map(len, ranks))
    shares = [[len(batch) for batch in rank] for rank in shards(22)]  # 11 batches and the first ones again
    assert shares == [[6] * (12 // processes)] * processes


@pytest.mark.parametrize("workers", [0, 1])
def test_torchdatas_loader_continues_where_it_stopped(workers):
    from torchdata.stateful_dataloader import StatefulDataLoader

    def loader():
        return StatefulDataLoader(torch.arange(16), batch_sampler=sampler_of(16), num_workers=workers)

    first, second = loader(), loader()
    list(first)  # epoch 1
    walk = iter(first)
    list(islice(walk, 3))
    second.load_state_dict(first.state_dict())
    second.batch_sampler.set_epoch(2)
    rest = [batch.tolist() for batch in walk]
    assert len(rest) == 5 and [batch.tolist() for batch in second] == rest
