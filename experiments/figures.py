"""The figures of README.md and docs/, those of the paper, and those of a run.

    python -m experiments.figures batch             assets/batch.png: one batch of hard negatives beside a random one
    python -m experiments.figures demo              assets/demo.png: what the demo's CLIP was pretrained on, the domains
    python -m experiments.figures run FOLDER ...    curves.png and confusion.png of finished runs, in their folders

experiments/reproduce.py draws the paper's Figs. 3 to 6, training curves and confusion by these functions. Each returns
a matplotlib Figure. None of them sets a backend or touches pyplot, so a notebook can import this file. Every draw has a
fixed seed: the same command makes the same figure. Gray tones, markers and hatches survive a print without color.
"""

import pathlib
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
from harness.files import make_folder
from harness.images import ShuffledBatches
from run import LEARNERS
from sampler import HardNegativeSampler, minilm

DOMAIN = "plain"  # of the README's batch: under plain light a reader sees the colors that the names say
MARKERS, TONES = "osD^v", ["0.15", "0.55", "0.8"]


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
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("\n".join(textwrap.wrap(below, int(width * 13))), fontsize=8, color="0.3")
    return figure, axes


def save(figure, path):
    """Writes a figure as PNG, and makes its folder."""
    make_folder(path.parent)
    figure.savefig(path, facecolor="white")


# The method -----------------------------------------------------------------------------------------------------------

DATA, FROZEN, LEARNED, LOSS = "#f2f2f2", "#cfe0f1", "#f7d8a8", "#ffffff"  # fills of boxes
STEPS = {  # of a phase, from left to right: (text of a box, its fill)
    "Base phase\nsection 3.2": [
        ("16 images per base class,\nwith labels", DATA),
        ("hard negatives: each image\nbrings the K - 1 classes with the\nmost similar names (Eq. 4)", DATA),
        ("prompts (learned)\nin CLIP (frozen)", LEARNED),
        ("cross-entropy over\nthe batch's classes\n(reg-B, Eq. 6)", LOSS),
    ],
    "New phase\nsection 3.3": [
        ("16 images per new class,\nwithout labels", DATA),
        ("zero-shot CLIP (frozen):\nits Top-1 is the label (Eq. 7)", FROZEN),
        ("the same prompts, tuned\nfurther, in CLIP (frozen)", LEARNED),
        ("cross-entropy over\nall new classes\n(reg-N, Eq. 8)", LOSS),
    ],
}
RESULTS = ["prompts after phase 1\nscore the base classes:\nBase", "prompts after phase 2\nscore the new classes:\nNew"]


def method_figure():
    """The two phases: images and their labels, what is learned, the classes that the loss runs over, what scores."""
    figure = new_figure(13, 3.75, 110, None)
    axis = figure.add_axes((0, 0, 1, 1), xlim=(0, 13), ylim=(0, 3.75))
    axis.axis("off")
    arrow = {"arrowstyle": "-|>", "color": "0.2", "shrinkA": 0, "shrinkB": 0}
    lefts, width, height = (1.35, 3.75, 6.7, 9.05, 11.15), (2.0, 2.55, 1.95, 1.7, 1.75), 1.05

    def box(column, bottom, text, fill):
        style = {"boxstyle": "round,pad=0.02", "facecolor": fill, "edgecolor": "0.2", "zorder": 2}
        middle = lefts[column] + width[column] / 2, bottom + height / 2
        axis.add_patch(patch((lefts[column], bottom), width[column], height, **style))
        axis.text(*middle, text, ha="center", va="center", fontsize=9.5, zorder=3)
        return middle

    from matplotlib.patches import FancyBboxPatch as patch

    middles = []
    for bottom, (phase, steps), result in zip((2.55, 0.75), STEPS.items(), RESULTS):
        axis.text(0.12, bottom + height / 2, phase, va="center", fontsize=11, fontweight="bold")
        for column, (text, fill) in enumerate([*steps, (result, LEARNED)]):
            middles.append(box(column, bottom, text, fill))
            if column:
                start = lefts[column - 1] + width[column - 1], bottom + height / 2
                axis.annotate("", (lefts[column], bottom + height / 2), start, arrowprops=arrow)
    axis.annotate("", (middles[7][0], 1.82), (middles[2][0], 2.53), arrowprops=arrow)
    axis.text(
        middles[2][0] + 0.1, 2.17, "the new phase starts from these prompts", va="center", fontsize=9, color="0.3"
    )
    axis.text(middles[4][0], 2.17, "H: harmonic mean", ha="center", va="center", fontsize=9.5)
    for left, fill, text in ((1.35, DATA, "images"), (3.0, FROZEN, "frozen"), (4.6, LEARNED, "learned")):
        axis.add_patch(patch((left, 0.2), 0.28, 0.18, boxstyle="round,pad=0.02", facecolor=fill, edgecolor="0.2"))
        axis.text(left + 0.42, 0.29, text, va="center", fontsize=9)
    return figure


# Batches: Figs. 5 and 6 -----------------------------------------------------------------------------------------------


class Batches:
    """The first batch of MAO's base phase on a dataset, and a random batch of the same size, seed 1.

    hard, random: positions in task.base_train, b*K of each. b, k: of the dataset (appendix B).
    """

    def __init__(self, dataset, root=None):
        self.task = open_task(options.Settings(dataset=dataset, root=root))
        self.labels = np.array([label for _, label, _ in self.task.base_train])
        self.b, self.k = options.paper_batch(len(self.task.base_names))
        self.hard = next(iter(HardNegativeSampler(self.labels, self.task.base_names, self.b, self.k)))
        self.random = next(iter(ShuffledBatches(len(self.labels), self.b * self.k, seed=1)))

    def rows(self, batch):
        """The labels of a batch, in rows of K."""
        return self.labels[batch].reshape(-1, self.k).tolist()


def batch_of_images(dataset, root=None):
    """Fig. 6: images and names of a batch in b rows of K, the anchor first; beside it a random batch."""
    batches = Batches(dataset, root)
    task, b, k = batches.task, batches.b, batches.k
    figure = new_figure(18, 2.1 * b, dpi=100, layout=None)
    sides = figure.subfigures(1, 2, wspace=0.03)
    titles = ("hard negatives, one row per anchor", "a random batch")
    for side, title, batch in zip(sides, titles, (batches.hard, batches.random)):
        rows = [[task.base_names[label] for label in row] for row in batches.rows(batch)]
        names = sum(rows, [])
        in_row, in_batch = np.mean([mean_similarity(row) for row in rows]), mean_similarity(names)
        told = f"mean cosine similarity of the names\nin a row {in_row:.2f}, in the batch {in_batch:.2f}"
        side.suptitle(f"{title}\n{told}", fontsize=20)
        side.subplots_adjust(0.01, 0.01, 0.99, 1 - 0.84 / b, 0.08, 0.5)
        for position, axis in enumerate(side.subplots(b, k, squeeze=False).flat):
            image, size = task.read(task.base_train[batch[position]][0]), 16 if len(names[position]) < 20 else 9
            anchor = batch is batches.hard and position % k == 0
            show_image(axis, image, names[position].replace(" ", "\n"), size, 5 if anchor else 0)
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


def mean_distance(e, classes):
    """The mean distance of two different classes of a list; 0 where there is one only. e: embeddings [C_b, 384]."""
    distances = torch.nn.functional.pdist(e[sorted(set(classes))])
    return distances.mean().item() if len(distances) else 0.0


def batch_in_plane(dataset, root=None):
    """Fig. 5: the classes of a random and of a hard-negative batch, their name embeddings in the plane by PCA.

    MiniLM replaces the paper's Word2Vec. The plane is that of all base classes, so both panels have the same axes.
    """
    batches = Batches(dataset, root)
    names, k = batches.task.base_names, batches.k
    e = embeddings(names)  # [C_b, 384]
    centered = e - e.mean(dim=0)
    *_, axes_of_pca = torch.linalg.svd(centered, full_matrices=False)
    plane = (centered @ axes_of_pca[:2].T).numpy()  # [C_b, 2]
    below = (
        f"{dataset}, seed 1, b = {batches.b}, K = {k}: MiniLM embeddings of the names in the plane of their first two "
        f"principal components, over all {len(names)} base classes (gray). Distances are in 384 dimensions."
    )
    figure, axes = canvas(2, below, 11, 5)
    for axis, title, batch in zip(axes, ("(a) random batch", "(b) hard negatives"), (batches.random, batches.hard)):
        rows = batches.rows(batch)
        classes = sorted(set(sum(rows, [])))
        axis.plot(*plane.T, "o", color="0.85", markersize=4)
        axis.plot(*plane[classes].T, "o", color="0.15", markersize=5)
        in_row = np.mean([mean_distance(e, row) for row in rows])
        told = f"mean pairwise distance: {mean_distance(e, classes):.2f}, within {k} in a row {in_row:.2f}"
        axis.set_title(f"{title}, {len(classes)} classes\n{told}", fontsize=10)
        axis.set(xticks=[], yticks=[])
        write_names(axis, plane[classes], [names[label] for label in classes])
    return figure


def write_names(axis, points, names):
    """Writes a name beside each point [N, 2], at the first of eight places where it covers no other name."""
    axis.margins(0.12, 0.05)
    axis.figure.draw_without_rendering()  # settles where the axes are
    taken = []
    for point, name in sorted(zip(points.tolist(), names)):
        for x, y in ((4, 3), (4, -9), (-4, 3), (-4, -9), (4, 13), (4, -19), (-4, 13), (-4, -19)):
            how = {"xytext": (x, y), "textcoords": "offset points", "ha": "left" if x > 0 else "right"}
            written = axis.annotate(name, point, fontsize=7, **how)
            box = written.get_window_extent()
            if not any(box.overlaps(other) for other in taken):
                break
            written.remove()
        else:
            written = axis.annotate(name, point, fontsize=7)
        taken.append(written.get_window_extent())


# Many cells: Figs. 3 and 4 --------------------------------------------------------------------------------------------


def bars(lines, settings):
    """Fig. 3: average H of each row, with its spread. lines: those of experiments/reproduce.py with the score H.

    settings: the text under the figure.
    """
    figure, (axis,) = canvas(1, f"H over {settings}. DePT is implemented on CoOp alone.", 9, 3.8)
    for place, line in enumerate(lines):
        hatch = "//" if "MAO" in line["row"] else ".." if "DePT" in line["row"] else ""
        how = {"color": TONES[2] if hatch else TONES[1], "edgecolor": "black", "hatch": hatch}
        bar = axis.bar(place, line["ours"], 0.7, yerr=line["spread"], capsize=4, **how)
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
        axis.set(xlabel=xlabel, title=score, xticks=x)
        if max(x) > 16:
            axis.set_xscale("log", base=2)
            axis.set_xticks(x, x)
    return figure


# One run --------------------------------------------------------------------------------------------------------------


def curves(folders):
    """Loss over the epochs of both phases, and the share of right pseudo-labels. folders: of rows, `Path`s."""
    told = "each epoch's mean loss. MAO's runs over fewer candidates. Dotted: the new phase begins."
    figure, axes = canvas(2, f"{', '.join(folder.name for folder in folders)}: {told}", 10)
    for number, folder in enumerate(folders):
        metrics, style = runs.read_metrics(folder), {"color": TONES[number % 3], "marker": MARKERS[number % 5]}
        style["label"] = "with MAO" if runs.read_config(folder).method == "mao" else "without MAO"
        axes[0].plot(range(1, len(metrics) + 1), [line["loss"] for line in metrics], markersize=4, **style)
        first = sum(line["phase"] == "base" for line in metrics)
        right = [line["pseudo_label_accuracy"] for line in metrics if "pseudo_label_accuracy" in line]
        if first < len(metrics):
            axes[0].axvline(first + 0.5, color="0.6", linestyle=":")
        if right:
            axes[1].plot(range(first + 1, first + 1 + len(right)), right, markersize=4, **style)
    for axis in axes:
        axis.xaxis.get_major_locator().set_params(integer=True)
    axes[0].set(xlabel="epoch", ylabel="loss", ylim=(0, None))
    axes[0].legend()
    axes[1].set(xlabel="epoch", ylabel="right pseudo-labels, %", ylim=(0, 100))
    return figure


def load_row(folder, device="cpu"):
    """(config, frozen CLIP, learner, its state dicts {"base", "new"}, None for zero-shot CLIP) of a finished row.

    folder: a `pathlib.Path`. ValueError, FileNotFoundError: its files are missing or broken, or its CLIP is.
    """
    config, where = runs.read_config(folder), folder / "config.json"
    clip_model, sha256 = load_clip_of(asdict(config), device)
    if config.method == "zeroshot":
        return config, clip_model, ZeroShot(clip_model, config.classnames), None
    files = {"base": "base.safetensors", "new": "new.safetensors" if config.new else "base.safetensors"}
    states = {phase: runs.read_prompts(folder / file, config.backbone, sha256) for phase, file in files.items()}
    of_learner = (config.backbone, config.learner_settings, clip_model, config.classnames, states.values())
    return config, clip_model, runs.build_learner(LEARNERS, *of_learner, where), states


def confusion(folder):
    """Confusion of base and new classes by zero-shot CLIP, and by the tuned prompts of a row's folder, a `Path`."""
    config, clip_model, learner, states = load_row(folder)
    task = open_task(config, runs.read_lists(folder))
    runs.check_data(folder, config, task)
    zero_shot = ZeroShot(clip_model, task.base_names)
    tests = scores.TestImages(task, zero_shot, "cpu", config.workers or 0)
    sets = list(task.tests)[: 2 if "base" in task.tests else 1]  # of cross-dataset, the source
    columns = [("zero-shot CLIP", zero_shot, None), *([("tuned prompts", learner, states)] if states else [])]
    below = f"{folder.name}: rows are true classes, darker is more often, 0 to 100% of a row"
    figure, axes = canvas(len(columns), below, 4 * len(columns), 4 * len(sets), rows=len(sets))
    pairs = [(name, *column) for name in sets for column in columns]
    for axis, (name, when, who, of_phases) in zip(axes, pairs):
        test = task.tests[name]
        scores.load_prompts_for(who, of_phases, "new" if name == "new" else "base", test)
        _, classes, labels = scores.top1(who, tests.batches(name, who), "cpu")
        show_confusion(axis, labels, classes, len(test.names), f"{name} classes, {when}")
        axis.set(xlabel="predicted class", ylabel="true class", xticks=[], yticks=[])
    return figure


def show_confusion(axis, labels, classes, count, title):
    """Shows how often each of `count` classes is predicted as each. labels, classes: true and predicted, int64 [N]."""
    table = torch.zeros(count, count).index_put_((labels, classes), torch.ones(len(labels)), accumulate=True)
    axis.imshow(table / table.sum(dim=1, keepdim=True).clamp_min(1), cmap="gray_r", vmin=0, vmax=1)
    axis.set_title(f"{title}: {100 * (classes == labels).float().mean().item():.1f}% right")


# The demo's world -----------------------------------------------------------------------------------------------------


def demo_figure():
    """Images of pretraining with their captions, and the eleven domains with the same classes in each."""
    rng = np.random.default_rng(0)
    figure = new_figure(15, 7, dpi=80, layout=None)
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
    for axis, domain in zip(right.subplots(len(demo.LIGHTS), 1), demo.LIGHTS):
        axis.imshow(np.concatenate([np.asarray(demo.read(f"{domain}/test/{name}/00")) for name in names], 1))
        label = f"{domain} = demo" if domain == demo.DEFAULT else domain
        axis.set_ylabel(label, rotation=0, ha="right", va="center")
        axis.set(xticks=[], yticks=[])
    return figure


def main():
    """The command line of experiments/figures.py."""
    parser = options.Parser("experiments.figures", __doc__)
    parser.add_argument("figure", choices=["method", "batch", "demo", "run"])
    parser.add_argument("folders", nargs="*", metavar="FOLDER", help="for run: those of finished runs")
    parser.add_argument("--out", metavar="FILE", help="of batch and demo (default: assets/<figure>.png)")
    args = parser.parse_args()
    if bool(args.folders) != (args.figure == "run") or (args.folders and args.out):
        parser.error("give the folders of finished runs with run alone, and --out with batch and demo alone")
    if args.figure == "run":
        for folder in map(pathlib.Path, args.folders):
            if runs.read_config(folder).method != "zeroshot":
                save(curves([folder]), folder / "curves.png")
            save(confusion(folder), folder / "confusion.png")
    else:
        draw = {"method": method_figure, "batch": lambda: batch_of_images(f"demo-{DOMAIN}"), "demo": demo_figure}
        figure = draw[args.figure]()
        save(figure, pathlib.Path(args.out or f"assets/{args.figure}.png"))


if __name__ == "__main__":
    run_main("experiments.figures", main)
