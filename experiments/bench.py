"""What tuning costs: the columns of Table 3 for every backbone, with and without MAO, compared with a baseline.

    python -m experiments.bench --quick             small batches, MAO's rows for CoOp only: some minutes
    python -m experiments.bench --json bench.json   all rows at 32 images per step, in a file too: half an hour
    python -m experiments.bench --table3            Table 3's columns of all nine prompt learners, without the baseline
    python -m experiments.bench --loader            how fast training images load

The baseline does what the authors' releases do, with the plain encoders of encoders.py: it encodes all classes at all
77 positions, and encodes images anew in each step. Weights are random, at the sizes of ViT-B/16, as speed does not
depend on them. The classes are the 51 base classes of Flowers102. The run checks our results against the baseline's.

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

import ctypes
import functools
import json
import platform
import statistics
import tempfile
import time
from typing import Annotated, NamedTuple

import numpy as np
import torch
from msgspec import Meta
from PIL import Image
from torch.nn import functional as F
from tqdm import tqdm

import run
from backbones import ZeroShot
from baselines import BASELINES
from encoders import encode_images, frozen_image_features
from experiments.tables import markdown
from harness import options
from harness.cli import run_main
from harness.clips import PRECISIONS, clip, in_precision
from harness.files import atomic_write
from harness.image_files import FolderReader
from harness.images import Images, KeptImages, loader, train_transform
from harness.runs import peak_mib, restart_peak
from harness.scores import scorer
from mao import alterable_cross_entropy, backbone_loss, base_loss, candidates, new_loss
from pseudolabel import PseudoLabeler
from sampler import HardNegativeSampler

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
BATCH, QUICK_BATCH, SHOTS, VIEWS, EPOCHS, IMAGES = 32, 8, 16, 8, 10, 64
STEADY = 0.15  # the largest spread of a ratio that is printed
AUTHORS, MAO_BASE, MAO_NEW = ", authors' way", " + MAO, base phase", " + MAO, new phase"  # after a learner's name
PAPERS_THREE = [name for name in run.LEARNERS if name not in BASELINES]


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
        self.learner.kept = g  # so that the learner's other losses do not encode them again, the fast way
        frozen = self.frozen_features(images) if self.learner.needs_frozen_features else None
        return loss + self.learner.other_losses((images, frozen), f)


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


def total(*parts):
    """The Cost of several calls one after another. parts: (how often, Cost)."""
    return Cost([sum(turn) for turn in zip(*([count * one for one in cost.seconds] for count, cost in parts))])


def now(device):
    """Seconds that ratios are of: on a CPU those that all threads of this process have had, otherwise the clock's."""
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


class Meter:
    """Measures calls in turns, A B C A B C ..., so that other work on the machine affects all of them alike."""

    def __init__(self, device, turns):
        self.device, self.turns = device, turns

    def __call__(self, calls):
        """{name: Cost} of {name: a function without arguments}."""
        turns = {name: [] for name in calls}
        for _ in range(self.turns):
            for name, call in calls.items():
                before = self.memory(restart=True)
                started, by_clock = now(self.device), time.perf_counter()
                call()
                seconds = now(self.device) - started
                turns[name].append((seconds, self.memory() - before, time.perf_counter() - by_clock))
        return {name: Cost(*zip(*of_call)) for name, of_call in turns.items()}

    def memory(self, restart=False):
        """The peak memory in MiB since the last restart; after a restart what is held now. On a CPU the process's."""
        if self.device == "cuda":
            torch.cuda.synchronize()
        elif restart:
            ctypes.CDLL(None).malloc_trim(0)  # gives back what the allocator kept of earlier calls
        if restart:
            restart_peak()
        return peak_mib(self.device)


def gradients(learner, loss):
    """Runs a step: returns its loss and its gradients, tensors. loss: a function without arguments, to a scalar."""
    for parameter in learner.parameters():
        parameter.grad = None
    loss = loss()
    loss.backward()
    return [loss.detach()] + [parameter.grad for parameter in learner.parameters()]


def difference(ours, theirs):
    """The largest relative difference between two lists of tensors."""
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(ours, theirs))


# The bench ------------------------------------------------------------------------------------------------------------


class Case:
    """What is measured: a CLIP of random weights, class names, a batch of images, and labels for each kind of step.

    precision: of CLIP's matrices, a key of `clips.PRECISIONS`. batch: images per step.
    """

    def __init__(self, sizes, device, meter, batch, precision="fp32"):
        self.sizes, self.device, self.meter, self.batch = sizes, device, meter, batch
        torch.manual_seed(0)
        model = clip.model.CLIP(*SIZES[sizes]).eval().requires_grad_(False)
        torch.nn.init.constant_(model.logit_scale, np.log(100))
        self.model, self.classnames = in_precision(model.to(device), PRECISIONS[precision]), names(51)
        torch.manual_seed(1)
        self.images = torch.randn(batch, 3, *[model.visual.input_resolution] * 2, device=device)
        self.labels = torch.arange(batch) % 51
        b, k = options.paper_batch(51)
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
        learner = run.LEARNERS[backbone](self.model, self.classnames)
        learner.frozen_text = self.foundation.text_features()  # PromptSRC's: once per run, not per step
        learner.bank = self.foundation.text_features()[None]  # CoPrompt's
        return learner

    def weights_mib(self):
        return sum(weight.nbytes for weight in self.model.parameters()) / 2**20

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
        found.update({"mib": statistics.median(cost.mib), "step": seconds, "spread": cost.spread})
        return {**found, "steps": steps, "epoch": steps * seconds}


RATIOS = {  # of two calls of `bench_backbone`; {} is the backbone
    "{}_step": (AUTHORS, ""),
    "{}_step_bf16": (AUTHORS, ", bf16"),
    "{}_bf16_to_fp32": ("", ", bf16"),
    "{}_step_to_image_side": ("", "image side"),
    "promptsrc_step_to_cached_step": ("", ", cached views"),
    "promptsrc_step_cached_bf16": (AUTHORS, ", cached views, bf16"),
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


def bench_backbone(case, half, backbone, quick):
    """(rows, ratios, differences) of a backbone's steps: the authors' way, ours, in bf16, on cached views, with MAO.

    half: the case in bf16.
    """
    learner, halved = case.learner(backbone), half.learner(backbone)
    baseline, ours, in_half = Baseline(learner), case.losses(learner), half.losses(halved)
    if quick and backbone != "coop":
        ours = {name: loss for name, loss in ours.items() if "MAO" not in name}
    if backbone == "maple":  # its cached pixels save the loaders' work alone; phase 2 has cached features to label by
        ours = {name: loss for name, loss in ours.items() if "cached" not in name or MAO_NEW in name}
    steps = {AUTHORS: (learner, lambda: baseline.loss(case.images, case.labels))}
    steps.update({name: (learner, loss) for name, loss in ours.items()})
    in_both = [name for name in ("", ", cached views", f"{MAO_BASE}, cached views") if name in ours]
    steps.update({f"{name}, bf16": (halved, in_half[name]) for name in in_both})
    g, few = torch.randn(51, case.f.shape[1], device=case.device), torch.arange(min(32, case.batch))
    parts = {"image side": lambda: (learner.image_features(case.images) * case.f).sum()}
    if backbone == "coop":
        parts = {
            "text, authors' way": lambda: (baseline.text_features() * g).sum(),
            "text": lambda: (learner.text_features() * g).sum(),
            "text, candidates": lambda: (learner.text_features(case.classes) * g[case.classes]).sum(),
            "text, 32 candidates": lambda: (learner.text_features(few) * g[few]).sum(),
        }
    calls = {name: functools.partial(gradients, *step) for name, step in steps.items()}
    calls.update({name: functools.partial(gradients, learner, part) for name, part in parts.items()})
    costs = case.meter({**calls, "encode": case.encode, "encode, bf16": half.encode})
    if backbone == "coop":
        costs["image side"] = costs["encode"]
    elif learner.needs_frozen_features:  # its losses compare with them
        costs["image side"] = total((1, costs["image side"]), (1, costs["encode"]))
    rows = [case.row(name, of_row, costs[name]) for name, (of_row, _) in steps.items()]
    ratios = {
        name.format(backbone): ratio(costs[theirs], costs[faster])
        for name, (theirs, faster) in RATIOS.items()
        if theirs in costs and faster in costs and not (backbone == "coop" and name.startswith("promptsrc"))
    }
    views = 51 * SHOTS * VIEWS / case.batch  # batches of them, once per phase
    for name, (step, encode, epochs, of_epoch) in PHASES.items() if backbone == "coop" else ():
        count = epochs * getattr(case, of_epoch)
        ratios[name] = ratio(total((count, costs[AUTHORS])), total((count, costs[step]), (views, costs[encode])))
    found = difference(*(gradients(learner, loss) for loss in (ours[""], steps[AUTHORS][1])))
    with torch.no_grad():
        few = difference([learner.text_features(case.classes)], [baseline.g.detach()[case.classes]])
    return rows, ratios, {f"{backbone}: loss and gradients": found, f"{backbone}: candidates' text features": few}


def text_side(case, backbone, count, quick):
    """A line of the text side at a number of classes: {"backbone", "classes", "authors", "plain", "mao"}.

    The last three are (seconds, MiB) or None: the authors' way, all classes, and the candidates of a batch. With
    `quick` the authors' way runs forward only, which understates its memory. Each call runs once: it is for memory.
    """
    learner = run.LEARNERS[backbone](case.model, names(count))
    few = torch.arange(min(count, len(case.classes)), device=case.device)
    calls = {"mao": lambda: learner.text_features(few).sum().backward()}
    if backbone == "coop":
        calls["plain"] = lambda: learner.text_features().sum().backward()
        if count in (100, 200):  # its memory at 1,000 classes is extrapolated
            baseline = Baseline(learner)
            calls["authors"] = baseline.text_features if quick else lambda: baseline.text_features().sum().backward()
    costs = Meter(case.device, 1)(calls)
    found = {way: (*cost.clock, *cost.mib) for way, cost in costs.items()}
    return {"backbone": backbone, "classes": count, "authors": None, "plain": None, **found}


def bench_table_3(case, backbone):
    """Table 3's rows of a backbone, without and with MAO: those of `Case.row`, with "images_per_second" at test."""
    learner = case.learner(backbone)
    losses = {name: loss for name, loss in case.losses(learner).items() if "cached" not in name}
    if learner.new_phase_refused:
        del losses[MAO_NEW]
    calls = {name: functools.partial(gradients, learner, loss) for name, loss in losses.items()}
    with torch.no_grad():
        at_test = torch.no_grad()(scorer(learner))
    costs = case.meter({**calls, "at test": lambda: at_test(case.images)})
    rate = case.batch / min(costs["at test"].clock)
    return [{**case.row(name, learner, costs[name]), "images_per_second": rate} for name in losses]


def bench_loader(meter, count=IMAGES, pixels=224):
    """How fast one process makes training images of 500x375 JPEGs: {what: Cost of `count` images}.

    "anew" decodes each time; "kept" is `images.KeptImages`, which must give the same bits; the others are its parts.
    """
    rng, transform = np.random.default_rng(0), train_transform(pixels, (0.08, 1))
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        for number in range(count):  # smooth, with noise: as large as photos of that size are
            smooth = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)).resize((500, 375))
            noisy = np.clip(np.asarray(smooth) + rng.normal(0, 12, (375, 500, 3)), 0, 255)
            Image.fromarray(noisy.astype(np.uint8)).save(folder / f"{number}.jpg", quality=90)
        paths, read = [f"{number}.jpg" for number in range(count)], FolderReader(folder)
        kept, keys = KeptImages(read, paths), list(enumerate(range(count)))
        images, again = (Images(paths, reader, transform, [0] * count) for reader in (read, kept))
        if not all(torch.equal(images[key][0], again[key][0]) for key in keys):
            raise ValueError("images that are kept are not those that are decoded anew")
        return meter({
            "anew": lambda: next(iter(loader(images, 0, batch_sampler=[keys]))),
            "kept": lambda: next(iter(loader(again, 0, batch_sampler=[keys]))),
            "decoding": lambda: [read(path) for path in paths],
            "crop, resize, flip": lambda: [transform(kept(path)) for path in paths],
        })  # fmt: skip


def describe(case):
    """The machine and what runs on it, a line."""
    device = torch.cuda.get_device_name() if case.device == "cuda" else platform.machine()
    here = f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}"
    return f"{here}; CLIP {case.sizes}, {case.batch} images per step, {case.meter.turns} turns"


def bench(sizes="vit-b/16", device="cpu", quick=True, turns=3, backbones=tuple(PAPERS_THREE)):
    """Everything that the command prints, a dict. backbones: those to measure, CoOp among them."""
    if sizes != "tiny":
        bench("tiny", device, quick, 2, backbones)  # warms up: libraries load, kernels are chosen
    batch, meter = QUICK_BATCH if quick else BATCH, Meter(device, turns)
    case, half = Case(sizes, device, meter, batch), Case(sizes, device, meter, batch, "bf16")
    rows, ratios, differences = [], {}, {}
    for backbone in tqdm(backbones, "steps", disable=sizes == "tiny" or None):
        of_backbone = bench_backbone(case, half, backbone, quick)
        rows, ratios, differences = rows + of_backbone[0], ratios | of_backbone[1], differences | of_backbone[2]
    counts = tqdm([10, 50, 100, 200, 1000], "text side", disable=None)
    sweep = [text_side(case, one, n, quick) for n in counts for one in ("coop", "maple") if one in backbones]
    memory = {line["classes"]: line for line in sweep if line["backbone"] == "coop"}
    at_100, at_200 = memory[100]["authors"][1], memory[200]["authors"][1]
    return {
        "machine": describe(case),
        "rows": rows,
        "sweep": sweep,
        "differences": differences,
        "weights_mib": {"fp32": case.weights_mib(), "bf16": half.weights_mib()},
        "ratios": ratios,
        # the authors' way at 1,000 classes is extrapolated
        "memory_1000_classes": (at_200 + 8 * (at_200 - at_100)) / memory[1000]["plain"][1],
        "impossible": impossible(ratios),
    }


def impossible(ratios):
    """The names of steady ratios that cannot be right: a step takes at least as long as its image side."""
    of_bound = {name: found for name, found in ratios.items() if name.endswith("_to_image_side")}
    return [name for name, found in of_bound.items() if found.value < 1 - STEADY and found.spread <= STEADY]


# The command ----------------------------------------------------------------------------------------------------------

# Of keys in the JSON:
TITLES = {"mib": "peak MiB of a step", "step": "s per step", "steps": "steps per epoch", "epoch": "s per epoch",
          "images_per_second": "images/s at test", "authors": "text side, authors' way", "plain": "all classes",
          "mao": "MAO's candidates", "differences": "largest relative difference from the baseline"}  # fmt: skip


def show(found):
    """Prints a dict: a list of rows as a table, a dict as a table of two columns, anything else on a line."""
    for name, part in found.items():
        title = TITLES.get(name, name)
        if isinstance(part, dict):
            part = [{title: key, "": value} for key, value in part.items()]
        if isinstance(part, list) and part:
            head = [TITLES.get(key, key) for key in part[0]]
            print("\n" + markdown([head, *([cell(value) for value in line.values()] for line in part)]))
        elif part:
            print(f"\n{title}: {cell(part)}")


def cell(value):
    """A value as text; a pair is (seconds, MiB)."""
    if type(value) is tuple:
        return f"{value[0]:.3f} s, {value[1]:,.0f} MiB"
    if isinstance(value, float | int):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return "" if value is None else str(value)


def main(arguments=None):
    """The command line of experiments/bench.py. Returns 1 where a ratio cannot be right."""
    parser = options.Parser("experiments.bench", __doc__)
    add = parser.add_argument
    add("--quick", action="store_true", help=f"{QUICK_BATCH} images per step, MAO's rows for CoOp only")
    turns = options.checked(Annotated[int, Meta(ge=2)])
    add("--turns", type=turns, default=3, metavar="N", help="of each call; the fastest counts (default: 3)")
    add("--backbones", nargs="+", choices=PAPERS_THREE, default=PAPERS_THREE, help="besides coop (default: all)")
    add("--table3", action="store_true", help="Table 3's columns of all nine, and nothing else")
    add("--loader", action="store_true", help="how fast training images load, and nothing else")
    add("--json", metavar="FILE", help="write all of it there")
    add("--sizes", choices=list(SIZES), default="vit-b/16", help="of CLIP (default: %(default)s)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(arguments)
    if args.loader:
        costs = bench_loader(Meter("cpu", max(3, args.turns)))
        found = {what: 1000 * min(cost.clock) / IMAGES for what, cost in costs.items()}
        found = {"milliseconds per image": found, "ratios": {"kept_images": ratio(costs["anew"], costs["kept"])}}
    elif args.table3:
        case = Case(args.sizes, args.device, Meter(args.device, args.turns), BATCH)
        learners = tqdm(run.LEARNERS, "backbones", disable=None)
        rows = [row for backbone in learners for row in bench_table_3(case, backbone)]
        found = {"machine": describe(case), "rows": rows}
    else:
        found = bench(args.sizes, args.device, args.quick, args.turns, dict.fromkeys(["coop", *args.backbones]))
    wrong = found.pop("impossible", [])
    show(found)
    for name in wrong:
        print(f"{name} is {found['ratios'][name]}, which cannot be right: a step contains its image side; run it again")
    if args.json:
        ratios = {name: value._asdict() for name, value in found.get("ratios", {}).items()}
        content = {**found, "ratios": ratios, "impossible": wrong}
        atomic_write(pathlib.Path(args.json), json.dumps(content, indent=1) + "\n")
    return 1 if wrong else None


if __name__ == "__main__":
    run_main("experiments.bench", main)
