"""Base, New and H: the scores (section 4.2), their table, and how many pseudo-labels are right.

Training code never sees what this file reads: only here does an unlabeled training image meet its label, and only here
are test images opened.
"""

import inspect
import pathlib

import torch
from tqdm import tqdm

from checkpoints import load_clip_of
from cli import printable, warn
from data import task_of
from encoders import ZeroShot
from images import Images, loader, model_input, test_transform
from mao import similarity_logits
from record import (
    COST,
    alone,
    read_config,
    read_lists,
    read_metrics,
    read_prompts,
    read_result,
    unfinished,
    write_result,
)
from rivals import BACKBONES

BESIDE = ["base_by_final_prompt", "one_list", "one_list_final"]  # scores that have no column in the table


class Tests:
    """The test images of a task, for any number of learners.

    task: a `data.Task`. zero_shot: a `ZeroShot` of frozen CLIP, which encodes the images of those learners that leave
    the image side alone: once, when the first of them asks. device, workers, batch_size: of loading and encoding.
    """

    def __init__(self, task, zero_shot, device, workers=0, batch_size=64):
        self.task, self.zero_shot, self.device = task, zero_shot, device
        self.workers, self.batch_size, self.features = workers, batch_size, {}

    def loader(self, name):
        """Batches of (uint8 images [B, 3, h, w], labels [B]) of the test set `name`."""
        test = self.task.tests[name]
        paths, labels = [path for path, _, _ in test.items], [label for _, label, _ in test.items]
        transform = test_transform(self.zero_shot.clip_model.visual.input_resolution)
        images = Images(paths, test.read, transform, labels)
        return loader(images, self.workers, batch_size=self.batch_size, prefetch_factor=1)

    @torch.no_grad()
    def batches(self, name, learner):
        """What `accuracy` takes: `loader`'s batches, or (features [B, d], labels [B]) where images are not prompted."""
        if learner.prompts_images:
            return self.loader(name)
        if name not in self.features:
            self.features[name] = []
            for images, labels in tqdm(self.loader(name), desc=f"{name} test images", unit="batch"):
                features = self.zero_shot.image_features(model_input(images.to(self.device)))
                self.features[name].append((features, labels))
        return self.features[name]


def score(learner, states, task, tests):
    """The scores of a row, in percent and in the order of the table, a dict.

    Of base-to-new "base", "new", "h" (section 4.2), and what the paper does not report, of `score_halves`; of
    cross-dataset each dataset and the targets' "average" (Table 2); of few-shot "accuracy".

    states: the learner's state dicts {"base", "new"}, or None for zero-shot CLIP. tests: the task's `Tests`.
    """
    if "base" in task.tests:
        return score_halves(learner, states, task, tests)
    scores = {}
    for name in task.tests:
        hold(learner, states, "base", task.tests[name])
        scores[name] = accuracy(*top1(learner, tests.batches(name, learner), tests.device))
    targets = list(scores.values())[1:]
    if targets:
        scores["average"] = sum(targets) / len(targets)
    return scores


def score_halves(learner, states, task, tests):
    """The scores of base-to-new: {"base", "new", "h", "base_by_final_prompt", "one_list", "one_list_final"}.

    Base classes are scored by the prompts after phase 1, new classes by the last ones (Tables 4 and 8). One list: over
    base and new classes together, so that nothing tells which half an image is from; each class keeps its prompts.
    "final" has the last prompts for both halves. None, and no list: there is no test image of the new classes.
    """
    found = {}  # (after which phase, whose classes, whose images): top-1 scores [N], classes [N], labels [N]
    for phase, half in (("base", "base"), ("new", "new"), ("new", "base")):
        if half not in task.tests:
            continue
        hold(learner, states, phase, task.tests[half])
        for name in task.tests:
            if states is None and phase == "new" and half == "base":  # zero-shot CLIP has no phases
                found[phase, half, name] = found["base", half, name]
            else:
                found[phase, half, name] = top1(learner, tests.batches(name, learner), tests.device)
    base, new = accuracy(*found["base", "base", "base"]), None
    if "new" in task.tests:
        new = accuracy(*found["new", "new", "new"])
    scores = {"base": base, "new": new, "h": None if new is None else harmonic_mean(base, new)}
    scores["base_by_final_prompt"] = accuracy(*found["new", "base", "base"])
    if new is not None:
        scores["one_list"] = together(found, "base")
        scores["one_list_final"] = together(found, "new")
    return scores


def together(found, phase):
    """{"base", "new", "h", "all"}: the share of test images whose class wins over the classes of both halves.

    found: of `score_halves`. phase: after which the prompts score the base classes; the new ones have the last.
    """
    right = {}
    for name in ("base", "new"):
        score_base, class_base, labels = found[phase, "base", name]
        score_new, class_new, _ = found["new", "new", name]
        base_wins = score_base >= score_new  # base classes come first in the list, as argmax would have it
        if name == "base":
            right[name] = base_wins & (class_base == labels)
        else:
            right[name] = ~base_wins & (class_new == labels)
    base, new = (100 * right[name].sum().item() / len(right[name]) for name in ("base", "new"))
    whole = torch.cat([right["base"], right["new"]])
    both = 100 * whole.sum().item() / len(whole)
    return {"base": base, "new": new, "h": harmonic_mean(base, new), "all": both}


def hold(learner, states, phase, test):
    """Lets a learner hold a test set's classes, with its prompts after a phase. states: as of `score`."""
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
        best = finite(classify(model_input(images.to(device)))).max(dim=-1)
        scores.append(best.values.float().cpu())
        classes.append(best.indices.cpu())
        truth.append(labels)
    return torch.cat(scores), torch.cat(classes), torch.cat(truth)


def accuracy(scores, classes, labels):
    """Top-1 accuracy in percent, of what `top1` gave."""
    return 100 * (classes == labels).sum().item() / len(labels)


def scorer(learner, g=None):
    """A function from images (or features) to the learner's scores at test, logits [B, C] (Eq. 3).

    g: the text features of all classes [C, d], where they are there already. Otherwise text is encoded once, here,
    unless it depends on the image. A learner without `logits` of its own is scored by similarity.
    """
    text_depends_on_image = getattr(learner, "text_depends_on_image", False)
    if g is None and not text_depends_on_image:
        g = learner.text_features()  # [C, d]

    def logits(images):
        f = learner.image_features(images)  # [B, d]
        text = learner.text_features() if text_depends_on_image else g
        if hasattr(learner, "logits"):
            return learner.logits(f, text)
        return similarity_logits(f, text, learner.logit_scale)

    return logits


def finite(scores):
    """Returns the scores of classes, a tensor. ValueError: they are not finite numbers, so none is the highest."""
    if not scores.isfinite().all():
        raise ValueError(
            "the scores of the classes are not finite numbers, so there is no highest one: the prompts went too far "
            "(lower --lr), or the CLIP is broken (get it again)"
        )
    return scores


def harmonic_mean(base, new):
    """H of base and new accuracy, all in percent (section 4.2)."""
    return 2 * base * new / (base + new) if base + new else 0.0


def pseudo_label_accuracy(answers, chosen, seen, guesses):
    """{"pseudo_label_accuracy": percent right}, or {} where `answers` is None or no image was seen.

    answers: the labels of all unlabeled training images, which nobody trained on. chosen: int64 [M], which of them the
    phase has. seen: lists of int64, positions in `chosen`. guesses: lists of int64, the pseudo-labels.
    """
    if answers is None or not seen:
        return {}
    right = torch.tensor(answers)[chosen][torch.cat(seen)] == torch.cat(guesses)
    return {"pseudo_label_accuracy": 100 * right.float().mean().item()}


def score_again(folder, device, workers=0, root=None, clip=None, threads=None):
    """Prints the scores of a tuned run's folder from what it left behind: the same digits.

    A row that was tuned to its end and failed while it was scored is finished by this. root, clip: where the data and
    CLIP are now, if not where they were. threads: of PyTorch (default: the run's).
    ValueError, FileNotFoundError: a broken folder, or a row that is not tuned.
    """
    folder = pathlib.Path(folder)
    config, result, metrics = read_config(folder), read_result(folder), read_metrics(folder)
    if result is None and unfinished(config, metrics):
        raise ValueError(f"{folder} has no scores: {unfinished(config, metrics)}")
    torch.set_num_threads(threads or min(config.get("threads") or 1, 1024))
    lists = read_lists(folder) or {}
    try:
        task = task_of({**config, "root": root or config.get("root")}, kept=lists)
        clip_model, sha256 = load_clip_of(config, device, clip)
    except (ValueError, OSError) as error:
        raise ValueError(f"{folder} cannot be scored: {error}") from error
    for names, known in ((task.base_names, config["classnames"]), (task.new_names, config.get("new_classnames"))):
        if known is not None and names != known:
            raise ValueError(
                f"{folder} was tuned on other classes than {root or config.get('root') or config['dataset']} has now "
                f"({len(known)}: {', '.join(known[:5])}, ...): restore the data"
            )
    if config.get("test_images", task.listed) != task.listed:
        raise ValueError(f"{folder} was scored on other test images than the lists have now: restore the lists")
    zero_shot = ZeroShot(clip_model, task.base_names)
    if config["method"] == "zeroshot":
        learner, states = zero_shot, None
    else:
        learner = build_learner(config, clip_model, task.base_names, folder / "config.json")
        states = {"base": read_prompts(folder / "base.safetensors", config["backbone"], sha256)}
        states["new"] = states["base"]
        if config.get("new_lr") is not None:  # the row had a new phase
            states["new"] = read_prompts(folder / "new.safetensors", config["backbone"], sha256)
        for state in states.values():
            fit_state(learner, state, folder / "config.json")
    scores = score(learner, states, task, Tests(task, zero_shot, device, workers))
    if result is not None:
        tell_difference(folder, result, scores)
    else:
        with alone(folder.resolve()):
            result = write_result(folder, scores, learner, sum(line["seconds"] for line in metrics), None)
    show(config, [(config["method"], {**result, **scores})], BACKBONES[config["backbone"]].__name__)


def tell_difference(folder, result, scores):
    """Warns where scores are others than the result.json of their folder has, in the digits that are shown."""
    for name, value in scores.items():
        there = result.get(name)
        if isinstance(value, float) and isinstance(there, float | int) and f"{there:.2f}" != f"{value:.2f}":
            warn(
                f"{folder}/result.json has {there:.2f} for {name}, and this is {value:.2f}: another machine, fewer "
                "images, or prompts of another run"
            )
            return


def build_learner(settings, clip_model, classnames, where):
    """The prompt learner of a config.json or of the header of a file of prompts. where: that file, for the sentence.

    ValueError: a backbone or a setting of it that is not known here, or one that does not fit.
    """
    name = settings["backbone"]
    if name not in BACKBONES:
        raise ValueError(f"{where} is of a backbone '{name}', and here are {', '.join(BACKBONES)} alone")
    known = inspect.signature(BACKBONES[name]).parameters
    for setting in settings["settings"]:
        if setting not in known:
            raise ValueError(f"{where} has a setting '{setting}', which {name} does not know: run the row again")
    try:
        return BACKBONES[name](clip_model, classnames, **settings["settings"])
    except (TypeError, RuntimeError, ValueError) as error:
        raise ValueError(f"{where} has settings that do not fit {name} ({error}): run the row again") from error


def fit_state(learner, state, where):
    """Puts a state dict into a learner. ValueError: it does not fit; `where` is the file that says what would."""
    try:
        learner.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"the prompts do not fit the settings in {where}: run the row again") from error


def show(config, rows, backbone):
    """Prints the rows' table, and under it the scores over one list of classes.

    config: the run's settings. rows: (method, result); accuracy in percent, seconds of tuning. backbone: its name.
    """
    names = {"zeroshot": "zero-shot CLIP", "backbone": backbone, "mao": f"{backbone} + MAO"}
    titles = {"base": "Base", "new": "New", "h": "H", "accuracy": "Accuracy", "average": "Average"}
    scores = [key for key in rows[0][1] if key not in (*COST, *BESIDE)]
    lines = [["", *(titles.get(score, score) for score in scores), "learnable", "seconds", "peak memory"]]
    for method, result in rows:
        line = [names[method]]
        line += ["-" if result[score] is None else f"{result[score]:.2f}" for score in scores]
        line += [f"{result['learnable_parameters']:,}", f"{result['seconds']:.1f}"]
        line.append("-" if result["peak_mib"] is None else f"{result['peak_mib']:,.0f} MiB")
        lines.append(line)
    widths = [max(map(len, column)) for column in zip(*lines)]
    print()
    shots = "1 shot" if config["shots"] == 1 else f"{config['shots']} shots"
    print(printable(f"{config['dataset']}, seed {config['seed']}, {shots}"))
    for name, *cells in lines:
        print(name.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(cells, widths[1:])), sep="  ")
    for method, result in rows:
        if "one_list" in result:
            told = f"Not told which half an image is from: {one_list(result['one_list'])} ({names[method]})"
            if method == "mao":
                told = f"{told[:-1]}; single final prompt: {one_list(result['one_list_final'])})"
            print(told)


def one_list(scores):
    """The scores over one list of classes, for a line of text."""
    return ", ".join(f"{key if key == 'all' else key.capitalize()} {value:.2f}" for key, value in scores.items())
