"""How a phase is tuned: optimizer, learning rate, precision, and what each epoch leaves (appendix B)."""

import math
import time

import torch
from tqdm import tqdm

import settings
from encoders import frozen_image_features
from images import CachedViews, KeptImages, model_input, training_loader


class Phase:
    """The optimization of a phase, from a fresh optimizer on: batches, learning rate, precision, what an epoch leaves.

    name: "base" or "new". recipe: a `settings.Recipe`. dataset: an `Images`. batches: its batch sampler. args: of
    `settings.row`. clip_model: frozen; it encodes the views of --cache-views.
    """

    def __init__(self, name, recipe, learner, dataset, batches, args, record, clip_model):
        self.name, self.recipe, self.learner, self.record = name, recipe, learner, record
        self.device = args.device
        number = {"base": 1, "new": 2}[name]
        dataset.read = KeptImages(dataset.read, dataset.paths, args.image_memory, args.workers)
        if args.cache_views:
            frozen = name == "new" or not learner.prompts_images or getattr(learner, "uses_frozen_features", False)

            def encode(images):
                return frozen_image_features(clip_model, model_input(images.to(args.device)))

            dataset = CachedViews(dataset, args.cache_views, learner.prompts_images, encode if frozen else None,
                                  args.seed, number, args.workers)  # fmt: skip
        self.loader = training_loader(dataset, batches, args.seed, number, args.workers, args.device == "cuda")
        self.optimizer = make_optimizer(learner, recipe.lr, **args.optimizer)
        self.scaler = torch.amp.GradScaler(args.device, enabled=args.precision == "fp16")
        self.done = 0  # epochs
        if record.state is not None and record.state["phase"] == name:  # --resume
            record.restore(learner, self.optimizer, self.scaler)
            self.done = record.state["epoch"]
        total, done = recipe.epochs * len(self.loader), self.done * len(self.loader)
        self.bar = tqdm(total=total, initial=done, desc=f"{args.method}, {name} phase", unit="batch")

    def epochs(self):
        """Yields the epochs 1, 2, ..., or those that a stopped run left, each with its learning rate and batches."""
        for epoch in range(self.done + 1, self.recipe.epochs + 1):
            self.epoch, self.started, self.losses, self.sizes = epoch, time.perf_counter(), [], []
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate(epoch, self.recipe.epochs, group["highest_lr"])
            self.loader.batch_sampler.set_epoch(epoch)
            yield epoch
        self.bar.close()

    def batches(self):
        """Yields an epoch's (images as CLIP wants them, on the device; labels or indices, on the CPU).

        With --cache-views the images are features [B, d], or a pair (images, features): `CachedViews`.
        """
        for images, labels in self.loader:
            if isinstance(images, list):  # several views of each image, or a pair
                yield tuple(self.to_model(view) for view in images), labels
            else:
                yield self.to_model(images), labels

    def to_model(self, images):
        return model_input(images.to(self.device, non_blocking=True))

    def step(self, loss, size):
        """One step of the optimizer down a loss, a scalar. size: the number of candidates, for the record."""
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.losses.append(loss.detach())
        self.sizes.append(size)
        self.bar.update()

    def skip(self):
        """A batch without a step: none of its pseudo-labels is confident."""
        self.bar.update()

    def end_epoch(self, more=()):
        """Keeps the prompts, and a line of metrics with `more` in it, a dict. ValueError: the loss is not finite."""
        if not self.losses:  # all batches were skipped
            self.losses, self.sizes = [torch.zeros(())], [0]
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
        self.record.keep(self.name, self.epoch, self.learner, self.optimizer, self.scaler)


def make_optimizer(learner, lr, optimizer, eps, lr_factors):
    """SGD or Adam over the learner's prompts.

    lr: the highest rate of the phase. lr_factors: what multiplies it, by the first part of a parameter's name, or None.
    The first epoch's rate is the same for all.
    """
    groups = {}
    for name, parameter in learner.named_parameters():
        factor = (lr_factors or {}).get(name.split(".")[0], 1)
        groups.setdefault(factor, []).append(parameter)
    groups = [{"params": params, "highest_lr": lr * factor} for factor, params in groups.items()]
    if optimizer == "sgd":
        return torch.optim.SGD(groups, lr, **settings.SGD)
    return torch.optim.Adam(groups, lr, eps=eps or 1e-8, weight_decay=settings.SGD["weight_decay"])


def learning_rate(epoch, epochs, lr):
    """The rate of an epoch in 1..epochs: one epoch of warm-up, then a cosine, as in the authors' release.

    The cosine is stepped once per epoch. Epoch 2 has lr itself. It would reach 0 two epochs after the last one. So the
    last rate is 2% of lr in a phase of 20 epochs, 10% in one of 10, 35% in one of 5. The paper does not say.
    """
    if epoch == 1:
        return settings.WARMUP_LR
    return lr / 2 * (1 + math.cos(math.pi * (epoch - 2) / epochs))
