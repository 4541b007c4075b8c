"""The scores: base and new accuracy, H, and how many pseudo-labels are right.

Nothing that trains imports this file's answers: only here does the index of an unlabelled training image meet its
label, and only here are test images read.
"""

import pathlib

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

import demo
from backbones import BACKBONES, ZeroShot, load_clip
from loaders import Images, model_input, test_transform
from record import read_folder, read_prompts, show
from tasks import task_of


class Tests:
    """A task's test images: called with a learner, {score: batches} to score it on, labels [B] with each.

    Images uint8 [B, 3, h, w] where the learner prompts them; else features [B, d], which `foundation`, a `ZeroShot`,
    encodes once for all learners, when the first is scored.
    """

    def __init__(self, task, foundation, device, workers=0, batch_size=256):
        self.foundation, self.device, self.features = foundation, device, None
        transform = test_transform(foundation.clip_model.visual.input_resolution)
        self.images = {}
        for name, (_, items, read, _) in task.tests.items():
            images = Images([path for path, _, _ in items], read, transform, [label for _, label, _ in items])
            self.images[name] = DataLoader(images, batch_size, num_workers=workers)

    @torch.no_grad()
    def __call__(self, learner):
        if learner.prompts_images:
            return self.images
        self.features = self.features or {
            name: [(self.foundation.image_features(model_input(images.to(self.device))), labels)
                   for images, labels in tqdm(batches, desc=f"{name} test images", unit="batch")]
            for name, batches in self.images.items()}
        return self.features


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
    """{score: accuracy in percent}, in the order of the table: of base-to-new "base", "new", "h" and, not in the paper,
    "base_by_final_prompt"; of cross-dataset each dataset and the targets' "average"; of few-shot "accuracy".

    Base classes are scored by the prompts after phase 1, new classes by those after phase 2 (as Tables 4 and 8 do).
    None: unknown, there is no test image of the new classes.

    prompts: state dicts {"base", "new"}, or None for zero-shot CLIP. tests: a task's `Tests`.
    """
    batches, scores, final = tests(learner), {}, None
    for name, test in task.tests.items():
        if prompts is None:
            learner.set_classes(test.names, test.template)
        else:
            learner.set_classes(test.names)
            learner.load_state_dict(prompts["new" if name == "new" else "base"])
        scores[name] = accuracy(learner, batches[name], device)
        if name == "base":
            learner.load_state_dict(prompts["new"] if prompts else {})
            final = accuracy(learner, batches[name], device)
    if "base" in task.tests:
        base, new = scores["base"], scores.get("new")
        return {"base": base, "new": new, "h": None if new is None else harmonic_mean(base, new),
                "base_by_final_prompt": final}
    targets = list(scores.values())[1:]
    return {**scores, "average": sum(targets) / len(targets)} if targets else scores


def harmonic_mean(base, new):
    """H of base and new accuracy, all in percent (section 4.2)."""
    return 2 * base * new / (base + new) if base + new else 0.0


def pseudo_label_accuracy(answers, indices, pseudo_labels):
    """{"pseudo_label_accuracy": percent right}; answers[index] is the label nobody trained on. {} without answers."""
    if answers is None:
        return {}
    right = torch.tensor(answers)[indices] == pseudo_labels
    return {"pseudo_label_accuracy": 100 * right.float().mean().item()}


def score_again(folder, device, workers=0, root=None, clip=None):
    """Prints the scores of a finished run's folder from what it left behind: the same digits.

    root, clip: where the data and CLIP are now, if not where they were. ValueError, FileNotFoundError: a broken folder.
    """
    folder = pathlib.Path(folder)
    config, result = read_folder(folder)
    if config["backbone"] not in BACKBONES:
        raise ValueError(f"{folder} is of a backbone '{config['backbone']}', and here are {', '.join(BACKBONES)} alone")
    task = task_of({**config, "root": root or config["root"]})
    clip = clip or config["clip"]
    clip_model, sha256 = load_clip(demo.WEIGHTS if clip == "demo" else clip, device)
    learner = foundation = ZeroShot(clip_model, task.base_names)
    prompts = None
    if config["method"] != "zeroshot":
        learner = BACKBONES[config["backbone"]](clip_model, task.base_names, **config["settings"])
        last = "base" if config["new_lr"] is None else "new"  # without a new phase, one prompt answers for both halves
        prompts = {half: read_prompts(folder / f"{name}.safetensors", config["backbone"], sha256)
                   for half, name in (("base", "base"), ("new", last))}
    try:
        result |= score(learner, prompts, task, Tests(task, foundation, device, workers), device)
    except RuntimeError as error:
        raise ValueError(f"the prompts in {folder} do not fit the settings in its config.json: run it again") from error
    show(config, [(config["method"], result)], BACKBONES[config["backbone"]].__name__)
