"""Base, New and H: the scores (section 4.2), their averages over seeds, and their table.

Only here are test images opened, and only here does an unlabeled training image meet its label. Code that tunes never
sees what this file reads.
"""

import json
import pathlib
import statistics

import torch
from torch.nn import functional as F

from harness.cli import printable
from harness.features import frozen_features
from harness.images import WHOLE, whole_images
from harness.runs import COST

PAPER = pathlib.Path(__file__).parents[1] / "experiments" / "paper.json"
PAPER = json.loads(PAPER.read_text())["table1_base_to_new"]["rows"]  # {row: {dataset: {"base", "new", "h"}}}
TITLES = {"base": "Base", "new": "New", "h": "H", "accuracy": "Accuracy", "average": "Average"}
BESIDE = ["base_by_final_prompt", "one_list", "one_list_final", "balanced", "ece", "per_class"]  # without a column
ORDER = {"Base": 0, "New": 1, "H": 2}  # of the columns; other scores follow
UNBALANCED = 2  # points between accuracy and the mean of the classes that the table tells


class TestImages:
    """The test images of a task, for any number of learners.

    Frozen CLIP encodes each image once, for all learners that do not prompt images. A learner that does encodes it once
    for each state of its prompts, whatever its classes are.

    task: a `data.Task`. zero_shot: frozen CLIP as a learner. device, workers, cache: as of `frozen_features`.
    """

    def __init__(self, task, zero_shot, device, workers=0, cache=None):
        self.task, self.zero_shot, self.device, self.workers, self.cache = task, zero_shot, device, workers, cache
        self.frozen, self.prompted, self.learner = {}, {}, None

    @torch.no_grad()
    def batches(self, name, learner):
        """Yields batches of the test set `name`: features [B, d], as the learner's `image_features` returns them, or
        images [B, 3, h, w] where its text depends on images that it prompts; and labels [B].
        """
        test = self.task.tests[name]
        paths, labels, _ = zip(*test.items)
        about = self.zero_shot.clip_model, paths, test.read, self.device, self.workers, f"{name} test images"
        if learner.unscaled_images or not learner.prompts_images:
            if name not in self.frozen:
                self.frozen[name] = frozen_features(*about, self.cache)
            found = [f if learner.unscaled_images else F.normalize(f, dim=-1) for f in self.frozen[name]]
        elif learner.text_depends_on_image:
            found = whole_images(*about)
        else:
            state = [value.clone() for value in learner.state_dict().values()]
            if learner is not self.learner or not all(map(torch.equal, state, self.state)):
                self.learner, self.state, self.prompted = learner, state, {}
            if name not in self.prompted:
                self.prompted[name] = [learner.image_features(images) for images in whole_images(*about)]
            found = self.prompted[name]
        return zip(found, torch.tensor(labels).split(WHOLE))


def score(learner, states, task, tests):
    """The scores of a row, in percent and in the order of the table, a dict.

    Base-to-new: "base", "new", "h" (section 4.2), and what `score_halves` adds. Cross-dataset: each dataset, and the
    "average" of the targets (Table 2). Few-shot: "accuracy". And what `by_class` adds.

    states: the learner's state dicts {"base", "new"}, or None for zero-shot CLIP. tests: the task's `TestImages`.
    """
    if "base" in task.tests:
        return score_halves(learner, states, task, tests)
    scores, found = {}, {}
    for name in task.tests:
        load_prompts_for(learner, states, "base", task.tests[name])
        found[name] = top1(learner, tests.batches(name, learner))
        scores[name] = accuracy(*found[name])
    targets = list(scores.values())[1:]
    if targets:
        scores["average"] = sum(targets) / len(targets)
    return {**scores, **by_class(task.tests, found)}


def score_halves(learner, states, task, tests):
    """The scores of base-to-new: {"base", "new", "h", "base_by_final_prompt", "one_list", "one_list_final"}, and what
    `by_class` adds.

    The prompts after phase 1 score base classes, the last ones new classes: in Tables 4 and 8, Base stays the same when
    the new phase is added. "one_list" is generalized accuracy: all base and new classes are candidates; each class
    keeps its prompts, in "one_list_final" the last ones. "new" and "h" are None, and there is no list, where there is
    no test image of the new classes.
    """
    found = {}  # (after which phase, whose classes, whose images): what `top1` returns
    for phase, half in (("base", "base"), ("new", "new"), ("new", "base")):
        if half not in task.tests:
            continue
        load_prompts_for(learner, states, phase, task.tests[half])
        for name in task.tests:  # the other half's images too: "one_list" needs them
            found[phase, half, name] = top1(learner, tests.batches(name, learner))
    base = accuracy(*found["base", "base", "base"])
    new = accuracy(*found["new", "new", "new"]) if "new" in task.tests else None
    scores = {"base": base, "new": new, "h": None if new is None else harmonic_mean(base, new)}
    scores["base_by_final_prompt"] = accuracy(*found["new", "base", "base"])
    details = by_class(task.tests, {half: found[half, half, half] for half in task.tests})
    if new is not None:
        scores["one_list"], details["ece"]["one_list"] = generalized(found, "base")
        scores["one_list_final"], _ = generalized(found, "new")
    return {**scores, **details}


def generalized(found, phase):
    """Generalized accuracy, with all base and new classes as candidates: {"base", "new", "h", "all"}, and its
    calibration error.

    found: of `score_halves`. phase: after which the prompts score the base classes; the new classes have the last.
    """
    right, confidences = {}, []
    for name in ("base", "new"):
        score_base, class_base, labels, among_base = found[phase, "base", name]
        score_new, class_new, _, among_new = found["new", "new", name]
        base_wins = score_base >= score_new  # base classes come first in the list, and argmax takes the first
        if name == "base":
            right[name] = base_wins & (class_base == labels)
        else:
            right[name] = ~base_wins & (class_new == labels)
        # The softmax over both lists, of their highest logits and these logits' shares of their own list.
        total = torch.logaddexp(score_base - among_base.log(), score_new - among_new.log())
        confidences.append((torch.maximum(score_base, score_new) - total).exp())
    every = torch.cat(list(right.values()))
    base, new, both = (100 * part.sum().item() / len(part) for part in (right["base"], right["new"], every))
    scores = {"base": base, "new": new, "h": harmonic_mean(base, new), "all": both}
    return scores, calibration_error(every, torch.cat(confidences))


def by_class(tests, found):
    """What accuracy alone does not tell, of each test set, a dict:

    "balanced": the mean of the classes' accuracies. "ece": the expected calibration error. "per_class": the classes'
    names, accuracies and numbers of test images. All in percent. tests: {name: TestSet}. found: {name: of `top1`}.
    """
    details = {"balanced": {}, "ece": {}, "per_class": {}}
    for name, (_, classes, labels, confidences) in found.items():
        right, rows = classes == labels, []
        for label, class_name in enumerate(tests[name].names):
            of_class = right[labels == label]  # without images it has no accuracy
            share = 100 * of_class.sum().item() / len(of_class) if len(of_class) else None
            rows.append({"class": class_name, "accuracy": share, "images": len(of_class)})
        details["per_class"][name], details["ece"][name] = rows, calibration_error(right, confidences)
        details["balanced"][name] = statistics.mean(row["accuracy"] for row in rows if row["images"])
    return details


def calibration_error(right, confidences, bins=15):
    """The expected calibration error (Guo et al. 2017) in percent, with bins of equal width.

    In a bin, it is the distance between the share that is right and the mean confidence; a bin weighs as many images
    as it has. right: whether the top-1 is right [N]. confidences: its probability [N].
    """
    places = (confidences.double() * bins).ceil().long().clamp(1, bins) - 1  # a bin has its upper edge
    gaps = torch.zeros(bins, dtype=torch.double).index_add(0, places, right.double() - confidences.double())
    return 100 * gaps.abs().sum().item() / len(right)


def load_prompts_for(learner, states, phase, test):
    """Lets a learner take a test set's classes, and its prompts after a phase. states: as of `score`."""
    if states is None:
        learner.set_classes(test.names, test.template)
    else:
        learner.set_classes(test.names)
        learner.load_state_dict(states[phase])


@torch.no_grad()
def top1(learner, batches):
    """Of each of N images: the highest score over the learner's classes, whose it is, the label, and the class's
    probability (Eq. 3). Four tensors [N].

    batches: of `TestImages`. ValueError: the scores are not finite.
    """
    classify, found = scorer(learner), []
    for images, labels in batches:
        logits = check_finite(classify(images)).float()
        best = logits.max(dim=-1)
        confidences = (best.values - logits.logsumexp(dim=-1)).exp()
        found.append((best.values.cpu(), best.indices.cpu(), labels, confidences.cpu()))
    return tuple(torch.cat(parts) for parts in zip(*found))


def accuracy(scores, classes, labels, confidences):
    """Top-1 accuracy in percent, of what `top1` returned."""
    return 100 * (classes == labels).sum().item() / len(labels)


def scorer(*learners):
    """A function from images, or features of `TestImages`, to the scores at test, logits [B, C] (Eq. 3).

    Text is encoded once, here, unless it depends on the image. Of several learners on one CLIP, such as the prompts
    after each phase, C counts the classes of all, one learner's after the other's.
    """
    texts = [None if learner.text_depends_on_image else learner.text_features() for learner in learners]  # [C, d]

    def logits(images):
        if not learners[0].prompts_images:
            images = learners[0].image_features(images)  # frozen CLIP's, for all
        found = []
        for learner, g in zip(learners, texts):
            f = images if learner.prompts_images and images.ndim == 2 else learner.image_features(images)  # [B, d]
            found.append(learner.logits(f, learner.text_features() if g is None else g))
        return torch.cat(found, dim=-1)

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


def average(values):
    """The mean of numbers, or None where one of them is None."""
    return None if None in values else statistics.mean(values)


def over_seeds(by_seed):
    """{score: (mean, sample standard deviation or None)} of a list over seeds of {score: number}; with Base and New, H.

    The mean of H is that of the averaged Base and New, as in the paper; its deviation is that of each seed's H.
    """
    each = {score: [cell[score] for cell in by_seed] for score in by_seed[0]}
    found = {score: average(values) for score, values in each.items()}
    if found.get("Base") is not None and found.get("New") is not None:
        each["H"] = [harmonic_mean(cell["Base"], cell["New"]) for cell in by_seed]
        found["H"] = harmonic_mean(found["Base"], found["New"])
    return {
        score: (found[score], statistics.stdev(each[score]) if by_seed[1:] and found[score] is not None else None)
        for score in sorted(found, key=lambda score: ORDER.get(score, len(ORDER)))
    }


def text(value, spread=None):
    """A number for a table, with its standard deviation behind it; "-" for None. Text stays as it is."""
    if value is None or isinstance(value, str):
        return value or "-"
    if isinstance(value, int):
        return f"{value:,}"
    told = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.2f}"
    return told if spread is None else f"{told} ± {spread:.2f}"


def print_table(config, rows, backbone):
    """Prints the rows' table: the scores with a half's classes as candidates, then those with all classes.

    config: the run's settings. rows: (method, results, one for each seed); accuracy in percent, seconds of tuning. Of
    several seeds the table has the means (`over_seeds`). backbone: its name. On one of the paper's datasets its own
    scores, of three seeds, stand below ours (Table 1).
    """
    first = rows[0][1][0]
    own = [key for key in first if key not in (*COST, *BESIDE)]
    generalized = list(first.get("one_list", ()))
    lines = [["", *(TITLES.get(key, key) for key in own + generalized), "learnable", "seconds", "peak memory"]]
    for method, results in rows:
        line = [row_name(method, backbone)]
        for keys, parts in ((own, results), (generalized, [result.get("one_list") for result in results])):
            by_seed = [{TITLES.get(key, key): part[key] for key in keys} for part in parts]
            line += [text(*score) for score in over_seeds(by_seed).values()]
        seconds = statistics.mean(result["seconds"] for result in results)
        memory = "-" if results[0]["peak_mib"] is None else f"{max(r['peak_mib'] for r in results):,.0f} MiB"
        lines.append([*line, f"{results[0]['learnable_parameters']:,}", f"{seconds:.1f}", memory])
        theirs = PAPER.get(config.backbone + "+mao" * (method == "mao"), {}).get(config.dataset, {})
        if set(own) <= set(theirs) and method != "zeroshot":
            lines.append(["  the paper", *(f"{theirs[key]:.2f}" for key in own), *[""] * (len(generalized) + 3)])
    widths = [max(map(len, column)) for column in zip(*lines)]
    shots = "1 shot" if config.shots == 1 else f"{config.shots} shots"
    one = not isinstance(config.seed, tuple)
    seeds = f"seed {config.seed}" if one else f"seeds {' '.join(map(str, config.seed))} (mean ± standard deviation)"
    print("\n" + printable(f"{config.dataset}, {seeds}, {shots}"))
    if generalized:
        known, every = (sum(part) + 2 * len(part) for part in (widths[1:][: len(own)], widths[1 + len(own) :][:4]))
        print(" " * widths[0], "  half known (paper)".rjust(known), "  all classes as candidates".rjust(every), sep="")
    for name, *cells in lines:
        print(name.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(cells, widths[1:])), sep="  ")
    for method, results in rows if one else ():
        for line in unbalanced(results[0]):
            print(printable(f"{row_name(method, backbone)}, {line}"))


def unbalanced(result):
    """Yields a line for each test set of a row whose accuracy is far from the mean of its classes."""
    for name, mean in result.get("balanced", {}).items():
        rows = result["per_class"].get(name, [])
        of_class = {row["class"]: row["accuracy"] for row in rows if row["accuracy"] is not None}
        if of_class and None not in (mean, result.get(name)) and abs(result[name] - mean) > UNBALANCED:
            zero, lowest = list(of_class.values()).count(0), min(of_class, key=of_class.get)
            told = f"{zero} of {len(of_class)} classes have 0%" if zero else f"{of_class[lowest]:.2f} for {lowest}"
            yield f"{TITLES.get(name, name)}: {result[name]:.2f}, mean of classes {mean:.2f}: {told}"


def row_name(method, backbone):
    """The name of a row: "zero-shot CLIP", "CoOp", "CoOp + MAO"."""
    return {"zeroshot": "zero-shot CLIP", "backbone": backbone, "mao": f"{backbone} + MAO"}[method]
