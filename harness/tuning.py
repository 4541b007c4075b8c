"""What a phase of tuning needs besides its loop: defaults of the machine, images as batches, the optimizer."""

import sys

import torch
from msgspec.structs import replace

from encoders import frozen_image_features
from harness.cli import warn
from harness.images import CachedViews, Images, KeptImages, augmentation, default_workers, model_input, training_loader
from harness.options import SGD, WARMUP_LR, paper_batch


def machine_defaults(args):
    """The settings with CLIP, device, workers, threads and precision filled in; sets PyTorch's threads.

    args: `options.Settings`. Says on stderr which precision CLIP runs in. ValueError: as `choose_device`.
    """
    demo = args.dataset.startswith("demo")
    clip = args.clip or ("demo" if demo else "ViT-B/16")
    device, precision, workers = choose_device(args.device), args.precision, args.workers
    if precision == "auto":
        precision = "fp32"
        if device.startswith("cuda"):
            precision = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if workers is None:
        workers = 0 if demo else default_workers()  # drawing the demo's images is faster than handing them over
    threads = args.threads or (1 if clip == "demo" else torch.get_num_threads())  # small tensors are slower on several
    torch.set_num_threads(threads)
    print(f"precision: {precision} on the {'CPU' if device == 'cpu' else f'GPU ({device})'}", file=sys.stderr)
    return replace(args, clip=clip, device=device, precision=precision, workers=workers, threads=threads)


def choose_device(device):
    """The device that the user named; None: "cuda" where there is one. ValueError: it is not there, or old PyTorch."""
    if torch.__version__ < (2, 9):
        raise ValueError(f"PyTorch 2.9 or newer is needed, and {torch.__version__} is installed: update it")
    gpus = [f"cuda:{number}" for number in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    there = ["mps"] * torch.backends.mps.is_available() + ["cpu", *gpus] + ["cuda"] * bool(gpus)
    device = device or there[-1]
    if device not in there:
        raise ValueError(f"--device {device}: PyTorch does not see it here; it sees {', '.join(there)}")
    if device in gpus:  # what PyTorch measures, and answers without a device, is then this one's
        torch.cuda.set_device(device)
    return device


def fill_defaults(args, task, learner):
    """The settings with b, K and the unlabeled shots filled in for a task (appendix B).

    args: `options.Settings`. task: a `data.Task`. learner: the class. ValueError: K exceeds the base classes. Warns
    about choices that weaken MAO.
    """
    count = len(task.base_names)  # C_b
    anchors, top_k = paper_batch(count)
    anchors, top_k = args.anchors or anchors, args.top_k or top_k
    if top_k > count:
        raise ValueError(f"--top-k {top_k} exceeds the {count} base classes: choose {count} or less")
    if "mao" in args.method:
        if anchors * top_k > count and args.sampler != "random":
            warn(
                f"b*K = {anchors}*{top_k} exceeds the {count} base classes: reg-B may become plain cross-entropy "
                "(appendix B wants --anchors times --top-k within the classes)"
            )
        if task.new_names and not args.no_new and learner.new_phase_refused:
            warn(learner.new_phase_refused)
        if args.epochs is not None and args.epochs < 4 and args.protocol != "cross-dataset":
            warn(f"--epochs {args.epochs} leaves MAO a phase of one epoch, which is the warm-up at {WARMUP_LR}")
    return replace(args, anchors=anchors, top_k=top_k, unlabeled_shots=args.unlabeled_shots or args.shots)


class PhaseBatches:
    """The batches of a phase: `of(epoch)` yields those of one epoch.

    phase: 1, labeled base images, or 2, unlabeled new images. learner: whose images they are. task: a `data.Task`.
    sampler: a batch sampler of indices. args: an `options.Config`.
    """

    def __init__(self, phase, learner, task, sampler, args):
        self.clip_model, self.device, self.phase = learner.clip_model, args.device, phase
        paths, labels, read = task.new_train, None, task.new_read
        if phase == 1:
            (paths, labels, _), read = zip(*task.base_train), task.read
        randaugment = args.recipe == "own" and learner.recipe.get("augmentation") == "randaugment"
        transform = augmentation(self.clip_model.visual.input_resolution, task.crop_scale, randaugment, learner.views)
        images = Images(paths, KeptImages(read, paths, args.workers), transform, labels)
        if views := args.cache_views:
            frozen = phase == 2 or not learner.prompts_images or learner.needs_frozen_features
            encode = (lambda images: frozen_image_features(self.clip_model, self.to_model(images))) if frozen else None
            images = CachedViews(images, views, learner.prompts_images, encode, args.seed, phase, args.workers)
        self.loader = training_loader(images, sampler, args.seed, phase, args.workers, self.device.startswith("cuda"))

    def __len__(self):
        return len(self.loader)

    def of(self, epoch):
        """Yields (images, labels) of an epoch; labels, or in phase 2 the images' indices, are int64 [B] on the CPU.

        images: on the device, as CLIP wants them: [B, 3, h, w]; a tuple of several views, where the learner takes them;
        in phase 2 a pair with frozen CLIP's features [B, d], which labeler and learner share; with --cache-views such
        features alone, or a pair.
        """
        self.loader.batch_sampler.set_epoch(epoch)
        for images, labels in self.loader:
            if isinstance(images, list):
                images = tuple(self.to_model(part) for part in images)
            else:
                images = self.to_model(images)
                if self.phase == 2 and images.ndim == 4:
                    images = images, frozen_image_features(self.clip_model, images)
            yield images, labels

    def to_model(self, images):
        return model_input(images.to(self.device, non_blocking=True))


def make_optimizer(learner, lr, recipe="own"):
    """SGD or Adam over what a learner learns.

    lr: the highest rate of the phase, kept as each group's "highest_lr". recipe: "own" is the optimizer of the
    learner's authors, with their factors of the rate by the first part of a parameter's name; "paper" is SGD.
    """
    own = learner.recipe if recipe == "own" else {}
    factors, groups = own.get("lr_factors", {}), {}
    for name, parameter in learner.named_parameters():
        groups.setdefault(factors.get(name.split(".")[0], 1), []).append(parameter)
    groups = [{"params": parameters, "highest_lr": lr * factor} for factor, parameters in groups.items()]
    if own.get("optimizer") == "adam":
        return torch.optim.Adam(groups, lr, eps=own["eps"], weight_decay=SGD["weight_decay"])
    return torch.optim.SGD(groups, lr, **SGD)
