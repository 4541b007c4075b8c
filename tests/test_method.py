"""The equations on cases worked by hand: mao.py, sampler.py, pseudolabel.py."""

import math
import os
import types

import numpy as np
import pytest
import torch

import evaluate
from mao import alterable_cross_entropy, backbone_loss, base_loss, candidates, new_loss, soft_new_loss
from pseudolabel import PseudoLabeler, balanced, confident
from sampler import HardNegativeSampler, minilm, paper_batch


class Plain:
    """A prompt learner that is not ours: a row of text features a class, images that are features. Notes its calls."""

    logit_scale = 2.0

    def __init__(self, text):
        self.text, self.asked = torch.tensor(text, requires_grad=True), []

    def text_features(self, classes=None):
        self.asked.append(classes)
        return self.text if classes is None else self.text[classes]

    def image_features(self, images):
        return images


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
    assert learner.text.grad[[1, 3]].abs().sum() == 0  # absent classes feel nothing
    assert learner.text.grad[[0, 2]].abs().sum() > 0


def test_full_and_new_loss_see_every_class():
    learner = Plain([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
    images, labels = torch.tensor([[1.0, 0.0]]), torch.tensor([2])
    expected = math.log(math.exp(2.0) + math.exp(0.0) + math.exp(1.2)) - 1.2
    for loss in (backbone_loss, new_loss):
        assert loss(learner, images, labels).item() == pytest.approx(expected, abs=1e-6)
    assert learner.asked == [None, None]


def test_pseudo_labels_by_hand():
    clip = types.SimpleNamespace(logit_scale=2.0, calls=0)
    clip.image_features = lambda images: images.flatten(1)[:, :2]
    clip.text_features = lambda: setattr(clip, "calls", clip.calls + 1) or torch.tensor([[7.0, 0.0], [0.6, 0.8]])
    labeler = PseudoLabeler(clip)
    images = torch.tensor([[1.0, 0.0], [0.0, 5.0]]).reshape(2, 2, 1, 1)  # of any length, as the texts are
    labels, confidences = labeler(images)
    assert labels.tolist() == [0, 1]
    assert confidences.tolist() == pytest.approx([1 / (1 + math.exp(-0.8)), 1 / (1 + math.exp(-1.6))])
    assert labeler(images)[0].tolist() == [0, 1] and clip.calls == 1


def test_confident_balanced_and_soft_labels_by_hand():
    p = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.6, 0.4], [0.3, 0.7]])
    assert confident(p, 0.8).tolist() == [True, True, False, False]
    indices, labels = balanced(p, 2)  # class 1 has one image of its own; the next by its probability is image 2
    assert indices.tolist() == [0, 1, 3, 2] and labels.tolist() == [0, 0, 1, 1]
    learner = Plain([[1.0, 0.0], [0.0, 1.0]])
    images = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    scale = learner.logit_scale
    log_p = [scale - math.log(math.exp(scale) + 1), -math.log(math.exp(scale) + 1)]  # of its own class, of the other
    expected = -(0.75 * log_p[0] + 0.25 * log_p[1] + 1 * log_p[0]) / 2
    loss = soft_new_loss(learner, images, torch.tensor([[0.75, 0.25], [0.0, 1.0]]))
    assert loss.item() == pytest.approx(expected, abs=1e-6)
    assert soft_new_loss(learner, images, torch.eye(2)).item() == pytest.approx(
        new_loss(learner, images, torch.tensor([0, 1])).item()
    )


def test_one_list_of_classes_by_hand():
    """Three base and two new images; an image counts where its own class scores highest of both halves."""
    truth = {"base": torch.tensor([0, 1, 1]), "new": torch.tensor([0, 1])}
    of_base = {"base": ([5.0, 3.0, 4.0], [0, 1, 0]), "new": ([2.0, 6.0], [1, 1])}  # best base class of each image
    of_new = {"base": ([4.0, 3.5, 1.0], [1, 0, 0]), "new": ([3.0, 5.0], [0, 1])}
    found = {}
    for name in ("base", "new"):
        for phase, half, (scores, classes) in (("base", "base", of_base[name]), ("new", "new", of_new[name])):
            found[phase, half, name] = (torch.tensor(scores), torch.tensor(classes), truth[name])
    scores = evaluate.together(found, "base")
    assert scores["base"] == pytest.approx(100 / 3) and scores["new"] == 50 and scores["all"] == pytest.approx(40)
    assert scores["h"] == pytest.approx(evaluate.harmonic_mean(100 / 3, 50))


LINE = {"a": 0.0, "b_b": 0.1, "c": 0.3, "d": 1.0}  # angles: nearest of a are b, c, d; of d are c, b, a


def on_a_line(names):
    return torch.tensor(
        [[math.cos(LINE[name.replace(" ", "_")]), math.sin(LINE[name.replace(" ", "_")])] for name in names]
    )


def test_hard_negatives_are_the_nearest_names():
    sampler = HardNegativeSampler([0, 1, 2, 3], list(LINE), 1, 3, encoder=on_a_line)
    assert sampler.neighbors.tolist() == [[0, 1, 2], [1, 0, 2], [2, 1, 0], [3, 2, 1]]
    assert sorted(map(tuple, sampler)) == [(0, 1, 2), (1, 0, 2), (2, 1, 0), (3, 2, 1)]  # one image a class: no choice


def test_underscores_are_read_as_spaces():
    seen = []
    HardNegativeSampler([0, 1], ["sea_or_lake", "river"], 1, 2, encoder=lambda x: seen.extend(x) or torch.eye(2))
    assert seen == ["sea or lake", "river"]


def test_a_class_is_its_own_first_neighbor_even_beside_its_twin():
    sampler = HardNegativeSampler([0, 1, 2], ["x", "y", "z"], 1, 2, encoder=lambda names: torch.ones(3, 4))
    assert sampler.neighbors[:, 0].tolist() == [0, 1, 2]


def test_batches_hold_b_times_k_images_and_every_anchor_once():
    labels = np.repeat(np.arange(4), 16)
    sampler = HardNegativeSampler(labels, list(LINE), 4, 3, seed=5, encoder=on_a_line)
    epochs = []
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
    drawn = {i for batch in epochs[0] + epochs[1] for i in batch}
    assert drawn == set(range(64))  # neighbors' images vary


@pytest.mark.parametrize(
    "labels, names, b, k, message",
    [
        ([0, 1], ["a", "c"], 1, 3, "top-k is 3, but there are 2 classes"),
        ([0, 0], ["a", "c"], 1, 2, "the class 'c' has no image"),
        ([0, 2], ["a", "c"], 1, 2, "labels must lie in 0..1"),
        ([0, 1], ["a", "c"], 0, 2, "0 anchors per batch"),
    ],
)
def test_sampler_refuses(labels, names, b, k, message):
    with pytest.raises(ValueError, match=message):
        HardNegativeSampler(labels, names, b, k, encoder=on_a_line)


def test_the_papers_batches():
    assert [paper_batch(n) for n in (500, 32, 31, 16, 15, 5, 3)] == [
        (4, 8),
        (4, 8),
        (2, 8),
        (2, 8),
        (2, 7),
        (2, 2),
        (2, 2),
    ]


def test_the_real_minilm_knows_colors_and_shapes():
    names = ["red star", "blue circle", "blue ring", "purple circle", "green circle", "yellow triangle"]
    sampler = HardNegativeSampler(range(6), names, 1, 4, encoder=minilm)
    assert [names[i] for i in sampler.neighbors[1]] == ["blue circle", "blue ring", "purple circle", "green circle"]


def test_foreign_minilm_weights_are_refused(monkeypatch):
    monkeypatch.setattr("sampler.MINILM_SHA256", "0" * 64)
    with pytest.raises(ValueError, match="is not the published all-MiniLM-L6-v2"):
        minilm(["a"])


@pytest.mark.parametrize("labels", [torch.zeros(3), torch.zeros(3, 1).long(), torch.zeros(3).bool()])
def test_labels_that_are_none_are_refused(labels):
    """They would broadcast to a loss of B x B pairs, or fail far from here."""
    learner, images = Plain([[1.0, 0.0], [0.0, 1.0]]), torch.randn(3, 2)
    for loss in (backbone_loss, base_loss, new_loss):
        with pytest.raises(ValueError, match=r"labels must be ints of shape \[B\], and are torch"):
            loss(learner, images, labels)


def test_features_that_do_not_go_together_are_refused():
    f, targets = torch.randn(3, 2), torch.zeros(3).long()
    for g in (torch.randn(4, 5), torch.randn(2, 4, 2), torch.randn(2), torch.randn(1, 3, 4, 2)):
        with pytest.raises(ValueError, match="do not go together"):
            alterable_cross_entropy(f, g, targets, 1.0)
    with pytest.raises(ValueError, match="do not go together"):
        alterable_cross_entropy(f[None], torch.randn(4, 2), targets, 1.0)
    same = alterable_cross_entropy(f, torch.ones(3, 4, 2), targets.int(), 1.0)  # int32 labels, text of each image
    assert same.item() == pytest.approx(math.log(4), abs=1e-6)


def sampler_of(count, **options):
    names = list(LINE)
    return HardNegativeSampler(np.arange(count) % 4, names, batch_size=2, top_k=3, encoder=on_a_line, **options)


def test_ranks_share_an_epoch():
    """Disjoint batches, which together are those of one process, in every epoch."""
    whole, ranks = sampler_of(24), [sampler_of(24, num_replicas=3, rank=rank) for rank in range(3)]
    for _ in range(2):
        batches = list(whole)
        shared = [list(rank) for rank in ranks]
        assert [len(rank) for rank in ranks] == [4, 4, 4] == [len(found) for found in shared]
        assert [shared[step % 3][step // 3] for step in range(12)] == batches
    with pytest.raises(ValueError, match="rank 3 must lie in 0..2"):
        sampler_of(24, num_replicas=3, rank=3)


def test_a_sampler_goes_on_from_its_state():
    first = sampler_of(16)
    list(first)
    walk = iter(first)  # epoch 2
    for _ in range(3):
        next(walk)
    second = sampler_of(16)
    second.load_state_dict(first.state_dict())
    assert first.state_dict() == {"epoch": 2, "position": 3} and list(second) == list(walk)
    assert first.state_dict() == second.state_dict() == {"epoch": 3, "position": 0}
    next(iter(first))  # a pass that is given up: the next one is epoch 4, whole
    second.set_epoch(4)
    assert list(first) == list(second) and len(list(first)) == 8


@pytest.mark.parametrize("labels", [[[0], [1], [2], [3]], [0.0, 1.0, 2.0, 3.0], ["0", "1", "2", "3"]])
def test_labels_of_a_sampler_are_ints(labels):
    with pytest.raises(ValueError, match="labels must be one int per image"):
        HardNegativeSampler(labels, list(LINE), batch_size=2, top_k=3, encoder=on_a_line)


def test_an_encoder_has_a_row_for_each_name():
    with pytest.raises(ValueError, match="encoder gave \\(3, 2\\) for 4 names"):
        HardNegativeSampler([0, 1, 2, 3], list(LINE), 2, 3, encoder=lambda names: torch.randn(3, 2))


def test_every_batch_arrives_under_accelerate():
    """Its shard class compares each batch with `batch_size`, which is b*K: by b, it drops nearly all of them."""
    from accelerate.data_loader import BatchSamplerShard as shard

    whole = list(sampler_of(24))
    shards = [list(shard(sampler_of(24), num_processes=2, process_index=rank)) for rank in range(2)]
    assert [shards[step % 2][step // 2] for step in range(12)] == whole


@pytest.mark.parametrize("workers", [0, 1])
def test_torchdatas_loader_goes_on_where_it_stopped(workers):
    from torchdata.stateful_dataloader import StatefulDataLoader

    def loader():
        return StatefulDataLoader(torch.arange(16), batch_sampler=sampler_of(16), num_workers=workers)

    first, second = loader(), loader()
    list(first)  # epoch 1
    walk = iter(first)
    for _ in range(3):
        next(walk)
    second.load_state_dict(first.state_dict())
    rest = [batch.tolist() for batch in walk]
    assert len(rest) == 5 and [batch.tolist() for batch in second] == rest


class Step(torch.nn.Module):
    """What DDP wraps: its forward is the loss, so that its backward adds up the gradients of all processes."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.words = torch.nn.Parameter(torch.randn(4, 2))

    logit_scale = 3.0

    def text_features(self, classes=None):
        return self.words if classes is None else self.words[classes]

    def image_features(self, images):
        return images

    def forward(self, images, labels):
        return base_loss(self, images, labels)


def batches_of_rank(rank, num_replicas):
    images = torch.randn(16, 2, generator=torch.Generator().manual_seed(1))
    for indices in sampler_of(16, num_replicas=num_replicas, rank=rank):
        yield images[indices], torch.tensor([index % 4 for index in indices])


def one_of_two(rank, folder):
    torch.distributed.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    step = torch.nn.parallel.DistributedDataParallel(Step())
    for images, labels in batches_of_rank(rank, 2):
        step(images, labels).backward()
    torch.save(step.module.words.grad, f"{folder}/{rank}.pt")
    torch.distributed.barrier()  # neither leaves while the other still talks to it
    os._exit(0)  # gloo's threads sometimes abort a process that ends in the ordinary way


def test_two_processes_have_the_gradients_of_one(tmp_path):
    torch.multiprocessing.spawn(one_of_two, (str(tmp_path),), nprocs=2)
    step = Step()
    for images, labels in batches_of_rank(0, 1):
        (step(images, labels) / 2).backward()  # DDP takes the mean over its processes
    for rank in range(2):
        assert torch.allclose(torch.load(tmp_path / f"{rank}.pt"), step.words.grad, atol=1e-6)
