"""Tunes prompts with and without MAO on a few-shot task, base-to-new unless told otherwise, and scores them (Table 1).

    python run.py                                        the embedded demo: no network, no GPU, some 3 minutes
    python run.py --dataset eurosat --backbone coop      CLIP ViT-B/16 on EuroSAT
    python run.py --dataset imagenet --protocol cross-dataset --targets all                       Table 2
    python run.py --dataset folder --root DIR --unlabeled DIR2 --new-classes names.txt            images of your own
    python run.py --eval runs/demo-coop-mao-seed1        scores a finished run again
    python run.py --resume                               goes on where a stopped run was

Each row of the table leaves its prompts and scores in a folder under --out.
"""

if __name__ == "__main__":
    from cli import catch_early_interrupt

    catch_early_interrupt()  # the imports below take seconds

import pathlib

import torch
from torch.nn.functional import one_hot, pad

import evaluate
import settings
from checkpoints import load_clip_of
from cli import end, printable, warn
from data import task_of
from encoders import ZeroShot
from images import (
    Images,
    ShuffledBatches,
    Views,
    loader,
    model_input,
    randaugment_transform,
    test_transform,
    train_transform,
)
from mao import backbone_loss, base_loss, candidates, new_loss, soft_new_loss
from phase import Phase
from pseudolabel import PseudoLabeler, balanced, confident
from record import Record, alone, folder_name, read_prompts
from rivals import BACKBONES  # the paper's three, and the six rivals
from sampler import HardNegativeSampler


def main(arguments=None):
    args = settings.parse(arguments, __doc__)
    if args.eval:
        for folder in args.eval:
            evaluate.score_again(folder, args.device, args.workers, args.root, args.clip, args.threads)
        return

    torch.set_num_threads(args.threads)
    task = task_of(vars(args), args.download)
    clip_model, sha256 = load_clip_of(vars(args), args.device)
    settings.fit(args, task, clip_model)
    settings.tell_precision(args)
    zero_shot = ZeroShot(clip_model, task.base_names)
    tests = evaluate.Tests(task, zero_shot, args.device, args.workers)

    rows = []
    for method in args.method:
        row = settings.row(args, method, task)
        name = folder_name(args.dataset, args.backbone, method, args.seed, args.changed)
        with alone(pathlib.Path(args.out) / name):
            in_force = settings.in_force(row, task, sha256)
            record = Record(pathlib.Path(args.out) / name, in_force, args.resume, args.force)
            if record.finished:
                warn(f"{record.folder} is there already: its scores are shown; --force tunes it again")
                rows.append((method, record.finished))
                continue
            record.lists(task.lists)
            if method == "zeroshot":
                learner, states = zero_shot, None
            else:
                learner, states = tune(clip_model, task, row, record)
            scores = evaluate.score(learner, states, task, tests)
            rows.append((method, record.result(scores, learner)))
            if args.plot:
                from experiments.figures import plot  # with matplotlib, which nothing else here needs

                plot(record.folder)
    evaluate.show(vars(args), rows, BACKBONES[args.backbone].__name__)
    print(printable(f"The last row's prompts and scores are in {record.folder}, the others' beside it."))


def tune(clip_model, task, args, record):
    """Tunes one row: the plain backbone in one phase of 20 epochs, MAO in two of 10 (section 3.2, `settings.RECIPES`).

    Where there are no new classes, MAO is its base phase alone. clip_model: frozen. task: a `data.Task`. args: of
    `settings.row`; base_recipe and new_recipe have the epochs of each phase, None where there is no such phase.
    record: the row's `Record`. Returns the learner, and its state dicts {"base", "new"}: after phase 1 and after the
    last one. ValueError: tuning diverged.
    """
    torch.manual_seed(args.seed)
    learner = BACKBONES[args.backbone](clip_model, task.base_names, **args.settings)
    if hasattr(learner, "sentences"):  # CoPrompt's
        learner.sentences = settings.read_sentences(args)
    if record.state is None or record.state["phase"] == "base":
        base_phase(learner, clip_model, task, args, record)
    else:  # --resume, of a run that was stopped in the new phase
        learner.load_state_dict(
            read_prompts(record.folder / "base.safetensors", args.backbone, record.config["clip_sha256"])
        )
    states = {"base": {name: value.clone() for name, value in learner.state_dict().items()}}
    if args.new_recipe is not None:
        new_phase(learner, clip_model, task, args, record)
    states["new"] = {name: value.clone() for name, value in learner.state_dict().items()}
    return learner, states


def base_phase(learner, clip_model, task, args, record):
    """Phase 1 tunes on labeled images of the base classes: MAO's (section 3.2) or the plain backbone's (section 3.1).

    Arguments as of `tune`; the learner is changed in place.
    """
    paths, all_labels = [path for path, _, _ in task.base_train], [label for _, label, _ in task.base_train]
    dataset = Images(paths, task.read, augmentation(learner, clip_model, task, args), all_labels)
    mao = args.method == "mao" and not args.no_base
    if mao:
        batches = HardNegativeSampler(all_labels, task.base_names, args.anchors, args.top_k, args.seed)  # Eq. 4
    else:
        batches = ShuffledBatches(len(dataset), args.base_recipe.batch_size, args.seed)

    phase = Phase("base", args.base_recipe, learner, dataset, batches, args, record, clip_model)
    for _ in phase.epochs():
        for images, labels in phase.batches():
            if mao and not args.no_reg_base:
                loss = base_loss(learner, images, labels)  # Eq. 6
                size = len(candidates(labels)[0])  # H
            else:
                loss = backbone_loss(learner, images, labels)  # Eq. 2
                size = len(task.base_names)  # C_b
            phase.step(loss, size)
        phase.end_epoch()


def new_phase(learner, clip_model, task, args, record):
    """Phase 2 goes on with unlabeled images of the new classes and pseudo-labels (section 3.3).

    Arguments as of `tune`; the learner is changed in place.
    """
    foundation = ZeroShot(clip_model, task.new_names, task.label_template)  # "a photo of a {}."
    if args.pseudo_labeler == "clip":
        labeler = PseudoLabeler(foundation)
    else:  # Table 5's other row: the prompts as phase 1 left them
        tuned = BACKBONES[args.backbone](clip_model, task.base_names, **args.settings)
        tuned.load_state_dict(learner.state_dict())
        tuned.set_classes(task.new_names)
        labeler = PseudoLabeler(tuned)
    if args.no_reg_new:  # Table 4 (c): the base classes stay candidates, before the new ones
        learner.set_classes(task.base_names + task.new_names)
        first = len(task.base_names)
    else:  # the new classes supersede them
        learner.set_classes(task.new_names)
        first = 0
    transform = augmentation(learner, clip_model, task, args)
    paths, chosen = task.new_train, torch.arange(len(task.new_train))
    known = None  # the paper's way. Otherwise the probabilities are known beforehand: options that it does not have.
    if args.pseudo_label_view == "center" or args.pseudo_labels == "balanced":
        known = label_whole_images(labeler, foundation, task, args)  # [N, C_n]
    if args.pseudo_labels == "balanced":
        chosen, labels = balanced(known, args.unlabeled_shots)
        paths, known = [paths[index] for index in chosen], one_hot(labels, known.shape[1]).float()
    dataset = Images(paths, task.new_read, transform)  # I_n: no labels, each image comes with its index
    batches = ShuffledBatches(len(dataset), args.new_recipe.batch_size, args.seed)

    phase = Phase("new", args.new_recipe, learner, dataset, batches, args, record, clip_model)
    for _ in phase.epochs():
        seen, guesses = [], []  # indices and pseudo-labels; which of them are right only the evaluation knows
        for images, indices in phase.batches():  # one view each: CoPrompt, which has two, has no new phase
            # f(i_n) of frozen CLIP, once for labeler and learner; --cache-views brings it along
            images, frozen = images if isinstance(images, tuple) else (images, foundation.image_features(images))
            if known is None:
                p = labeler.probabilities(inputs(labeler.classifier, images, frozen))  # of the view as it comes
            else:
                p = known[indices]
            pseudo_labels = p.argmax(dim=-1)  # Eq. 7
            images = inputs(learner, images, frozen)
            if args.pseudo_labels == "confident":  # not the paper's, nor is "soft" below
                keep = confident(p, args.confidence)
                if not keep.any():
                    phase.skip()
                    continue
                images, pseudo_labels, indices = take(images, keep), pseudo_labels[keep], indices[keep.cpu()]
            if args.pseudo_labels == "soft":
                loss = soft_new_loss(learner, images, pad(p, (first, 0)))
            else:
                loss = new_loss(learner, images, pseudo_labels + first)  # Eq. 8
            phase.step(loss, first + len(task.new_names))
            seen.append(indices)
            guesses.append(pseudo_labels.cpu())
        phase.end_epoch(evaluate.pseudo_label_accuracy(task.new_answers, chosen, seen, guesses))


@torch.no_grad()
def label_whole_images(labeler, foundation, task, args):
    """p [N, C_n] of all unlabeled images, each seen once, as CLIP's own preprocessing shows it."""
    pixels = foundation.clip_model.visual.input_resolution
    found = []
    for images, _ in loader(Images(task.new_train, task.new_read, test_transform(pixels)), args.workers, batch_size=64):
        images = model_input(images.to(args.device))
        found.append(labeler.probabilities(inputs(labeler.classifier, images, foundation.image_features(images))))
    return torch.cat(found)


def take(images, keep):
    """Those images that are to be kept, of what `inputs` gave. keep: bool [B]."""
    return tuple(part[keep] for part in images) if isinstance(images, tuple) else images[keep]


def augmentation(learner, clip_model, task, args):
    """The transform of training images: CoOp's, unless the learner's recipe has another; as many views as it wants."""
    pixels = clip_model.visual.input_resolution
    if args.augmentation == "randaugment":
        transform = randaugment_transform(pixels)
    else:
        transform = train_transform(pixels, task.crop_scale)
    views = getattr(learner, "views", 1)
    return transform if views == 1 else Views(transform, views)


def inputs(learner, images, frozen):
    """What a learner's image_features takes of images [B, 3, h, w] and frozen CLIP's features [B, d] of them.

    CoOp takes the features, PromptSRC the pair (images, features), MaPLe the images.
    """
    if not learner.prompts_images:
        return frozen
    if getattr(learner, "uses_frozen_features", False):
        return images, frozen
    return images


if __name__ == "__main__":
    end("run.py", main)
