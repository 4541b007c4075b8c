"""What tuning costs: the columns of Table 3 for every backbone with and without MAO, beside a straightforward baseline.

    python -m experiments.bench --quick             each call once, MAO's rows for CoOp only
    python -m experiments.bench --json bench.json   all rows, medians of three (--repeats), in a file too

The baseline does what the authors' releases do: all classes at all 77 positions, every prompt whole, by clip's own
modules (nn.MultiheadAttention), images encoded anew. Weights are random, at ViT-B/16's sizes (speed does not depend on
them); the classes are the 51 base classes of Flowers102. Every fast path is checked against the baseline in the run.
Ratios are the baseline's time or memory over ours, unless the name says otherwise.
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

from backbones import BACKBONES, ZeroShot, clip, frozen_image_features
from command import Parser, at_least, end
from mao import alterable_cross_entropy, base_step, candidates, full_step, new_step
from pseudolabel import PseudoLabeler
from record import write
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
    """A prompt learner of ours, encoded as the authors' releases encode: the same prompts, the straightforward way."""

    def __init__(self, learner, classnames):
        self.learner, self.model, self.logit_scale = learner, learner.clip_model, learner.logit_scale
        self.tokens = clip.tokenize([f"{learner.words} {name}." for name in classnames]).to(learner.ctx.device)
        self.embedded = self.model.token_embedding(self.tokens)  # [C, 77, w]
        if hasattr(learner, "other_losses"):
            self.other_losses = learner.other_losses

    def text_features(self):
        model, context = self.model, self.learner.ctx
        embedded, count = self.embedded, len(context)
        deep = self.learner.deep_text()
        x = torch.cat([embedded[:, :1], context.expand(len(embedded), -1, -1), embedded[:, 1 + count :]], dim=1)
        x = (x + model.positional_embedding).transpose(0, 1)  # [77, C, w]
        for layer, block in enumerate(model.transformer.resblocks):
            if 0 < layer <= len(deep):
                x = torch.cat([x[:1], deep[layer - 1][:, None].expand(-1, x.shape[1], -1), x[1 + count :]])
            x = block(x)
        x = model.ln_final(x.transpose(0, 1))
        x = x[torch.arange(len(x)), self.tokens.argmax(dim=-1)] @ model.text_projection
        x = F.normalize(x, dim=-1)
        self.found = x.detach()
        return x

    def image_features(self, images):
        learner, visual = self.learner, self.model.visual
        if not learner.prompts_images:
            with torch.no_grad():
                return F.normalize(visual(images), dim=-1)
        if hasattr(learner, "projections"):  # MaPLe
            context = learner.proj(learner.ctx)
            deep = [coupling(text) for coupling, text in zip(learner.projections, learner.text_prompts)]
        else:
            context, *deep = learner.visual_prompts
        x = visual.conv1(images).flatten(2).transpose(1, 2)
        x = torch.cat([visual.class_embedding.expand(len(x), 1, -1), x], dim=1) + visual.positional_embedding
        x = visual.ln_pre(torch.cat([x, context.expand(len(x), -1, -1)], dim=1)).transpose(0, 1)  # [T, B, w]
        for layer, block in enumerate(visual.transformer.resblocks):
            if 0 < layer <= len(deep):
                x = torch.cat([x[: -len(context)], deep[layer - 1][:, None].expand(-1, x.shape[1], -1)])
            x = block(x)
        return F.normalize(visual.ln_post(x[0]) @ visual.proj, dim=-1)

    def other_losses_frozen(self, images):
        """PromptSRC's frozen features, by clip's own image encoder."""
        with torch.no_grad():
            return F.normalize(self.model.visual(images), dim=-1)

    def step(self, images, labels):
        """The loss of a batch, over all classes (over the batch's own it costs the same: the text side encodes all)."""
        f, g = self.image_features(images), self.text_features()
        loss = alterable_cross_entropy(f, g, labels.to(f.device), self.logit_scale)
        if hasattr(self, "other_losses"):
            loss = loss + self.other_losses(images, f, g, frozen_features=self.other_losses_frozen(images))
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


def bench(sizes="vit-b/16", device="cpu", quick=True, repeats=1, backbones=tuple(BACKBONES)):
    """Everything the command prints, as a dict. `backbones` names those to measure, CoOp among them."""
    measure = Meter(device, repeats)
    model = random_clip(sizes, device)
    classnames = names(51)
    torch.manual_seed(1)
    images = torch.randn(BATCH, 3, model.visual.input_resolution, model.visual.input_resolution, device=device)
    sampler = HardNegativeSampler(np.repeat(np.arange(51), SHOTS), classnames, *paper_batch(51))
    hard = torch.from_numpy(sampler.labels[next(iter(sampler))])  # the labels of a batch of hard negatives
    classes = candidates(hard)[0].to(device)
    plain_steps, base_steps = 51 * SHOTS // BATCH, len(sampler)
    ratios, rows, differences = {}, [], {}

    foundation = ZeroShot(model, classnames)
    labeler = PseudoLabeler(foundation)
    frozen = {}
    encode, _ = measure(lambda: frozen.update(f=frozen_image_features(model, images)))
    f = frozen["f"]  # [B, d]

    for backbone in tqdm(backbones, "steps"):
        cls = BACKBONES[backbone]
        learner = cls(model, classnames)
        baseline = Baseline(learner, classnames)
        learner.frozen_text = foundation.text_features()  # PromptSRC's, of one template: encoded once a run, not a step

        def step(loss, learner=learner):
            return measure(lambda: gradients(learner, loss))

        def new_phase(images=images, learner=learner):
            f = foundation.image_features(images)
            pseudo_labels, _ = labeler.label_features(f)
            return new_step(learner, images if learner.prompts_images else f, pseudo_labels, frozen_features=f)

        labels = torch.arange(BATCH) % 51
        authors = step(lambda: baseline.step(images, labels))
        theirs = learner.found
        if learner.prompts_images:
            side = ImageSide(learner)
            plain = measure(lambda: side(lambda: full_step(learner, images, labels)))
            bound = statistics.median(side.seconds[-repeats:]) + encode * hasattr(learner, "other_losses")
        else:
            plain, bound = step(lambda: full_step(learner, images, labels)), encode
        differences[f"{backbone}: loss and gradients"] = difference(learner.found, theirs)
        with torch.no_grad():
            differences[f"{backbone}: candidates' text features"] = difference(
                [learner.text_features(classes)], [baseline.found[classes]])

        parameters = sum(p.numel() for p in learner.parameters())
        measured = [(", authors' way", authors, plain_steps), ("", plain, plain_steps),
                    (", as many steps as MAO's base phase", plain, base_steps)]
        ratios[f"{backbone}_step"] = authors[0] / plain[0]
        ratios[f"{backbone}_step_memory"] = authors[1] / plain[1]
        ratios[f"{backbone}_step_to_image_side"] = plain[0] / bound
        if backbone == "coop" or not quick:
            base, new = step(lambda: base_step(learner, images, hard)), step(new_phase)
            ratios[f"mao_step_to_{backbone}_step"] = base[0] / plain[0]
            ratios[f"mao_new_step_to_{backbone}_step"] = new[0] / plain[0]
            measured += [(" + MAO, base phase", base, base_steps), (" + MAO, new phase", new, plain_steps)]
        for name, (seconds, mib), steps in measured:
            rows.append({"row": cls.__name__ + name, "learnable": parameters, "mib": mib, "step": seconds,
                         "steps": steps})
        if backbone == "coop":
            g = torch.randn(51, f.shape[1], device=device)
            authors_text, _ = step(lambda: (baseline.text_features() * g).sum())
            ratios["text_all_classes"] = authors_text / step(lambda: (learner.text_features() * g).sum())[0]
            for ratio, few in (("text_candidates", classes), ("text_32_candidates", torch.arange(32))):
                ratios[ratio] = authors_text / step(lambda: (learner.text_features(few) * g[few]).sum())[0]
            encoding = encode * 51 * SHOTS * VIEWS / BATCH  # of all views, once a phase
            for name, ratio, loss, steps, epochs in (
                    ("", "cached_views_coop", lambda: full_step(learner, f, labels), plain_steps, 2 * EPOCHS),
                    (" + MAO, base phase", "cached_views_phase", lambda: base_step(learner, f, hard), base_steps,
                     EPOCHS),
                    (" + MAO, new phase", "cached_views_new_phase", lambda: new_phase(f), plain_steps, EPOCHS)):
                (seconds, mib), count = step(loss), epochs * steps
                ratios[ratio] = count * authors[0] / (encoding + count * seconds)
                rows.append({"row": f"CoOp{name}, {VIEWS} cached views (their encoding spread over the phase)",
                             "learnable": parameters, "mib": mib, "step": seconds + encoding / count, "steps": steps})

    # Over the classes. With --quick the authors' way runs forward only, which understates its memory.
    sweep = []
    for count in tqdm((10, 50, 100, 200, 1000) if quick else (10, 50, 100, 200, 500, 1000), "text side"):
        for backbone in [name for name in ("coop", "maple") if name in backbones]:
            learner = BACKBONES[backbone](model, names(count))
            few = torch.arange(min(count, len(classes)), device=device)  # as many candidates as the batch above
            line = {"backbone": backbone, "classes": count, "authors": None, "plain": None}
            if backbone == "coop" and (100 <= count <= 200 if quick else count <= 200):
                baseline = Baseline(learner, names(count))
                line["authors"] = measure(baseline.text_features if quick
                                          else lambda: baseline.text_features().sum().backward())
                del baseline
            if backbone == "coop" or count <= 50 or not quick:
                line["plain"] = measure(lambda: learner.text_features().sum().backward())
            line["mao"] = measure(lambda: learner.text_features(few).sum().backward())
            sweep.append(line)
    memory = {line["classes"]: line for line in sweep if line["backbone"] == "coop"}
    at_100, at_200 = memory[100]["authors"][1], memory[200]["authors"][1]
    extrapolated = at_200 + 8 * (at_200 - at_100)
    ratios["memory_1000_classes"] = extrapolated / memory[1000]["plain"][1]

    visual = model.visual
    width, layers, tokens = visual.conv1.out_channels, visual.transformer.layers, len(visual.positional_embedding)
    operations = 2 * BATCH * (tokens * 12 * width**2 * layers + 2 * tokens**2 * width * layers  # blocks, attention
                              + (tokens - 1) * visual.conv1.weight.numel())
    a = torch.randn(2048, 2048, device=device)
    rate = 2 * 2048**3 / Meter(device, 5)(lambda: a @ a)[0]
    return {
        "machine": {"processor": platform.machine(), "threads": torch.get_num_threads(), "sizes": sizes,
                    "device": torch.cuda.get_device_name() if device == "cuda" else "cpu", "torch": torch.__version__,
                    "repeats": measure.repeats, "date": time.strftime("%Y-%m-%d")},
        "ratios": ratios, "rows": rows, "sweep": sweep, "differences": differences,
        "memory_1000_classes_extrapolated_mib": extrapolated, "inference_images_a_second": BATCH / encode,
        "share_of_matmul_rate": operations / encode / rate, "matmul_rate": rate,
    }


def show(found):
    """Prints what `bench` found."""
    print(", ".join(f"{key} {value}" for key, value in found["machine"].items()))
    print("\n| row | learnable | peak MiB of a step | s a step | steps an epoch | images an epoch | s an epoch |"
          "\n|---|---|---|---|---|---|---|")
    for row in found["rows"]:
        print(f"| {row['row']} | {row['learnable']:,} | {row['mib']:,.0f} | {row['step']:.3f} | {row['steps']} "
              f"| {BATCH * row['steps']:,} | {row['step'] * row['steps']:.1f} |")
    print(f"\ninference: {found['inference_images_a_second']:.1f} images/s, "
          f"{100 * found['share_of_matmul_rate']:.0f}% of the device's measured matrix-multiply rate, "
          f"{found['matmul_rate'] / 1e9:,.0f} GFLOP/s")
    print("\n| text side, forward and backward | classes | authors' way | all classes | MAO's candidates |"
          "\n|---|---|---|---|---|")
    for line in found["sweep"]:
        cells = ["" if line[key] is None else f"{line[key][0]:.3f} s, {line[key][1]:,.0f} MiB"
                 for key in ("authors", "plain", "mao")]
        print(f"| {line['backbone']} | {line['classes']} | " + " | ".join(cells) + " |")
    print(f"\nauthors' way at 1,000 classes, extrapolated: {found['memory_1000_classes_extrapolated_mib']:,.0f} MiB")
    print("\nlargest relative difference from the baseline: "
          + ", ".join(f"{name} {value:.1e}" for name, value in found["differences"].items()))
    print("\n| ratio | |\n|---|---|")
    for name, value in found["ratios"].items():
        print(f"| {name} | {value:.2f} |")


def main():
    parser = Parser("experiments.bench", __doc__)
    parser.add_argument("--quick", action="store_true", help="MAO's rows for CoOp only, fewer classes, each call once")
    parser.add_argument("--repeats", type=at_least(1), metavar="N", help="calls to take the median of, after "
                        "one to warm up where there are several (default: 3; quick: 1)")
    parser.add_argument("--backbones", nargs="+", choices=list(BACKBONES), default=list(BACKBONES),
                        help="besides coop (default: all)")
    parser.add_argument("--json", metavar="FILE", help="write all of it there")
    parser.add_argument("--sizes", choices=list(SIZES), default="vit-b/16", help="of CLIP (default: %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    repeats = args.repeats or (1 if args.quick else 3)
    found = bench(args.sizes, args.device, args.quick, repeats, dict.fromkeys(["coop", *args.backbones]))
    show(found)
    if args.json:
        write(pathlib.Path(args.json), json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    end("experiments.bench", main)
