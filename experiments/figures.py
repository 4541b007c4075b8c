"""The figures of README.md and docs/, those of the paper, and those of a run.

    python -m experiments.figures method            assets/method.png: the two phases of MAO
    python -m experiments.figures batch             assets/batch.png: one batch of hard negatives beside a random one
    python -m experiments.figures demo              assets/demo.png: what the demo's CLIP was pretrained on, the domains
    python -m experiments.figures run FOLDER ...    curves.png of all these runs beside the first one's folder, and
                                                    confusion.png and confusion.csv in each

experiments/reproduce.py draws the paper's Figs. 3 to 6, training curves and confusion by these functions. Each returns
a matplotlib Figure. None of them sets a backend or touches pyplot, so a notebook can import this file. Every draw has a
fixed seed: the same command makes the same figure. Line styles, markers and hatches survive a print without color.
"""

import collections
import csv
import io
import itertools
import pathlib
import sys

if __name__ == "__main__":
    sys.path[0] = str(pathlib.Path(__file__).parents[1])  # as a file, too, it imports from the project's folder

import textwrap

import numpy as np
import torch
from msgspec.structs import asdict

from backbones import ZeroShot
from data import open_task
from experiments.pretrain import caption
from harness import demo, options, runs, scores
from harness.cli import run_main
from harness.clips import load_clip_of
from harness.files import atomic_write, make_folder
from harness.images import ShuffledBatches
from predict import no_formula
from run import LEARNERS
from sampler import HardNegativeSampler, minilm

MARKERS, STYLES = "sD^vo", ["-", "--", "-.", ":"]


def new_figure(width, height, dpi=110, layout="constrained"):
    """An empty Figure; its size is in inches. ValueError: matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("figures need matplotlib, which is not installed: pip install matplotlib") from error
    return Figure(figsize=(width, height), dpi=dpi, layout=layout)


def canvas(columns, below, width=9.0, height=3.6, rows=1):
    """(figure, axes [rows * columns]) in the style of this file; the text `below` says the settings."""
    figure = new_figure(width, height)
    figure.supxlabel("\n".join(textwrap.wrap(below, int(width * 13))), fontsize=8, color="0.3")
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def save(figure, path):
    """Writes a figure as PNG, and makes its folder. Returns its path."""
    make_folder(pathlib.Path(path).parent)
    figure.savefig(path, facecolor="white")
    return path


# The method -----------------------------------------------------------------------------------------------------------

DATA, FROZEN, LEARNED, LOSS = "#f2f2f2", "#cfe0f1", "#f7d8a8", "#ffffff"  # fills of boxes
STEPS = {  # of a phase, from left to right: (text of a box, its fill)
    "Base phase\nsection 3.2": [
        ("16 images\nper base class,\nwith labels", DATA),
        ("hard negatives: each\nimage brings the K - 1\nclasses with the most\nsimilar names (Eq. 4)", DATA),
        ("prompts (learned)\nin CLIP (frozen)", LEARNED),
        ("cross-entropy over\nthe batch's classes\n(reg-B, Eq. 6)", LOSS),
    ],
    "New phase\nsection 3.3": [
        ("16 images\nper new class,\nwithout labels", DATA),
        ("zero-shot CLIP (frozen):\nits Top-1 is the label\n(Eq. 7)", FROZEN),
        ("the same prompts,\ntuned further,\nin CLIP (frozen)", LEARNED),
        ("cross-entropy over\nall new classes\n(reg-N, Eq. 8)", LOSS),
    ],
}
RESULTS = ["prompts after phase 1\nscore the base classes:\nBase", "prompts after phase 2\nscore the new classes:\nNew"]


def method_figure():
    """The two phases: images and their labels, what is learned, the classes that the loss runs over, what scores."""
    from matplotlib.patches import FancyBboxPatch as patch

    figure = new_figure(11, 3.3, layout=None)
    axis = figure.add_axes((0, 0, 1, 1), xlim=(0, 13), ylim=(0.45, 3.75), frame_on=False, xticks=[], yticks=[])
    arrow = {"arrowstyle": "-|>", "color": "0.2", "shrinkA": 0, "shrinkB": 0}
    style = {"boxstyle": "round,pad=0.02", "edgecolor": "0.2", "zorder": 2}
    lefts, widths, height = (1.45, 3.4, 6.15, 8.5, 10.85), (1.6, 2.4, 2.0, 2.0, 2.1), 1.15
    centers = [left + width / 2 for left, width in zip(lefts, widths)]
    for bottom, (phase, steps), result in zip((2.5, 0.65), STEPS.items(), RESULTS):
        middle = bottom + height / 2
        axis.text(0.1, middle, phase, va="center", fontsize=11, fontweight="bold")
        for column, (text, fill) in enumerate([*steps, (result, LEARNED)]):
            axis.add_patch(patch((lefts[column], bottom), widths[column], height, facecolor=fill, **style))
            axis.text(centers[column], middle, text, ha="center", va="center", fontsize=10, zorder=3)
            if column:
                start = lefts[column - 1] + widths[column - 1], middle
                axis.annotate("", (lefts[column], middle), start, arrowprops=arrow)
    axis.annotate("", (centers[2], 1.82), (centers[2], 2.48), arrowprops=arrow)
    axis.text(centers[2] - 0.1, 2.15, "the new phase starts from these prompts", ha="right", va="center", fontsize=10)
    axis.text(centers[4], 2.15, "H: harmonic mean", ha="center", va="center", fontsize=10)
    return figure


# Batches: Figs. 5 and 6 -----------------------------------------------------------------------------------------------


class Batches:
    """The first batch of MAO's base phase on a dataset, and a random batch of the same size, seed 1.

    hard, random: positions in task.base_train, b rows of K. b, k: of the dataset (appendix B). labels: of all images.
    """

    def __init__(self, dataset, root=None):
        self.task = open_task(options.Settings(dataset=dataset, root=root))
        self.labels = np.array([label for _, label, _ in self.task.base_train])
        self.b, self.k = options.paper_batch(len(self.task.base_names))
        self.hard = next(iter(HardNegativeSampler(self.labels, self.task.base_names, self.b, self.k)))
        self.random = next(iter(ShuffledBatches(len(self.labels), self.b * self.k, seed=1)))


def batch_of_images(dataset, root=None):
    """Fig. 6: images and names of a batch in b rows of K, the anchor first; beside it a random batch."""
    batches = Batches(dataset, root)
    task, b, k = batches.task, batches.b, batches.k
    figure = new_figure(18, 2.1 * b, dpi=100, layout=None)
    sides = figure.subfigures(1, 2, wspace=0.03)
    titles = ("hard negatives, one row per anchor", "a random batch")
    for side, title, batch in zip(sides, titles, (batches.hard, batches.random)):
        rows = [[task.base_names[label] for label in row] for row in batches.labels[batch].reshape(b, k)]
        names = sum(rows, [])
        in_row, in_batch = np.mean([mean_similarity(row) for row in rows]), mean_similarity(names)
        told = f"mean cosine similarity of names: {in_row:.2f} in a row, {in_batch:.2f} in the batch"
        side.suptitle(f"{title}\n{told}", fontsize=18)
        side.subplots_adjust(0.01, 0.24 / b, 0.99, 1 - 0.72 / b, 0.08, 0.5)
        for position, axis in enumerate(side.subplots(b, k, squeeze=False).flat):
            image, size = task.read(task.base_train[batch[position]][0]), 16 if len(names[position]) < 20 else 9
            anchor = batch is batches.hard and position % k == 0
            show_image(axis, image, names[position].replace(" ", "\n"), size, 5 if anchor else 0)
    figure.text(0.005, 0.05 / b, "red frame: the anchor, whose K - 1 hard negatives follow in its row", fontsize=18)
    return figure


def show_image(axis, image, title, size, frame):
    """Shows an image with a title. size: of the letters. frame: the width of a red frame; 0: none."""
    axis.imshow(image)
    axis.set_title(title, fontsize=size, pad=max(2, size / 4))
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set(visible=frame > 0, color="crimson", linewidth=frame)


def embeddings(names):
    """MiniLM's embeddings of N names, unit length [N, 384]."""
    return torch.nn.functional.normalize(minilm(list(names)), dim=-1).double()


def mean_similarity(names):
    """The mean cosine similarity of two different names in a list, by MiniLM; 1 where there is one name only."""
    e = embeddings(sorted(set(names)))
    cosine = e @ e.T
    return cosine[~torch.eye(len(e), dtype=torch.bool)].mean().item() if len(e) > 1 else 1.0


def batch_in_plane(dataset, root=None):
    """Fig. 5: the classes of a random and of a hard-negative batch, their name embeddings in the plane by PCA.

    MiniLM replaces the paper's Word2Vec. The plane is that of all base classes, so both panels have the same axes.
    """
    batches = Batches(dataset, root)
    names, b, k = np.array(batches.task.base_names), batches.b, batches.k
    e = embeddings(names)  # [C_b, 384]
    plane = (e @ torch.linalg.svd(e - e.mean(dim=0), full_matrices=False).Vh[:2].T).numpy()  # [C_b, 2]
    below = f"{dataset}, seed 1. Gray: all base classes. Colored: the anchors, with lines to their hard negatives."
    figure, axes = canvas(2, below, 11, 5.5)
    for axis in axes:
        axis.set(xticks=[], yticks=[])
    titles = f"(a) random batch of {b * k} images", f"(b) hard negatives of {b} anchors"
    for axis, title, batch in zip(axes, titles, (batches.random, batches.hard)):
        rows = batches.labels[batch].reshape(b, k).tolist()
        classes = sorted(set(sum(rows, [])))
        in_row = np.mean([mean_similarity(names[row]) for row in rows])
        told = f"mean similarity: {in_row:.2f} in a row of {k}, {mean_similarity(names[classes]):.2f} in the batch"
        axis.set_title(f"{title}, {len(classes)} classes\n{told}", fontsize=10)
        axis.plot(*plane.T, "o", color="0.85", markersize=4)
        axis.plot(*plane[classes].T, "o", color="0.3", markersize=5)
        for number, (anchor, *neighbors) in enumerate(rows if batch is batches.hard else []):
            there_and_back = plane[[place for neighbor in neighbors for place in (anchor, neighbor)]]
            axis.plot(*there_and_back.T, STYLES[number % 4], color=f"C{number}", linewidth=1.2, zorder=1)
            axis.plot(*plane[anchor], MARKERS[number % 5], color=f"C{number}", markersize=9)
        write_names(axis, plane[classes], names[classes])
    return figure


def write_names(axis, points, names):
    """Writes a name near each point [N, 2], at the nearest place where it covers no point, no name and no border."""
    axis.margins(0.17, 0.05)
    axis.figure.draw_without_rendering()  # settles where the axes are
    taken = [axis.bbox.frozen().from_bounds(x - 6, y - 6, 12, 12) for x, y in axis.transData.transform(points)]
    sides = (1, 0), (-1, 0), (1, 1), (-1, 1), (1, -1), (-1, -1), (0, 1), (0, -1)
    how = {"textcoords": "offset pixels", "ha": "center", "va": "center", "fontsize": 9}
    how["arrowprops"] = {"arrowstyle": "-", "color": "0.5", "linewidth": 0.6, "shrinkA": 0}
    how["bbox"] = {"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 0}
    for point, name in sorted(zip(points.tolist(), names)):
        written = axis.annotate(name, point, (0, 0), **how)
        box = written.get_window_extent()
        shifts = [(x * (box.width / 2 + far), y * (box.height / 2 + far)) for far in (8, 16, 28, 44) for x, y in sides]
        boxes = [box.translated(*shift) for shift in shifts]
        covered = [one.count_overlaps(taken) + 4 - axis.bbox.count_contains(one.corners()) for one in boxes]
        best = covered.index(min(covered))
        written.xyann = shifts[best]
        written.arrow_patch.set_visible(best >= len(sides))
        taken.append(boxes[best].padded(3))


# Many cells: Figs. 3 and 4 --------------------------------------------------------------------------------------------


def bars(lines, settings):
    """Fig. 3: average H of each row, with its spread. lines: those of experiments/reproduce.py with the score H.

    settings: the text under the figure.
    """
    figure, (axis,) = canvas(1, f"H over {settings}. DePT is implemented on CoOp alone.", 9, 3.8)
    for place, line in enumerate(lines):
        color, hatch = ("C1", "//") if "MAO" in line["row"] else ("C2", "..") if "DePT" in line["row"] else ("C0", "")
        bar = axis.bar(place, line["ours"], yerr=line["spread"], capsize=4, color=color, hatch=hatch, edgecolor="black")
        axis.bar_label(bar, fmt="%.1f", padding=3)
    axis.set_xticks(range(len(lines)), [line["row"].replace(" + ", "\n+ ") for line in lines])
    axis.set(ylabel="H, %", ylim=(0, 100))
    return figure


def panels(lines, scores, xlabel, settings):
    """Fig. 4: one panel per score over a number. lines: of experiments/reproduce.py; their "row" is the number.

    settings: the text under the figure.
    """
    figure, axes = canvas(len(scores), settings, 3 * len(scores), 3)
    for axis, score in zip(axes, scores):
        found = [line for line in lines if line["score"] == score]
        x, y = [int(line["row"]) for line in found], [line["ours"] for line in found]
        axis.errorbar(x, y, [line["spread"] or 0 for line in found], color="black", marker="o", capsize=3)
        axis.set(xlabel=xlabel, title=score)
        axis.set_xscale("log", base=2)
        axis.set_xticks(x, x)
    return figure


# One run --------------------------------------------------------------------------------------------------------------


def curves(folders):
    """The mean loss over the epochs of all rows in one figure, and the share of right pseudo-labels.

    Each phase has a panel per set of candidates: losses over different ones cannot be compared. The new phase is gray.
    Markers of different sizes show rows that coincide. folders: of tuned rows, `Path`s.
    """
    panels, drawn = {}, {}  # {title: {number of the row: [(epoch, value)]}}, {number: its lines}
    for number, folder in enumerate(folders):
        config = runs.read_config(folder)
        base, new = len(config.classnames), len(config.new_classnames)
        losses = {"base": f"mean loss over\nall {base} base classes", "new": f"mean loss over\nall {new} new classes"}
        if config.method == "mao" and not (config.no_base or config.no_reg_base):
            losses["base"] = f"mean loss over\nthe batch's classes, b = {config.anchors}, K = {config.top_k}"
        if config.no_reg_new:
            losses["new"] = f"mean loss over\nall {base} base and {new} new classes"
        for line in runs.read_metrics(folder):
            titles = {"loss": losses[line["phase"]], "pseudo_label_accuracy": "right pseudo-labels\nin percent"}
            for key in titles.keys() & line.keys() if line["candidates"] else ():  # 0: all steps were left out
                lines = panels.setdefault(f"{line['phase']} phase\n{titles[key]}", {})
                lines.setdefault(number, []).append((line["epoch"], line[key]))
    figure, axes = canvas(len(panels), "", 3.4 * len(panels), 3.8 + 0.2 * len(folders))
    for axis, (title, lines) in zip(axes, sorted(panels.items())):
        for number, points in lines.items():
            style = {"color": f"C{number}", "fillstyle": "none", "markersize": 3 + 5 * 0.8**number}
            drawn[number] = axis.plot(*zip(*points), MARKERS[number % 5] + STYLES[number % 4], **style)[0]
        axis.set(title=title, xlabel="epoch", ylim=(0, 100 if "percent" in title else None))
        axis.set_facecolor("white" if title.startswith("base") else "0.94")
        axis.xaxis.get_major_locator().set_params(integer=True)
    figure.legend([drawn[i] for i in sorted(drawn)], [folder.name for folder in folders], loc="outside upper center")
    return figure


def load_row(folder, device="cpu"):
    """(config, frozen CLIP, learner, its state dicts {"base", "new"}, None for zero-shot CLIP) of a finished row.

    folder: a `pathlib.Path`. ValueError, FileNotFoundError: its files are missing or broken, or its CLIP is.
    """
    config = runs.read_config(folder)
    clip_model, sha256 = load_clip_of(asdict(config), device)
    if config.method == "zeroshot":
        return config, clip_model, ZeroShot(clip_model, config.classnames), None
    return config, clip_model, *runs.read_learner(folder, config, LEARNERS, clip_model, sha256)


def confusion(folder):
    """Confusion of base and new classes by zero-shot CLIP, and by the tuned prompts of a row's folder, a `Path`.

    Returns the Figure and the same as rows of a table, the head first: how many images of each class are predicted as
    each, where there are any.
    """
    config, clip_model, learner, states = load_row(folder)
    task = open_task(config, runs.read_lists(folder))
    runs.check_data(folder, config, task)
    zero_shot = ZeroShot(clip_model, task.base_names)
    tests = scores.TestImages(task, zero_shot, "cpu", config.workers or 0)
    sets = list(task.tests)[: 2 if "base" in task.tests else 1]  # of cross-dataset, the source
    columns = [("zero-shot CLIP", zero_shot, None), ("tuned prompts", learner, states)][: 2 if states else 1]
    figure, axes = canvas(len(columns), folder.name, 4.3 * len(columns), 4 * len(sets), rows=len(sets))
    rows = [("half", "prompts", "true class", "predicted class", "images")]
    for axis, (name, (when, who, of_phases)) in zip(axes, itertools.product(sets, columns)):
        scores.load_prompts_for(who, of_phases, "new" if name == "new" else "base", task.tests[name])
        _, classes, labels, _ = scores.top1(who, tests.batches(name, who))
        names = task.tests[name].names
        counts = sorted(collections.Counter(zip(labels.tolist(), classes.tolist())).items())
        rows += [(name, when, names[label], names[found], count) for (label, found), count in counts]
        shown = show_confusion(axis, labels, classes, names, f"{name} classes, {when}")
        axis.set(xlabel="predicted class", ylabel="true class")
    figure.colorbar(shown, ax=axes, label="% of the true class's images", shrink=0.6)
    return figure, rows


def show_confusion(axis, labels, classes, names, title):
    """Shows how often each class is predicted as each, in percent of a true class. Returns the image, for a color bar.

    labels, classes: true and predicted, int64 [N]. names: of all classes.
    """
    table = torch.zeros(len(names), len(names)).index_put_((labels, classes), torch.tensor(1.0), accumulate=True)
    shown = axis.imshow(100 * table / table.sum(dim=1, keepdim=True).clamp_min(1), cmap="Blues", vmin=0, vmax=100)
    axis.set_title(f"{title}: {100 * (classes == labels).float().mean().item():.1f}% right", fontsize=10)
    name_axes(axis, names)
    return shown


def name_axes(axis, names, which="both"):
    """Writes class names beside a matrix of classes. which: its axes, "x", "y" or "both".

    Up to 15 names are all written. More are written as groups of one first word ("blue circle", "blue cross"), where
    that makes 2 to 15 groups, with a frame of the color that the word names. Otherwise every n-th name is written.
    """
    from matplotlib.colors import is_color_like

    first_words = itertools.groupby(names, lambda name: name.split(" ")[0])
    words, sizes = zip(*((word, len(list(group))) for word, group in first_words))
    step, ends, between = -(-len(names) // 15), np.cumsum(sizes), []
    ticks, written = range(0, len(names), step), names[::step]
    if step > 1 and 2 <= len(words) == len(set(words)) <= 15:
        ticks, written, between = ends - (np.array(sizes) + 1) / 2, words, ends[:-1] - 0.5
    for side in (axis.xaxis, axis.yaxis):
        if which in ("both", side.axis_name):
            level = side is axis.xaxis and len(written) * max(map(len, written)) <= 32
            side.set_ticks(ticks, written, fontsize=8, rotation=0 if level or side is axis.yaxis else 90)
            side.set_ticks(between, minor=True)
            side.grid(which="minor", color="0.8", linewidth=0.7)
            for label in side.get_ticklabels() if written is words else []:
                color = label.get_text() if is_color_like(label.get_text()) else "none"
                label.set_bbox({"facecolor": "white", "edgecolor": color, "linewidth": 2, "pad": 1.5})


# The demo's world -----------------------------------------------------------------------------------------------------


def demo_figure():
    """Images of pretraining with their captions, and the eleven domains with the same classes in each."""
    rng = np.random.default_rng(0)
    figure = new_figure(13, 7, dpi=100, layout=None)
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1.7))

    left.suptitle("pretraining: images, captions (some imprecise)", fontsize=14)
    left.subplots_adjust(0.02, 0.02, 0.98, 0.88, 0.1, 0.5)
    for axis in left.subplots(5, 3).flat:
        name, light = rng.choice(demo.CLASSNAMES), rng.choice(demo.SEEN)
        axis.imshow(demo.draw(name, light, rng))
        axis.set_title(caption(name, light, rng).replace(" of ", "\nof "), fontsize=11)
        axis.axis("off")

    right.suptitle(f"the eleven few-shot domains ({demo.DEFAULT} is the default)", fontsize=14)
    right.subplots_adjust(0.16, 0.02, 0.91, 0.93, 0, 0.08)
    names, axes = demo.CLASSNAMES[3::9], right.subplots(len(demo.LIGHTS), 1)
    for axis, domain in zip(axes, demo.LIGHTS):
        axis.imshow(np.concatenate([np.asarray(demo.read(f"{domain}/test/{name}/00")) for name in names], 1))
        axis.set_ylabel(domain, rotation=0, ha="right", va="center", fontsize=12)
        axis.set(xticks=[], yticks=[])
    y = np.repeat([axes[-1].get_position().y0, axes[len(demo.SEEN)].get_position().y1], 2)
    axes[0].plot([0.92, 0.935, 0.935, 0.92], y, color="black", clip_on=False, transform=right.transSubfigure)
    right.text(0.95, y.mean(), "never seen in pretraining", rotation=270, va="center", fontsize=13)
    return figure


def main(arguments=None):
    """The command line of experiments/figures.py."""
    parser = options.Parser("experiments.figures", __doc__)
    parser.add_argument("figure", choices=["method", "batch", "demo", "run"])
    parser.add_argument("folders", nargs="*", metavar="FOLDER", help="for run: those of finished runs")
    parser.add_argument("--out", metavar="FILE", help="default: assets/<figure>.png, or curves.png beside the runs")
    args = parser.parse_args(arguments)
    if bool(args.folders) != (args.figure == "run"):
        parser.error("give the folders of finished runs with run, and with run alone")
    if args.figure == "run":
        folders = list(dict.fromkeys(map(pathlib.Path, args.folders)))
        tuned = [folder for folder in folders if runs.read_config(folder).method != "zeroshot"]
        if tuned:
            print(save(curves(tuned), args.out or folders[0].parent / "curves.png"))
        for folder in folders:
            drawn, rows = confusion(folder)
            table = io.StringIO()
            csv.writer(table, lineterminator="\n").writerows([[no_formula(str(cell)) for cell in row] for row in rows])
            atomic_write(folder / "confusion.csv", table.getvalue().encode("utf-8-sig"))  # the mark is for Excel
            print(save(drawn, folder / "confusion.png"))
    else:
        draw = {"method": method_figure, "batch": lambda: batch_of_images("demo-plain"), "demo": demo_figure}
        print(save(draw[args.figure](), args.out or f"assets/{args.figure}.png"))


if __name__ == "__main__":
    run_main("experiments.figures", main)
