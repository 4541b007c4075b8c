"""MAO: tunes prompts in two phases, with and without MAO, and scores them on base and new classes (Table 1).

    python run.py                                        the embedded demo: no network, no GPU, 2 to 3 minutes
    python run.py --dataset eurosat --backbone coop      CLIP ViT-B/16 on EuroSAT
    python run.py --dataset imagenet --protocol cross-dataset                                     Table 2
    python run.py --dataset folder --root DIR --unlabeled DIR2 --new-classes names.txt            your own images
    python run.py --eval runs/demo-coop-mao-seed1        scores a finished run again
    python run.py --resume                               continues a stopped run
    python run.py --seed 1 2 3                           three runs, their mean and standard deviation

Each row of the table leaves its prompts and scores in a folder under --out.
"""

from harness import folders, options
from harness.cli import printable, run_main, warn

if __name__ == "__main__":  # wrong options and missing folders are handled here: the imports below take seconds
    run_main("run.py", lambda: folders.look_for_folders(options.parse(description=__doc__)))

import copy
import math
import pathlib
import sys

import torch
from msgspec.structs import asdict, replace

from backbones import BACKBONES, Learner, ZeroShot
from baselines import BASELINES, labelers, samplers
from data import open_task
from harness import runs, scores
from harness.clips import load_clip_of
from harness.images import ShuffledBatches
from harness.tuning import PhaseBatches, fill_defaults, machine_defaults, make_optimizer
from mao import backbone_loss, base_loss, candidates, new_loss
from pseudolabel import PseudoLabeler
from sampler import HardNegativeSampler

# What can be exchanged: prompt learner, batches of the base phase, pseudo-labels of the new phase --------------------


def hard_negatives(learner, task, args):
    """The paper's (Eq. 4): b anchors, each with images of the K - 1 classes whose names are nearest to its own."""
    labels = [label for _, label, _ in task.base_train]
    print(f"{args.text_encoder or 'MiniLM'} embeds the names of the base classes ...", file=sys.stderr, flush=True)
    return HardNegativeSampler(labels, task.base_names, args.anchors, args.top_k, args.seed, args.text_encoder)


def random_images(learner, task, args):
    """The backbone's: random images."""
    return ShuffledBatches(len(task.base_train), args.base.batch_size, args.seed)


def foundation_labels(learner, task, args):
    """The paper's (Eq. 7): the Top-1 of the foundation CLIP on each augmented view, with "a photo of a {}."."""
    labeler = PseudoLabeler(ZeroShot(learner.clip_model, task.new_names, task.label_template))
    return labels_of(labeler), task


def tuned_labels(learner, task, args):
    """Table 5's other row: the Top-1 of the prompts as phase 1 left them."""
    tuned = LEARNERS[args.backbone](learner.clip_model, task.base_names, **args.learner_settings)
    tuned.load_state_dict(learner.state_dict())
    tuned.set_classes(task.new_names)
    return labels_of(PseudoLabeler(tuned)), task


def labels_of(labeler):
    """A function from a batch, images and their indices [B], to the images, indices and pseudo-labels to tune on."""
    return lambda images, indices: (images, indices, labeler(images)[0])


LEARNERS = BACKBONES  # CoOp, MaPLe, PromptSRC
LEARNERS.update(BASELINES)
SAMPLERS = {"hard": hard_negatives, "random": random_images, **samplers.SAMPLERS}
LABELERS = {"clip": foundation_labels, "tuned": tuned_labels, **labelers.LABELERS}

# The two phases -------------------------------------------------------------------------------------------------------


def tune(learner, task, args, record):
    """Tunes one row: the plain backbone in one phase of 20 epochs, MAO in two of 10 (section 3.2, `options.RECIPES`).

    learner: holds the base classes. task: a `data.Task`. args: an `options.Config`, whose `base` and `new` are the
    recipes of the phases, None where the row does not have the phase. record: the row's `runs.Record`.
    Returns the state dicts {"base", "new"}, after phase 1 and after the last phase. ValueError: tuning diverged.
    """
    if record.state is None or record.state["phase"] == "base":
        base_phase(learner, task, args, record)
    else:  # --resume of a run that was stopped in the new phase: these are for states["base"], it restores the rest
        state = runs.read_prompts(record.folder / "base.safetensors", args.backbone, args.clip_sha256)
        learner.load_state_dict(state)
    states = {"base": copy.deepcopy(learner.state_dict())}  # these score the base classes
    if args.new is not None:
        new_phase(learner, task, args, record)
    states["new"] = copy.deepcopy(learner.state_dict())  # these score the new classes
    return states


def base_phase(learner, task, args, record):
    """Phase 1: labeled images of the base classes, with MAO (section 3.2) or without (section 3.1)."""
    mao = args.method == "mao" and not args.no_base
    sampler = SAMPLERS[args.sampler if mao else "random"](learner, task, args)  # "hard": Eq. 4
    loss_of = base_loss if mao and not args.no_reg_base else backbone_loss  # Eq. 6, or Eq. 2
    batches = PhaseBatches(1, learner, task, sampler, args)  # the sampler's images, augmented, with their labels
    # SGD for the paper's three learners (Table 6), new in each phase; args.base.lr is its highest rate
    optimizer = make_optimizer(learner, args.base.lr, args.recipe)
    scaler = torch.amp.GradScaler(enabled=args.precision == "fp16" and args.device.startswith("cuda"))
    # 1..epochs; with --resume those that are left, and learner, optimizer and scaler are restored first
    for epoch in record.epochs_left("base", args.base.epochs, len(batches), learner, optimizer, scaler):
        set_learning_rate(optimizer, epoch, args.base.epochs)
        for images, labels in batches.of(epoch):  # I'_b [b*K, 3, h, w], T'_b [b*K]
            loss = loss_of(learner, images, labels)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            size = len(candidates(labels)[0]) if loss_of is base_loss else len(task.base_names)  # H, or C_b
            record.step(loss, candidates=size)
        learner.epoch_end(epoch, args.base.epochs)
        record.end_epoch("base", epoch, learner, optimizer, scaler)


def new_phase(learner, task, args, record):
    """Phase 2 (section 3.3): tuning continues from phase 1's prompts, on unlabeled images of the new classes."""
    label, task = LABELERS[args.labeler](learner, task, args)  # "clip": Eq. 7; only "balanced" changes the task
    loss_of = labelers.soft_new_loss if args.labeler == "soft" else new_loss  # Eq. 8
    learner.set_classes(task.new_names)  # C_n, which supersede the base classes
    first = 0
    if args.no_reg_new:  # Table 4 (c): the base classes stay candidates, before the new ones
        learner.set_classes(task.base_names + task.new_names)
        first = len(task.base_names)
    sampler = ShuffledBatches(len(task.new_train), args.new.batch_size, args.seed)
    batches = PhaseBatches(2, learner, task, sampler, args)  # with indices instead of labels
    optimizer = make_optimizer(learner, args.new.lr, args.recipe)
    scaler = torch.amp.GradScaler(enabled=args.precision == "fp16" and args.device.startswith("cuda"))
    for epoch in record.epochs_left("new", args.new.epochs, len(batches), learner, optimizer, scaler):
        set_learning_rate(optimizer, epoch, args.new.epochs)
        labeled = []  # indices and pseudo-labels; only the evaluation knows which of them are right
        for images, indices in batches.of(epoch):  # a pair: I_n [B, 3, h, w], and frozen CLIP's f(i_n) [B, d]
            images, indices, pseudo_labels = label(images, indices)  # Eq. 7: t^_n [B]
            if not len(indices):  # "confident" found none in this batch
                record.step()
                continue
            loss = loss_of(learner, images, pseudo_labels + first)  # Eq. 8
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            record.step(loss, candidates=first + len(task.new_names))
            labeled.append((indices, pseudo_labels))
        learner.epoch_end(epoch, args.new.epochs)
        right = scores.pseudo_label_accuracy(task.new_answers, labeled)
        record.end_epoch("new", epoch, learner, optimizer, scaler, **right)


def set_learning_rate(optimizer, epoch, epochs):
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(epoch, epochs, group["highest_lr"])


def learning_rate(epoch, epochs, lr):
    """The rate of an epoch in 1..epochs: one epoch of warm-up, then a cosine, as in the authors' release.

    The cosine is stepped once per epoch. Epoch 2 has lr itself. The rate would reach 0 two epochs after the last one.
    So the last rate is 2% of lr in a phase of 20 epochs, 10% in one of 10, 35% in one of 5. The paper does not say.
    """
    if epoch == 1:
        return options.WARMUP_LR
    return lr / 2 * (1 + math.cos(math.pi * (epoch - 2) / epochs))


# The command ----------------------------------------------------------------------------------------------------------


def main(arguments=None):
    choices = {"backbone": LEARNERS, "sampler": SAMPLERS, "labeler": LABELERS}
    typed = options.parse(arguments, __doc__, choices)
    for folder in typed.eval:
        score_again(pathlib.Path(folder), typed)
    if typed.eval:
        return
    learner_class = LEARNERS[typed.backbone]
    options.check_learner(typed, learner_class)
    args, rows = machine_defaults(typed), {method: [] for method in typed.method}
    seeds = typed.seed if isinstance(typed.seed, tuple) else (typed.seed,)
    for seed in seeds:
        args = replace(args, seed=seed)
        task = open_task(args)
        print(task.draw, file=sys.stderr)
        if seed == seeds[0]:  # all seeds have the same classes and test images
            if not args.dataset.startswith("demo"):
                print(folders.describe(task, args.shots, args.unlabeled_shots or args.shots), file=sys.stderr)
            clip_model, sha256 = load_clip_of(asdict(args), args.device)
            args = fill_defaults(args, task, learner_class)
            zero_shot, on = ZeroShot(clip_model, task.base_names), (args.device, args.workers)
            tests = scores.TestImages(task, zero_shot, *on, cache=(args, sha256))
            check_names(learner_class, clip_model, task, args)
        for method in args.method:
            rows[method].append(run_row(method, replace(typed, seed=seed), args, task, clip_model, sha256, tests))
        scores.print_table(args, [(method, results[-1:]) for method, results in rows.items()], learner_class.__name__)
    if seeds[1:]:
        scores.print_table(replace(args, seed=seeds), list(rows.items()), learner_class.__name__)
    last = pathlib.Path(args.out) / runs.folder_name(replace(typed, seed=args.seed), args.method[-1])
    print(printable(f"Prompts and scores are in {args.out}/. Next: python -m experiments.figures run {last}"))


def run_row(method, typed, args, task, clip_model, sha256, tests):
    """Tunes and scores one row, unless it is finished already. Returns its result, a dict.

    typed: the settings as the user typed them, of one seed. args: with all defaults filled in.
    """
    learner_class = LEARNERS[args.backbone]
    number, of_seed = 1 + args.method.index(method), f", seed {args.seed}" if args.seed != 1 else ""
    title = f"[{number}/{len(args.method)}] {scores.row_name(method, learner_class.__name__)}{of_seed}"
    config = runs.row_settings(args, method, learner_class, task, sha256)
    folder = pathlib.Path(args.out) / runs.folder_name(typed, method)
    with runs.run_lock(folder):
        record = runs.Record(folder, config, title, args.resume, args.force)
        if record.result:
            warn(f"{folder} is there already: its scores are shown; --force tunes it again")
            return record.result
        record.write_lists(task.lists)
        learner, states = tests.zero_shot, None
        if method != "zeroshot":
            torch.manual_seed(args.seed)
            learner = learner_class(clip_model, task.base_names, **config.learner_settings)
            states = tune(learner, task, config, record)
        record.finish(scores.score(learner, states, task, tests), learner)
    return record.result


def check_names(learner_class, clip_model, task, args):
    """ValueError: what a learner needs for its classes is missing, or a class name does not fit into its prompt."""
    learner = learner_class(clip_model, task.base_names, **options.learner_settings(args, learner_class))
    if not isinstance(learner, Learner):
        raise ValueError(f"{learner_class.__name__} is not a backbones.Learner: derive it (docs/backbone.md)")
    learner.check()
    for names in (task.base_names, task.new_names or task.base_names, *(test.names for test in task.tests.values())):
        learner.set_classes(names)


def score_again(folder, typed):
    """Scores a finished row again from its prompts, and prints the table.

    typed: the settings given with --eval, such as where data and CLIP are now. ValueError, FileNotFoundError: a broken
    folder, a row that is not finished, or data that differs from the run's.
    """
    config, result = runs.read_config(folder), runs.read_result(folder)
    if result is None:
        raise ValueError(f"{folder} is not finished: run.py with the same options and --resume continues it")
    given = {name: getattr(typed, name) for name in ("root", "clip", "threads") if getattr(typed, name) is not None}
    config = machine_defaults(replace(config, device=typed.device, workers=typed.workers, cache=typed.cache, **given))
    task = open_task(config, runs.read_lists(folder))
    runs.check_data(folder, config, task)
    clip_model, sha256 = load_clip_of(asdict(config), config.device)
    learner, states = ZeroShot(clip_model, task.base_names), None
    tests = scores.TestImages(task, learner, config.device, config.workers, (config, sha256))
    if config.method != "zeroshot":
        learner, states = runs.read_learner(folder, config, LEARNERS, clip_model, sha256)
    found = scores.score(learner, states, task, tests)
    runs.warn_of_difference(folder, result, found)
    scores.print_table(config, [(config.method, [{**result, **found}])], LEARNERS[config.backbone].__name__)


if __name__ == "__main__":
    run_main("run.py", main)
