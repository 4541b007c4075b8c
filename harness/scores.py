"""Base, New and H: the scores (section 4.2), and their table.

Only here are test images opened, and only here does an unlabeled training image meet its label. Code that tunes never
sees what this file reads.
"""

import json
import pathlib

import torch
from tqdm import tqdm

from harness.cli import printable
from harness.images import Images, loader, model_input, test_transform
from harness.runs import COST

PAPER = pathlib.Path(__file__).parents[1] / "experiments" / "paper.json"
PAPER = json.loads(PAPER.read_text())["table1_base_to_new"]["rows"]  # {row: {dataset: {"base", "new", "h"}}}
BESIDE = ["base_by_final_prompt", "one_list", "one_list_final"]  # scores that have no column in the table


class TestImages:
    """The test images of a task, for any number of learners.

    task: a `data.Task`. zero_shot: frozen CLIP as a learner; it encodes the images, once, for the learners that do not
    prompt them. device, workers, batch_size: of loading and encoding.
    """

    def __init__(self, task, zero_shot, device, workers=0, batch_size=64):
        self.task, self.zero_shot, self.device = task, zero_shot, device
        self.workers, self.batch_size, self.features = workers, batch_size, {}

    @torch.no_grad()
    def batches(self, name, learner):
        """Batches of the test set `name`: uint8 images [B, 3, h, w], or features [B, d] where the learner takes them;
        and labels [B].
        """
        test = self.task.tests[name]
        paths, labels = [path for path, _, _ in test.items], [label for _, label, _ in test.items]
        transform = test_transform(self.zero_shot.clip_model.visual.input_resolution)
        images = Images(paths, test.read, transform, labels)
        batches = loader(images, self.workers, batch_size=self.batch_size, prefetch_factor=1)
        if learner.prompts_images:
            return batches
        if name not in self.features:
            self.features[name] = [
                (self.zero_shot.image_features(model_input(images.to(self.device))), labels)
                for images, labels in tqdm(batches, f"{name} test images", unit="batch", disable=None)
            ]
        return self.features[name]


def score(learner, states, task, tests):
    """The scores of a row, in percent and in the order of the table, a dict.

    Base-to-new: "base", "new", "h" (section 4.2), and what `score_halves` adds. Cross-dataset: each dataset, and the
    "average" of the targets (Table 2). Few-shot: "accuracy".

    states: the learner's state dicts {"base", "new"}, or None for zero-shot CLIP. tests: the task's `TestImages`.
    """
    if "base" in task.tests:
        return score_halves(learner, states, task, tests)
    scores = {}
    for name in task.tests:
        load_prompts_for(learner, states, "base", task.tests[name])
        scores[name] = accuracy(*top1(learner, tests.batches(name, learner), tests.device))
    targets = list(scores.values())[1:]
    if targets:
        scores["average"] = sum(targets) / len(targets)
    return scores


def score_halves(learner, states, task, tests):
    """The scores of base-to-new: {"base", "new", "h", "base_by_final_prompt", "one_list", "one_list_final"}.

    The prompts after phase 1 score base classes, the last ones new classes: in Tables 4 and 8, Base stays the same when
    the new phase is added. "one_list" is generalized accuracy: all base and new classes are candidates; each class
    keeps its prompts, in "one_list_final" the last ones. "new" and "h" are None, and there is no list, where there is
    no test image of the new classes.
    """
    found = {}  # (after which phase, whose classes, whose images): top-1 scores [N], classes [N], labels [N]
    for phase, half in (("base", "base"), ("new", "new"), ("new", "base")):
        if half not in task.tests:
            continue
        load_prompts_for(learner, states, phase, task.tests[half])
        for name in task.tests:  # the other half's images too: "one_list" needs them
            found[phase, half, name] = top1(learner, tests.batches(name, learner), tests.device)
    base, new = accuracy(*found["base", "base", "base"]), None
    if "new" in task.tests:
        new = accuracy(*found["new", "new", "new"])
    scores = {"base": base, "new": new, "h": None if new is None else harmonic_mean(base, new)}
    scores["base_by_final_prompt"] = accuracy(*found["new", "base", "base"])
    if new is not None:
        scores["one_list"] = generalized(found, "base")
        scores["one_list_final"] = generalized(found, "new")
    return scores


def generalized(found, phase):
    """{"base", "new", "h", "all"}: generalized accuracy, with all base and new classes as candidates.

    found: of `score_halves`. phase: after which the prompts score the base classes; the new classes have the last.
    """
    right = {}
    for name in ("base", "new"):
        score_base, class_base, labels = found[phase, "base", name]
        score_new, class_new, _ = found["new", "new", name]
        base_wins = score_base >= score_new  # base classes come first in the list, and argmax takes the first
        if name == "base":
            right[name] = base_wins & (class_base == labels)
        else:
            right[name] = ~base_wins & (class_new == labels)
    base, new, both = (
        100 * part.sum().item() / len(part) for part in (right["base"], right["new"], torch.cat(list(right.values())))
    )
    return {"base": base, "new": new, "h": harmonic_mean(base, new), "all": both}


def load_prompts_for(learner, states, phase, test):
    """Lets a learner take a test set's classes, and its prompts after a phase. states: as of `score`."""
    if states is None:
        learner.set_classes(test.names, test.template)
    else:
        learner.set_classes(test.names)
        learner.load_state_dict(states[phase])


@torch.no_grad()
def top1(learner, batches, device):
    """The highest score [N] of each of N images over the learner's classes, whose it is [N], and its label [N].

    batches: (uint8 images or features, labels). ValueError: the scores are not finite.
    """
    scores, classes, truth = [], [], []
    classify = scorer(learner)
    for images, labels in batches:
        best = check_finite(classify(model_input(images.to(device)))).max(dim=-1)
        scores.append(best.values.float().cpu())
        classes.append(best.indices.cpu())
        truth.append(labels)
    return torch.cat(scores), torch.cat(classes), torch.cat(truth)


def accuracy(scores, classes, labels):
    """Top-1 accuracy in percent, of what `top1` returned."""
    return 100 * (classes == labels).sum().item() / len(labels)


def scorer(learner):
    """A function from images (or features) to the learner's scores at test, logits [B, C] (Eq. 3).

    Text is encoded once, here, unless it depends on the image.
    """
    g = None if learner.text_depends_on_image else learner.text_features()  # [C, d]

    def logits(images):
        f = learner.image_features(images)  # [B, d]
        return learner.logits(f, learner.text_features() if learner.text_depends_on_image else g)

    return logits


def check_finite(scores):
    """Returns the scores of classes, a tensor. ValueError: they are not finite numbers, so none is the highest."""
    if not scores.isfinite().all():
        raise ValueError("the scores are not finite: the prompts diverged (lower --lr), or the CLIP is broken")
    return scores


def harmonic_mean(base, new):
    """H of base and new accuracy, all in percent (section 4.2)."""
    return 2 * base * new / (base + new) if base + new else 0.0


def pseudo_label_accuracy(answers, labeled):
    """{"pseudo_label_accuracy": percent}, or {} where the answers are not known or no image was labeled.

    answers: the labels of all unlabeled training images, or None. labeled: pairs (indices, pseudo-labels), int64 [B]
    each; of soft labels the probabilities [B, C_n].
    """
    if answers is None or not labeled:
        return {}
    indices, labels = zip(*labeled)
    labels = torch.cat([one if one.ndim == 1 else one.argmax(dim=-1) for one in labels]).cpu()
    right = torch.tensor(answers)[torch.cat(indices)] == labels
    return {"pseudo_label_accuracy": 100 * right.float().mean().item()}


def print_table(config, rows, backbone):
    """Prints the rows' table: the scores with a half's classes as candidates, then those with all classes.

    config: the run's settings. rows: (method, result); accuracy in percent, seconds of tuning. backbone: its name.
    On one of the paper's datasets its own scores, of three seeds, stand below ours (Table 1).
    """
    titles = {"base": "Base", "new": "New", "h": "H", "accuracy": "Accuracy", "average": "Average"}
    own = [key for key in rows[0][1] if key not in (*COST, *BESIDE)]
    generalized = list(rows[0][1].get("one_list", ()))
    lines = [["", *(titles.get(key, key) for key in own + generalized), "learnable", "seconds", "peak memory"]]
    for method, result in rows:
        found = [result[key] for key in own] + [result["one_list"][key] for key in generalized]
        line = [row_name(method, backbone), *("-" if score is None else f"{score:.2f}" for score in found)]
        memory = "-" if result["peak_mib"] is None else f"{result['peak_mib']:,.0f} MiB"
        lines.append([*line, f"{result['learnable_parameters']:,}", f"{result['seconds']:.1f}", memory])
        theirs = PAPER.get(config.backbone + "+mao" * (method == "mao"), {}).get(config.dataset, {})
        if set(own) <= set(theirs) and method != "zeroshot":
            lines.append(["  the paper", *(f"{theirs[key]:.2f}" for key in own), *[""] * (len(generalized) + 3)])
    widths = [max(map(len, column)) for column in zip(*lines)]
    shots = "1 shot" if config.shots == 1 else f"{config.shots} shots"
    print("\n" + printable(f"{config.dataset}, seed {config.seed}, {shots}"))
    if generalized:
        known, every = (sum(part) + 2 * len(part) for part in (widths[1:][: len(own)], widths[1 + len(own) :][:4]))
        print(" " * widths[0], "  half known (paper)".rjust(known), "  all classes as candidates".rjust(every), sep="")
    for name, *cells in lines:
        print(name.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(cells, widths[1:])), sep="  ")


def row_name(method, backbone):
    """The name of a row: "zero-shot CLIP", "CoOp", "CoOp + MAO"."""
    return {"zeroshot": "zero-shot CLIP", "backbone": backbone, "mao": f"{backbone} + MAO"}[method]
