"""The scores: base and new accuracy, H, and how many pseudo-labels are right.

Nothing that trains imports this file's answers: only here does the index of an unlabelled training image meet its
label, and only here are test images read.
"""

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from data import Images, model_input, test_transform


def test_images(task, pixels, workers=0, batch_size=256):
    """{"base", "new"}: loaders of (images uint8 [B, 3, h, w], labels [B]) over a task's test images."""
    loaders = {}
    for half, items in (("base", task.base_test), ("new", task.new_test)):
        paths, labels = [path for path, _, _ in items], [label for _, label, _ in items]
        images = Images(paths, task.read, test_transform(pixels), labels)
        loaders[half] = DataLoader(images, batch_size, num_workers=workers)
    return loaders


@torch.no_grad()
def test_features(model, loaders, device):
    """The batches of `test_images` with features [B, d] in place of images, by the frozen encoder of a `ZeroShot`.

    Computed once, for every row whose image side is frozen.
    """
    return {half: [(model.image_features(model_input(images.to(device))), labels)
                   for images, labels in tqdm(batches, desc=f"{half} test images", unit="batch")]
            for half, batches in loaders.items()}


@torch.no_grad()
def accuracy(learner, batches, device):
    """Top-1 accuracy in percent over the learner's classes. batches: (uint8 images or features, labels)."""
    text_features = learner.text_features()  # [C, d]
    right = total = 0
    for images, labels in batches:
        predicted = (learner.image_features(model_input(images.to(device))) @ text_features.T).argmax(dim=-1).cpu()
        right += (predicted == labels).sum().item()
        total += len(labels)
    return 100 * right / total


def score(learner, prompts, task, tests, device):
    """{"base", "new", "h", "base_by_final_prompt"} in percent.

    Base classes are scored by the prompts after phase 1, new classes by those after phase 2 (as Tables 4 and 8 do);
    the single final prompt on the base classes is not in the paper.

    prompts: state dicts {"base", "new"}, or None where nothing was learned. tests: of `test_images`, or of
    `test_features` where the learner prompts no images.
    """
    prompts = prompts or {"base": {}, "new": {}}
    learner.set_classes(task.base_names)
    learner.load_state_dict(prompts["base"])
    base = accuracy(learner, tests["base"], device)
    learner.load_state_dict(prompts["new"])
    final = accuracy(learner, tests["base"], device)
    learner.set_classes(task.new_names)
    new = accuracy(learner, tests["new"], device)
    return {"base": base, "new": new, "h": harmonic_mean(base, new), "base_by_final_prompt": final}


def harmonic_mean(base, new):
    """H of base and new accuracy, all in percent (section 4.2)."""
    return 2 * base * new / (base + new) if base + new else 0.0


def pseudo_label_accuracy(answers, indices, pseudo_labels):
    """The share, in percent, of pseudo-labels that are right: answers[index] is the label nobody trained on."""
    return 100 * (torch.tensor(answers)[indices] == pseudo_labels).float().mean().item()
