"""What docs/reading.md shows: one batch of the demo from the names to the scores, its values and figures.

Everything comes from one seed, on one thread, and nothing is typed in. A function makes one figure or one table.
"""

import base64
import functools
import json
import re
import tempfile

import matplotlib.pyplot as plt
import numpy as np
import torch
from IPython.core.pylabtools import print_figure
from IPython.display import display
from msgspec.structs import asdict

import run
from backbones import CoOp, ZeroShot
from baselines.labelers import of_whole_images
from data import open_task
from experiments import figures
from harness import clips, demo, images, options, runs, scores, tuning
from mao import candidates, similarity_logits
from pseudolabel import PseudoLabeler
from sampler import minilm, nearest_classes

plt.rcParams.update({"font.size": 9, "figure.dpi": 110, "savefig.facecolor": "white", "axes.titlesize": 10})
GRAY = "0.75"
VALUES = {"figures": 0}  # what a test computes again, and what CI compares with the page that is checked in
show = functools.partial(display, raw=True)  # what a cell shows: {MIME type: data}, which functions here return


def keep(name, value):
    """Notes a value under a name, for the page's own list of values; returns it."""
    VALUES[name] = round(float(value), 6)
    return value


def all_values():
    """All values that were kept, for `python -m docs --check` to compare."""
    return {"application/json": VALUES, "text/plain": f"{len(VALUES)} values, which python -m docs --check compares"}


def image(figure, alt):
    """A figure as a PNG, without a backend of matplotlib; counts it, so that none is lost. alt: what it shows."""
    VALUES["figures"] += 1
    plt.close(figure)
    return {"image/png": base64.b64encode(print_figure(figure, bbox_inches=None)).decode(), "text/plain": alt}


def table(rows, header, below=""):
    """A table of cells, HTML, with a sentence below it."""
    lines = [f"<tr>{''.join(f'<th>{cell}</th>' for cell in header)}</tr>"]
    lines += [f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows]
    text = "\n".join(" | ".join(map(str, row)) for row in [header, *rows]) + f"\n{below}"
    page = f"<div><table>{''.join(lines)}</table><p>{below}</p></div>"
    return {"text/html": page, "text/plain": re.sub("<[^>]+>", "", text).strip()}


class CountedRecord(runs.Record):
    """A record that counts all steps."""

    steps = 0

    def step(self, *args, **more):
        self.steps += 1
        super().step(*args, **more)


class Run:
    """The demo's task, and CoOp with and without MAO tuned on it, by run.py's own functions."""

    def __init__(self):
        args = tuning.machine_defaults(options.parse(["--device", "cpu"]))
        self.task = open_task(args)
        self.clip, self.sha256 = clips.load_clip_of(asdict(args), "cpu")
        self.args = tuning.fill_defaults(args, self.task, CoOp)
        self.names, self.new_names = self.task.base_names, self.task.new_names
        self.labels = np.array([label for _, label, _ in self.task.base_train])
        self.sampler = run.hard_negatives(None, self.task, self.args)
        self.batch = next(iter(self.sampler))  # the first batch of phase 1
        self.random = images.ShuffledBatches(len(self.labels), len(self.batch), seed=1)  # as without MAO
        torch.manual_seed(1)
        self.learner = CoOp(self.clip, self.names)  # as phase 1 starts
        self.images = images.model_input(self.views(1, [self.task.base_train[index][0] for index in self.batch]))
        self.targets = torch.tensor(self.labels[self.batch])

    def views(self, phase, paths):
        """Augmented images, uint8 [B, 3, h, w], as the first epoch of a phase sees those of its first batches."""
        transform = images.train_transform(self.clip.visual.input_resolution, self.task.crop_scale)
        found = images.Images(paths, self.task.read, transform)
        return torch.stack([found[i, images.augmentation_seed(1, phase, 1, i)][0] for i in range(len(paths))])

    def tune(self):
        """Tunes the rows and scores them: fills `records`, `states` and `results`, by method."""
        self.records, self.states, self.results = {}, {}, {}
        zero_shot = ZeroShot(self.clip, self.names)
        self.tests = scores.TestImages(self.task, zero_shot, "cpu")
        self.results["zeroshot"] = scores.score(zero_shot, None, self.task, self.tests)
        for method in ("backbone", "mao"):
            config = self.config = runs.row_settings(self.args, method, CoOp, self.task, self.sha256)
            torch.manual_seed(1)
            learner = CoOp(self.clip, self.names)
            with tempfile.TemporaryDirectory() as folder:
                record = self.records[method] = CountedRecord(folder, config)
                states = self.states[method] = run.tune(learner, self.task, config, record)
            self.results[method] = scores.score(learner, states, self.task, self.tests)


# 3.1 ------------------------------------------------------------------------------------------------------------------


def shapes(live):
    """The prompt and the encoders' outputs, with their shapes."""
    learner = live.learner
    with torch.no_grad():
        prompts, _ = learner.prompts()
        f, g = learner.image_features(live.images), learner.text_features()
    words = " ".join(f"[θ]<sub>{i + 1}</sub>" for i in range(len(learner.ctx)))
    rows = [
        ("P, the context", "drawn from N(0, 0.02²)", list(learner.ctx.shape)),
        ("P<sub>t</sub>, a textual prompt", f"{words} {live.names[0]}.", list(prompts.shape)),
        ("f(I), the batch's images", f"{len(f)} images of {live.images.shape[-1]} pixels", list(f.shape)),
        ("g(P<sub>t</sub>), all base classes", f"{len(g)} names", list(g.shape)),
        ("1/τ", "CLIP's own", f"{keep('1/tau', learner.logit_scale.item()):.2f}"),
    ]
    return table(rows, ("symbol", "on the demo", "shape or value"))


def one_image(live):
    """The probabilities of Eq. 3 for one image over all base classes, at the start of phase 1."""
    with torch.no_grad():
        logits = live.learner(live.images[:1])[0]
    p, truth = logits.softmax(-1), live.targets[0].item()
    keep("p of the first image's class", p[truth])
    figure, axis = plt.subplots(figsize=(6.8, 2.6), layout="constrained")
    axis.bar(range(len(p)), logits, color=["black" if i == truth else GRAY for i in range(len(p))])
    figures.name_axes(axis, live.names, "x")
    axis.set(ylim=(logits.min().item() - 2, logits.max().item() + 1), ylabel="⟨g, f⟩ / τ")
    axis.set_title(f"an image of '{live.names[truth]}' (black) before tuning: p = {p[truth]:.3f}")
    return image(figure, "logits of one image over all base classes")


# Eq. 4 ----------------------------------------------------------------------------------------------------------------


def neighbors(live):
    """The similarity matrix of the names, and the first anchor's row of it."""
    e = torch.nn.functional.normalize(minilm(live.names).double(), dim=-1)
    cosine, anchor = (e @ e.T).numpy(), int(live.labels[live.batch[0]])
    figure, axis = plt.subplots(figsize=(4.4, 3.9), layout="constrained")
    shown = axis.imshow(cosine, cmap="Greys", vmin=0, vmax=1)
    figures.name_axes(axis, live.names)
    axis.axhline(anchor, color="crimson", linewidth=0.8)
    figure.colorbar(shown, label="cosine of two names")
    axis.set_title("the names of all base classes")
    nearest = nearest_classes(live.names, live.args.top_k + 1, minilm)[anchor]
    keep("cosine of the last neighbor", cosine[anchor, nearest[-2]])
    rows = [(live.names[c], f"{cosine[anchor, c]:.3f}") for c in nearest]
    header = f"nearest to '{live.names[anchor]}'; the last is not taken", "cosine"
    return image(figure, "cosines of the names of all base classes"), table(rows, header)


def batches(live):
    """The batch of hard negatives as a b by K grid, beside a random batch of the same size."""
    for title, batch in (("hard", live.batch), ("at random", next(iter(live.random)))):
        names = [live.names[label] for label in live.labels[batch]]
        keep(f"mean similarity of the batch, {title}", figures.mean_similarity(names))
    return image(figures.batch_of_images("demo"), "images of a batch of hard negatives and of a random batch")


# Eqs. 5 and 6 ---------------------------------------------------------------------------------------------------------


def remapped(live):
    """The labels of the batch, its candidates, and the labels as positions in them."""
    classes, targets = candidates(live.targets)
    keep("candidates, H", len(classes))
    pairs = zip(live.targets.tolist()[:10], targets.tolist())
    rows = [(i + 1, live.names[label], label, position) for i, (label, position) in enumerate(pairs)]
    text = f"H = {len(classes)} candidates, of b·K = {len(targets)} images and {len(live.names)} base classes."
    header = ("image", "class", "label in C<sub>b</sub>", "position in C̃′<sub>b</sub>")
    return table([*rows, ("…", "", "", "")], header, text)


def regularized(live):
    """Logits over C_b with the absent classes grayed out, both losses, and the gradient that each class's g gets."""
    classes, targets = candidates(live.targets)
    with torch.no_grad():
        f, g_all = live.learner.image_features(live.images), live.learner.text_features()
    losses, pushes = {}, {}
    for name, rows, wanted in (("over C_b", torch.arange(len(g_all)), live.targets), ("over C̃′_b", classes, targets)):
        g = g_all.clone().requires_grad_()
        logits = similarity_logits(f, g[rows], live.learner.logit_scale)
        loss = torch.nn.functional.cross_entropy(logits, wanted)
        loss.backward()
        losses[name], pushes[name] = keep(f"loss {name}", loss.item()), g.grad.norm(dim=-1)
    logits = similarity_logits(f, g_all, live.learner.logit_scale).numpy()
    figure, axes = plt.subplots(2, 1, figsize=(8.2, 5.2), layout="constrained", height_ratios=(2, 1))
    edges = (-0.5, len(g_all) - 0.5, len(f) + 0.5, 0.5)  # images are counted from 1, as in the table
    shown = axes[0].imshow(logits, cmap="viridis", aspect="auto", extent=edges)
    for column in np.setdiff1d(np.arange(len(g_all)), classes.numpy()):
        axes[0].axvspan(column - 0.5, column + 0.5, color="0.85")
    axes[0].plot(live.targets, range(1, len(f) + 1), "o", markersize=3, markerfacecolor="none", color="crimson")
    axes[0].set(ylabel="image of the batch", xticks=[])
    found = (
        f"loss over all {len(g_all)} classes {losses['over C_b']:.3f}, over the candidates {losses['over C̃′_b']:.3f}"
    )
    axes[0].set_title(f"logits; gray: classes absent from the batch; red: each image's own\n{found}")
    figure.colorbar(shown, ax=axes[0], label="⟨g, f⟩ / τ")
    x = np.arange(len(g_all))
    axes[1].bar(x - 0.2, pushes["over C_b"], 0.4, color=GRAY, label="loss over C_b")
    axes[1].bar(x + 0.2, pushes["over C̃′_b"], 0.4, color="black", label="loss over the candidates (Eq. 6)")
    axes[1].set_xlim(edges[:2])
    figures.name_axes(axes[1], live.names, "x")
    axes[1].set_ylabel("gradient of g, norm")
    axes[1].legend(fontsize=8)
    return image(figure, "logits of the batch, and gradients of the classes")


# The base phase -------------------------------------------------------------------------------------------------------


def curves(live):
    """Loss and H over the epochs of phase 1, with MAO and without."""
    figure, axes = plt.subplots(1, 2, figsize=(8, 2.5), layout="constrained")
    for method, style, color, label in (("backbone", "s--", "0.6", "CoOp alone"), ("mao", "o-", "black", "MAO")):
        lines = [line for line in map(json.loads, live.records[method].metrics) if line["phase"] == "base"]
        for axis, key, title in zip(axes, ("loss", "candidates"), ("mean loss", "mean number of candidates, H")):
            axis.plot(range(1, len(lines) + 1), [line[key] for line in lines], style, ms=3, color=color, label=label)
            axis.set(title=title, xlabel="epoch of phase 1", xticks=range(0, 21, 5))
        keep(f"last loss of {label}", lines[-1]["loss"])
    axes[0].legend(fontsize=8)
    axes[1].set_ylim(0)
    return image(figure, "loss and number of candidates over the epochs of phase 1")


def words(live):
    """The tokens nearest to each learned context vector: a table."""
    decoder, embedding = clips.clip.simple_tokenizer.SimpleTokenizer().decoder, live.clip.token_embedding.weight
    text = " ".join(["a of . photo picture drawing", *demo.COLORS, *demo.NEIGHBORS, *demo.SEEN])
    used = clips.clip.tokenize(text).unique()[1:-2]  # no padding, start and end: what the demo's CLIP was trained on
    rows = []
    for i, vector in enumerate(live.states["mao"]["base"]["ctx"]):
        distance = (embedding[used] - vector).norm(dim=-1)
        nearest = [decoder[used[j].item()].replace("</w>", "") for j in distance.argsort()[:4]]
        rows.append((f"[θ]<sub>{i + 1}</sub>", ", ".join(nearest), f"{distance.min():.2f}", f"{vector.norm():.2f}"))
    return table(rows, ("vector", "nearest words", "distance", "its length"))


# Eq. 7 ----------------------------------------------------------------------------------------------------------------


def pseudo_labels(live):
    """Unlabeled images with Top-1, confidence and truth, the wrong ones framed; and accuracy by confidence."""
    task = live.task
    labeler = PseudoLabeler(ZeroShot(live.clip, live.new_names, task.label_template))
    pixels = live.views(2, task.new_train)
    labels, confidences = labeler(images.model_input(pixels))
    truth = torch.tensor(task.new_answers)  # only to be shown: training never reads it
    right = labels == truth
    on_whole = of_whole_images(live.learner, task, live.config).argmax(dim=-1)
    share = keep("pseudo-labels right, one view each", 100 * right.float().mean())
    keep("pseudo-labels right, whole images", 100 * (on_whole == truth).float().mean())
    figure = plt.figure(figsize=(12.2, 3.8), layout="constrained")
    left, side = figure.subfigures(1, 2, width_ratios=(2.1, 1))
    for axis, i in zip(left.subplots(3, 6).flat, np.random.default_rng(1).permutation(len(right))):
        name = live.new_names[labels[i]] + ("" if right[i] else f"\nis {live.new_names[truth[i]]}")
        text = f"{name}\n{confidences[i]:.2f}"
        figures.show_image(axis, pixels[i].permute(1, 2, 0), text, 8, 0 if right[i] else 2.5)
    axis = side.subplots()
    for low in torch.arange(10) / 10:
        inside = (confidences >= low) & (confidences < low + 0.1 + 1e-6)
        if inside.sum() > 4:
            axis.bar(low + 0.05, right[inside].float().mean(), 0.09, color=GRAY, edgecolor="black", linewidth=0.5)
            axis.text(low + 0.05, 0.02, int(inside.sum()), ha="center", fontsize=7)
    axis.plot([0, 1], [0, 1], "k--", linewidth=0.8)
    axis.set(xlabel="confidence (at a bar's foot: its number of images)", ylabel="share right")
    axis.set_title(f"right: {share:.1f}% of views")
    return image(figure, "unlabeled images with pseudo-labels; the share that is right by confidence")


# Eq. 8 and after ------------------------------------------------------------------------------------------------------


def predictions(live, after):
    """What `scores.top1` returns of the new classes' test images, by MAO's prompts after a phase."""
    learner = CoOp(live.clip, live.new_names)
    learner.load_state_dict(live.states["mao"][after])
    return scores.top1(learner, live.tests.batches("new", learner))


def final_scores(live):
    """Base and New by the prompts after each phase: a table."""
    mao, after_1 = live.results["mao"], keep("New after phase 1", scores.accuracy(*predictions(live, "base")))
    final = mao["base_by_final_prompt"], keep("New after phase 2", mao["new"])
    pairs = ("after phase 1", (keep("Base after phase 1", mao["base"]), after_1)), ("after phase 2", final)
    rows = [(f"CoOp + MAO, prompts {when}", *(f"{score:.2f}" for score in both)) for when, both in pairs]
    text = f"Base is scored by phase 1's prompts, New by phase 2's: H is {keep('harmonic mean', mao['h']):.2f}."
    return table(rows, ("", "Base", "New"), text)


def confusion(live):
    """How often each new class is taken for each other, before and after phase 2."""
    figure, axes = plt.subplots(1, 2, figsize=(8.2, 3.9), layout="constrained")
    for axis, after, title in zip(axes, ("base", "new"), ("after phase 1", "after phase 2")):
        _, found, truth, _ = predictions(live, after)
        shown = figures.show_confusion(axis, truth, found, live.new_names, title)
        axis.set_xlabel("the class predicted")
    axes[0].set_ylabel("the class shown")
    figure.colorbar(shown, ax=axes, label="% of the class shown")
    return image(figure, "confusion of the new classes after each phase")


def gains(live):
    """What MAO gains, and what it costs: scores, learned parameters and steps of the three rows."""
    learnable, rows = sum(p.numel() for p in live.learner.parameters()), []
    for method, name in (("zeroshot", "zero-shot CLIP"), ("backbone", "CoOp alone"), ("mao", "CoOp + MAO")):
        result, record = live.results[method], live.records.get(method)
        steps = keep(f"steps of {name}", record.steps if record else 0)
        h = keep(f"H of {name}, all classes as candidates", result["one_list"]["h"])
        scored = [f"{result[key]:.2f}" for key in ("base", "new", "h")] + [f"{h:.2f}"]
        cost = f"{learnable if record else 0:,}", f"{steps:,}"
        rows.append((name, *scored, *cost))
    header = ("", "Base", "New", "H", "H, all classes as candidates", "learned parameters", "steps")
    return table(rows, header)


# Appendix A -----------------------------------------------------------------------------------------------------------


def meetings(live):
    """How often two base classes meet in one batch over phase 1, with hard negatives and at random."""
    figure, axes = plt.subplots(1, 2, figsize=(11.6, 5), layout="constrained")
    for axis, sampler, title in zip(axes, (live.sampler, live.random), ("hard negatives", "at random")):
        sampler.set_epoch(1)
        batches = [batch for _ in range(options.RECIPES["mao"].epochs) for batch in sampler]
        present = np.zeros((len(batches), len(live.names)))
        for row, batch in zip(present, batches):
            row[live.labels[batch]] = 1
        share = present.T @ present / len(batches)
        shown = axis.imshow(share, cmap="Greys", vmin=0, vmax=1)
        off = share[~np.eye(len(share), dtype=bool)]
        keep(f"spread of meetings, {title}", off.std())
        axis.set_title(f"{title}: two classes meet in {off.mean():.2f} ± {off.std():.2f} of batches")
        figures.name_axes(axis, live.names)
    figure.colorbar(shown, ax=axes, label="share of batches with both")
    return image(figure, "how often two classes meet in a batch")
