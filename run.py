"""Tunes prompts with and without MAO on a few-shot task, base-to-new unless told otherwise, and scores them (Table 1).

    python run.py                                        the embedded demo: no network, no GPU, some 3 minutes
    python run.py --dataset eurosat --backbone coop      CLIP ViT-B/16 on EuroSAT
    python run.py --dataset imagenet --protocol cross-dataset --targets all                       Table 2
    python run.py --dataset folder --root DIR --unlabeled DIR2 --new-classes names.txt            images of your own
    python run.py --eval runs/demo-coop-mao-seed1        scores a finished run again
"""

import argparse
import math
import os
import pathlib
import time

import torch
from tqdm import tqdm

import data
import demo
import evaluate
import loaders
from backbones import BACKBONES, ZeroShot, load_clip
from command import Parser, at_least, end, settings_of, warn
from mao import base_step, candidates, full_step, new_step
from pseudolabel import PseudoLabeler
from record import Record, folder_name, show
from sampler import HardNegativeSampler, paper_batch
from tasks import PROTOCOLS, task_of

SGD = {"momentum": 0.9, "weight_decay": 5e-4}  # the authors' release, all backbones, as is the next
WARMUP_LR, BACKBONE_LR, MAO_LR = 1e-5, 0.002, 0.0035  # appendix B
METHODS, PHASES = ["zeroshot", "backbone", "mao"], ["", "base", "new"]
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


# Settings ------------------------------------------------------------------------------------------------------------


def settings(arguments=None):
    """The command line: (parser, arguments)."""
    parser = Parser("run.py", __doc__)
    count = {"type": at_least(1), "metavar": "N"}
    add = parser.add_argument_group("task (section 4.1)").add_argument
    add("--dataset", default="demo", metavar="NAME", help=f"one of {', '.join(data.DATASETS)} (default: demo)")
    add("--root", metavar="DIR", help="folder of the datasets, in CoOp's layout (default: data); for --dataset folder "
        "your own: DIR/<class name>/*.jpg, or DIR/train and DIR/test")
    add("--download", action="store_true", help="fetch what is missing, where a program can (EuroSAT: always)")
    add("--protocol", choices=PROTOCOLS, default=PROTOCOLS[0], help="base-to-new (default, Table 1); cross-dataset: "
        "tune on all classes, score on --targets too (Table 2); few-shot: all classes, train and test")
    add("--targets", nargs="+", default=["all"], metavar="NAME", help="of cross-dataset (default: all others)")
    add("--unlabeled", metavar="DIR", help="phase 2 on all images of DIR instead; all classes of the dataset are base")
    add("--new-classes", metavar="FILE", help="their class names, a line each")
    add("--new-test", metavar="DIR", help="labelled images of them, DIR/<class name>/*.jpg (default: none, New is '-')")
    add("--shots", default=16, **count, help="labelled images a base class (default: 16, appendix B)")
    add("--unlabeled-shots", **count, help="unlabelled images a new class (default: as --shots; Fig. 4 right)")
    add("--seed", type=at_least(0), default=1, metavar="N", help="of all draws (default: 1; the paper has 3 runs)")
    add = parser.add_argument_group("model (Table 6)").add_argument
    add("--backbone", choices=list(BACKBONES), default="coop", help="the prompt learner (default: coop); promptsrc's "
        "losses weigh 25 (text), 10 (image) and 1, its Gaussian over epochs is at 15, std 1")
    add("--method", nargs="+", choices=METHODS, default=METHODS, help="rows of the table (default: all; Table 1)")
    add("--n-ctx", **count, help="text contexts (default: 4, of maple 2; Table 3's 8K parameters are 16)")
    add("--ctx-init", metavar="WORDS", help="coop: the context starts from these words (default: from N(0, 0.02^2))")
    add("--depth", **count, help="maple, promptsrc: layers with contexts (default: 9, or all where there are fewer)")
    add("--n-ctx-vision", **count, help="promptsrc: visual contexts (default: 4)")
    add("--depth-vision", **count, help="promptsrc: layers with visual contexts (default: as for --depth)")
    add("--clip", metavar="NAME|FILE", help="frozen CLIP (default: ViT-B/16, section 3.1; on the demo: demo, its own)")
    add = parser.add_argument_group("tuning (section 4.1 and appendix B)").add_argument
    add("--epochs", type=at_least(2), metavar="N", help="default: 20, MAO halves them; cross-dataset 5, not halved")
    add("--lr", type=at_least(1e-9), metavar="X", help=f"default: {BACKBONE_LR}, MAO and cross-dataset {MAO_LR}")
    add("--batch-size", default=32, **count, help="of the backbone and of MAO's new phase (default: 32)")
    add("--anchors", **count, help="b of the base phase (default: 4 from 32 base classes, else 2)")
    add("--top-k", **count, help="K of Eq. 4 (default: 8 from 16 base classes, else half of them)")
    add("--cache-views", **count, help="coop: encode N views of each image once, draw from them (default: none)")
    add = parser.add_argument_group("ablations (Tables 4, 5 and 8)").add_argument
    add("--no-base", action="store_true", help="phase 1 is the plain backbone with all its epochs (Table 4 b)")
    add("--no-new", action="store_true", help="stop after phase 1 (Tables 4 a and 8 c)")
    add("--no-reg-base", action="store_true", help="phase 1: cross-entropy over all base classes, not Eq. 6")
    add("--no-reg-new", action="store_true", help="phase 2: over base and new classes, not Eq. 8 (Table 4 c)")
    add("--pseudo-labeler", choices=["clip", "tuned"], default="clip", help="Eq. 7's CLIP (default: clip; Table 5)")
    add = parser.add_argument_group("machine and files").add_argument
    add("--precision", choices=list(PRECISIONS), default="fp32", help="of CLIP; prompts stay fp32 (default: fp32)")
    add("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu",
        help="default: cuda where there is one")
    add("--workers", type=at_least(0), metavar="N", help="load images (default: a core each, at most 8; demo: none)")
    add("--out", default="runs", metavar="DIR", help="each row leaves a folder there (default: runs)")
    add("--eval", nargs="+", metavar="RUN", help="score finished rows again (--root, --clip: where they are now)")
    return parser, parser.parse_args(arguments)


# The two phases ------------------------------------------------------------------------------------------------------


def learning_rate(epoch, epochs, lr):
    """Of epoch 1..epochs: one warm-up epoch, then a cosine, stepped once an epoch (the authors' release)."""
    return WARMUP_LR if epoch == 1 else lr / 2 * (1 + math.cos(math.pi * (epoch - 2) / epochs))


def tune(phase, learner, images, batches, step, epochs, lr, args, record, report=dict):
    """One phase by SGD. step(images, labels or indices) -> (loss, H). The prompts are kept after every epoch."""
    loader = loaders.training_loader(
        images, batches, args.seed, PHASES.index(phase), args.workers, args.device == "cuda", args.cache_views,
        encode=lambda images: learner.image_features(loaders.model_input(images.to(args.device))))
    optimiser = torch.optim.SGD(learner.parameters(), lr, **SGD)
    precision = PRECISIONS[args.precision]
    scaler = torch.amp.GradScaler(args.device, enabled=args.precision == "fp16")
    bar = tqdm(total=epochs * len(loader), desc=f"{record.config['method']}, {phase} phase", unit="batch")
    for epoch in range(1, epochs + 1):
        started, losses, sizes = time.perf_counter(), [], []
        optimiser.param_groups[0]["lr"] = rate = learning_rate(epoch, epochs, lr)
        loader.batch_sampler.set_epoch(epoch)
        for images, labels in loader:
            images = loaders.model_input(images.to(args.device, non_blocking=True))
            with torch.autocast(args.device, precision, enabled=precision != torch.float32):
                loss, size = step(images, labels)
            optimiser.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimiser)
            scaler.update()
            losses.append(loss.detach())
            sizes.append(size)
            bar.update()
        mean = torch.stack(losses).mean().item()
        if not math.isfinite(mean) or not all(p.isfinite().all() for p in learner.parameters()):
            bar.close()
            kept = f"epoch {epoch - 1}'s prompts are kept in {record.folder}" if epoch > 1 else "nothing to keep yet"
            raise ValueError(f"the {phase} phase diverged in epoch {epoch}, its loss is {mean}: lower --lr; {kept}")
        if hasattr(learner, "epoch_end"):
            learner.epoch_end(epoch, epochs)
        bar.set_postfix(epoch=epoch, loss=f"{mean:.3f}")
        record.prompts(phase, learner)
        record.epoch({"phase": phase, "epoch": epoch, "loss": mean, "lr": rate, "candidates": sum(sizes) / len(sizes),
                      "seconds": time.perf_counter() - started, **report()})
    bar.close()
    return {name: value.clone() for name, value in learner.state_dict().items()}


def tune_row(args, task, clip_model, record):
    """Tunes one row; returns the learner, its prompts after phase 1 ("base") and at the end ("new")."""
    torch.manual_seed(args.seed)
    learner = BACKBONES[args.backbone](clip_model, task.base_names, **args.settings)
    transform = loaders.train_transform(clip_model.visual.input_resolution, task.crop_scale)

    # Phase 1, base classes: hard negatives and reg-B (section 3.2), or the plain backbone.
    labels = [label for _, label, _ in task.base_train]
    images = loaders.Images([path for path, _, _ in task.base_train], task.read, transform, labels)
    if args.method == "mao" and not args.no_base:
        batches = HardNegativeSampler(labels, task.base_names, args.anchors, args.top_k, args.seed)
        loss, epochs = full_step if args.no_reg_base else base_step, args.base_epochs
    else:
        batches = loaders.ShuffledBatches(len(images), args.batch_size, args.seed)
        loss, epochs = full_step, args.epochs

    def step(images, labels):
        return loss(learner, images, labels), len(candidates(labels)[0] if loss is base_step else task.base_names)

    base = tune("base", learner, images, batches, step, epochs, args.base_lr, args, record)
    if args.new_lr is None:
        return learner, {"base": base, "new": base}

    # Phase 2, new classes: unlabelled images, pseudo-labels and reg-N (section 3.3).
    foundation = ZeroShot(clip_model, task.new_names)  # "a photo of a {}."
    labeler = PseudoLabeler(foundation)
    if args.pseudo_labeler == "tuned":  # Table 5: the prompts as phase 1 left them
        tuned = BACKBONES[args.backbone](clip_model, task.new_names, **args.settings)
        tuned.load_state_dict(base)
        labeler = PseudoLabeler(tuned)
    offset = len(task.base_names) if args.no_reg_new else 0  # the old candidates stay, before the new ones
    learner.set_classes(task.base_names + task.new_names if args.no_reg_new else task.new_names)
    images = loaders.Images(task.new_train, task.new_read, transform)
    batches = loaders.ShuffledBatches(len(images), args.batch_size, args.seed)
    guesses = []  # (indices, pseudo-labels) of an epoch: only the evaluation knows which are right

    def step(images, indices):
        f = foundation.image_features(images)  # f(i_n), frozen: encoded once, for all that can use it
        pseudo_labels, _ = labeler(images) if labeler.classifier.prompts_images else labeler.label_features(f)  # Eq. 7
        guesses.append((indices, pseudo_labels))
        loss = new_step(learner, images if learner.prompts_images else f, pseudo_labels + offset, frozen_features=f)
        return loss, offset + len(task.new_names)

    def report():
        indices, labels = (torch.cat(parts).cpu() for parts in zip(*guesses))
        guesses.clear()
        return evaluate.pseudo_label_accuracy(task.new_answers, indices, labels)

    new = tune("new", learner, images, batches, step, args.epochs // 2, args.new_lr, args, record, report)
    return learner, {"base": base, "new": new}


# The rows ------------------------------------------------------------------------------------------------------------


def main(arguments=None):
    parser, args = settings(arguments)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: PyTorch sees no GPU here; use --device cpu")
    unsaid = ["dataset", "backbone", "method", "seed", "download", "device", "workers", "out"]
    unsaid += ["root"] * (args.dataset != "folder")
    changed = {name: value for name, value in vars(args).items()
               if value != parser.get_default(name) and name not in unsaid}
    if args.workers is None:  # the demo draws its images faster than a worker hands them over
        args.workers = 0 if args.dataset in data.DEMOS else min(8, os.cpu_count() or 1)
    for folder in args.eval or ():
        evaluate.score_again(folder, args.device, args.workers, args.root, args.clip)
    if args.eval:
        return
    args.unlabeled_shots, cross = args.unlabeled_shots or args.shots, args.protocol == "cross-dataset"
    args.epochs = args.epochs or (5 if cross else 20)
    args.base_epochs = args.epochs if cross else (args.epochs + 1) // 2  # of MAO's base phase
    args.clip = args.clip or ("demo" if args.dataset in data.DEMOS else "ViT-B/16")
    args.settings = settings_of(BACKBONES[args.backbone], args)
    if args.cache_views and BACKBONES[args.backbone].prompts_images:
        raise ValueError(f"--cache-views needs a frozen image side, which {args.backbone} prompts: leave it out")

    # Data and CLIP, and whether the settings fit them.
    task = task_of(vars(args), args.download)
    clip_model, sha256 = load_clip(demo.WEIGHTS if args.clip == "demo" else args.clip, args.device)
    foundation = ZeroShot(clip_model, task.base_names)
    tests = evaluate.Tests(task, foundation, args.device, args.workers)
    every = task.base_names + task.new_names + sum([test.names for test in task.tests.values()], [])
    BACKBONES[args.backbone](clip_model, every, **args.settings)  # whether all names fit
    count = len(task.base_names)
    args.anchors, args.top_k = args.anchors or paper_batch(count)[0], args.top_k or paper_batch(count)[1]
    if args.top_k > count:
        raise ValueError(f"top-k is {args.top_k}, but there are {count} classes: choose that or less")
    if args.anchors * args.top_k > count:
        warn(f"b*K = {args.anchors}*{args.top_k} exceeds the {count} base classes: reg-B may become plain "
             "cross-entropy (appendix B wants --anchors times --top-k within the classes)")
    if "mao" in args.method and args.epochs < 4 and not cross:
        warn(f"--epochs {args.epochs} leaves MAO a phase of one epoch, which is the warm-up at {WARMUP_LR}")

    rows = []
    for method in dict.fromkeys(args.method):
        base_lr = args.lr or (MAO_LR if cross or method == "mao" and not args.no_base else BACKBONE_LR)
        row = argparse.Namespace(**{
            **vars(args), "method": method, "base_lr": None if method == "zeroshot" else base_lr,
            "new_lr": args.lr or MAO_LR if method == "mao" and task.new_names and not args.no_new else None})
        name = folder_name(args.dataset, args.backbone, method, args.seed, changed)
        record = Record(pathlib.Path(args.out) / name, {
            **vars(row), **SGD, "warmup_lr": WARMUP_LR, "crop_scale": task.crop_scale, "clip_sha256": sha256,
            "templates": {k: test.template for k, test in task.tests.items()}, "threads": torch.get_num_threads()})
        learner, prompts = (foundation, None) if method == "zeroshot" else tune_row(row, task, clip_model, record)
        rows.append((method, record.result(evaluate.score(learner, prompts, task, tests, args.device), learner)))
    show(vars(args), rows, BACKBONES[args.backbone].__name__)
    print(f"The last row's prompts and scores are in {record.folder}, the others' beside it.")


if __name__ == "__main__":
    end("run.py", main)
