"""Every table and figure of the paper from one command: our scores beside the paper's.

    python -m experiments.reproduce table1 --plan                     lists the runs and their time; runs nothing
    python -m experiments.reproduce table1 --root data                11 datasets x 7 rows x 3 seeds, on Ray
    python -m experiments.reproduce table1 --datasets eurosat dtd --backbones coop --seeds 1 --serial
    python -m experiments.reproduce all --demo --quick                on the embedded demo, one domain and one seed
    python -m experiments.reproduce table8 --address 10.0.0.1:6379    on a Ray cluster

A cell is one row of run.py for one dataset and one seed. A finished cell is not run again, so you can stop the command
and repeat it. The averages are the paper's: see experiments/tables.py.
"""

import pathlib
import sys

if __name__ == "__main__":
    sys.path[0] = str(pathlib.Path(__file__).parents[1])  # as a file, too, it imports from the project's folder

import csv
import io
import json
import math
import statistics
from collections.abc import Callable
from typing import Annotated, NamedTuple

import torch
from msgspec import Meta

from baselines import BASELINES
from experiments import figures, sweep
from experiments.bench import PAPERS_THREE, Meter
from experiments.tables import markdown, over_datasets
from harness import demo, options
from harness.cli import printable, run_main, warn
from harness.files import Count, Index, atomic_write, make_folder
from harness.folders import DEMOS
from harness.layouts import LAYOUTS
from harness.runs import read_metrics, run_lock
from harness.scores import harmonic_mean, over_seeds, scorer, text
from run import LEARNERS

PAPER = json.loads(pathlib.Path(__file__).with_name("paper.json").read_text())  # its tables; notes say what is missing

# The rows of the tables -----------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """A row of a table: run.py's --backbone, --method and further options, and the row's name in paper.json, if any."""

    name: str
    backbone: str
    method: str
    options: str = ""
    paper: str | None = None


def pairs(backbones):
    """Zero-shot CLIP, which the paper's tables do not have, and each backbone without and with MAO."""
    rows = [Row("zero-shot CLIP", "coop", "zeroshot")]
    for backbone in backbones:
        name = LEARNERS[backbone].__name__
        rows.append(Row(name, backbone, "backbone", "", backbone))
        rows.append(Row(f"{name} + MAO", backbone, "mao", "", f"{backbone}+mao"))
    return rows


def figure_4_left(args):
    """The default K is left out, so that tables share its cell."""
    counts = [2, 8, 16] if args.quick else range(2, 17, 2)
    return [Row(str(k), "coop", "mao", "--no-new" + (f" --top-k {k}" if k != 8 else "")) for k in counts]


def figure_4_right(args):
    counts = [1, 16, 64] if args.quick else [1, 2, 4, 8, 16, 32, 64]
    return [Row(str(n), "coop", "mao", f"--unlabeled-shots {n}" if n != 16 else "") for n in counts]


DEPT = Row("CoOp + DePT", "dept", "backbone")  # of Fig. 3; it is implemented on CoOp alone
TABLE_3 = pairs(["coop"])[1:] + pairs(["maple", "coprompt"])[1::2]
TABLE_4 = [
    Row("PromptSRC", "promptsrc", "backbone", "", "backbone"),
    Row("(a) base phase alone", "promptsrc", "mao", "--no-new", "a_base_dde_ar"),
    Row("(b) new phase alone", "promptsrc", "mao", "--no-base", "b_new_dde_ar"),
    Row("(c) without reg-N", "promptsrc", "mao", "--no-reg-new", "c_base_dde_ar_new_dde"),
    Row("(d) full", "promptsrc", "mao", "", "d_full"),
]
TABLE_5 = [
    Row("PromptSRC", "promptsrc", "backbone", "", "backbone"),
    Row("+ MAO, foundation CLIP", "promptsrc", "mao", "", "foundation_clip"),
    Row("+ MAO, tuned prompts", "promptsrc", "mao", "--labeler tuned", "fine_tuned_prompt"),
]
TABLE_7 = [
    *pairs(["cocoop", "proda", "kgcoop", "tcp", "promptsrc"])[1::2],
    Row("MAO-SRC", "promptsrc", "mao", "", "mao-src"),
]
TABLE_8 = [
    Row("(a) CoOp", "coop", "backbone", "", "a_coop"),
    Row("(b) CoOp, 2x epochs", "coop", "backbone", "--epochs 40", "b_coop_2x_epochs"),
    Row("(c) + MAO, base phase alone", "coop", "mao", "--no-new", "c_mao_base_only"),
    Row("(d) + MAO", "coop", "mao", "", "d_mao_full"),
]

# The scores of a cell: {score: number}. Where it has Base and New, H comes from their averages. -----------------------


def halves(result, _):
    return {"Base": result["base"], "New": result["new"]}


def transfer(result, _):
    """Table 2: the accuracy on the source and on each target."""
    return {name: value for name, value in result.items() if name == "average" or name in (*LAYOUTS, *DEMOS)}


def cost(result, folder):
    """Table 3: what tuning costs, and the images per second of the tuned learner at test, its text encoded before."""
    return {
        "learnable": result["learnable_parameters"],
        "memory, MiB": result["peak_mib"],
        "s per base epoch": statistics.mean(base_epochs(folder, "seconds")),
        "images/s": inference_rate(folder),
        **halves(result, folder),
    }


def spent(result, folder):
    """Fig. 4: the mean size H of the candidate set in the base phase, the time of all phases, and the memory."""
    costs = {"seconds": result["seconds"], "memory, MiB": result["peak_mib"]}
    return {**halves(result, folder), "candidates": statistics.mean(base_epochs(folder, "candidates")), **costs}


def base_epochs(folder, key):
    """A value of metrics.jsonl for each epoch of the base phase."""
    return [line[key] for line in read_metrics(folder) if line["phase"] == "base"]


@torch.no_grad()
def inference_rate(folder, batch=64):
    """Images per second of a finished row at test, of noise: speed does not depend on what an image shows."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    _, clip_model, learner, _ = figures.load_row(folder, device)
    pixels, classify = clip_model.visual.input_resolution, scorer(learner)
    images = torch.randn(batch, 3, pixels, pixels, device=device)
    return batch / min(Meter(device, 4)({"": lambda: classify(images)})[""].clock)


class Made(NamedTuple):
    """A table or figure that is made from cells."""

    title: str
    rows: Callable  # from the command's arguments to a list of `Row`
    scores: Callable  # of one cell, a function above
    paper: str | None = None  # its key in paper.json
    each: bool = False  # whether it shows each dataset, after the average


MADE = {
    "table1": Made("Table 1: base-to-new", lambda args: pairs(args.backbones), halves, "table1_base_to_new", True),
    "table2": Made("Table 2: cross-dataset", lambda args: pairs(args.of_table_2), transfer, "table2_cross_dataset"),
    "table3": Made("Table 3: what tuning costs", lambda _: TABLE_3, cost, "table3_cost_flowers102"),
    "table4": Made("Table 4: MAO's parts, PromptSRC", lambda _: TABLE_4, halves, "table4_ablation_promptsrc"),
    "table5": Made("Table 5: labelers, PromptSRC", lambda _: TABLE_5, halves, "table5_pseudo_labeler_promptsrc"),
    "table7": Made("Table 7: more baselines", lambda _: TABLE_7, halves, "table7_more_baselines"),
    "table8": Made("Table 8: MAO's parts, CoOp", lambda _: TABLE_8, halves, "table8_ablation_coop"),
    "fig3": Made("Fig. 3: plug-and-play methods", lambda args: [*pairs(args.backbones)[1:], DEPT], halves),
    "fig4-left": Made("Fig. 4, left: K of Eq. 4, base phase of CoOp + MAO", figure_4_left, spent),
    "fig4-right": Made("Fig. 4, right: unlabeled images per class, CoOp + MAO", figure_4_right, spent),
    "curves": Made("Training curves, CoOp", lambda _: TABLE_3[:2], halves),
    "confusion": Made("Confusion, CoOp + MAO", lambda _: TABLE_3[1:2], halves),
}
BATCHES = {"fig5": figures.batch_in_plane, "fig6": figures.batch_of_images}  # need no cells
NAMES = [*list(MADE)[:8], "fig4", *BATCHES, "curves", "confusion", "all"]
PAPERS_WORDS = {"Base": "base", "New": "new", "H": "h", "learnable": "params", "memory, MiB": "memory_mb",
                "s per base epoch": "seconds_per_epoch", "images/s": "inference_fps"}  # fmt: skip


def cells_of(name, args):
    """{(row's name, dataset): a cell for each seed} of a table or figure; a cell is a tuple of run.py's options."""
    datasets, more = args.datasets, []
    if name == "table2":  # tuned on one dataset, scored on the others
        datasets = ["demo-plain" if args.demo else "imagenet"]
        more = ["--protocol", "cross-dataset"]
        targets = [dataset for dataset in args.named if dataset not in datasets]
        if 0 < len(targets) < 10:  # all the others are the default
            more += ["--targets", *targets]
    elif name == "table3":
        datasets = datasets[:1] if args.demo else ["oxford_flowers"]
    elif name in ("curves", "confusion"):
        datasets = datasets[:1]
    for option in ("root", "clip"):
        more += [f"--{option}", getattr(args, option)] if getattr(args, option) else []
    cells = {}
    for row in MADE[name].rows(args):
        words = ["--backbone", row.backbone, "--method", row.method, *row.options.split()]
        if row.backbone in BASELINES and args.recipe == "paper":
            words += ["--recipe", "paper"]
        for dataset in datasets:
            of_seeds = [("--dataset", dataset, "--seed", str(seed), *words, *more) for seed in args.seeds]
            cells[row.name, dataset] = of_seeds
    return cells


# From cells to a table ------------------------------------------------------------------------------------------------


def lines_of(name, args, out, failed):
    """(lines, notes): a table's figures, dicts, the average over datasets first; and the sentences under the table."""
    made, notes, lines, found, marks = MADE[name], [], [], {}, {}
    for key, cells in cells_of(name, args).items():
        found[key], marks[key] = [], []
        for cell in cells:
            folder = out / sweep.parsed(cell)[1]
            if cell in failed:
                marks[key].append(f"[{len(notes) + 1}]")
                notes.append(f"[{len(notes) + 1}] {folder.name}: {failed[cell]}")
            result = None if cell in failed else sweep.finished(cell, out)
            found[key].append(result and made.scores(result, folder))
    rows, datasets = made.rows(args), list(dict.fromkeys(dataset for _, dataset in found))
    # An average compares rows, so it is over the datasets of which all rows have all seeds. A row without any is out.
    some = [row.name for row in rows if any(any(found[row.name, dataset]) for dataset in datasets)]
    whole = [dataset for dataset in datasets if some and all(all(found[row, dataset]) for row in some)]
    if len(whole) < len(datasets) > 1:
        without = ", ".join(dataset for dataset in datasets if dataset not in whole)
        notes.append(f"the averages are over {len(whole)} of {len(datasets)} datasets, without {without}")
    for dataset in ["average", *datasets] if len(datasets) > 1 else datasets:
        for row in rows:
            by_seed = over_datasets([found[row.name, one] for one in (whole if dataset == "average" else [dataset])])
            mark, paper = " ".join(marks.get((row.name, dataset), [])), papers(made, row, dataset, whole, args)
            for score, (ours, spread) in (over_seeds(by_seed) if by_seed else {"": (None, None)}).items():
                theirs = paper.get(score)
                compared = ours is not None and isinstance(theirs, float) and not args.demo  # the paper has "8K", too
                lines.append({
                    "table": name, "dataset": dataset, "row": row.name, "seeds": len(by_seed), "mark": mark,
                    "score": score, "ours": ours, "spread": spread, "paper": theirs,
                    "difference": ours - theirs if compared else None,
                })  # fmt: skip
    return lines, notes


def papers(made, row, dataset, whole, args):
    """{score: figure} that the paper has for a row: of a dataset, or its average over the datasets `whole`."""
    found = PAPER[made.paper]["rows"].get(row.paper, {}) if made.paper else {}
    partial = not args.demo and len(whole) < len(LAYOUTS)  # the average is not over the paper's eleven datasets
    if made.scores is transfer:  # the average is over the targets
        targets = [target for target in args.named if target in found and target != "imagenet"]
        if 0 < len(targets) < 10 and not args.demo:
            found = {**found, "average": statistics.mean(found[target] for target in targets)}
        return found
    if made.each and dataset == "average" and found and whole and partial:
        found = {half: statistics.mean(found[one][half] for one in whole) for half in ("base", "new")}
        found["h"] = harmonic_mean(found["base"], found["new"])
    elif made.each:
        found = found.get(dataset, {})
    elif made.scores is halves and partial:
        found = {}  # the paper's other tables have the average over eleven datasets alone
    return {score: found[word] for score, word in PAPERS_WORDS.items() if word in found}


def written(name, lines, notes, args):
    """A table as Markdown: under each of our rows the paper's, and the difference."""
    made, blocks = MADE[name], {}  # {(dataset, row): {score: line}}
    for line in lines:
        if made.each or line["dataset"] == lines[0]["dataset"]:
            blocks.setdefault((line["dataset"], line["row"]), {})[line["score"]] = line
    scores = list(dict.fromkeys(line["score"] for line in lines if line["score"]))
    table = [["dataset", "row", *scores]]
    for (dataset, row), found in blocks.items():
        of_scores, mark = [found.get(score) for score in scores], next(iter(found.values()))["mark"]
        ours = [f"{text(line['ours'], line['spread'])} {mark}".strip() if line else mark or "-" for line in of_scores]
        table.append([dataset, row, *ours])
        for kind, shown in (("paper", text), ("difference", "{:+.2f}".format)):
            values = [line and line[kind] for line in of_scores]
            if any(value is not None for value in values):
                table.append(["", f"  {kind}", *("" if value is None else shown(value) for value in values)])
    about = [seeds_of(args) if len(args.seeds) == 1 else f"{seeds_of(args)}: mean ± standard deviation"]
    if any(line["paper"] is not None for line in lines):
        about.append("the paper's figures are of its own datasets" if args.demo else "difference: ours - paper")
    if not made.each and lines[0]["dataset"] == "average":
        about.append("figures.csv has each dataset")
    below = "\n".join(["", *map(printable, notes)]).rstrip()
    return f"### {made.title}\n\n{'; '.join(about)}\n\n{markdown(table)}\n{below}\n"


def seeds_of(args):
    return f"seed{'s' if len(args.seeds) > 1 else ''} {', '.join(map(str, args.seeds))}"


# The plan -------------------------------------------------------------------------------------------------------------

CLASSES = {"imagenet": 1000, "caltech101": 100, "oxford_pets": 37, "stanford_cars": 196, "oxford_flowers": 102,
           "food101": 101, "fgvc_aircraft": 100, "sun397": 397, "dtd": 47, "eurosat": 10, "ucf101": 101}  # fmt: skip
# Seconds of a step of 32 images on a CPU, where no cell of the kind (see `work_of`) is finished yet. ViT-B/16's are
# those of docs/speed.md, on 2 cores.
STEP = {("coop", False): 4.4, ("maple", False): 9.2, ("promptsrc", False): 13.0,
        ("coop", True): 0.03, ("maple", True): 0.045, ("promptsrc", True): 0.065}  # fmt: skip


def work_of(cell):
    """(kind, steps): what a step's time depends on, (backbone, whether on the demo), and how many there are, nearly."""
    settings, _ = sweep.parsed(cell)
    classes = CLASSES.get(settings.dataset, len(demo.CLASSNAMES))
    base = classes if settings.protocol == "cross-dataset" else (classes + 1) // 2
    learner, method, steps = LEARNERS[settings.backbone], settings.method[0], 0
    first, second = options.recipes(settings, method, learner, classes > base)
    if first:
        anchors = settings.anchors or options.paper_batch(base)[0]
        size = anchors if method == "mao" and not settings.no_base else first.batch_size
        steps += first.epochs * settings.shots * base // size
    if second:
        steps += second.epochs * (settings.unlabeled_shots or settings.shots) * (classes - base) // second.batch_size
    return (settings.backbone, settings.dataset.startswith("demo")), steps


def estimates(results, device):
    """{cell: seconds, or None where nothing is known}, from the finished cells of the kind, or from STEP.

    results: {cell: its result, or None}.
    """
    measured, found, work = {}, {}, {cell: work_of(cell) for cell in results}
    for cell, (kind, steps) in work.items():
        if results[cell] and steps:
            measured.setdefault(kind, []).append(results[cell]["seconds"] / steps)
    for cell, (kind, steps) in work.items():
        per_step = statistics.mean(measured[kind]) if kind in measured else STEP.get(kind) if device == "cpu" else None
        found[cell] = None if steps and per_step is None else steps * (per_step or 0)
    return found


def show_plan(results, args):
    """Prints one line per row: its cells, how many are done, the time of the rest. results: {cell: result or None}."""
    known, rows = estimates(results, args.device), {"all rows": list(results)}
    for cell in results:
        rows.setdefault(" ".join(cell[4:]), []).append(cell)  # a row has each dataset and seed
    print(f"{', '.join(args.datasets)}; {seeds_of(args)}. The time is that of tuning, one cell after another.")
    for row, cells in rows.items():
        left = [known[cell] for cell in cells if not results[cell]]
        minutes, unknown = sum(seconds or 0 for seconds in left) / 60, left.count(None)
        time = f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"
        time += f" and {unknown} cells of unknown time" if unknown else ""
        print(f"{len(cells):>4} cells, {len(cells) - len(left):>3} done, {time:>8} left: {row}")


# The command ----------------------------------------------------------------------------------------------------------


def draw(name, lines, folders, below):
    """The Figure of a key of MADE. lines: of the average, with scores. folders: of cells. below: the settings, text."""
    if name == "fig3":
        return figures.bars([line for line in lines if line["score"] == "H"], below)
    if name == "fig4-left":
        return figures.panels(lines, ("Base", "candidates", "seconds", "memory, MiB"), "K", below)
    if name == "fig4-right":
        return figures.panels(lines, ("H", "New", "seconds", "memory, MiB"), "unlabeled images per class", below)
    return figures.curves(folders) if name == "curves" else figures.confusion(folders[-1])[0]


def make(names, out, args, failed):
    """Writes and prints the tables of finished cells, and draws the figures.

    Returns (the names of the files that it wrote, how many figures are left out, each with a warning).
    """
    files, all_lines, left_out = [], [], 0
    below = f"{', '.join(args.datasets)}; {seeds_of(args)}"
    for name in names:
        if name in BATCHES:
            drawn = {f"{name}-{dataset}": (BATCHES[name], dataset, args.root) for dataset in args.of_batches}
        else:
            lines, notes = lines_of(name, args, out, failed)
            all_lines += lines
            table = written(name, lines, notes, args)
            print("\n" + table, end="")
            atomic_write(out / f"{name}.md", table)
            files.append(f"{name}.md")
            lines = [line for line in lines if line["ours"] is not None and line["dataset"] == lines[0]["dataset"]]
            first_seeds = [cells[0] for cells in cells_of(name, args).values() if cells[0] not in failed]
            folders = [out / sweep.parsed(cell)[1] for cell in first_seeds]
            drawn = {name: (draw, name, lines, folders, below)} if not MADE[name].paper and lines and folders else {}
        for figure, (function, *of_figure) in drawn.items():
            try:
                figures.save(function(*of_figure), out / f"{figure}.png")
                files.append(f"{figure}.png")
            except (ValueError, OSError) as error:  # a dataset or matplotlib is missing: the rest is made
                cause, missing, _ = str(error).partition(": add --download")  # run.py's option, not this command's
                get = f": python data.py {of_figure[0]} --root {args.root or 'data'} --download, or give --demo"
                warn(f"{figure}.png is left out: {cause}{missing and get}")
                left_out += 1
    if all_lines:
        table = io.StringIO()
        writer = csv.DictWriter(table, list(all_lines[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(all_lines)
        atomic_write(out / "figures.csv", table.getvalue())
        files.append("figures.csv")
    return files, left_out


def arguments(words=None):
    """The command line, with its defaults filled in."""
    parser = options.Parser("experiments.reproduce", __doc__)
    add, count = parser.add_argument, options.checked(Count)
    add("what", nargs="+", choices=NAMES, metavar="WHAT", help=f"one or more of {', '.join(NAMES)}")
    add("--plan", action="store_true", help="print the cells, what is done, and an estimate; run nothing")
    add("--datasets", nargs="+", default=[], metavar="NAME", help="default: the paper's eleven, or the demo's domains")
    add("--backbones", nargs="+", choices=list(LEARNERS), default=[], metavar="NAME",
        help=f"of Tables 1 and 2 and Fig. 3 (default: {' '.join(PAPERS_THREE)}; the baselines too)")  # fmt: skip
    add("--seeds", nargs="+", type=options.checked(Index), default=[], metavar="N", help="default: 1 2 3; --quick: 1")
    add("--demo", action="store_true", help="the embedded demo's eleven domains instead of the eleven datasets")
    add("--quick", action="store_true", help="one dataset, one seed, CoOp in Table 2, fewer points of Fig. 4")
    add("--recipe", choices=["own", "paper"], help="of baselines: their authors' (default), or that of the other "
        "backbones (default with --demo)")  # fmt: skip
    add("--root", metavar="DIR", help="of the datasets, as of run.py")
    add("--clip", metavar="NAME|FILE", help="as of run.py")
    add("--out", default="runs/reproduce", metavar="DIR", help="cells, tables and figures (default: runs/reproduce)")
    add("--serial", action="store_true", help="one cell after another, without Ray")
    add("--address", metavar="HOST:PORT", help="of a Ray cluster (default: Ray starts by itself, here)")
    add("--cpus-per-run", type=count, default=1, metavar="N", help="threads of a cell (default: 1)")
    gpus, share = options.checked(Annotated[float, Meta(ge=0, le=64)]), 0.25 if torch.cuda.is_available() else 0.0
    add("--gpus-per-run", type=gpus, default=share, metavar="X", help="default: 0.25 where there is a GPU, else 0")
    add("--memory-per-run", type=count, metavar="MIB", help="that Ray keeps for a cell (default: none)")
    args = parser.parse_args(words)
    if args.serial and args.address is not None:
        parser.error("--serial runs here, --address elsewhere: leave one out")
    for option in ("what", "datasets", "backbones", "seeds"):  # each value once
        setattr(args, option, list(dict.fromkeys(getattr(args, option))))
    known = DEMOS[1:] if args.demo else list(LAYOUTS)
    for dataset in args.datasets:
        if dataset not in known:
            parser.error(f"--datasets {dataset} is not known{' with --demo' if args.demo else ''}: {', '.join(known)}")
    names = NAMES[:-1] if "all" in args.what else args.what
    args.what = [part for name in names for part in (["fig4-left", "fig4-right"] if name == "fig4" else [name])]
    one = f"demo-{demo.DEFAULT}" if args.demo else "eurosat"
    args.named, args.datasets = args.datasets, args.datasets or ([one] if args.quick else known)
    args.of_batches = args.named or (["demo-plain", "demo-sepia"] if args.demo else ["caltech101", "oxford_pets"])
    args.of_batches = args.of_batches[:1] if args.quick else args.of_batches
    args.seeds = args.seeds or ([1] if args.quick else [1, 2, 3])
    args.of_table_2 = args.backbones or (["coop"] if args.quick else PAPERS_THREE)
    args.backbones = args.backbones or PAPERS_THREE
    args.recipe = args.recipe or ("paper" if args.demo else "own")
    args.device = "cuda" if args.gpus_per_run else "cpu"
    return args


def main(words=None):
    """The command line of experiments/reproduce.py. Returns 1 where a cell failed or a figure was left out."""
    args = arguments(words)
    out, tables = pathlib.Path(args.out), {name: cells_of(name, args) for name in args.what if name in MADE}
    cells = list(dict.fromkeys(cell for table in tables.values() for of_row in table.values() for cell in of_row))
    if args.plan:
        show_plan({cell: sweep.finished(cell, out) for cell in cells}, args)
        return None
    with run_lock(out):
        make_folder(out)
        results = {cell: sweep.finished(cell, out) for cell in cells}
        known, todo = estimates(results, args.device), [cell for cell in cells if results[cell] is None]
        # the longest first, so that at the end no worker waits long for another
        todo.sort(key=lambda cell: math.inf if known[cell] is None else known[cell], reverse=True)
        if cells:
            print(f"{len(cells)} cells, {len(cells) - len(todo)} done, {len(todo)} to run")
        measured = [table for name, table in tables.items() if MADE[name].scores in (cost, spent)]
        own = {cell for table in measured for of_row in table.values() for cell in of_row}
        ray = {"gpus": args.gpus_per_run, "mib": args.memory_per_run, "address": args.address}
        failed = sweep.run_cells(todo, out, args.cpus_per_run, args.device, own, args.serial, **ray)
        files, left_out = make(args.what, out, args, failed)
        if files:
            print(f"\nIn {out}: {', '.join(files)}")
    if failed:
        print(f"{len(failed)} cells failed; the same command tries them again")
    return 1 if failed or left_out else None


if __name__ == "__main__":
    run_main("experiments.reproduce", main)
