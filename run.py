"""Tunes prompts with and without MAO on a few-shot task, base-to-new unless told otherwise, and scores them (Table 1).

python run.py                                        the embedded demo: no network, no GPU, some 3 minutes
python run.py --dataset eurosat --backbone coop      CLIP ViT-B/16 on EuroSAT
python run.py --dataset imagenet --protocol cross-dataset --targets all                       Table 2
python run.py --dataset folder --root DIR --unlabeled DIR2 --new-classes names.txt            images of your own
python run.py --eval runs/demo-coop-mao-seed1        scores a finished run again
"""

import math
import pathlib
import time

import torch
from tqdm import tqdm

import evaluate
import settings
from backbones import BACKBONES
from cli import end
from data import task_of
from encoders import ZeroShot, load_clip
from images import Images, ShuffledBatches, model_input, train_transform, training_loader
from mao import backbone_loss, base_loss, candidates, new_loss
from pseudolabel import PseudoLabeler
from record import Record, folder_name
from sampler import HardNegativeSampler


def main(arguments=None):
    args = settings.parse(arguments, __doc__)
    if args.eval:
        for folder in args.eval:
            evaluate.score_again(folder, args.device, args.workers, args.root, args.clip)
        return

    task = task_of(vars(args), args.download)
    clip_model, sha256 = load_clip(args.clip, args.device)
    settings.fit(args, task, clip_model)
    zero_shot = ZeroShot(clip_model, task.base_names)
    tests = evaluate.Tests(task, zero_shot, args.device, args.workers)

    rows = []
    for method in args.method:
        row = settings.row(args, method, task)
        record = Record(
            pathlib.Path(args.out) / folder_name(args.dataset, args.backbone, method, args.seed, args.changed),
            settings.in_force(row, task, sha256),
        )
        if method == "zeroshot":
            learner, prompts = zero_shot, None
        else:
            learner, prompts = tune(clip_model, task, row, record)
        scores = evaluate.score(learner, prompts, task, tests)
        rows.append((method, record.result(scores, learner)))
    evaluate.show(vars(args), rows, BACKBONES[args.backbone].__name__)
    print(f"The last row's prompts and scores are in {record.folder}, the others' beside it.")


def tune(clip_model, task, args, record):
    """Tunes one row in MAO's two phases, or in the one of the plain backbone (section 3).

    clip_model: frozen. task: a `data.Task`. args: of `settings.row`. record: the row's `Record`. Returns the learner
    and its prompts, state dicts {"base", "new"}: after phase 1 and after the last one. ValueError: tuning diverged.
    """
    torch.manual_seed(args.seed)
    learner = BACKBONES[args.backbone](clip_model, task.base_names, **args.settings)
    base_phase(learner, clip_model, task, args, record)
    prompts = {"base": {name: value.clone() for name, value in learner.state_dict().items()}}
    if args.new is not None:
        new_phase(learner, clip_model, task, args, record)
    prompts["new"] = {name: value.clone() for name, value in learner.state_dict().items()}
    return learner, prompts


def base_phase(learner, clip_model, task, args, record):
    """Phase 1 tunes on labeled images of the base classes: MAO's (section 3.2) or the plain backbone's (section 3.1).

    Arguments as of `tune`; the learner is changed in place.
    """
    paths, labels = [path for path, _, _ in task.base_train], [label for _, label, _ in task.base_train]
    transform = train_transform(clip_model.visual.input_resolution, task.crop_scale)
    dataset = Images(paths, task.read, transform, labels)
    mao = args.method == "mao" and not args.no_base
    if mao:
        batches = HardNegativeSampler(labels, task.base_names, args.anchors, args.top_k, args.seed)  # Eq. 4
    else:
        batches = ShuffledBatches(len(dataset), args.batch_size, args.seed)

    phase = Phase("base", args.base, learner, dataset, batches, args, record)
    for _ in phase.epochs():
        for images, labels in phase.batches():
            with phase.precision():
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
    foundation = ZeroShot(clip_model, task.new_names)  # "a photo of a {}."
    if args.pseudo_labeler == "clip":
        labeler = PseudoLabeler(foundation)
    else:  # Table 5's other row: the prompts as phase 1 left them
        tuned = BACKBONES[args.backbone](clip_model, task.new_names, **args.settings)
        tuned.load_state_dict(learner.state_dict())
        labeler = PseudoLabeler(tuned)
    if args.no_reg_new:  # Table 4 (c): the base classes stay candidates, before the new ones
        learner.set_classes(task.base_names + task.new_names)
        first = len(task.base_names)
    else:
        learner.set_classes(task.new_names)
        first = 0
    transform = train_transform(clip_model.visual.input_resolution, task.crop_scale)
    dataset = Images(task.new_train, task.new_read, transform)  # no labels: each image comes with its index
    batches = ShuffledBatches(len(dataset), args.batch_size, args.seed)

    phase = Phase("new", args.new, learner, dataset, batches, args, record)
    for _ in phase.epochs():
        seen, labels = [], []  # indices and pseudo-labels; which of them are right only the evaluation knows
        for images, indices in phase.batches():
            with phase.precision():
                f = foundation.image_features(images)  # f(i_n) of frozen CLIP, once for all that can use it
                pseudo_labels, _ = labeler(inputs(labeler.classifier, images, f))  # Eq. 7
                loss = new_loss(learner, inputs(learner, images, f), pseudo_labels + first)  # Eq. 8
            phase.step(loss, first + len(task.new_names))
            seen.append(indices)
            labels.append(pseudo_labels.cpu())
        phase.end_epoch(evaluate.pseudo_label_accuracy(task.new_answers, torch.cat(seen), torch.cat(labels)))


def inputs(learner, images, f):
    """What a learner takes as images [B, 3, h, w] where frozen CLIP's features f [B, d] of them are known (mao.py)."""
    if not learner.prompts_images:
        return f
    if getattr(learner, "uses_frozen_features", False):
        return images, f
    return images


class Phase:
    """The SGD of a phase: its epochs and batches, the learning rate, the precision, and what each epoch leaves.

    name: "base" or "new". recipe: epochs and learning rate. dataset: an `Images`. batches: its batch sampler.
    """

    def __init__(self, name, recipe, learner, dataset, batches, args, record):
        self.name, self.recipe, self.learner, self.record = name, recipe, learner, record
        self.device, self.type = args.device, settings.PRECISIONS[args.precision]
        self.loader = training_loader(
            dataset,
            batches,
            args.seed,
            1 + ["base", "new"].index(name),
            args.workers,
            args.device == "cuda",
            args.cache_views,
            encode=lambda images: learner.image_features(model_input(images.to(args.device))),
        )
        self.optimizer = torch.optim.SGD(learner.parameters(), recipe.lr, **settings.SGD)
        self.scaler = torch.amp.GradScaler(args.device, enabled=args.precision == "fp16")
        self.bar = tqdm(total=recipe.epochs * len(self.loader), desc=f"{args.method}, {name} phase", unit="batch")

    def epochs(self):
        """Yields 1, 2, ..., each time with its learning rate and draw in force."""
        for epoch in range(1, self.recipe.epochs + 1):
            self.epoch, self.started, self.losses, self.sizes = epoch, time.perf_counter(), [], []
            self.optimizer.param_groups[0]["lr"] = learning_rate(epoch, *self.recipe)
            self.loader.batch_sampler.set_epoch(epoch)
            yield epoch
        self.bar.close()

    def batches(self):
        """Yields an epoch's (images as CLIP wants them on the device, labels or indices on the CPU)."""
        for images, labels in self.loader:
            yield model_input(images.to(self.device, non_blocking=True)), labels

    def precision(self):
        """The context in which losses are computed."""
        return torch.autocast(self.device, self.type, enabled=self.type != torch.float32)

    def step(self, loss, size):
        """One step of SGD down a loss, a scalar. size: the number of candidates, for the record."""
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.losses.append(loss.detach())
        self.sizes.append(size)
        self.bar.update()

    def end_epoch(self, more=()):
        """Keeps the prompts, and a line of metrics with `more` in it, a dict. ValueError: the loss is not finite."""
        loss, lr = torch.stack(self.losses).mean().item(), self.optimizer.param_groups[0]["lr"]
        if not math.isfinite(loss) or not all(p.isfinite().all() for p in self.learner.parameters()):
            kept = "nothing to keep yet"
            if self.epoch > 1:
                kept = f"epoch {self.epoch - 1}'s prompts are kept in {self.record.folder}"
            raise ValueError(
                f"the {self.name} phase diverged in epoch {self.epoch}, its loss is {loss}: lower --lr; {kept}"
            )
        if hasattr(self.learner, "epoch_end"):
            self.learner.epoch_end(self.epoch, self.recipe.epochs)
        self.bar.set_postfix(epoch=self.epoch, loss=f"{loss:.3f}")
        self.record.prompts(self.name, self.learner)
        line = {"phase": self.name, "epoch": self.epoch, "loss": loss, "lr": lr}
        line["candidates"] = sum(self.sizes) / len(self.sizes)
        line["seconds"] = time.perf_counter() - self.started
        self.record.epoch({**line, **dict(more)})


def learning_rate(epoch, epochs, lr):
    """The rate of epoch 1..epochs: one of warm-up, then a cosine, stepped once per epoch (the authors' release)."""
    if epoch == 1:
        return settings.WARMUP_LR
    return lr / 2 * (1 + math.cos(math.pi * (epoch - 2) / epochs))


if __name__ == "__main__":
    end("run.py", main)
