"""What docs/reading.md shows: one batch of the demo from the names to the scores, its values and pictures.

Everything comes from one seed, on one thread, and nothing is typed in. A function makes one picture or one table.
"""

import contextlib
import io
import json
import tempfile

import matplotlib.pyplot as plt
import numpy as np
import torch
from IPython.display import HTML

import data
import demo
import evaluate
import phase
import run
import settings
from checkpoints import load_clip_of
from encoders import ZeroShot, clip
from experiments import figures
from images import Images, ShuffledBatches, augmentation_seed, model_input, test_transform, train_transform
from mao import candidates, similarity_logits
from pseudolabel import PseudoLabeler
from rivals import BACKBONES
from sampler import HardNegativeSampler, minilm

plt.rcParams.update({"font.size": 9, "figure.dpi": 110, "savefig.facecolor": "white", "axes.titlesize": 10})
GRAY = "0.75"
VALUES = {}  # what a test computes again, and what CI compares with the page that is checked in


def keep(name, value):
    """Notes a value under a name, for the page's own list of values; returns it."""
    VALUES[name] = round(float(value), 6)
    return value


def told(text):
    """A sentence of the page that has a value in it."""
    return HTML(f"<p>{text}</p>")


def listed():
    """All values that the page shows, for a program: `python -m docs --check` compares them."""
    return HTML(f'<script type="application/json" id="values">{json.dumps(VALUES, indent=0)}</script>')


class Run:
    """The demo's task, and CoOp with and without MAO tuned on it, by run.py's own functions."""

    def __init__(self, *options):
        torch.set_num_threads(1)
        self.args = settings.parse(["--seed", "1", "--workers", "0", *options])
        self.task = data.task_of(vars(self.args))
        self.clip, self.sha256 = load_clip_of(vars(self.args), "cpu")
        settings.fit(self.args, self.task, self.clip)
        self.names, self.new_names = self.task.base_names, self.task.new_names
        self.labels = np.array([label for _, label, _ in self.task.base_train])
        self.sampler = HardNegativeSampler(self.labels, self.names, self.args.anchors, self.args.top_k, 1)
        self.batch = next(iter(self.sampler))  # the first batch of phase 1
        self.random = next(iter(ShuffledBatches(len(self.labels), len(self.batch), seed=1)))
        torch.manual_seed(1)
        self.learner = BACKBONES["coop"](self.clip, self.names, **self.args.settings)  # as phase 1 starts
        self.images = self.training_images(self.batch)
        self.targets = torch.tensor(self.labels[self.batch])

    def training_images(self, batch):
        """The batch [b*K, 3, h, w] as phase 1 sees it: augmented, normalized."""
        transform = train_transform(self.clip.visual.input_resolution, self.task.crop_scale)
        images = Images([path for path, _, _ in self.task.base_train], self.task.read, transform)
        return model_input(torch.stack([images[i, augmentation_seed(1, 1, 1, p)][0] for p, i in enumerate(batch)]))

    def tune(self):
        """Tunes the rows and scores them: fills `metrics`, `prompts` (after each epoch), `states` and `results`."""
        self.metrics, self.prompts, self.states, self.results = {}, {}, {}, {}
        end_epoch = phase.Phase.end_epoch

        def remember(this, more=()):
            end_epoch(this, more)
            key = this.record.config["method"], this.name
            self.prompts.setdefault(key, []).append(this.learner.ctx.detach().clone())

        phase.Phase.end_epoch = remember
        tests = evaluate.Tests(self.task, ZeroShot(self.clip, self.names), "cpu")
        try:
            for method in ("backbone", "mao"):
                row = settings.row(self.args, method, self.task)
                with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
                    record = run.Record(folder, settings.in_force(row, self.task, self.sha256))
                    learner, self.states[method] = run.tune(self.clip, self.task, row, record)
                    self.results[method] = evaluate.score(learner, self.states[method], self.task, tests)
                    self.metrics[method] = [json.loads(line) for line in record.metrics]
            zero_shot = ZeroShot(self.clip, self.names)
            with contextlib.redirect_stderr(io.StringIO()):
                self.results["zeroshot"] = evaluate.score(zero_shot, None, self.task, tests)
        finally:
            phase.Phase.end_epoch = end_epoch
        self.tests, self.tuned = tests, learner


# 3.1 ------------------------------------------------------------------------------------------------------------------


def table(rows, header=None):
    """An HTML table of cells."""
    lines = ["<table class='values'>"]
    if header:
        lines.append("<tr>" + "".join(f"<th>{cell}</th>" for cell in header) + "</tr>")
    lines += ["<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows]
    return HTML("".join(lines) + "</table>")


def shape(tensor):
    return "[" + ", ".join(map(str, tensor.shape)) + "]"


def shapes(live):
    """The prompt and the encoders' outputs, with their shapes."""
    learner = live.learner
    with torch.no_grad():
        prompts, ends = learner.prompts()
        f, g = learner.image_features(live.images), learner.text_features()
    words = " ".join(f"[θ]<sub>{i + 1}</sub>" for i in range(len(learner.ctx)))
    rows = [
        ("P, the context", "drawn from N(0, 0.02²)", shape(learner.ctx)),
        ("P<sub>t</sub>, a textual prompt", f"{words} {live.names[0]}.", shape(prompts)),
        ("f(I), the batch's images", f"{len(f)} images of {live.images.shape[-1]} pixels", shape(f)),
        ("g(P<sub>t</sub>), all base classes", f"{len(g)} names", shape(g)),
        ("1/τ", "CLIP's own", f"{keep('1/tau', learner.logit_scale.item()):.2f}"),
    ]
    return table(rows, ("symbol", "on the demo", "shape or value"))


def one_image(live):
    """The probabilities of Eq. 3 for one image over all base classes, at the start of phase 1."""
    with torch.no_grad():
        f, g = live.learner.image_features(live.images[:1]), live.learner.text_features()
        logits = similarity_logits(f, g, live.learner.logit_scale)[0]
    p, truth = logits.softmax(-1), live.targets[0].item()
    keep("p of the first image's class", p[truth])
    figure, axis = plt.subplots(figsize=(7.6, 2.2), layout="constrained")
    axis.bar(range(len(p)), logits, color=["black" if i == truth else GRAY for i in range(len(p))])
    axis.set_xticks(range(len(p)), live.names, rotation=90, fontsize=5.5)
    axis.set_ylim(logits.min().item() - 2, logits.max().item() + 1)
    axis.set_ylabel("⟨g, f⟩ / τ")
    axis.set_title(f"an image of '{live.names[truth]}' (black) before tuning: p = {p[truth]:.3f}")
    plt.close(figure)
    return figure


# Eq. 4 ----------------------------------------------------------------------------------------------------------------


def similarity(names):
    e = torch.nn.functional.normalize(minilm(list(names)).double(), dim=-1)
    return (e @ e.T).numpy()


def neighbors(live):
    """The similarity matrix of the names, and the first anchor's row of it."""
    cosine, anchor = similarity(live.names), int(live.labels[live.batch[0]])
    figure, axis = plt.subplots(figsize=(4.4, 3.9), layout="constrained")
    shown = axis.imshow(cosine, cmap="Greys", vmin=0, vmax=1)
    axis.set_xticks(range(0, len(live.names), 5), live.names[::5], rotation=90, fontsize=6)
    axis.set_yticks(range(0, len(live.names), 5), live.names[::5], fontsize=6)
    axis.axhline(anchor, color="crimson", linewidth=0.8)
    figure.colorbar(shown, label="cosine of two names")
    axis.set_title("every base class against every other")
    plt.close(figure)
    nearest = live.sampler.neighbors[anchor]
    rows = [(i + 1, live.names[c], f"{cosine[anchor, c]:.3f}") for i, c in enumerate(nearest)]
    keep("cosine of the last neighbor", cosine[anchor, nearest[-1]])
    out = sorted(set(range(len(live.names))) - set(nearest.tolist()), key=lambda c: -cosine[anchor, c])
    rows.append(("not taken", live.names[out[0]], f"{cosine[anchor, out[0]]:.3f}"))
    return figure, table(rows, ("", f"nearest to '{live.names[anchor]}'", "cosine"))


def batches(live):
    """The batch of hard negatives as a b by K grid, beside as many random images."""
    b, k = live.args.anchors, live.args.top_k
    figure = plt.figure(figsize=(10.4, 4.1))
    sides = figure.subfigures(1, 2, wspace=0.02)
    for side, title, batch in zip(sides, ("hard negatives, an anchor per row", "at random"), (live.batch, live.random)):
        names = [live.names[label] for label in live.labels[batch]]
        value = keep(f"mean similarity of the batch, {title[:4]}", figures.mean_similarity(names))
        side.suptitle(f"{title}: mean cosine of the names in the batch {value:.2f}", fontsize=10)
        side.subplots_adjust(0.01, 0.01, 0.99, 0.83, 0.06, 0.55)
        for position, axis in enumerate(side.subplots(b, k).flat):
            image = live.task.read(live.task.base_train[batch[position]][0])
            anchor = batch is live.batch and position % k == 0
            figures.show_image(axis, image, names[position].replace(" ", "\n"), 6.5, 2.5 if anchor else 0)
    plt.close(figure)
    return figure


# Eqs. 5 and 6 ---------------------------------------------------------------------------------------------------------


def remapped(live):
    """The labels of the batch, its candidates, and the labels as positions in them."""
    classes, targets = candidates(live.targets)
    keep("candidates, H", len(classes))
    rows = [(i + 1, live.names[t], t, r) for i, (t, r) in enumerate(zip(live.targets.tolist(), targets.tolist()))][:10]
    text = f"H = {len(classes)} candidates, of b·K = {len(live.targets)} images and {len(live.names)} base classes."
    header = ("image", "class", "label in C<sub>b</sub>", "position in C̃′<sub>b</sub>")
    return table([*rows, ("…", "", "", "")], header), told(text)


def regularized(live):
    """Logits over C_b with the absent classes grayed out, both losses, and the gradient that each class's g gets."""
    classes, targets = candidates(live.targets)
    with torch.no_grad():
        f = live.learner.image_features(live.images)
        g_all = live.learner.text_features()
    losses, pushes = {}, {}
    for name, rows, wanted in (("over C_b", torch.arange(len(g_all)), live.targets), ("over C̃′_b", classes, targets)):
        g = g_all.clone().requires_grad_()
        logits = similarity_logits(f, g[rows], live.learner.logit_scale)
        loss = torch.nn.functional.cross_entropy(logits, wanted)
        loss.backward()
        losses[name], pushes[name] = keep(f"loss {name}", loss.item()), g.grad.norm(dim=-1)
    logits = similarity_logits(f, g_all, live.learner.logit_scale).numpy()
    figure, axes = plt.subplots(2, 1, figsize=(8.6, 5.2), layout="constrained", height_ratios=(2, 1))
    absent = np.setdiff1d(np.arange(len(g_all)), classes.numpy())
    shown = axes[0].imshow(logits, cmap="viridis", aspect="auto")
    for column in absent:
        axes[0].axvspan(column - 0.5, column + 0.5, color="0.85")
    axes[0].plot(live.targets, range(len(f)), "o", markersize=3, markerfacecolor="none", color="crimson")
    axes[0].set_ylabel("image of the batch")
    axes[0].set_xticks([])
    axes[0].set_title(
        f"logits; gray: classes absent from the batch; red: each image's own.  Loss over all {len(g_all)} classes "
        f"{losses['over C_b']:.3f}, over the {len(classes)} candidates {losses['over C̃′_b']:.3f}"
    )
    figure.colorbar(shown, ax=axes[0], label="⟨g, f⟩ / τ")
    x = np.arange(len(g_all))
    axes[1].bar(x - 0.2, pushes["over C_b"], 0.4, color=GRAY, label="loss over C_b")
    axes[1].bar(x + 0.2, pushes["over C̃′_b"], 0.4, color="black", label="loss over the candidates (Eq. 6)")
    axes[1].set_xticks(x, live.names, rotation=90, fontsize=5.5)
    axes[1].set_ylabel("gradient of g, norm")
    axes[1].legend(fontsize=7)
    plt.close(figure)
    return figure


# The base phase -------------------------------------------------------------------------------------------------------


def curves(live):
    """Loss, H and the prompt's distance from its start over the epochs of phase 1, with MAO and without."""
    figure, axes = plt.subplots(1, 3, figsize=(10, 2.5), layout="constrained")
    for method, style, label in (("mao", "ko-", "MAO"), ("backbone", "s--", "CoOp alone")):
        lines = [line for line in live.metrics[method] if line["phase"] == "base"]
        epochs = [line["epoch"] for line in lines]
        color = {} if method == "mao" else {"color": "0.6"}
        way = [(ctx - live.learner.ctx).norm().item() for ctx in live.prompts[method, "base"]]
        for axis, values in zip(axes, ([l["loss"] for l in lines], [l["candidates"] for l in lines], way)):  # noqa: E741
            axis.plot(epochs, values, style, markersize=3, label=label, **color)
        keep(f"last loss of {label}", lines[-1]["loss"])
    for axis, title in zip(axes, ("mean loss", "mean number of candidates, H", "‖P − P at the start‖")):
        axis.set_title(title)
        axis.set_xlabel("epoch of phase 1")
        axis.set_ylim(0)
    axes[0].legend(fontsize=8)
    plt.close(figure)
    return figure


def words(live):
    """The tokens nearest to each learned context vector: a table."""
    from clip.simple_tokenizer import SimpleTokenizer

    decoder, embedding = SimpleTokenizer().decoder, live.clip.token_embedding.weight
    ctx = live.states["mao"]["base"]["ctx"]
    used = clip.tokenize(
        "a of . photo picture drawing " + " ".join([*demo.COLORS, *demo.NEIGHBORS, *demo.SEEN])
    ).unique()
    used = used[1:-2]  # without padding, start and end: the tokens that the demo's CLIP was trained on
    rows = []
    for i, vector in enumerate(ctx):
        distance = (embedding[used] - vector).norm(dim=-1)
        nearest = [decoder[used[j].item()].replace("</w>", "") for j in distance.argsort()[:4]]
        rows.append((f"[θ]<sub>{i + 1}</sub>", ", ".join(nearest), f"{distance.min():.2f}", f"{vector.norm():.2f}"))
    return table(rows, ("vector", "nearest words", "distance", "its length"))


# Eq. 7 ----------------------------------------------------------------------------------------------------------------


def pseudo_labels(live):
    """Unlabeled images with Top-1, confidence and truth, the wrong ones framed; and accuracy against confidence."""
    task = live.task
    labeler = PseudoLabeler(ZeroShot(live.clip, live.new_names, task.label_template))
    size = live.clip.visual.input_resolution
    views = Images(task.new_train, task.new_read, train_transform(size, task.crop_scale))
    pixels = torch.stack([views[i, augmentation_seed(1, 2, 1, i)][0] for i in range(len(views))])
    labels, confidences = labeler(model_input(pixels))
    truth = torch.tensor(task.new_answers)  # only to be shown: training never reads it
    right = labels == truth
    whole = Images(task.new_train, task.new_read, test_transform(size))
    on_whole = labeler(model_input(torch.stack([whole[i][0] for i in range(len(whole))])))[0] == truth
    keep("pseudo-labels right, one view each", 100 * right.float().mean())
    keep("pseudo-labels right, whole images", 100 * on_whole.float().mean())
    figure = plt.figure(figsize=(10.4, 3.6), layout="constrained")
    left, side = figure.subfigures(1, 2, width_ratios=(2.1, 1))
    chosen = np.random.default_rng(1).permutation(len(views))[:18]
    for axis, i in zip(left.subplots(3, 6).flat, chosen):
        name = live.new_names[labels[i]] + ("" if right[i] else f"\nis {live.new_names[truth[i]]}")
        text = f"{name}\n{confidences[i]:.2f}"
        figures.show_image(axis, pixels[i].permute(1, 2, 0), text, 6.5, 0 if right[i] else 2.5)
    axis = side.subplots()
    edges = torch.linspace(0, 1, 11)
    for low, high in zip(edges[:-1], edges[1:]):
        inside = (confidences >= low) & (confidences < high + 1e-6)
        if inside.sum() > 4:
            axis.bar((low + high) / 2, right[inside].float().mean(), 0.09, color=GRAY, edgecolor="black", linewidth=0.5)
            axis.text((low + high) / 2, 0.02, int(inside.sum()), ha="center", fontsize=6)
    axis.plot([0, 1], [0, 1], "k--", linewidth=0.8)
    axis.set_xlabel("confidence; the number of images")
    axis.set_ylabel("share that is right")
    axis.set_title(f"right: {VALUES['pseudo-labels right, one view each']:.1f}% of views")
    plt.close(figure)
    return figure


# Eq. 8 and after ------------------------------------------------------------------------------------------------------


def predictions(live, method, after):
    """(predicted, true) classes of the new classes' test images, by the prompts of a row after a phase."""
    learner = BACKBONES["coop"](live.clip, live.new_names, **live.args.settings)
    learner.load_state_dict(live.states[method][after])
    _, found, truth = evaluate.top1(learner, live.tests.batches("new", learner), "cpu")
    return found, truth


def scores(live):
    """Base and New after each phase, beside the backbone's and zero-shot CLIP's: a table."""
    after_1 = evaluate.accuracy(None, *predictions(live, "mao", "base"))
    zero, plain, mao = (live.results[name] for name in ("zeroshot", "backbone", "mao"))
    rows = [
        ("zero-shot CLIP", zero["base"], zero["new"]),
        ("CoOp alone", plain["base"], plain["new"]),
        ("CoOp + MAO, prompts after phase 1", mao["base"], keep("New after phase 1", after_1)),
        ("CoOp + MAO, prompts after phase 2", mao["base_by_final_prompt"], keep("New after phase 2", mao["new"])),
    ]
    keep("Base after phase 1", mao["base"])
    cells = [(name, f"{base:.2f}", f"{new:.2f}") for name, base, new in rows]
    cells[2] = (cells[2][0], f"<b>{cells[2][1]}</b>", cells[2][2])
    cells[3] = (cells[3][0], cells[3][1], f"<b>{cells[3][2]}</b>")
    h = keep("harmonic mean of Base and New", mao["h"])
    text = f"The two bold scores are what the paper calls Base and New; their harmonic mean, H, is {h:.2f}."
    return table(cells, ("", "Base", "New")), told(text)


def confusion(live):
    """How often each new class is taken for each other, before and after phase 2."""
    figure, axes = plt.subplots(1, 2, figsize=(9.4, 4.3), layout="constrained")
    for axis, after, title in zip(axes, ("base", "new"), ("after phase 1", "after phase 2")):
        found, truth = predictions(live, "mao", after)
        count = len(live.new_names)
        figures.show_confusion(axis, truth, found, count, title)
        axis.set_xticks(range(0, count, 5), live.new_names[::5], rotation=90, fontsize=6)
        axis.set_yticks(range(0, count, 5), live.new_names[::5], fontsize=6)
    axes[0].set_ylabel("the class shown")
    axes[1].set_xlabel("the class predicted")
    plt.close(figure)
    return figure


# Appendix A -----------------------------------------------------------------------------------------------------------


def meetings(live):
    """How often two base classes meet in one batch over phase 1, with hard negatives and at random."""
    figure, axes = plt.subplots(1, 2, figsize=(9.4, 4.3), layout="constrained")
    count, size = len(live.names), len(live.batch)
    samplers = (live.sampler, ShuffledBatches(len(live.labels), size, seed=1))
    for axis, sampler, title in zip(axes, samplers, ("hard negatives", "at random")):
        together, total = np.zeros((count, count)), 0
        for epoch in range(1, settings.RECIPES["mao"].epochs + 1):
            sampler.set_epoch(epoch)
            for batch in sampler:
                present = np.unique(live.labels[batch])
                together[np.ix_(present, present)] += 1
                total += 1
        share = together / total
        shown = axis.imshow(share, cmap="Greys", vmin=0, vmax=1)
        off = share[~np.eye(count, dtype=bool)]
        keep(f"spread of meetings, {title}", off.std())
        axis.set_title(f"{title}: two classes meet in {off.mean():.2f} ± {off.std():.2f} of batches")
        axis.set_xticks(range(0, count, 5), live.names[::5], rotation=90, fontsize=6)
        axis.set_yticks(range(0, count, 5), live.names[::5], fontsize=6)
    figure.colorbar(shown, ax=axes, label="share of batches with both")
    plt.close(figure)
    return figure
