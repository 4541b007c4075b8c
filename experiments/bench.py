"""What tuning costs: the parts of run.py's whole job, and Table 3's columns for a step, compared with a baseline.

    python -m experiments.bench --job --quick       what the job encodes, counted on a small one: a minute
    python -m experiments.bench --job               `run.py --dataset eurosat --backbone coop`, seeds 1 and 2: hours
    python -m experiments.bench --quick             small batches, MAO's rows for CoOp only: some minutes
    python -m experiments.bench --json bench.json   all rows at 32 images per step, in a file too: half an hour
    python -m experiments.bench --table3            Table 3's columns of all nine prompt learners, without the baseline
    python -m experiments.bench --loader            how fast training images load

Weights are random, at the sizes of ViT-B/16, as speed does not depend on them.

The job runs on generated images in EuroSAT's layout, with its own cache folder. Its counts are exact on any machine.

A step has 51 classes, as many as the base classes of Flowers102. The baseline does what the authors' releases do, with
the plain encoders of encoders.py: it encodes all classes at all 77 positions, and encodes images anew in each step. The
run checks our results against the baseline's.

Calls are measured in turns, A B C A B C ..., and the fastest turn of each counts. A ratio is the baseline's time over
ours, unless its name says otherwise. The spread of a ratio is how far the two fastest turns are apart; above 15% the
ratio is not printed. On a CPU, ratios are of processor time over all threads, which other work on the machine hardly
changes. Seconds and milliseconds in the tables are those of the clock.
"""

import os
import pathlib
import sys

if __name__ == "__main__":
    sys.path[0] = str(pathlib.Path(__file__).parents[1])  # as a file, too, it imports from the project's folder
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before PyTorch comes: a waiting thread uses no processor time

import collections
import contextlib
import ctypes
import functools
import platform
import tempfile
import time
from typing import Annotated, NamedTuple
from unittest import mock

import msgspec
import numpy as np
import psutil
import torch
from PIL import Image
from torch.nn import functional as F
from tqdm import tqdm

import run
from backbones import ZeroShot
from baselines import BASELINES
from encoders import encode_images, frozen_image_features
from experiments.tables import markdown
from harness import demo, options, scores
from harness.cli import run_main
from harness.clips import PRECISIONS, clip, in_precision
from harness.files import atomic_write
from harness.image_files import FolderReader
from harness.images import Images, KeptImages, loader, train_transform
from harness.layouts import EUROSAT_NAMES
from harness.runs import peak_mib, restart_peak
from mao import alterable_cross_entropy, backbone_loss, base_loss, candidates, new_loss
from pseudolabel import PseudoLabeler
from sampler import HardNegativeSampler

SIZES = {  # clip.model.CLIP's: embedding, pixels, layers, width, patch; context, vocabulary, text width, heads, layers
    "vit-b/16": (512, 224, 12, 768, 16, 77, 49408, 512, 8, 12),
    "tiny": (64, 32, 4, 64, 8, 77, 49408, 64, 1, 4),
}
BATCH, QUICK_BATCH, SHOTS, VIEWS, EPOCHS, IMAGES = 32, 8, 16, 8, 10, 64
STEADY = 0.15  # the largest spread of a ratio that is printed
AUTHORS, MAO_BASE, MAO_NEW = ", authors' way", " + MAO, base phase", " + MAO, new phase"  # after a learner's name
PAPERS_THREE = [name for name in run.LEARNERS if name not in BASELINES]


def names(count):
    """`count` class names: the demo's, which are nearly as long, in tokens, as those of Flowers102."""
    return [demo.CLASSNAMES[i % 100] + (f" {i // 100}" if i > 99 else "") for i in range(count)]


def random_clip(sizes):
    """A frozen CLIP of random weights, always the same. sizes: a key of SIZES."""
    torch.manual_seed(0)
    return clip.model.CLIP(*SIZES[sizes]).eval().requires_grad_(False)


def draw(folder, paths, size):
    """Draws JPEGs of a size (width, height) into a folder: smooth, with noise, so that they are as large as photos."""
    rng = np.random.default_rng(0)
    for path in paths:
        smooth = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)).resize(size)
        noisy = np.clip(np.asarray(smooth) + rng.normal(0, 12, (*size[::-1], 3)), 0, 255)
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noisy.astype(np.uint8)).save(folder / path, quality=90)


# The baseline ---------------------------------------------------------------------------------------------------------


def baseline_loss(learner, images, labels):
    """The loss of a batch of a prompt learner of ours, run as the authors' releases run theirs: the plain encoders.

    It is over all classes. Over the batch's own it costs the same: the text side encodes all.
    """

    def encoded(context=None, *deep):  # f [B, d]
        return F.normalize(encode_images(learner.clip_model, images, context, deep), dim=-1)

    f = encoded(*learner.visual_contexts()) if learner.prompts_images else encoded()
    g = learner.kept = learner.plain_text_features()  # kept: else PromptSRC's other losses encode them, the fast way
    frozen = encoded() if learner.needs_frozen_features else None
    loss = alterable_cross_entropy(f, g, labels, learner.logit_scale)
    return loss + learner.other_losses((images, frozen), f)


# Measuring ------------------------------------------------------------------------------------------------------------


class Cost(NamedTuple):
    """What a call costs in each turn: seconds by `now`, MiB that it adds at its peak, and seconds of the clock."""

    seconds: list
    mib: list = ()
    clock: list = ()

    @property
    def least(self):
        return min(self.seconds)

    @property
    def spread(self):
        """By how much the second fastest turn is slower than the fastest: 0.1 is 10%."""
        first, second = sorted(self.seconds)[:2]
        return second / first - 1


class Ratio(msgspec.Struct):
    """A ratio of the least times of two calls, and the larger of their spreads."""

    value: float
    spread: float

    def __str__(self):
        if self.spread > STEADY:
            return f"unsteady: the fastest two turns are {100 * self.spread:.0f}% apart; run it again"
        return f"{self.value:.2f} ({100 * self.spread:.0f}%)"


def ratio(theirs, ours):
    return Ratio(theirs.least / ours.least, max(theirs.spread, ours.spread))


def total(*parts):
    """The Cost of several calls one after another. parts: (how often, Cost)."""
    return Cost([sum(turn) for turn in zip(*([count * one for one in cost.seconds] for count, cost in parts))])


def clock():
    """Seconds of the clock, when a GPU is done with what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def now(device):
    """Seconds that ratios are of: on a CPU those that all threads of this process have had, otherwise the clock's."""
    return time.process_time() if device == "cpu" else clock()


class Meter:
    """Measures calls in turns, A B C A B C ..., so that other work on the machine affects all of them alike."""

    def __init__(self, device, turns):
        self.device, self.turns = device, turns

    def __call__(self, calls):
        """{name: Cost} of {name: a function without arguments}. The memory is a GPU's, or the process's."""
        turns = {name: [] for name in calls}
        for _ in range(self.turns):
            for name, call in calls.items():
                if self.device == "cpu":
                    ctypes.CDLL(None).malloc_trim(0)  # gives back what the allocator kept of earlier calls
                restart_peak()
                before, started, by_clock = peak_mib(self.device), now(self.device), time.perf_counter()
                call()
                seconds = now(self.device) - started
                turns[name].append((seconds, peak_mib(self.device) - before, time.perf_counter() - by_clock))
        return {name: Cost(*zip(*of_call)) for name, of_call in turns.items()}


def gradients(learner, loss):
    """Runs a step: returns its loss and its gradients, tensors. loss: a function without arguments, to a scalar."""
    learned, loss = [p for p in learner.parameters() if p.requires_grad], loss()
    return [loss.detach(), *torch.autograd.grad(loss, learned, allow_unused=True)]


def difference(ours, theirs):
    """The largest relative difference between two lists of tensors."""
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(ours, theirs))


# The job --------------------------------------------------------------------------------------------------------------

FUNCTIONS = ("open_task", "load_clip_of", "HardNegativeSampler", "base_phase", "new_phase", "run_row")  # of run.py
PARTS = ("lists", "CLIP", "MiniLM", "base phase", "new phase", "scoring")  # the parts that they are, in this order
COUNTS = ("seconds", "images encoded", "needed", "texts encoded")


class Job:
    """Runs run.py's command, times its parts, and counts what CLIP encodes in each: {part: Counter} in `parts`.

    "needed" is how many of the images needed an encoder. A tuning image needs one once per step, prompted or frozen,
    or both, where the step uses both features. A test image needs one once for each state of the prompts that prompt
    images; its frozen features are needed once, and a later job finds them on the disk. "scoring" is what the other
    parts leave of a row: test images are loaded, features are compared, files are written.

    learner: the class. tests: how many test images have to be encoded, {method: count}. imports: their seconds.
    """

    def __init__(self, learner, tests, imports):
        self.learner, self.tests, self.row = learner, tests, ""
        self.parts = collections.defaultdict(collections.Counter, imports=collections.Counter(seconds=imports))
        self.part, self.since = "everything else", clock()

    def __call__(self, arguments):
        """Runs the command; what it prints goes to stderr."""
        wrapped = {name: self.inside(part)(getattr(run, name)) for name, part in zip(FUNCTIONS, PARTS)}
        run_row, load, of = wrapped["run_row"], wrapped["load_clip_of"], run.PhaseBatches.of

        def named_row(method, *more):
            self.row = scores.row_name(method, self.learner.__name__) + ": "
            self.parts[f"{self.row}test images"]["needed"] = self.tests[method]
            return run_row(method, *more)

        def counted_batches(batches, epoch):
            frozen = batches.phase == 2 or not self.learner.prompts_images or self.learner.needs_frozen_features
            for images, labels in of(batches, epoch):
                self.parts[self.part]["needed"] += len(labels) * (self.learner.prompts_images + frozen)
                yield images, labels

        wrapped.update(run_row=named_row, load_clip_of=lambda *settings: self.watched(*load(*settings)))
        with mock.patch.multiple(run, **wrapped), mock.patch.object(run.PhaseBatches, "of", counted_batches):
            run.main(arguments)
        last = self.switch("")
        self.parts[last] = self.parts.pop(last)  # the last row, before the total
        self.parts["total"] = sum(self.parts.values(), collections.Counter())

    def switch(self, part):
        """Starts a part, and returns the one that it interrupts."""
        before, end = self.part, clock()
        self.parts[before]["seconds"] += end - self.since
        self.part, self.since = part, end
        return before

    @contextlib.contextmanager
    def inside(self, part):
        """Within it, or in a function that it decorates, the job is in this part."""
        before = self.switch(self.row + part)
        yield
        self.switch(before)

    def watched(self, clip_model, sha256):
        """Counts what goes through both encoders of a CLIP. While a row is scored, its image side is "test images"."""
        first, end = clip_model.visual.conv1, clip_model.visual.transformer.resblocks[-1].mlp
        text = clip_model.transformer.resblocks[-1].mlp  # of [H, w] in the fast encoder, of [77, H, w] in the plain one

        def begin_images(_, inputs):  # [B, 3, h, w]
            self.before = self.switch(self.part.replace("scoring", "test images"))
            self.parts[self.part]["images encoded"] += len(inputs[0])

        def end_images(*_):
            self.switch(self.before)

        first.register_forward_pre_hook(begin_images)
        end.register_forward_hook(end_images)
        text.register_forward_pre_hook(lambda _, x: self.parts[self.part].update({"texts encoded": x[0].shape[-2]}))
        return clip_model, sha256


def bench_job(backbone, sizes, device, count, imports=0.0, options=()):
    """Yields (command, rows of its parts) of a job on generated images in EuroSAT's layout, then of seed 2.

    count: images of each of the 10 classes; 30% are test images. imports: seconds. options: more of run.py's, words.
    """
    learner, paths = run.LEARNERS[backbone], [f"{name}/{n}.jpg" for name in EUROSAT_NAMES for n in range(count)]
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, XDG_CACHE_HOME=folder):
        draw(pathlib.Path(folder, "eurosat/2750"), paths, (64, 64))
        torch.save(random_clip(sizes).half().state_dict(), f"{folder}/clip.pt")
        made = f"--root {folder} --clip {folder}/clip.pt --clip-activation quickgelu --out {folder} --device {device}"
        for seed in (1, 2):
            passes = {"zeroshot": seed == 1, "backbone": learner.prompts_images, "mao": 2 * learner.prompts_images}
            job = Job(learner, {method: 3 * count * passes[method] for method in passes}, imports)
            command = f"--dataset eurosat --backbone {backbone} --seed {seed}"
            with contextlib.redirect_stdout(sys.stderr):
                job([*command.split(), *made.split(), *options])
            rows = [{"part": part, **dict.fromkeys(COUNTS, 0), **found} for part, found in job.parts.items()]
            yield f"run.py {command}", rows


# The bench ------------------------------------------------------------------------------------------------------------


class Case:
    """What is measured: a CLIP of random weights, class names, a batch of images, and labels for each kind of step.

    precision: of CLIP's matrices, a key of `clips.PRECISIONS`. batch: images per step.
    """

    def __init__(self, sizes, device, meter, batch, precision="fp32"):
        self.device, self.meter, self.batch = device, meter, batch
        self.model, self.classnames = in_precision(random_clip(sizes).to(device), PRECISIONS[precision]), names(51)
        torch.manual_seed(1)
        self.images = torch.randn(batch, 3, *[self.model.visual.input_resolution] * 2, device=device)
        self.labels = torch.arange(batch) % 51
        k = min(8, batch // 2)  # the paper's; --quick has a small batch of hard negatives
        sampler = HardNegativeSampler(np.repeat(np.arange(51), SHOTS), self.classnames, batch // k, k)
        self.hard_labels = torch.from_numpy(sampler.labels[next(iter(sampler))])  # of a batch of hard negatives
        self.classes = candidates(self.hard_labels)[0].to(device)  # H of them
        self.plain_steps, self.base_steps = 51 * SHOTS // batch, len(sampler)  # per epoch
        self.foundation = ZeroShot(self.model, self.classnames)
        self.labeler = PseudoLabeler(self.foundation)
        self.f = self.encode()

    def encode(self):
        """The frozen features f [B, d] of the images."""
        return frozen_image_features(self.model, self.images)

    def image_side(self, learner):
        """A step's image side alone: encodes the images, and once more where its loss compares with frozen CLIP."""
        frozen = self.encode() if learner.needs_frozen_features else self.f
        return (learner.image_features(self.images) * frozen).sum() + learner.ctx.sum()  # CoOp's has no gradient

    def learner(self, backbone):
        """A prompt learner, with the same prompts in each case; frozen text features of one template, computed once."""
        torch.manual_seed(1)
        learner = run.LEARNERS[backbone](self.model, self.classnames)
        learner.frozen_text = self.foundation.text_features()  # PromptSRC's: once per run, not per step
        learner.bank = self.foundation.text_features()[None]  # CoPrompt's
        return learner

    def losses(self, learner):
        """{what is added to the learner's name: the loss of such a step, a function without arguments}."""
        images = (self.images, self.images) if learner.views == 2 else self.images
        cached = self.images, self.f

        def new_phase(f):  # as in run.py: pseudo-labels, then the loss
            return new_loss(learner, (self.images, f), self.labeler(f)[0])

        return {
            "": lambda: backbone_loss(learner, images, self.labels),
            ", cached views": lambda: backbone_loss(learner, cached, self.labels),
            MAO_BASE: lambda: base_loss(learner, images, self.hard_labels),
            f"{MAO_BASE}, cached views": lambda: base_loss(learner, cached, self.hard_labels),
            MAO_NEW: lambda: new_phase(self.encode()),
            f"{MAO_NEW}, cached views": lambda: new_phase(self.f),
        }

    def row(self, name, learner, cost):
        """A row of the table: what a step of a kind costs."""
        steps, seconds = self.base_steps if MAO_BASE in name else self.plain_steps, min(cost.clock)
        found = {"row": type(learner).__name__ + name, "learnable": sum(p.numel() for p in learner.parameters())}
        found |= {"peak MiB of a step": float(np.median(cost.mib)), "s per step": seconds, "spread": cost.spread}
        return found | {"steps per epoch": steps, "s per epoch": steps * seconds}


RATIOS = {  # of two calls of `bench_backbone`; {} is the backbone
    "{}_step": (AUTHORS, ""),
    "{}_step_bf16": (AUTHORS, ", bf16"),
    "{}_bf16_to_fp32": ("", ", bf16"),
    "{}_step_to_image_side": ("", "image side"),
    "{}_step_to_cached_step": ("", ", cached views"),
    "{}_step_cached_bf16": (AUTHORS, ", cached views, bf16"),
    "mao_step_to_{}_step": (MAO_BASE, ""),
    "mao_new_step_to_{}_step": (MAO_NEW, ""),
    "mao_new_step_cached_to_{}_step": (f"{MAO_NEW}, cached views", ""),
    "text_all_classes": ("text, authors' way", "text"),
    "text_candidates": ("text, authors' way", "text, candidates"),
    "text_32_candidates": ("text, authors' way", "text, 32 candidates"),
}
PHASES = {  # of CoOp on cached views: a step, how the views are encoded, how many epochs of how many steps
    "cached_views_coop": (", cached views", "encode", 2 * EPOCHS, "plain_steps"),
    "cached_views_phase": (f"{MAO_BASE}, cached views", "encode", EPOCHS, "base_steps"),
    "cached_views_phase_bf16": (f"{MAO_BASE}, cached views, bf16", "encode, bf16", EPOCHS, "base_steps"),
    "cached_views_new_phase": (f"{MAO_NEW}, cached views", "encode", EPOCHS, "plain_steps"),
}


def bench_backbone(case, half, backbone, quick, found):
    """Measures a backbone's steps: the authors' way, ours, in bf16, on cached views, with MAO.

    half: the case in bf16. found: gets the "rows", "ratios" and "differences".
    """
    learner, halved = case.learner(backbone), half.learner(backbone)
    in_half = half.losses(halved)
    steps = {AUTHORS: (learner, lambda: baseline_loss(learner, case.images, case.labels))}
    steps |= {name: (learner, loss) for name, loss in case.losses(learner).items()}
    steps |= {f"{name}, bf16": (halved, in_half[name]) for name in ("", ", cached views", f"{MAO_BASE}, cached views")}
    if quick and backbone != "coop":
        steps = {name: step for name, step in steps.items() if "MAO" not in name}
    parts = {"image side": (learner, lambda: case.image_side(learner))}
    if backbone == "coop":
        g, few = torch.randn(51, case.f.shape[1], device=case.device), torch.arange(min(32, case.batch))
        parts |= {
            "text, authors' way": (learner, lambda: (learner.plain_text_features() * g).sum()),
            "text": (learner, lambda: (learner.text_features() * g).sum()),
            "text, candidates": (learner, lambda: (learner.text_features(case.classes) * g[case.classes]).sum()),
            "text, 32 candidates": (learner, lambda: (learner.text_features(few) * g[few]).sum()),
        }
    calls = {name: functools.partial(gradients, *call) for name, call in (steps | parts).items()}
    costs = case.meter({**calls, "encode": case.encode, "encode, bf16": half.encode})
    found["rows"] += [case.row(name, of_row, costs[name]) for name, (of_row, _) in steps.items()]
    measured = [(name.format(backbone), pair) for name, pair in RATIOS.items() if costs.keys() >= set(pair)]
    found["ratios"] |= {name: ratio(costs[theirs], costs[ours]) for name, (theirs, ours) in measured}
    views = 51 * SHOTS * VIEWS / case.batch  # batches of them, once per phase
    for name, (step, encode, epochs, of_epoch) in PHASES.items() if backbone == "coop" else ():
        count = epochs * getattr(case, of_epoch)
        cached = total((count, costs[step]), (views, costs[encode]))
        found["ratios"][name] = ratio(total((count, costs[AUTHORS])), cached)
    both = (gradients(*steps[way]) for way in ("", AUTHORS))
    found["differences"][f"{backbone}: loss and gradients"] = difference(*both)


def text_side(case, count):
    """A line of CoOp's text side at a number of classes: the MiB of the authors' way, all classes, MAO's candidates."""
    learner = run.LEARNERS["coop"](case.model, names(count))
    few = torch.arange(min(count, len(case.classes)), device=case.device)
    ways = {"all classes": learner.text_features, "candidates": lambda: learner.text_features(few)}
    if count in (50, 100):  # the authors' at 1,000 classes is extrapolated
        ways["authors' way"] = learner.plain_text_features
    costs = Meter(case.device, 1)({way: lambda g=g: gradients(learner, lambda: g().sum()) for way, g in ways.items()})
    return {"classes": count, "authors' way": None, **{f"{way}": cost.mib[0] for way, cost in costs.items()}}


def bench_table_3(case, backbone):
    """Table 3's rows of a backbone, without and with MAO: those of `Case.row`, with the "images/s at test"."""
    learner = case.learner(backbone)
    losses = {name: loss for name, loss in case.losses(learner).items() if "cached" not in name}
    if learner.new_phase_refused:
        del losses[MAO_NEW]
    calls = {name: functools.partial(gradients, learner, loss) for name, loss in losses.items()}
    at_test = torch.no_grad()(torch.no_grad()(scores.scorer)(learner))
    costs = case.meter({**calls, "at test": lambda: at_test(case.images)})
    rate = case.batch / min(costs["at test"].clock)
    return [{**case.row(name, learner, costs[name]), "images/s at test": rate} for name in losses]


def bench_loader(meter, count=IMAGES, pixels=224):
    """How fast one process makes training images of 500x375 JPEGs: {what: Cost of `count` images}.

    "anew" decodes each time; "kept" is `images.KeptImages`, from the second turn on.
    """
    transform, paths = train_transform(pixels, (0.08, 1)), [f"{number}.jpg" for number in range(count)]
    with tempfile.TemporaryDirectory() as folder:
        draw(pathlib.Path(folder), paths, (500, 375))
        read = FolderReader(pathlib.Path(folder))
        readers, batch = {"anew": read, "kept": KeptImages(read, paths)}, [list(enumerate(range(count)))]
        ways = {way: Images(paths, reader, transform, [0] * count) for way, reader in readers.items()}
        return meter({way: lambda i=i: next(iter(loader(i, 0, batch_sampler=batch))) for way, i in ways.items()})


def bench(sizes, device, quick, turns, backbones):
    """Everything that the command prints of a step, a dict. backbones: those to measure, CoOp among them."""
    batch, meter = QUICK_BATCH if quick else BATCH, Meter(device, turns)
    case, half = (Case(sizes, device, meter, batch, precision) for precision in ("fp32", "bf16"))
    found = {"rows": [], "ratios": {}, "differences": {}}
    for backbone in tqdm(backbones, "steps", disable=None):
        bench_backbone(case, half, backbone, quick, found)
    found["MiB of the text side"] = sweep = [text_side(case, count) for count in (10, 50, 100, 200, 1000)]
    at_50, at_100 = (line["authors' way"] for line in sweep if line["authors' way"])
    found["memory_1000_classes"] = (at_100 + 18 * (at_100 - at_50)) / sweep[-1]["all classes"]
    return found


def impossible(ratios):
    """The names of steady ratios that cannot be right: a step takes at least as long as its image side."""
    of_bound = {name: found for name, found in ratios.items() if name.endswith("_to_image_side")}
    return [name for name, found in of_bound.items() if found.value < 1 - STEADY and found.spread <= STEADY]


# The command ----------------------------------------------------------------------------------------------------------


def show(name, part):
    """Prints a part of what was found: a list of rows or a dict as a table, anything else on a line."""
    if isinstance(part, dict):
        part = [{"": key, name: value} for key, value in part.items()]
    if isinstance(part, list):
        rows = [[cell(value) for value in row.values()] for row in part]
        print(f"\n{name}\n\n{markdown([list(part[0]), *rows])}", flush=True)
    else:
        print(f"\n{name}: {cell(part)}")


def cell(value):
    """A value as text."""
    if isinstance(value, float | int):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return "" if value is None else str(value)


def main(arguments=None):
    """The command line of experiments/bench.py. Returns 1 where a ratio cannot be right."""
    imports = time.time() - psutil.Process().create_time()  # since the process started
    parser = options.Parser("experiments.bench", __doc__)
    add = parser.add_argument
    add("--quick", action="store_true", help=f"{QUICK_BATCH} images per step, MAO's rows for CoOp only")
    turns = options.checked(Annotated[int, msgspec.Meta(ge=2)])
    add("--turns", type=turns, default=3, metavar="N", help="of each call; the fastest counts (default: 3)")
    add("--backbones", nargs="+", choices=PAPERS_THREE, help="besides coop (default: all); of --job (default: coop)")
    add("--job", action="store_true", help="the parts of run.py's job, and nothing else; --quick: a small one")
    add("--table3", action="store_true", help="Table 3's columns of all nine, and nothing else")
    add("--loader", action="store_true", help="how fast training images load, and nothing else")
    add("--json", metavar="FILE", help="write all of it there")
    add("--sizes", choices=list(SIZES), default="vit-b/16", help="of CLIP (default: %(default)s)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(arguments)
    here = torch.cuda.get_device_name() if args.device == "cuda" else platform.machine()
    print(f"{here}, {torch.get_num_threads()} threads, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}")
    if args.job:
        sizes, count = ("tiny", 270) if args.quick else (args.sizes, 2700)
        jobs = (bench_job(one, sizes, args.device, count, imports) for one in args.backbones or ["coop"])
        parts = (part for job in jobs for part in job)
    elif args.loader:
        costs = bench_loader(Meter("cpu", max(3, args.turns)))
        rates = {what: IMAGES / min(cost.clock) for what, cost in costs.items()}
        parts = [("images per second", rates), ("ratios", {"kept_images": ratio(costs["anew"], costs["kept"])})]
    elif args.table3:
        case = Case(args.sizes, args.device, Meter(args.device, args.turns), BATCH)
        parts = [("rows", [row for one in tqdm(run.LEARNERS, disable=None) for row in bench_table_3(case, one)])]
    else:
        backbones = dict.fromkeys(["coop", *(args.backbones or PAPERS_THREE)])
        parts = bench(args.sizes, args.device, args.quick, args.turns, backbones).items()
    found = {}
    for name, part in parts:  # of jobs, one after the other
        show(name, part)
        found[name] = part
    wrong = impossible(found.get("ratios", {}))
    for name in wrong:
        print(f"{name} is {found['ratios'][name]}, which cannot be right: a step contains its image side; run it again")
    if args.json:
        content = msgspec.json.encode({**found, "impossible": wrong})
        atomic_write(pathlib.Path(args.json), msgspec.json.format(content) + b"\n")
    return 1 if wrong else None


if __name__ == "__main__":
    run_main("experiments.bench", main)
