"""What tuning costs: the columns of Table 3 for every backbone with and without MAO, beside a straightforward baseline.

    python -m experiments.bench --quick             small batches, MAO's rows for CoOp only: some minutes
    python -m experiments.bench --json bench.json   all rows at 32 images a step, in a file too: half an hour
    python -m experiments.bench --table3            Table 3's columns of all nine prompt learners, without a baseline

The baseline does what the authors' releases do, by the plain encoders of encoders.py: all classes at all 77 positions,
images encoded anew. Weights are random, at the sizes of ViT-B/16, since speed does not depend on them. The classes are
the 51 base classes of Flowers102. Every fast path is checked against the baseline in the run.

Calls are measured in turns, A B C A B C ..., and of each the fastest turn counts. A ratio is the baseline's time over
ours, unless its name says otherwise, and behind it stands its spread: how far the two fastest turns are apart. Where
that is more than 15%, the bench says so in place of the ratio. On a CPU the time of a ratio is processor time, of all
threads, which other work on the machine hardly changes. Seconds in the rows are those of the clock.
"""

if __name__ == "__main__":
    import os

    from cli import catch_early_interrupt

    catch_early_interrupt()  # the imports below take seconds
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before PyTorch comes: who waits takes no processor time

import ctypes
import json
import pathlib
import platform
import statistics
import tempfile
import time
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F
from tqdm import tqdm

import settings
from checkpoints import PRECISIONS, in_precision, load_clip_of
from cli import Parser, at_least, end
from data import task_of
from encoders import ZeroShot, clip, encode_images, frozen_image_features
from evaluate import scorer
from images import FolderReader, Images, KeptImages, loader, model_input, train_transform, training_loader
from mao import alterable_cross_entropy, backbone_loss, base_loss, candidates, new_loss
from phase import make_optimizer
from pseudolabel import PseudoLabeler
from record import peak_mib, restart_peak, write
from rivals import BACKBONES, RIVALS
from run import inputs
from sampler import HardNegativeSampler, paper_batch

FLOWERS = """pink primrose; hard-leaved pocket orchid; canterbury bells; sweet pea; english marigold; tiger lily; moon
orchid; bird of paradise; monkshood; globe thistle; snapdragon; colt's foot; king protea; spear thistle; yellow iris;
globe-flower; purple coneflower; peruvian lily; balloon flower; giant white arum lily; fire lily; pincushion flower;
fritillary; red ginger; grape hyacinth; corn poppy; prince of wales feathers; stemless gentian; artichoke; sweet
william; carnation; garden phlox; love in the mist; mexican aster; alpine sea holly; ruby-lipped cattleya; cape
flower; great masterwort; siam tulip; lenten rose; barbeton daisy; daffodil; sword lily; poinsettia; bolero deep blue;
wallflower; marigold; buttercup; oxeye daisy; common dandelion; petunia""".replace("\n", " ").split("; ")
SIZES = {  # clip.model.CLIP's: embedding, pixels, layers, width, patch; context, vocabulary, text width, heads, layers
    "vit-b/16": (512, 224, 12, 768, 16, 77, 49408, 512, 8, 12),
    "tiny": (64, 32, 4, 64, 8, 77, 49408, 64, 1, 4),
}
BATCH, QUICK_BATCH, SHOTS, VIEWS, EPOCHS = 32, 8, 16, 8, 10
STEADY = 0.15  # the largest spread of a ratio that is printed
MEASURED = [name for name in BACKBONES if name not in RIVALS]  # the paper's three


def random_clip(sizes, device):
    torch.manual_seed(0)
    model = clip.model.CLIP(*SIZES[sizes])
    torch.nn.init.constant_(model.logit_scale, np.log(100))
    return model.eval().requires_grad_(False).to(device)


def names(count):
    """`count` class names of Flowers102's lengths."""
    return [FLOWERS[i % 51] + ("" if i < 51 else f" {chr(97 + i // 51 % 26)}") for i in range(count)]


# The baseline ---------------------------------------------------------------------------------------------------------


class Baseline:
    """A prompt learner of ours, run as the authors' releases run theirs: the same prompts, the plain encoders."""

    def __init__(self, learner):
        self.learner, self.clip_model = learner, learner.clip_model

    def text_features(self):
        self.g = self.learner.plain_text_features()  # [C, d]
        return self.g

    def image_features(self, images):
        if not self.learner.prompts_images:
            return self.frozen_features(images)
        context, *deep = self.learner.visual_contexts()
        return F.normalize(encode_images(self.clip_model, images, context, deep), dim=-1)

    @torch.no_grad()
    def frozen_features(self, images):
        return F.normalize(encode_images(self.clip_model, images), dim=-1)

    def loss(self, images, labels):
        """The loss of a batch over all classes. Over the batch's own it costs the same: the text side encodes all."""
        f, g = self.image_features(images), self.text_features()
        loss = alterable_cross_entropy(f, g, labels, self.learner.logit_scale)
        if hasattr(self.learner, "other_losses"):
            self.learner.encoded = g  # so that the learner does not encode them again, its own way
            loss = loss + self.learner.other_losses((images, self.frozen_features(images)), f)
        return loss


# Measuring ------------------------------------------------------------------------------------------------------------


class Cost(NamedTuple):
    """What a call takes: of each turn the seconds by `now`, MiB at its peak beyond what was held before, and of each
    turn the seconds of the clock.
    """

    seconds: list
    mib: float = 0.0
    clock: list = ()

    @property
    def least(self):
        return min(self.seconds)

    @property
    def spread(self):
        """By how much the second fastest turn is slower than the fastest: 0.1 is 10%."""
        first, second = sorted(self.seconds)[:2]
        return second / first - 1


class Ratio(NamedTuple):
    """A ratio of the least times of two calls, and the larger of their spreads."""

    value: float
    spread: float

    def __str__(self):
        if self.spread > STEADY:
            return f"unsteady: the fastest two turns are {100 * self.spread:.0f}% apart; run it again"
        return f"{self.value:.2f} ({100 * self.spread:.0f}%)"


def ratio(theirs, ours):
    return Ratio(theirs.least / ours.least, max(theirs.spread, ours.spread))


def now(device):
    """Seconds that times are taken by: on a CPU those that all threads of this process have had, else the clock's."""
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


class Meter:
    """Measures calls in turns, A B C A B C ..., so that what else the machine does meets all of them alike."""

    def __init__(self, device, turns):
        self.device, self.turns = device, turns

    def __call__(self, calls):
        """{name: Cost} of {name: a function of nothing}."""
        turns = {name: [] for name in calls}
        for _ in range(self.turns):
            for name, call in calls.items():
                before = self.memory(restart=True)
                started, by_clock = now(self.device), time.perf_counter()
                call()
                seconds = now(self.device) - started
                turns[name].append((seconds, self.memory() - before, time.perf_counter() - by_clock))
        found = {name: list(zip(*of)) for name, of in turns.items()}
        return {name: Cost(list(s), statistics.median(mib), list(clock)) for name, (s, mib, clock) in found.items()}

    def memory(self, restart=False):
        """MiB: what is held now, from where the peak starts anew, or that peak. On a CPU the process's, by Linux."""
        if self.device == "cuda":
            torch.cuda.synchronize()
        elif restart:
            ctypes.CDLL(None).malloc_trim(0)  # what the allocator kept of earlier calls goes back first
        if restart:
            restart_peak()
        return peak_mib(self.device)


def gradients(learner, loss):
    """Runs a step: returns its loss and its gradients. loss: a function of nothing that gives the scalar."""
    for parameter in learner.parameters():
        parameter.grad = None
    loss = loss()
    loss.backward()
    return [loss.detach()] + [parameter.grad for parameter in learner.parameters()]


class ImageSide:
    """Times what a learner's image side takes of a step: the graph is cut at the image features, so that their forward
    and, after everything else, their backward are calls of their own. The step's gradients stay what they are.
    """

    def __init__(self, learner, device):
        self.learner, self.device, self.encode, self.seconds = learner, device, learner.image_features, []

    def timed(self, call):
        started = now(self.device)
        found = call()
        self.seconds[-1] += now(self.device) - started
        return found

    def image_features(self, images):
        self.whole = self.timed(lambda: self.encode(images))
        self.cut = self.whole.detach().requires_grad_()
        return self.cut

    def __call__(self, loss):
        self.seconds.append(0.0)
        self.learner.image_features = self.image_features
        found = gradients(self.learner, loss)
        del self.learner.image_features
        self.timed(lambda: self.whole.backward(self.cut.grad))
        return found[:1] + [parameter.grad for parameter in self.learner.parameters()]


def weights_mib(clip_model):
    """MiB of a CLIP's weights."""
    return sum(parameter.nbytes for parameter in clip_model.parameters()) / 2**20


def difference(ours, theirs):
    """The largest relative difference between two lists of tensors."""
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(ours, theirs))


# The bench ------------------------------------------------------------------------------------------------------------


class Case:
    """What is measured: a CLIP of random weights, class names, a batch of images, and labels for each kind of step.

    precision: of CLIP's matrices, a key of `checkpoints.PRECISIONS`. batch: images of a step.
    """

    def __init__(self, sizes, device, meter, batch, precision="fp32"):
        self.sizes, self.device, self.meter, self.batch = sizes, device, meter, batch
        self.model = in_precision(random_clip(sizes, device), PRECISIONS[precision])
        self.classnames = names(51)
        pixels = self.model.visual.input_resolution
        torch.manual_seed(1)
        self.images = torch.randn(batch, 3, pixels, pixels, device=device)
        self.labels = torch.arange(batch) % 51
        b, k = paper_batch(51)
        b, k = (b, k) if batch >= b * k else (2, batch // 2)  # a small batch of hard negatives for --quick
        sampler = HardNegativeSampler(np.repeat(np.arange(51), SHOTS), self.classnames, b, k)
        self.hard_labels = torch.from_numpy(sampler.labels[next(iter(sampler))])  # of a batch of hard negatives
        self.classes = candidates(self.hard_labels)[0].to(device)  # H of them
        self.plain_steps, self.base_steps = 51 * SHOTS // batch, len(sampler)  # per epoch
        self.foundation = ZeroShot(self.model, self.classnames)
        self.labeler = PseudoLabeler(self.foundation)
        self.f = self.encode()

    def encode(self):
        """The frozen features f [B, d] of the images."""
        return frozen_image_features(self.model, self.images)

    def learner(self, backbone):
        """A prompt learner, with the same prompts in each case; frozen text features of one template, computed once."""
        torch.manual_seed(1)
        learner = BACKBONES[backbone](self.model, self.classnames)
        learner.frozen_text = self.foundation.text_features()  # PromptSRC's: once per run, not per step
        learner.bank = self.foundation.text_features()[None]  # CoPrompt's
        return learner

    def new_phase_loss(self, learner, images, f=None):
        """MAO's new phase as run.py has it: pseudo-labels, then the loss. f: frozen features that are cached."""
        f = self.foundation.image_features(images) if f is None else f
        pseudo_labels, _ = self.labeler(f)
        return new_loss(learner, inputs(learner, images, f), pseudo_labels)


def bench_steps(case, half, backbone, quick):
    """(rows, ratios, differences) of a backbone's steps: the authors' way, ours, in bf16, on cached views, with MAO.

    half: the case in bf16.
    """
    learner, halved = case.learner(backbone), half.learner(backbone)
    baseline, side, found = Baseline(learner), ImageSide(learner, case.device), {}
    prompted, pair = learner.prompts_images, getattr(learner, "uses_frozen_features", False)
    images = {one: (one.images, one.f) if pair else one.images if prompted else one.f for one in (case, half)}  # cached

    def step(name, learner, loss, run=None):
        def call():
            found[name] = (run or (lambda loss: gradients(learner, loss)))(loss)

        return call

    calls = {
        "authors": step("authors", learner, lambda: baseline.loss(case.images, case.labels)),
        "ours": step("ours", learner, lambda: backbone_loss(learner, case.images, case.labels), prompted and side),
        "bf16": step("bf16", halved, lambda: backbone_loss(halved, half.images, half.labels)),
        "encode": case.encode,
        "cached": step("cached", learner, lambda: backbone_loss(learner, images[case], case.labels)),
        "cached bf16": step("cached bf16", halved, lambda: backbone_loss(halved, images[half], half.labels)),
    }
    if backbone == "coop" or not quick:
        calls["base"] = step("base", learner, lambda: base_loss(learner, case.images, case.hard_labels))
        calls["new"] = step("new", learner, lambda: case.new_phase_loss(learner, case.images))
        calls["new cached"] = step("new cached", learner, lambda: case.new_phase_loss(
            learner, case.images if prompted else case.f, case.f))  # fmt: skip
    if prompted and not pair:
        del calls["cached"], calls["cached bf16"]  # MaPLe's cached pixels save the loaders' work alone
    costs = case.meter(calls)

    differences = {f"{backbone}: loss and gradients": difference(found["ours"], found["authors"])}
    with torch.no_grad():
        few = learner.text_features(case.classes)
    differences[f"{backbone}: candidates' text features"] = difference([few], [baseline.g.detach()[case.classes]])

    ratios = {f"{backbone}_step": ratio(costs["authors"], costs["ours"])}
    ratios[f"{backbone}_step_bf16"] = ratio(costs["authors"], costs["bf16"])
    ratios[f"{backbone}_bf16_to_fp32"] = ratio(costs["ours"], costs["bf16"])
    if prompted:
        bound = Cost(side.seconds[-case.meter.turns :])
        if pair:  # the frozen image features that its losses take
            bound = Cost([a + b for a, b in zip(bound.seconds, costs["encode"].seconds)])
    else:
        bound = costs["encode"]
    ratios[f"{backbone}_step_to_image_side"] = ratio(costs["ours"], bound)
    if pair:
        ratios[f"{backbone}_step_to_cached_step"] = ratio(costs["ours"], costs["cached"])
        ratios[f"{backbone}_step_cached_bf16"] = ratio(costs["authors"], costs["cached bf16"])
    if "base" in costs:
        ratios[f"mao_step_to_{backbone}_step"] = ratio(costs["base"], costs["ours"])
        ratios[f"mao_new_step_to_{backbone}_step"] = ratio(costs["new"], costs["ours"])
        ratios[f"mao_new_step_cached_to_{backbone}_step"] = ratio(costs["new cached"], costs["ours"])
    shown = {"authors": ", authors' way", "ours": "", "bf16": ", bf16", "cached": ", cached views",
             "cached bf16": ", bf16 and cached views", "base": " + MAO, base phase", "new": " + MAO, new phase",
             "new cached": " + MAO, new phase, cached views"}  # fmt: skip
    name, parameters = BACKBONES[backbone].__name__, sum(p.numel() for p in learner.parameters())
    rows = [
        row(name + what, parameters, costs[key], case.base_steps if key == "base" else case.plain_steps)
        for key, what in shown.items()
        if key in costs
    ]
    return rows, ratios, differences


def row(name, parameters, cost, steps):
    return {"row": name, "learnable": parameters, "mib": cost.mib, "step": min(cost.clock), "spread": cost.spread,
            "steps": steps}  # fmt: skip


def bench_coop(case, half):
    """Ratios of CoOp alone: its text side by itself, and its phases on cached views, their encoding included."""
    learner, halved = case.learner("coop"), half.learner("coop")
    baseline, g = Baseline(learner), torch.randn(51, case.f.shape[1], device=case.device)
    few = torch.arange(min(32, case.batch))
    costs = case.meter({
        "authors": lambda: gradients(learner, lambda: baseline.loss(case.images, case.labels)),
        "authors' text": lambda: gradients(learner, lambda: (baseline.text_features() * g).sum()),
        "text": lambda: gradients(learner, lambda: (learner.text_features() * g).sum()),
        "candidates": lambda: gradients(learner, lambda: (learner.text_features(case.classes) * g[case.classes]).sum()),
        "32 candidates": lambda: gradients(learner, lambda: (learner.text_features(few) * g[few]).sum()),
        "encode": case.encode,
        "encode bf16": half.encode,
        "plain": lambda: gradients(learner, lambda: backbone_loss(learner, case.f, case.labels)),
        "base": lambda: gradients(learner, lambda: base_loss(learner, case.f, case.hard_labels)),
        "new": lambda: gradients(learner, lambda: case.new_phase_loss(learner, case.f)),
        "base bf16": lambda: gradients(halved, lambda: base_loss(halved, half.f, half.hard_labels)),
    })  # fmt: skip
    ratios = {
        "text_all_classes": ratio(costs["authors' text"], costs["text"]),
        "text_candidates": ratio(costs["authors' text"], costs["candidates"]),
        "text_32_candidates": ratio(costs["authors' text"], costs["32 candidates"]),
    }
    phases = {  # what a step is, how the views are encoded, how many steps a phase has
        "cached_views_coop": ("plain", "encode", 2 * EPOCHS * case.plain_steps),
        "cached_views_phase": ("base", "encode", EPOCHS * case.base_steps),
        "cached_views_phase_bf16": ("base bf16", "encode bf16", EPOCHS * case.base_steps),
        "cached_views_new_phase": ("new", "encode", EPOCHS * case.plain_steps),
    }
    views = 51 * SHOTS * VIEWS / case.batch  # batches of them, once per phase
    for name, (step, encode, steps) in phases.items():
        ours = [a * views + b * steps for a, b in zip(costs[encode].seconds, costs[step].seconds)]
        ratios[name] = ratio(Cost([steps * one for one in costs["authors"].seconds]), Cost(ours))
    return ratios


def bench_classes(case, backbones, quick):
    """The text side over the number of classes: a list of lines, {"authors", "plain", "mao"} (seconds, MiB) in each.

    With `quick` the authors' way runs forward only, which understates its memory. Each call once: it is memory that
    is compared here.
    """
    lines, once = [], Meter(case.device, 1)
    counts = [10, 50, 100, 200, 1000] if quick else [10, 50, 100, 200, 500, 1000]
    for count in tqdm(counts, "text side"):
        for backbone in [name for name in ("coop", "maple") if name in backbones]:
            learner = BACKBONES[backbone](case.model, names(count))
            few = torch.arange(min(count, len(case.classes)), device=case.device)  # as many as the batch above has
            calls = {"mao": lambda t=learner, few=few: t.text_features(few).sum().backward()}
            if backbone == "coop" and (100 if quick else 0) <= count <= 200:
                baseline = Baseline(learner)
                calls["authors"] = baseline.text_features
                if not quick:
                    calls["authors"] = lambda b=baseline: b.text_features().sum().backward()
            if backbone == "coop" or count <= 50 or not quick:
                calls["plain"] = lambda t=learner: t.text_features().sum().backward()
            costs = once(calls)
            found = {key: (min(costs[key].clock), costs[key].mib) if key in costs else None
                     for key in ("authors", "plain", "mao")}  # fmt: skip
            lines.append({"backbone": backbone, "classes": count, **found})
    return lines


def matmul_rates(case):
    """(the device's operations per second in matrix multiplication, the share of them that encoding images reaches,
    images encoded per second).
    """
    visual = case.model.visual
    width, layers, tokens = visual.conv1.out_channels, visual.transformer.layers, len(visual.positional_embedding)
    blocks = tokens * 12 * width**2 * layers  # multiplications of an image's tokens with weights
    attention = 2 * tokens**2 * width * layers
    patches = (tokens - 1) * visual.conv1.weight.numel()
    operations = 2 * case.batch * (blocks + attention + patches)
    a = torch.randn(2048, 2048, device=case.device)
    costs = case.meter({"multiply": lambda: a @ a, "encode": case.encode})
    rate, encode = 2 * 2048**3 / min(costs["multiply"].clock), min(costs["encode"].clock)
    return rate, operations / encode / rate, case.batch / encode


def bench_table_3(case, backbone):
    """Table 3's rows of a backbone, without and with MAO: those of `row`, with "images_per_second" at test."""
    learner, name = case.learner(backbone), BACKBONES[backbone].__name__
    images = (case.images, case.images) if getattr(learner, "views", 1) == 2 else case.images
    steps = {
        name: (lambda: backbone_loss(learner, images, case.labels), case.plain_steps),
        f"{name} + MAO, base phase": (lambda: base_loss(learner, images, case.hard_labels), case.base_steps),
    }
    if not hasattr(learner, "new_phase_refused"):
        steps[f"{name} + MAO, new phase"] = (lambda: case.new_phase_loss(learner, case.images), case.plain_steps)
    with torch.no_grad():
        scores = scorer(learner)

    def at_test():
        with torch.no_grad():
            scores(case.images)

    calls = {what: lambda loss=loss: gradients(learner, loss) for what, (loss, _) in steps.items()}
    costs = case.meter({**calls, "at test": at_test})
    parameters = sum(p.numel() for p in learner.parameters())
    rows = [row(what, parameters, costs[what], count) for what, (_, count) in steps.items()]
    return [{**found, "images_per_second": case.batch / min(costs["at test"].clock)} for found in rows]


def show_table_3(rows):
    """Prints the rows of `bench_table_3`."""
    print(
        "\n| row | learnable | peak MiB of a step | s per step | steps per epoch | s per epoch | images/s at test |"
        "\n|---|---|---|---|---|---|---|"
    )
    for row in rows:
        print(
            f"| {row['row']} | {row['learnable']:,} | {row['mib']:,.0f} | {row['step']:.3f} | {row['steps']} "
            f"| {row['step'] * row['steps']:.1f} | {row['images_per_second']:.1f} |"
        )


def bench_loader(meter, count=64, pixels=224):
    """How fast one process makes training images of 500x375 JPEGs: {what: Cost of `count` images}.

    "anew" decodes each time, "kept" is `images.KeptImages`, which must give the same bits; the others are its parts.
    """
    rng, transform = np.random.default_rng(0), train_transform(pixels, (0.08, 1))
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        for number in range(count):  # smooth, with noise: as large as photos of that size are
            smooth = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)).resize((500, 375))
            noisy = np.clip(np.asarray(smooth) + rng.normal(0, 12, (375, 500, 3)), 0, 255)
            Image.fromarray(noisy.astype(np.uint8)).save(folder / f"{number}.jpg", quality=90)
        paths, read = [f"{number}.jpg" for number in range(count)], FolderReader(folder)
        anew = Images(paths, read, transform, [0] * count)
        kept = Images(paths, KeptImages(read, paths, 1024, 0), transform, [0] * count)
        if not all(torch.equal(anew[key][0], kept[key][0]) for key in enumerate(range(count))):
            raise ValueError("images that are kept are not those that are decoded anew")

        def epoch(images):
            return lambda: next(iter(loader(images, 0, batch_sampler=[list(enumerate(range(count)))])))

        return meter({
            "anew": epoch(anew),
            "kept": epoch(kept),
            "decoding": lambda: [read(path) for path in paths],
            "crop, resize, flip": lambda: [transform(kept.read(path)) for path in paths],
        })  # fmt: skip


def show_loader(costs, count=64):
    """Prints what `bench_loader` found."""
    least = {what: min(cost.clock) / count for what, cost in costs.items()}  # seconds an image
    print(
        f"\ntraining images of 500x375 JPEGs, of one process: {1 / least['anew']:.0f} a second decoded anew, "
        f"{1 / least['kept']:.0f} kept, ratio {ratio(costs['anew'], costs['kept'])}; milliseconds an image: "
        + ", ".join(f"{what} {1000 * seconds:.2f}" for what, seconds in least.items())
    )


def bench_demo_step(meter, steps=50):
    """What a step of MAO's base phase spends on the demo, CoOp: {part: Cost of `steps` steps}."""
    args = settings.parse(["--method", "mao"])
    task, (clip_model, _) = task_of(vars(args)), load_clip_of(vars(args), "cpu")
    settings.fit(args, task, clip_model)
    learner = BACKBONES["coop"](clip_model, task.base_names)
    paths, labels = [path for path, _, _ in task.base_train], [label for _, label, _ in task.base_train]
    transform = train_transform(clip_model.visual.input_resolution, task.crop_scale)
    images = Images(paths, KeptImages(task.read, paths, args.image_memory, 0), transform, labels)
    sampler = HardNegativeSampler(labels, task.base_names, args.anchors, args.top_k, args.seed)
    batches = training_loader(images, sampler, args.seed, 1)
    row = settings.row(args, "mao", task)
    optimizer = make_optimizer(learner, row.base_recipe.lr, **row.optimizer)

    def load():
        return [(model_input(images), labels) for _, (images, labels) in zip(range(steps), batches)]

    def step(images, labels):
        optimizer.zero_grad()
        base_loss(learner, images, labels).backward()
        optimizer.step()

    loaded = load()
    classes = [candidates(labels)[0] for _, labels in loaded]
    return meter({
        "loading": load,
        "image encoder": lambda: [learner.image_features(images) for images, _ in loaded],
        "text side forward": lambda: [learner.text_features(these) for these in classes],
        "text side": lambda: [learner.text_features(these).sum().backward() for these in classes],
        "whole": lambda: [step(*batch) for batch in load()],
    })  # fmt: skip


def show_demo_step(costs, steps=50):
    """Prints what `bench_demo_step` found, in milliseconds a step."""
    least = {part: 1000 * cost.least / steps for part, cost in costs.items()}
    rest = least["whole"] - least["loading"] - least["image encoder"] - least["text side"]
    print(
        f"a step of MAO's base phase on the demo: {least['whole']:.1f} ms, of which loading {least['loading']:.1f}, "
        f"image encoder {least['image encoder']:.1f}, text side {least['text side forward']:.1f} forward and "
        f"{least['text side'] - least['text side forward']:.1f} backward, the rest {rest:.1f}"
    )


def describe(case):
    """The machine and what runs on it, a dict."""
    return {
        "processor": platform.machine(),
        "threads": torch.get_num_threads(),
        "sizes": case.sizes,
        "device": torch.cuda.get_device_name() if case.device == "cuda" else "cpu",
        "torch": torch.__version__,
        "images a step": case.batch,
        "turns": case.meter.turns,
        "date": time.strftime("%Y-%m-%d"),
    }


def bench(sizes="vit-b/16", device="cpu", quick=True, turns=3, backbones=tuple(MEASURED)):
    """Everything the command prints, as a dict. `backbones` names those to measure, CoOp among them."""
    if sizes != "tiny":
        bench("tiny", device, quick, 2, backbones)  # warms up: libraries load, kernels are chosen
    batch, meter = QUICK_BATCH if quick else BATCH, Meter(device, turns)
    case, half = Case(sizes, device, meter, batch), Case(sizes, device, meter, batch, "bf16")
    rows, ratios, differences = [], {}, {}
    for backbone in tqdm(backbones, "steps", disable=sizes == "tiny"):
        found = bench_steps(case, half, backbone, quick)
        rows += found[0]
        ratios.update(found[1])
        differences.update(found[2])
    ratios.update(bench_coop(case, half))
    sweep = bench_classes(case, backbones, quick)
    memory = {line["classes"]: line for line in sweep if line["backbone"] == "coop"}
    at_100, at_200 = memory[100]["authors"][1], memory[200]["authors"][1]
    extrapolated = at_200 + 8 * (at_200 - at_100)  # the authors' way at 1,000 classes
    rate, share, inference = matmul_rates(case)
    return {
        "machine": describe(case),
        "ratios": ratios,
        "memory_1000_classes": extrapolated / memory[1000]["plain"][1],
        "impossible": impossible(ratios),
        "rows": rows,
        "sweep": sweep,
        "differences": differences,
        "memory_1000_classes_extrapolated_mib": extrapolated,
        "weights_mib": {"fp32": weights_mib(case.model), "bf16": weights_mib(half.model)},
        "inference_images_a_second": inference,
        "share_of_matmul_rate": share,
        "matmul_rate": rate,
    }


def impossible(ratios):
    """The names of ratios that cannot be, although they are steady: a step takes at least as long as its image side."""
    return [
        name for name, found in ratios.items()
        if name.endswith("_to_image_side") and found.value < 1 - STEADY and found.spread <= STEADY
    ]  # fmt: skip


def show(found):
    """Prints what `bench` found."""
    print(", ".join(f"{key} {value}" for key, value in found["machine"].items()))
    print(
        "\n| row | learnable | peak MiB of a step | s per step | spread | steps per epoch | s per epoch |"
        "\n|---|---|---|---|---|---|---|"
    )
    for row in found["rows"]:
        print(
            f"| {row['row']} | {row['learnable']:,} | {row['mib']:,.0f} | {row['step']:.3f} "
            f"| {100 * row['spread']:.0f}% | {row['steps']} | {row['step'] * row['steps']:.1f} |"
        )
    print(
        f"\ninference: {found['inference_images_a_second']:.1f} images/s, "
        f"{100 * found['share_of_matmul_rate']:.0f}% of the device's measured matrix-multiply rate, "
        f"{found['matmul_rate'] / 1e9:,.0f} GFLOP/s"
    )
    print(
        "\n| text side, forward and backward | classes | authors' way | all classes | MAO's candidates |"
        "\n|---|---|---|---|---|"
    )
    for line in found["sweep"]:
        cells = [
            "" if line[key] is None else f"{line[key][0]:.3f} s, {line[key][1]:,.0f} MiB"
            for key in ("authors", "plain", "mao")
        ]
        print(f"| {line['backbone']} | {line['classes']} | " + " | ".join(cells) + " |")
    print(f"\nauthors' way at 1,000 classes, extrapolated: {found['memory_1000_classes_extrapolated_mib']:,.0f} MiB")
    print(
        "\nlargest relative difference from the baseline: "
        + ", ".join(f"{name} {value:.1e}" for name, value in found["differences"].items())
    )
    print("\nCLIP's weights: " + ", ".join(f"{kind} {mib:,.0f} MiB" for kind, mib in found["weights_mib"].items()))
    print("\n| ratio (spread) | |\n|---|---|")
    for name, value in found["ratios"].items():
        print(f"| {name} | {value} |")
    print(f"| memory_1000_classes | {found['memory_1000_classes']:.2f} |")
    for name in found["impossible"]:
        print(f"{name} is {found['ratios'][name]}, which cannot be: a step contains its image side; run it again")


def main():
    parser = Parser("experiments.bench", __doc__)
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_BATCH} images a step, MAO's rows for CoOp only")
    parser.add_argument("--turns", type=at_least(2), default=3, metavar="N", help="of each call; the fastest counts "
                        "(default: 3)")  # fmt: skip
    parser.add_argument(
        "--backbones", nargs="+", choices=MEASURED, default=MEASURED, help="besides coop (default: all)"
    )
    parser.add_argument("--table3", action="store_true", help="Table 3's columns of all nine, and nothing else")
    parser.add_argument("--loader", action="store_true", help="how fast training images are loaded, what a step of "
                        "the demo spends, and nothing else")  # fmt: skip
    parser.add_argument("--json", metavar="FILE", help="write all of it there")
    parser.add_argument("--sizes", choices=list(SIZES), default="vit-b/16", help="of CLIP (default: %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    if args.loader:
        costs = bench_loader(Meter("cpu", max(3, args.turns)))
        show_loader(costs)
        torch.set_num_threads(1)  # the demo's
        parts = bench_demo_step(Meter("cpu", max(3, args.turns)))
        show_demo_step(parts)
        found = {"impossible": []}
        for name, of in (("loader", costs), ("demo_step", parts)):
            found[name] = {what: cost._asdict() for what, cost in of.items()}
    elif args.table3:
        case = Case(args.sizes, args.device, Meter(args.device, args.turns), BATCH)
        rows = [row for backbone in tqdm(BACKBONES, "backbones") for row in bench_table_3(case, backbone)]
        found = {"machine": describe(case), "rows": rows, "impossible": []}
        print(", ".join(f"{key} {value}" for key, value in found["machine"].items()))
        show_table_3(rows)
    else:
        found = bench(args.sizes, args.device, args.quick, args.turns, dict.fromkeys(["coop", *args.backbones]))
        show(found)
    if args.json:
        told = {name: value._asdict() for name, value in found.get("ratios", {}).items()}
        write(pathlib.Path(args.json), json.dumps({**found, "ratios": told}, indent=1) + "\n")
    return 1 if found["impossible"] else None


if __name__ == "__main__":
    end("experiments.bench", main)
