"""What of MAO works: its parts taken apart, on equal terms (docs/results.md, "What of MAO works").

    python -m experiments.dissect --figure assets/dissect.png        the demo's eleven domains (2 cores: hours)
    python -m experiments.dissect --questions bundle negatives candidates --datasets eurosat dtd -- --root data
    python -m experiments.dissect --questions bundle negatives candidates --seeds 1 -- --backbone maple

The paper bundles hard negatives with reg-B, and compares the bundle with a backbone that takes a quarter of its steps
at a lower learning rate. Here the parts are compared one by one. All rows draw from 32 cached views of each image
(docs/speed.md). Base and New are those of the prompts after phase 1; in rows that say "new phase", New is that of the
prompts after phase 2.

Hypotheses, stated before the runs:

    bundle      MAO's base phase is ahead of the backbone in Base because of its steps: with as many, it is not.
    negatives   Hard negatives by names do not raise Base or New over random classes.
    candidates  reg-B raises New, and Base where the batches are hard.
    schedule    More steps and a higher rate raise Base and lower New.
    chosen      Neighbors that frozen CLIP chooses do no better than neighbors by names.
    new phase   It makes the gain in H, whatever phase 1 was. (Stated when seed 1 was known, before seeds 2 and 3.)
    phase 2     After the new phase, rows no longer differ in New.
    hardness    Base falls as K grows with hard negatives, and does not with random classes.
    similarity  Where similar names mean similar images (to frozen CLIP), hard negatives help more.

A pair is one dataset and seed. A difference is the mean over pairs, with its standard error and the number of pairs of
its sign. Below two standard errors it is reported as none.
"""

import pathlib
import sys

if __name__ == "__main__":
    sys.path[0] = str(pathlib.Path(__file__).parents[1])  # as a file, too, it imports from the project's folder

import numpy as np
from msgspec.structs import asdict, replace
from scipy.stats import spearmanr

from baselines.samplers import confusion
from data import open_task
from experiments import figures, sweep
from experiments.hidden import Cells, halves
from experiments.reproduce import CLASSES
from experiments.tables import markdown, paired, told
from harness import demo, options
from harness.cli import run_main
from harness.clips import load_clip_of
from harness.files import Index
from harness.folders import DEMOS
from harness.runs import read_config
from harness.scores import text
from harness.tuning import machine_defaults

BASE = "--method mao --no-new"  # MAO's base phase alone: on the demo 2,000 steps, at 0.0035
RANDOM = "--sampler random-classes"
ROWS = {  # name: run.py's options; 20 epochs of the backbone are 500 steps on the demo
    "backbone": "--method backbone",
    "backbone, MAO's rate": "--method backbone --lr 0.0035",
    "backbone, MAO's steps": "--method backbone --epochs {steps}",
    "backbone, MAO's steps and rate": "--method backbone --epochs {steps} --lr 0.0035",
    "random images, reg-B": f"{BASE} --sampler random --epochs {{twice}}",
    "random classes, reg-B": f"{BASE} {RANDOM}",
    "random classes, all candidates": f"{BASE} {RANDOM} --no-reg-base",
    "names, reg-B": BASE,
    "names, all candidates": f"{BASE} --no-reg-base",
    "CLIP's text, reg-B": f"{BASE} --sampler clip-text",
    "CLIP's confusions, reg-B": f"{BASE} --sampler clip-confusion",
    "backbone, new phase": "--method mao --no-base",
    "random classes, reg-B, new phase": f"--method mao {RANDOM}",
    "names, reg-B, new phase": "--method mao",
}
HARDNESS = (2, 32)  # K; b*K = 32 images make 2,000 steps on the demo, with K = 32 2,400
for k in HARDNESS:
    of_k = f"{BASE} --top-k {k} --anchors {32 // k} --epochs {160 // k}"
    ROWS.update({f"names, reg-B, K = {k}": of_k, f"random classes, reg-B, K = {k}": f"{of_k} {RANDOM}"})
MAIN = ["bundle", "negatives", "candidates", "new phase"]  # they have all seeds, the other questions the first one
QUESTIONS = {  # (what is asked, pairs of rows: the first minus the second)
    "bundle": ("What does MAO's base phase gain, and is it more than its steps and its rate?", [
        ("names, reg-B", "backbone"),
        ("names, reg-B", "backbone, MAO's steps and rate"),
        ("backbone, MAO's steps and rate", "backbone"),
    ]),
    "negatives": ("Do hard negatives help, compared with random classes in batches of the same form?", [
        ("names, reg-B", "random classes, reg-B"),
        ("names, all candidates", "random classes, all candidates"),
    ]),
    "candidates": ("Does reg-B help, compared with cross-entropy over all base classes?", [
        ("names, reg-B", "names, all candidates"),
        ("random classes, reg-B", "random classes, all candidates"),
    ]),
    "new phase": ("What does the new phase gain, after MAO's base phase and after the plain backbone?", [
        ("names, reg-B, new phase", "backbone"),
        ("backbone, new phase", "backbone"),
        ("names, reg-B, new phase", "backbone, new phase"),
    ]),
    "schedule": ("What do the steps do, the rate, reg-B on random images, and the form of the batches?", [
        ("backbone, MAO's steps", "backbone"),
        ("backbone, MAO's rate", "backbone"),
        ("random images, reg-B", "backbone, MAO's steps and rate"),
        ("random classes, reg-B", "random images, reg-B"),
    ]),
    "chosen": ("Do neighbors that frozen CLIP chooses help?", [
        ("CLIP's text, reg-B", "random classes, reg-B"),
        ("CLIP's confusions, reg-B", "random classes, reg-B"),
    ]),
    "phase 2": ("What is left of the batches' differences after the new phase?", [
        ("names, reg-B, new phase", "random classes, reg-B, new phase"),
    ]),
    "hardness": ("Where does hardness turn from help to harm? b*K = 32; K = 8 is above.", [
        (f"names, reg-B, K = {k}", f"random classes, reg-B, K = {k}") for k in HARDNESS
    ]),
}  # fmt: skip


def with_epochs(words, dataset):
    """run.py's options with the epochs of batches of 32 images that make as many steps as MAO's base phase.

    The count is for 16 shots, and for the paper's anchors and epochs.
    """
    base = (CLASSES.get(dataset, len(demo.CLASSNAMES)) + 1) // 2
    epochs = round(10 * (16 * base // options.paper_batch(base)[0]) / (16 * base // 32))  # 80 on the demo
    return words.format(steps=epochs, twice=2 * epochs)  # a phase of MAO takes half of --epochs


def scores_of(result):
    """{score: number} of a cell: Base, New, H, and the calibration errors (ECE) of base, new and one list of all."""
    return {**halves(result), "H": result["h"], **{f"ECE {key}": value for key, value in result["ece"].items()}}


def difference(cells, first, second, score):
    """`paired` of a score of two rows: the first minus the second."""
    return paired(*([scores_of(one)[score] for one in sum(cells.of(row), [])] for row in (first, second)))


def tables(cells, pairs):
    """Two tables, Markdown: the rows with all their scores, and the differences of the pairs of rows."""
    rows = list(dict.fromkeys(row for pair in pairs for row in pair))
    of_rows = [["row", *scores_of(cells.of(rows[0])[0][0])]]
    for row in rows:
        found = cells.summary(row, scores_of)
        of_rows.append([row, *(text(*found[score]) for score in of_rows[0][1:])])
    of_pairs = [["difference", "Base", "New", "H"]]
    for pair in pairs:
        of_pairs.append([" - ".join(pair), *(told(*difference(cells, *pair, score)) for score in of_pairs[0][1:])])
    return f"{markdown(of_rows)}\n\n{markdown(of_pairs)}"


def similarity(cells):
    """Of each dataset: the rank correlation of two names' similarity with the probability that frozen CLIP gives the
    one for images of the other, and what hard negatives add to Base. Below, that of the two columns. Markdown.
    """
    table, columns = [["dataset", "similarity and confusion", "Base, names - random classes"]], []
    for dataset, *rows in zip(cells.datasets, *(cells.of(row) for row in QUESTIONS["negatives"][1][0])):
        _, folder = sweep.parsed(cells.cells["names, reg-B", dataset, cells.seeds[0]])
        args = machine_defaults(replace(read_config(cells.out / folder), workers=0))
        task, (clip_model, sha256) = open_task(args), load_clip_of(asdict(args), args.device)
        e, off = figures.embeddings(task.base_names).numpy(), ~np.eye(len(task.base_names), dtype=bool)
        labels, args = [label for _, label, _ in task.base_train], replace(args, clip_sha256=sha256)
        p = confusion(clip_model, task, labels, args).numpy()
        gain = np.mean([one["base"] - other["base"] for one, other in zip(*rows)])
        columns.append((spearmanr((e @ e.T)[off], p[off]).statistic, gain))
        table.append([dataset, f"{columns[-1][0]:.2f}", f"{gain:+.2f}"])
    found = spearmanr(*zip(*columns)) if columns[2:] else None
    return markdown(table) + (f"\n\nboth: {found.statistic:.2f}, p = {found.pvalue:.2f}" if found else "")


def forest(contrasts):
    """The contrasts with two standard errors, one line each, for Base and New. contrasts: (cells, pair of rows)."""
    drawn, axes = figures.canvas(2, "Bars are two standard errors; gray ones reach 0.", 13, 1.2 + 0.3 * len(contrasts))
    lines = range(len(contrasts))
    for axis, score in zip(axes, ("Base", "New")):
        for line, (cells, pair) in zip(lines, contrasts):
            mean, error, *_ = difference(cells, *pair, score)
            color = "C0" if abs(mean) > 2 * error else "0.6"
            axis.errorbar(mean, line, xerr=2 * error, fmt="o", capsize=3, color=color)
        axis.axvline(0, color="0.6", linewidth=1)
        axis.set(title=f"{score}, difference in points", yticks=lines, yticklabels=[], ylim=(len(lines) - 0.5, -0.5))
    axes[0].set_yticklabels([" minus ".join(pair) for _, pair in contrasts])
    return drawn


def main(arguments=None):
    """The command line of experiments/dissect.py."""
    parser = options.Parser("experiments.dissect", __doc__)
    add = parser.add_argument
    add("--questions", nargs="+", choices=list(QUESTIONS), default=list(QUESTIONS), metavar="NAME")
    add("--datasets", nargs="+", default=list(DEMOS[1:]), metavar="NAME", help="default: the demo's eleven domains")
    add("--seeds", nargs="+", type=options.checked(Index), default=[1, 2, 3], metavar="N", help="default: 1 2 3")
    add("--out", default="runs/dissect", metavar="DIR", help="for the cells (default: runs/dissect)")
    add("--figure", metavar="FILE", help="draw the contrasts of all questions, a PNG")
    add("options", nargs="*", metavar="-- OPTIONS", help="of run.py, for all rows, such as -- --backbone maple")
    args, contrasts = parser.parse_args(arguments), []
    for name in args.questions:
        question, pairs = QUESTIONS[name]
        rows = {row: ROWS[row] for pair in pairs for row in pair}
        seeds = args.seeds if name in MAIN else args.seeds[:1]
        cells = Cells(args.datasets, seeds, args.out, rows, ["--cache-views", "32", *args.options], with_epochs)
        contrasts += [(cells, pair) for pair in pairs]
        print(f"### {question}\n\n{tables(cells, pairs)}\n")
        if name == "negatives":
            print(f"### Do similar names mean similar images, and does that help?\n\n{similarity(cells)}\n")
    if args.figure:
        figures.save(forest(contrasts), args.figure)


if __name__ == "__main__":
    run_main("experiments.dissect", main)
