"""What tuning costs: the columns of Table 3 for every backbone with and without MAO, beside a straightforward baseline.

    python -m experiments.bench --quick             each call once, MAO's rows for CoOp only
    python -m experiments.bench --json bench.json   all rows, medians of three (--repeats), in a file too
    python -m experiments.bench --table3            Table 3's columns of all nine prompt learners, without a baseline

The baseline does what the authors' releases do, by the plain encoders of encoders.py: all classes at all 77 positions,
images encoded anew. Weights are random, at the sizes of ViT-B/16, since speed does not depend on them. The classes are
the 51 base classes of Flowers102. Every fast path is checked against the baseline in the run. Ratios are the baseline's
time or memory over ours, unless the name says otherwise.
"""

import ctypes
import json
import pathlib
import platform
import statistics
import time

import numpy as np
import torch
from torch.nn import functional as F
from tqdm import tqdm

from cli import Parser, at_least, end
from encoders import ZeroShot, clip, encode_images, frozen_image_features
from evaluate import scorer
from mao import alterable_cross_entropy, backbone_loss, base_loss, candidates, new_loss
from pseudolabel import PseudoLabeler
from record import write
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
BATCH, SHOTS, VIEWS, EPOCHS = 32, 16, 8, 10
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


class Meter:
    """Seconds and peak memory of a call: the median of its repeats, after one to warm up where there are several."""

    def __init__(self, device, repeats):
        self.device, self.repeats = device, repeats

    def __call__(self, call):
        seconds, mib = [], []
        for _ in range(self.repeats + (self.repeats > 1)):
            before = self.memory(restart=True)
            started = time.perf_counter()
            call()
            if self.device == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - started)
            mib.append(self.memory() - before)
        return statistics.median(seconds[-self.repeats :]), statistics.median(mib[-self.repeats :])

    def memory(self, restart=False):
        """MiB: what is held now, from where the peak starts anew, or that peak. On a CPU the process's, by Linux."""
        if self.device == "cuda":
            torch.cuda.synchronize()
            if restart:
                torch.cuda.reset_peak_memory_stats()
            return torch.cuda.max_memory_allocated() / 2**20
        if restart:
            ctypes.CDLL(None).malloc_trim(0)  # what the allocator kept of earlier calls goes back first
            pathlib.Path("/proc/self/clear_refs").write_text("5")
        lines = pathlib.Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def gradients(learner, loss):
    """Runs a step: its gradients, and its loss with them, are kept as `learner.found`."""
    for parameter in learner.parameters():
        parameter.grad = None
    loss = loss()
    loss.backward()
    learner.found = [loss.detach()] + [parameter.grad for parameter in learner.parameters()]


class ImageSide:
    """Times what a learner's image side takes of a step: the graph is cut at the image features, so that their forward
    and, after everything else, their backward are calls of their own. The step's gradients stay what they are.
    """

    def __init__(self, learner):
        self.learner, self.encode, self.seconds = learner, learner.image_features, []

    def timed(self, call):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        started = time.perf_counter()
        found = call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds[-1] += time.perf_counter() - started
        return found

    def image_features(self, images):
        self.whole = self.timed(lambda: self.encode(images))
        self.cut = self.whole.detach().requires_grad_()
        return self.cut

    def __call__(self, loss):
        self.seconds.append(0.0)
        self.learner.image_features = self.image_features
        gradients(self.learner, loss)
        del self.learner.image_features
        self.timed(lambda: self.whole.backward(self.cut.grad))
        self.learner.found[1:] = [parameter.grad for parameter in self.learner.parameters()]


def difference(ours, theirs):
    """The largest relative difference between two lists of tensors."""
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(ours, theirs))


# The bench ------------------------------------------------------------------------------------------------------------


class Case:
    """What is measured: a CLIP of random weights, class names, a batch of images, and labels for each kind of step."""

    def __init__(self, sizes, device, measure):
        self.sizes, self.device, self.measure = sizes, device, measure
        self.model = random_clip(sizes, device)
        self.classnames = names(51)
        pixels = self.model.visual.input_resolution
        torch.manual_seed(1)
        self.images = torch.randn(BATCH, 3, pixels, pixels, device=device)
        self.labels = torch.arange(BATCH) % 51
        sampler = HardNegativeSampler(np.repeat(np.arange(51), SHOTS), self.classnames, *paper_batch(51))
        self.hard_labels = torch.from_numpy(sampler.labels[next(iter(sampler))])  # of a batch of hard negatives
        self.classes = candidates(self.hard_labels)[0].to(device)  # H of them
        self.plain_steps, self.base_steps = 51 * SHOTS // BATCH, len(sampler)  # per epoch
        self.foundation = ZeroShot(self.model, self.classnames)
        self.labeler = PseudoLabeler(self.foundation)
        self.encode = measure(self.encode_images)[0]  # seconds, and f [B, d] with them

    def encode_images(self):
        self.f = frozen_image_features(self.model, self.images)

    def step(self, learner, loss):
        """(seconds, MiB) of a forward and backward pass; `loss` is a function of nothing that gives the scalar."""
        return self.measure(lambda: gradients(learner, loss))

    def new_phase_loss(self, learner, images):
        """MAO's new phase as run.py has it: pseudo-labels, then the loss."""
        f = self.foundation.image_features(images)
        pseudo_labels, _ = self.labeler(f)
        return new_loss(learner, inputs(learner, images, f), pseudo_labels)


def bench_steps(case, backbone, with_mao):
    """(rows, ratios, differences) of a backbone's steps: the authors' way, ours, and with MAO."""
    torch.manual_seed(1)  # the same prompts whichever backbones are measured
    learner = BACKBONES[backbone](case.model, case.classnames)
    learner.frozen_text = case.foundation.text_features()  # PromptSRC's, of one template: once per run, not per step
    baseline = Baseline(learner)
    images, labels, hard_labels = case.images, case.labels, case.hard_labels
    authors = case.step(learner, lambda: baseline.loss(images, labels))
    theirs = learner.found
    if learner.prompts_images:
        side = ImageSide(learner)
        ours = case.measure(lambda: side(lambda: backbone_loss(learner, images, labels)))
        bound = statistics.median(side.seconds[-case.measure.repeats :])
        if hasattr(learner, "other_losses"):
            bound += case.encode  # the frozen image features that its losses take
    else:
        ours = case.step(learner, lambda: backbone_loss(learner, images, labels))
        bound = case.encode
    differences = {f"{backbone}: loss and gradients": difference(learner.found, theirs)}
    with torch.no_grad():
        few = learner.text_features(case.classes)
    differences[f"{backbone}: candidates' text features"] = difference([few], [baseline.g.detach()[case.classes]])

    ratios = {
        f"{backbone}_step": authors[0] / ours[0],
        f"{backbone}_step_memory": authors[1] / ours[1],
        f"{backbone}_step_to_image_side": ours[0] / bound,
    }
    measured = [
        (", authors' way", authors, case.plain_steps),
        ("", ours, case.plain_steps),
        (", as many steps as MAO's base phase", ours, case.base_steps),
    ]
    if with_mao:
        base = case.step(learner, lambda: base_loss(learner, images, hard_labels))
        new = case.step(learner, lambda: case.new_phase_loss(learner, images))
        ratios[f"mao_step_to_{backbone}_step"] = base[0] / ours[0]
        ratios[f"mao_new_step_to_{backbone}_step"] = new[0] / ours[0]
        measured += [(" + MAO, base phase", base, case.base_steps), (" + MAO, new phase", new, case.plain_steps)]
    name, parameters = BACKBONES[backbone].__name__, sum(p.numel() for p in learner.parameters())
    rows = [row(name + what, parameters, cost, steps) for what, cost, steps in measured]
    return rows, ratios, differences


def row(name, parameters, cost, steps):
    seconds, mib = cost
    return {"row": name, "learnable": parameters, "mib": mib, "step": seconds, "steps": steps}


def bench_coop(case, authors_step):
    """(rows, ratios) of CoOp alone: its text side by itself, and steps on cached views of the images.

    authors_step: seconds of its step the authors' way.
    """
    learner = BACKBONES["coop"](case.model, case.classnames)
    baseline = Baseline(learner)
    g = torch.randn(51, case.f.shape[1], device=case.device)
    authors_text, _ = case.step(learner, lambda: (baseline.text_features() * g).sum())
    all_text, _ = case.step(learner, lambda: (learner.text_features() * g).sum())
    ratios, rows = {"text_all_classes": authors_text / all_text}, []
    for ratio, few in (("text_candidates", case.classes), ("text_32_candidates", torch.arange(32))):
        few_text, _ = case.step(learner, lambda few=few: (learner.text_features(few) * g[few]).sum())
        ratios[ratio] = authors_text / few_text

    encoding = case.encode * 51 * SHOTS * VIEWS / BATCH  # seconds, of all views, once per phase
    phases = [
        ("", "cached_views_coop", lambda: backbone_loss(learner, case.f, case.labels), 2 * EPOCHS * case.plain_steps),
        (" + MAO, base phase", "cached_views_phase", lambda: base_loss(learner, case.f, case.hard_labels),
         EPOCHS * case.base_steps),
        (" + MAO, new phase", "cached_views_new_phase", lambda: case.new_phase_loss(learner, case.f),
         EPOCHS * case.plain_steps),
    ]  # fmt: skip
    for what, ratio, loss, steps in phases:
        seconds, mib = case.step(learner, loss)
        ratios[ratio] = steps * authors_step / (encoding + steps * seconds)
        name = f"CoOp{what}, {VIEWS} cached views (their encoding spread over the phase)"
        per_epoch = case.base_steps if ratio == "cached_views_phase" else case.plain_steps
        rows.append(row(name, learner.ctx.numel(), (seconds + encoding / steps, mib), per_epoch))
    return rows, ratios


def bench_classes(case, backbones, quick):
    """The text side over the number of classes: a list of lines, {"authors", "plain", "mao"} (seconds, MiB) in each.

    With `quick` the authors' way runs forward only, which understates its memory.
    """
    lines = []
    counts = [10, 50, 100, 200, 1000] if quick else [10, 50, 100, 200, 500, 1000]
    for count in tqdm(counts, "text side"):
        for backbone in [name for name in ("coop", "maple") if name in backbones]:
            learner = BACKBONES[backbone](case.model, names(count))
            few = torch.arange(min(count, len(case.classes)), device=case.device)  # as many as the batch above has
            line = {"backbone": backbone, "classes": count, "authors": None, "plain": None}
            least = 100 if quick else 0
            if backbone == "coop" and least <= count <= 200:
                baseline = Baseline(learner)
                if quick:
                    line["authors"] = case.measure(baseline.text_features)
                else:
                    line["authors"] = case.measure(lambda b=baseline: b.text_features().sum().backward())
                del baseline
            if backbone == "coop" or count <= 50 or not quick:
                line["plain"] = case.measure(lambda t=learner: t.text_features().sum().backward())
            line["mao"] = case.measure(lambda t=learner, few=few: t.text_features(few).sum().backward())
            lines.append(line)
    return lines


def matmul_rates(case):
    """(the device's operations per second in matrix multiplication, the share of them that encoding images reaches)."""
    visual = case.model.visual
    width, layers, tokens = visual.conv1.out_channels, visual.transformer.layers, len(visual.positional_embedding)
    blocks = tokens * 12 * width**2 * layers  # multiplications of an image's tokens with weights
    attention = 2 * tokens**2 * width * layers
    patches = (tokens - 1) * visual.conv1.weight.numel()
    operations = 2 * BATCH * (blocks + attention + patches)
    a = torch.randn(2048, 2048, device=case.device)
    rate = 2 * 2048**3 / Meter(case.device, 5)(lambda: a @ a)[0]
    return rate, operations / case.encode / rate


def bench_table_3(case, backbone):
    """Table 3's rows of a backbone, without and with MAO: those of `row`, with "images_per_second" at test."""
    torch.manual_seed(1)
    learner, name = BACKBONES[backbone](case.model, case.classnames), BACKBONES[backbone].__name__
    # What PromptSRC and CoPrompt compute once per run, not per step: of one template, of one sentence for each class.
    learner.frozen_text, learner.bank = case.foundation.text_features(), case.foundation.text_features()[None]
    images = (case.images, case.images) if getattr(learner, "views", 1) == 2 else case.images
    steps = [
        (name, lambda: backbone_loss(learner, images, case.labels), case.plain_steps),
        (f"{name} + MAO, base phase", lambda: base_loss(learner, images, case.hard_labels), case.base_steps),
    ]
    if not hasattr(learner, "new_phase_refused"):
        steps.append((f"{name} + MAO, new phase", lambda: case.new_phase_loss(learner, case.images), case.plain_steps))
    with torch.no_grad():
        scores = scorer(learner)
        seconds, _ = case.measure(lambda: scores(case.images))
    parameters = sum(p.numel() for p in learner.parameters())
    rows = [row(what, parameters, case.step(learner, loss), count) for what, loss, count in steps]
    return [{**found, "images_per_second": BATCH / seconds} for found in rows]


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


def describe(case, repeats):
    """The machine and what runs on it, a dict."""
    return {
        "processor": platform.machine(),
        "threads": torch.get_num_threads(),
        "sizes": case.sizes,
        "device": torch.cuda.get_device_name() if case.device == "cuda" else "cpu",
        "torch": torch.__version__,
        "repeats": repeats,
        "date": time.strftime("%Y-%m-%d"),
    }


def bench(sizes="vit-b/16", device="cpu", quick=True, repeats=1, backbones=tuple(MEASURED)):
    """Everything the command prints, as a dict. `backbones` names those to measure, CoOp among them."""
    case = Case(sizes, device, Meter(device, repeats))
    rows, ratios, differences = [], {}, {}
    for backbone in tqdm(backbones, "steps"):
        found = bench_steps(case, backbone, with_mao=backbone == "coop" or not quick)
        rows += found[0]
        ratios.update(found[1])
        differences.update(found[2])
        if backbone == "coop":
            found = bench_coop(case, rows[0]["step"])
            rows += found[0]
            ratios.update(found[1])
    sweep = bench_classes(case, backbones, quick)
    memory = {line["classes"]: line for line in sweep if line["backbone"] == "coop"}
    at_100, at_200 = memory[100]["authors"][1], memory[200]["authors"][1]
    extrapolated = at_200 + 8 * (at_200 - at_100)  # the authors' way at 1,000 classes
    ratios["memory_1000_classes"] = extrapolated / memory[1000]["plain"][1]
    rate, share = matmul_rates(case)
    return {
        "machine": describe(case, repeats),
        "ratios": ratios,
        "rows": rows,
        "sweep": sweep,
        "differences": differences,
        "memory_1000_classes_extrapolated_mib": extrapolated,
        "inference_images_a_second": BATCH / case.encode,
        "share_of_matmul_rate": share,
        "matmul_rate": rate,
    }


def show(found):
    """Prints what `bench` found."""
    print(", ".join(f"{key} {value}" for key, value in found["machine"].items()))
    print(
        "\n| row | learnable | peak MiB of a step | s per step | steps per epoch | images per epoch | s per epoch |"
        "\n|---|---|---|---|---|---|---|"
    )
    for row in found["rows"]:
        print(
            f"| {row['row']} | {row['learnable']:,} | {row['mib']:,.0f} | {row['step']:.3f} | {row['steps']} "
            f"| {BATCH * row['steps']:,} | {row['step'] * row['steps']:.1f} |"
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
    print("\n| ratio | |\n|---|---|")
    for name, value in found["ratios"].items():
        print(f"| {name} | {value:.2f} |")


def main():
    parser = Parser("experiments.bench", __doc__)
    parser.add_argument("--quick", action="store_true", help="MAO's rows for CoOp only, fewer classes, each call once")
    parser.add_argument(
        "--repeats",
        type=at_least(1),
        metavar="N",
        help="calls to take the median of, after one to warm up where there are several (default: 3; quick: 1)",
    )
    parser.add_argument(
        "--backbones", nargs="+", choices=MEASURED, default=MEASURED, help="besides coop (default: all)"
    )
    parser.add_argument("--table3", action="store_true", help="Table 3's columns of all nine, and nothing else")
    parser.add_argument("--json", metavar="FILE", help="write all of it there")
    parser.add_argument("--sizes", choices=list(SIZES), default="vit-b/16", help="of CLIP (default: %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    repeats = args.repeats or (1 if args.quick else 3)
    if args.table3:
        case = Case(args.sizes, args.device, Meter(args.device, repeats))
        rows = [row for backbone in tqdm(BACKBONES, "backbones") for row in bench_table_3(case, backbone)]
        found = {"machine": describe(case, repeats), "rows": rows}
        print(", ".join(f"{key} {value}" for key, value in found["machine"].items()))
        show_table_3(rows)
    else:
        found = bench(args.sizes, args.device, args.quick, repeats, dict.fromkeys(["coop", *args.backbones]))
        show(found)
    if args.json:
        write(pathlib.Path(args.json), json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    end("experiments.bench", main)
