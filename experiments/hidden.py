"""What MAO's scores hide, and other ways to run its new phase: docs/results.md's tables and figure, on the demo.

    python -m experiments.hidden --figure assets/hidden.png    all eleven domains, seeds 1 to 3 (2 cores: hours)
    python -m experiments.hidden --clip clip1.pt               zero-shot CLIP, CoOp and CoOp + MAO on another CLIP

The cells are rows of run.py, by experiments/sweep.py: on Ray where it is installed, each on one thread. A finished cell
is not run again. Phase 1 has the same seed in all ways of phase 2, and so leaves the same prompts.
"""

import pathlib
import sys

if __name__ == "__main__":
    sys.path[0] = str(pathlib.Path(__file__).parents[1])  # as a file, too, it imports from the project's folder

import statistics

from experiments import figures, sweep
from experiments.tables import markdown, over_datasets, paired, told
from harness import demo
from harness.cli import run_main
from harness.files import Index, make_folder
from harness.options import Parser, checked
from harness.runs import read_metrics, run_lock
from harness.scores import over_seeds, text

ROWS = {"zero-shot CLIP": "--method zeroshot", "CoOp": "--method backbone", "CoOp + MAO": "--method mao"}
BEFORE = "before phase 2"
PHASE_2 = {  # run.py's options; the first way is the paper's
    "clip": "--method mao",
    **{labeler: f"--method mao --labeler {labeler}" for labeler in ("whole", "confident", "balanced", "soft", "tuned")},
}


def halves(result):
    return {"Base": result["base"], "New": result["new"]}


def generalized(key):
    """A function from a result to its generalized accuracy, with all base and new classes as candidates."""
    return lambda result: {"Base": result[key]["base"], "New": result[key]["new"], "all": result[key]["all"]}


def final_prompt(result):
    """Base and New where the last prompts score the base classes too."""
    return {"Base": result["base_by_final_prompt"], "New": result["new"]}


class Cells:
    """The results of all cells. `summary` averages them over domains and seeds."""

    def __init__(self, datasets, seeds, out, ways, more, filled=lambda words, dataset: words):
        """Runs what is not finished. ways: {name: run.py's options, a text that `filled` completes for a dataset}.

        more: options of all cells. ValueError: a cell failed.
        """
        self.datasets, self.seeds, self.out = datasets, seeds, pathlib.Path(out)
        self.cells = {
            (way, dataset, seed): ("--dataset", dataset, "--seed", str(seed), *filled(words, dataset).split(), *more)
            for seed in seeds
            for dataset in datasets
            for way, words in ways.items()
        }
        with run_lock(self.out):
            make_folder(self.out)
            left = [cell for cell in dict.fromkeys(self.cells.values()) if sweep.finished(cell, self.out) is None]
            failed = sweep.run_cells(left, self.out)
        if failed:
            raise ValueError(f"{len(failed)} cells failed: the same command tries them again")
        self.results = {key: sweep.finished(cell, self.out) for key, cell in self.cells.items()}

    def of(self, way, datasets=None):
        """The results of a way, for each dataset a list over seeds."""
        return [[self.results[way, dataset, seed] for seed in self.seeds] for dataset in datasets or self.datasets]

    def summary(self, way, scores, datasets=None):
        """{score: (mean, standard deviation over seeds)}, averaged over datasets. scores: a function as `halves`."""
        return over_seeds(over_datasets([[scores(one) for one in results] for results in self.of(way, datasets)]))

    def right_labels(self, way):
        """The percentage of right pseudo-labels over all new phases of a way."""
        folders = [self.out / sweep.parsed(cell)[1] for (name, *_), cell in self.cells.items() if name == way]
        lines = [line for folder in folders for line in read_metrics(folder)]
        return statistics.mean(line["pseudo_label_accuracy"] for line in lines if "pseudo_label_accuracy" in line)


def table_of_lists(cells):
    """Base, New and H within each half, and with all classes as candidates: Markdown."""
    table = [["row", "Base", "New", "H", "all classes: Base", "New", "H", "all"]]
    rows = [(row, row, halves, generalized("one_list")) for row in ROWS]
    rows.append(("CoOp + MAO, final prompt alone", "CoOp + MAO", final_prompt, generalized("one_list_final")))
    for title, row, apart, together in rows:
        found = [*cells.summary(row, apart).values(), *cells.summary(row, together).values()]
        table.append([title, *(text(*score) for score in found)])
    return markdown(table)


def table_of_phase_2(cells):
    """New after phase 2 in each way, per domain, and how many pseudo-labels were right: Markdown."""
    table = [["domain", BEFORE, *PHASE_2]]
    for name, some in [*((name.split("-")[1], [name]) for name in cells.datasets), ("**average**", cells.datasets)]:
        table.append([name, *(text(*cells.summary(way, halves, some)["New"]) for way in (BEFORE, *PHASE_2))])
    compared, right = ["compared with clip", "", ""], ["pseudo-labels", ""]
    for way in PHASE_2:
        new, papers = ([one["new"] for results in cells.of(name) for one in results] for name in (way, "clip"))
        if way != "clip":
            compared.append(told(*paired(new, papers)))
        right.append(f"{cells.right_labels(way):.1f}% right")
    return markdown([*table, compared, right])


def figure(cells):
    """Left: H within each half and with all classes as candidates. Right: New before and after phase 2 over CLIP's."""
    drawn, (left, right) = figures.canvas(2, "", 10, 4.6)
    drawn.suptitle("H depends on the candidates, and phase 2 draws New to that of zero-shot CLIP.")
    ways = ((-0.1, "o", "candidates: one half", halves), (0.1, "s", "candidates: all classes", generalized("one_list")))
    for shift, marker, label, scores in ways:
        h, spread = zip(*((mean, spread or 0) for mean, spread in (cells.summary(row, scores)["H"] for row in ROWS)))
        left.errorbar([i + shift for i in range(3)], h, spread, fmt=marker, ms=8, capsize=4, label=label)
        for place, value in enumerate(h):
            left.text(place + 2.8 * shift, value, f"{value:.1f}", ha="center", va="center")
    left.set(title=f"(a) H, %, over {len(cells.datasets)} domains", xlim=(-0.5, 2.5), xticks=range(3), xticklabels=ROWS)
    left.set_ylim(bottom=min(60, left.get_ylim()[0]))
    new = {way: [one["new"] for results in cells.of(way) for one in results] for way in (*ROWS, BEFORE)}
    for way, marker, label in ((BEFORE, "x", "after phase 1"), ("CoOp + MAO", "o", "after phase 2")):
        right.plot(new["zero-shot CLIP"], new[way], marker, fillstyle="none", label=label)
    right.axline((0, 0), slope=1, color="0.6", linewidth=1, label="as zero-shot CLIP")
    right.set(title="(b) New, %", xlabel="zero-shot CLIP", ylabel="CoOp + MAO", xlim=(0, 100), ylim=(0, 100))
    drawn.legend(loc="outside lower center", ncols=5)
    return drawn


def main(arguments=None):
    """The command line of experiments/hidden.py."""
    parser = Parser("experiments.hidden", __doc__)
    add = parser.add_argument
    add("--domains", nargs="+", choices=list(demo.LIGHTS), default=list(demo.LIGHTS), metavar="NAME")
    add("--seeds", nargs="+", type=checked(Index), default=[1, 2, 3], metavar="N", help="default: 1 2 3")
    add("--clip", metavar="FILE", help="of experiments.pretrain --seed; then the first table alone")
    add("--out", default="runs/hidden", metavar="DIR", help="for the cells (default: runs/hidden)")
    add("--figure", metavar="FILE", help="draw the figure of docs/results.md, a PNG")
    args = parser.parse_args(arguments)
    ways = ROWS if args.clip else {**ROWS, BEFORE: "--method mao --no-new", **PHASE_2}
    more = [] if args.clip is None else ["--clip", args.clip, "--clip-activation", "quickgelu"]
    cells = Cells([f"demo-{domain}" for domain in args.domains], args.seeds, args.out, ways, more)
    print(table_of_lists(cells))
    if args.clip is None:
        print("\n" + table_of_phase_2(cells))
        if args.figure:
            figures.save(figure(cells), args.figure)


if __name__ == "__main__":
    run_main("experiments.hidden", main)
