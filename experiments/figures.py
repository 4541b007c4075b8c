"""The figures of README.md and docs/, of the paper, and of a run.

    python -m experiments.figures batch             assets/batch.png: one batch of hard negatives beside a random one
    python -m experiments.figures demo              assets/demo.png: what the demo's CLIP was pretrained on, the domains

experiments/reproduce.py draws the paper's Figs. 3 to 6, training curves and confusion by what stands here, and
`run.py --plot` the last two. Every draw has a fixed seed: the same command makes the same figure. One style: gray
tones, markers and hatches, so that print without color loses nothing.
"""

if __name__ == "__main__":
    from cli import catch_early_interrupt

    catch_early_interrupt()  # the imports below take seconds

import argparse
import itertools
import pathlib
import textwrap

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch

import demo
import evaluate
import settings
from checkpoints import load_clip_of
from data import task_of
from encoders import ZeroShot
from images import ShuffledBatches
from record import make_folder, read_config, read_metrics, read_prompts
from sampler import HardNegativeSampler, minilm, paper_batch

DOMAIN = "plain"  # of the README's batch: under plain light a reader sees the colors that the names say
TWO_DATASETS = {"paper": ["caltech101", "oxford_pets"], "demo": ["demo-plain", "demo-sepia"]}  # of Figs. 5 and 6
STYLE = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "savefig.facecolor": "white",
         "figure.dpi": 110, "figure.constrained_layout.use": True}  # fmt: skip
MARKERS, TONES, HATCHES = "osD^v", ["0.15", "0.55", "0.8"], ["", "//", "xx", ".."]


def save(figure, path):
    """Writes a figure as PNG, and forgets it."""
    make_folder(path.parent)
    figure.savefig(path)
    plt.close(figure)


def canvas(columns, caption, width=9.0, height=3.6, rows=1):
    """(figure, axes [rows * columns]) in the one style; the caption under it says the settings."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(rows, columns, figsize=(width, height), squeeze=False)
    figure.supxlabel("\n".join(textwrap.wrap(caption, int(width * 13))), fontsize=8, color="0.3")
    return figure, list(axes.flat)


# Batches: Figs. 5 and 6 -----------------------------------------------------------------------------------------------


class Batches:
    """The first batch of MAO's base phase on a dataset, and the first one without MAO, seed 1.

    hard, random: positions in task.base_train, b*K of each. b, k: of the dataset (appendix B).
    """

    def __init__(self, dataset, root=None):
        options = ["--dataset", dataset, *(["--root", root] if root else [])]
        self.task = task_of(vars(settings.parse(options)))
        self.labels = np.array([label for _, label, _ in self.task.base_train])
        self.b, self.k = paper_batch(len(self.task.base_names))
        self.hard = next(iter(HardNegativeSampler(self.labels, self.task.base_names, self.b, self.k)))
        self.random = next(iter(ShuffledBatches(len(self.labels), self.b * self.k, seed=1)))

    def names(self, batch):
        return [self.task.base_names[label] for label in self.labels[batch]]


def batch_of_images(dataset, root=None):
    """Fig. 6: images and names of a batch, b rows of K, the anchor first; beside it a random batch."""
    batches = Batches(dataset, root)
    task, b, k = batches.task, batches.b, batches.k
    figure = plt.figure(figsize=(18, 2.1 * b), dpi=100)
    sides = figure.subfigures(1, 2, wspace=0.03)
    titles = ("hard negatives, one row per anchor", "a random batch")
    for side, title, batch in zip(sides, titles, (batches.hard, batches.random)):
        names = batches.names(batch)
        rows = [mean_similarity(names[start : start + k]) for start in range(0, b * k, k)]
        side.suptitle(
            f"{title}\nmean cosine similarity of the names\n"
            f"in a row {np.mean(rows):.2f}, in the batch {mean_similarity(names):.2f}",
            fontsize=20,
        )
        side.subplots_adjust(0.01, 0.01, 0.99, 1 - 0.84 / b, 0.08, 0.5)
        for position, axis in enumerate(np.atleast_1d(side.subplots(b, k)).flat):
            image, size = task.read(task.base_train[batch[position]][0]), 16 if len(names[position]) < 20 else 9
            anchor = batch is batches.hard and position % k == 0
            show_image(axis, image, names[position].replace(" ", "\n"), size, 5 if anchor else 0)
    return figure


def show_image(axis, image, title, size, frame):
    """An image and what is written above it. size: of the letters. frame: the width of a red frame; 0: none."""
    axis.imshow(image)
    axis.set_title(title, fontsize=size, pad=max(2, size / 4))
    axis.set(xticks=[], yticks=[])
    for spine in axis.spines.values():
        spine.set(visible=frame > 0, color="crimson", linewidth=frame)


def mean_similarity(names):
    """The mean cosine similarity of two different names in a list, by MiniLM; 1 where there is one name only."""
    names = sorted(set(names))
    e = torch.nn.functional.normalize(minilm(names), dim=-1)  # [names, 384]
    cosine = e @ e.T
    return cosine[~torch.eye(len(names), dtype=torch.bool)].mean().item() if len(names) > 1 else 1.0


def batch_in_plane(dataset, root=None):
    """Fig. 5: the classes of a random and of a hard-negative batch, their name embeddings in the plane by PCA.

    MiniLM in place of the paper's Word2Vec. The plane is of all base classes, so that both panels have the same axes.
    """
    batches = Batches(dataset, root)
    names = batches.task.base_names
    e = torch.nn.functional.normalize(minilm(names), dim=-1).double()  # [C_b, 384]
    centered = e - e.mean(dim=0)
    *_, axes_of_pca = torch.linalg.svd(centered, full_matrices=False)
    plane = (centered @ axes_of_pca[:2].T).numpy()  # [C_b, 2]
    caption = (
        f"{dataset}, seed 1, b = {batches.b}, K = {batches.k}: MiniLM embeddings of the names in the plane of their "
        f"first two principal components, over all {len(names)} base classes (gray). Distances are in 384 dimensions."
    )
    figure, axes = canvas(2, caption, 11, 5)
    for axis, title, batch in zip(axes, ("(a) random batch", "(b) hard negatives"), (batches.random, batches.hard)):
        classes = sorted(set(batches.labels[batch].tolist()))
        rows = [batches.labels[batch[i : i + batches.k]].tolist() for i in range(0, len(batch), batches.k)]
        in_row, in_batch = (np.mean([mean_distance(e, part) for part in parts]) for parts in (rows, [classes]))
        axis.plot(*plane.T, "o", color="0.85", markersize=4)
        axis.plot(*plane[classes].T, "o", color="0.15", markersize=5)
        axis.set_title(
            f"{title}, {len(classes)} classes\n"
            f"mean pairwise distance: {in_batch:.2f}, within {batches.k} in a row {in_row:.2f}",
            fontsize=10,
        )
        axis.set_xticks([])
        axis.set_yticks([])
        write_names(axis, plane[classes], [names[label] for label in classes])
    return figure


def mean_distance(e, classes):
    """The mean distance of two different classes of a list. e: embeddings [C_b, 384]."""
    classes = sorted(set(classes))
    return torch.nn.functional.pdist(e[classes]).mean().item() if len(classes) > 1 else 0.0


def write_names(axis, points, names):
    """Writes a name beside each point [N, 2], at the first of eight places where it lies on no other name."""
    axis.margins(0.12, 0.05)
    axis.figure.canvas.draw()  # settles where the axes are
    taken = []
    for point, name in sorted(zip(points.tolist(), names)):
        for x, y in ((4, 3), (4, -9), (-4, 3), (-4, -9), (4, 13), (4, -19), (-4, 13), (-4, -19)):
            text = axis.annotate(name, point, fontsize=7, xytext=(x, y), textcoords="offset points",
                                 ha="left" if x > 0 else "right")  # fmt: skip
            box = text.get_window_extent()
            if not any(box.overlaps(other) for other in taken):
                break
            text.remove()
        else:
            text = axis.annotate(name, point, fontsize=7)
        taken.append(text.get_window_extent())


# Of many cells: Figs. 3 and 4 -----------------------------------------------------------------------------------------


def bars(lines, caption):
    """Fig. 3: average H of each row, with its spread. lines: of experiments/reproduce.py."""
    found = [line for line in lines if line["score"] == "H" and line["dataset"] == lines[0]["dataset"]]
    figure, (axis,) = canvas(1, f"H over {caption}. DePT is here on CoOp alone.", 9, 3.8)
    hatch = {"MAO": "//", "DePT": ".."}
    for place, line in enumerate(found):
        kind = next((name for name in hatch if name in line["row"]), "")
        bar = axis.bar(place, line["ours"], 0.7, yerr=line["spread"], capsize=4, color=TONES[2] if kind else TONES[1],
                       edgecolor="black", hatch=hatch.get(kind, ""))  # fmt: skip
        axis.bar_label(bar, fmt="%.1f", padding=3)
    axis.set_xticks(range(len(found)), [line["row"].replace(" + ", "\n+ ") for line in found])
    axis.set_ylabel("H, %")
    axis.set_ylim(0, 100)
    return figure


def sweep(name, lines, caption):
    """Fig. 4: accuracy and cost over K ("fig4-left") or over unlabeled images a class ("fig4-right")."""
    left = name == "fig4-left"
    panels = [("Base", "H-size") if left else ("H", "New"), ("seconds", "memory, MiB")]
    words = {"Base": "Base, %", "H": "H, %", "New": "New, %", "H-size": "candidates H of a batch",
             "seconds": "seconds of tuning", "memory, MiB": "peak memory, MiB"}  # fmt: skip
    figure, axes = canvas(2, f"CoOp + MAO{', base phase alone' if left else ''}; {caption}", 10, 3.8)
    for axis, pair in zip(axes, panels):
        for number, score in enumerate(pair):
            found = [one for one in lines if one["score"] == score and one["dataset"] == lines[0]["dataset"]]
            x, y = [int(one["row"]) for one in found], [one["ours"] for one in found]
            on = axis if number == 0 or pair == ("H", "New") else axis.twinx()
            on.errorbar(x, y, [one["spread"] or 0 for one in found], marker=MARKERS[number], color=TONES[number],
                        linestyle=["-", "--"][number], capsize=3, label=words[score])  # fmt: skip
            on.set_ylabel("%" if pair == ("H", "New") else words[score])
            if on is not axis:
                on.spines["right"].set_visible(True)
            if not left:
                on.set_xscale("log", base=2)
                on.set_xticks(x, x)
        axis.set_xlabel("K" if left else "unlabeled images a class")
        axis.legend(*legend_of(figure, axis), ncols=2, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1))
    return figure


def legend_of(figure, axis):
    """(handles, labels) of an axis and of its twin."""
    twins = [other for other in figure.axes if other.bbox.bounds == axis.bbox.bounds]
    pairs = [other.get_legend_handles_labels() for other in twins]
    return [list(itertools.chain(*part)) for part in zip(*pairs)]


# Of one run -----------------------------------------------------------------------------------------------------------


def curves(folders):
    """Loss over the epochs of both phases, and the share of right pseudo-labels. folders: of rows, one line each."""
    folders = [pathlib.Path(folder) for folder in folders]
    caption = (
        f"{', '.join(folder.name for folder in folders)}: each epoch's mean loss. MAO's runs over fewer "
        "candidates than the plain one. Dotted: the new phase begins."
    )
    figure, axes = canvas(2, caption, 10, 3.6)
    for number, folder in enumerate(folders):
        metrics, style = read_metrics(folder), {"color": TONES[number % 3], "marker": MARKERS[number % 5]}
        label = {"mao": "with MAO", "backbone": "without MAO"}[read_config(folder)["method"]]
        loss = [line["loss"] for line in metrics]
        axes[0].plot(range(1, len(loss) + 1), loss, markersize=4, label=label, **style)
        first = sum(line["phase"] == "base" for line in metrics)
        right = [line["pseudo_label_accuracy"] for line in metrics if "pseudo_label_accuracy" in line]
        if first < len(metrics):
            axes[0].axvline(first + 0.5, color="0.6", linestyle=":")
        if right:
            axes[1].plot(range(first + 1, first + 1 + len(right)), right, markersize=4, label=label, **style)
    for axis in axes:
        axis.xaxis.get_major_locator().set_params(integer=True)
    axes[0].set(xlabel="epoch", ylabel="loss", ylim=(0, None))
    axes[1].set(xlabel="epoch", ylabel="pseudo-labels right, %", ylim=(0, 100))
    axes[0].legend()
    if not axes[1].lines:
        axes[1].text(0.5, 0.5, "no pseudo-labels", ha="center", transform=axes[1].transAxes)
    return figure


def confusion(folders):
    """Confusion of base and of new classes before tuning (zero-shot CLIP) and after it. folders: the last is drawn."""
    folder = pathlib.Path(folders[-1])
    config = read_config(folder)
    task = task_of(config)
    clip_model, sha256 = load_clip_of(config, "cpu")
    zero_shot = ZeroShot(clip_model, task.base_names)
    tests = evaluate.Tests(task, zero_shot, "cpu", config.get("workers", 0))
    learner, states = zero_shot, None
    if config["method"] != "zeroshot":
        learner = evaluate.build_learner(config, clip_model, task.base_names, folder / "config.json")
        states = {"base": read_prompts(folder / "base.safetensors", config["backbone"], sha256)}
        last = folder / "new.safetensors"
        states["new"] = read_prompts(last, config["backbone"], sha256) if last.is_file() else states["base"]
    halves = list(task.tests)[:2] if "base" in task.tests else list(task.tests)[:1]
    figure, axes = canvas(
        2, f"{folder.name}: rows are the true classes, darker is more often, 0 to 100% of a row", 8, 4 * len(halves),
        rows=len(halves),
    )  # fmt: skip
    for number, half in enumerate(halves):
        for column, (who, of, when) in enumerate((("before", zero_shot, None), ("after", learner, states))):
            evaluate.hold(of, when, half if half == "new" else "base", task.tests[half])
            _, classes, labels = evaluate.top1(of, tests.batches(half, of), "cpu")
            axis = axes[2 * number + column]
            show_confusion(axis, labels, classes, len(task.tests[half].names), f"{half} classes, {who}")
            axis.set(xlabel="predicted class", ylabel="true class", xticks=[], yticks=[])
    return figure


def show_confusion(axis, labels, classes, count, title):
    """How often each of `count` true classes is taken for each. labels, classes: true and predicted, int64 [N]."""
    table = torch.zeros(count, count).index_put_((labels, classes), torch.ones(len(labels)), accumulate=True)
    axis.imshow(table / table.sum(dim=1, keepdim=True).clamp_min(1), cmap="gray_r", vmin=0, vmax=1)
    axis.set_title(f"{title}: {100 * (classes == labels).float().mean().item():.1f}% right")


def plot(folder):
    """What `run.py --plot` leaves in a row's folder: curves.png, where it was tuned, and confusion.png."""
    if read_metrics(folder):
        save(curves([folder]), folder / "curves.png")
    save(confusion([folder]), folder / "confusion.png")


# Of the README --------------------------------------------------------------------------------------------------------


def demo_figure():
    """Images of pretraining with their captions, and the eleven domains with the same classes in each."""
    from experiments.pretrain import caption

    rng = np.random.default_rng(0)
    figure = plt.figure(figsize=(15, 7), dpi=80)
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1.3))

    left.suptitle("pretraining: images and their captions")
    left.subplots_adjust(0.02, 0.02, 0.98, 0.88, 0.1, 0.5)
    for axis in left.subplots(5, 4).flat:
        name, light = rng.choice(demo.CLASSNAMES), rng.choice(demo.SEEN)
        axis.imshow(demo.draw(name, light, rng))
        axis.set_title(caption(name, light, rng).replace(" of ", "\nof "), fontsize=8)
        axis.axis("off")

    right.suptitle("the eleven few-shot domains (pretraining never saw the last five)")
    right.subplots_adjust(0.14, 0.02, 0.99, 0.93, 0, 0.08)
    names = demo.CLASSNAMES[3::8]
    for row, domain in zip(right.subplots(len(demo.LIGHTS), 1), demo.LIGHTS):
        images = [np.asarray(demo.read(f"{domain}/test/{name}/00")) for name in names]
        row.imshow(np.concatenate(images, 1))
        label = f"{domain} = demo" if domain == demo.DEFAULT else domain
        row.set_ylabel(label, rotation=0, ha="right", va="center")
        row.set_xticks([])
        row.set_yticks([])
    return figure


FIGURES = {"batch": lambda: batch_of_images(f"demo-{DOMAIN}"), "demo": demo_figure}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figure", choices=list(FIGURES))
    parser.add_argument("--out", metavar="FILE", help="PNG file (default: assets/<figure>.png)")
    args = parser.parse_args()
    save(FIGURES[args.figure](), pathlib.Path(args.out or f"assets/{args.figure}.png"))


if __name__ == "__main__":
    main()
