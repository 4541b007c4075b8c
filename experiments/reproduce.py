"""Every table and figure of the paper from one command: what comes out here, beside what the paper has.

    python -m experiments.reproduce table1 --plan                     what it would run, how long; runs nothing
    python -m experiments.reproduce table1 --root data                11 datasets x 7 rows x 3 seeds, on Ray
    python -m experiments.reproduce table1 --datasets eurosat dtd --backbones coop --seeds 1 --serial
    python -m experiments.reproduce all --demo --quick                on the embedded demo, one domain and one seed
    python -m experiments.reproduce table8 --address 10.0.0.1:6379    on a Ray cluster

A cell is a row of run.py for one dataset and one seed. What is done is not done again: stop it and go on as you like.
As in the paper, Base and New are averaged first, over datasets and seeds, and H is the harmonic mean of the averages.
"""

if __name__ == "__main__":
    from cli import catch_early_interrupt

    catch_early_interrupt()  # the imports below take seconds

import csv
import io
import json
import math
import pathlib
import statistics
import time
import types
from typing import NamedTuple

import torch
from tqdm import tqdm

import demo
import settings
from checkpoints import load_clip_of
from cli import Parser, at_least, end, printable, warn
from data import DEMOS
from evaluate import build_learner, fit_state, harmonic_mean, scorer
from experiments import figures, sweep
from layouts import LAYOUTS
from record import alone, make_folder, read_config, read_metrics, read_prompts, write
from rivals import BACKBONES, RIVALS
from sampler import paper_batch

PAPER = json.loads(pathlib.Path(__file__).with_name("paper.json").read_text())  # its tables, with notes on what lacks
PAPERS_THREE = [name for name in BACKBONES if name not in RIVALS]
TOP_K = [2, 4, 6, 8, 10, 12, 14, 16]  # Fig. 4, left
UNLABELED = [1, 2, 4, 8, 16, 32, 64]  # Fig. 4, right: images a class
QUICK_TOP_K, QUICK_UNLABELED = [2, 8, 16], [1, 16, 64]


class Row(NamedTuple):
    """A row of a table: its name, the options of run.py that make it, and its name in paper.json, or None."""

    name: str
    options: list
    paper: str | None


def plain(backbone, *more, name=None, paper=None):
    return Row(name or BACKBONES[backbone].__name__, ["--backbone", backbone, "--method", "backbone", *more], paper)


def with_mao(backbone, *more, name=None, paper=None):
    name = name or f"{BACKBONES[backbone].__name__} + MAO"
    return Row(name, ["--backbone", backbone, "--method", "mao", *more], paper)


ZERO_SHOT = Row("zero-shot CLIP", ["--method", "zeroshot"], None)  # not in the paper's tables


def pairs(args, backbones=None):
    """Zero-shot CLIP, and each backbone without and with MAO."""
    found = [ZERO_SHOT]
    for backbone in backbones or args.backbones:
        if backbone in RIVALS:  # not in the paper's Tables 1 and 2
            found += [plain(backbone, *args.of_rivals), with_mao(backbone, *args.of_rivals)]
        else:
            found += [plain(backbone, paper=backbone), with_mao(backbone, paper=f"{backbone}+mao")]
    return found


def table_4(_):
    return [
        plain("promptsrc", name="PromptSRC", paper="backbone"),
        with_mao("promptsrc", "--no-new", name="(a) base phase alone", paper="a_base_dde_ar"),
        with_mao("promptsrc", "--no-base", name="(b) new phase alone", paper="b_new_dde_ar"),
        with_mao("promptsrc", "--no-reg-new", name="(c) without reg-N", paper="c_base_dde_ar_new_dde"),
        with_mao("promptsrc", name="(d) full", paper="d_full"),
    ]


def table_5(_):
    return [
        plain("promptsrc", name="PromptSRC", paper="backbone"),
        with_mao("promptsrc", name="+ MAO, foundation CLIP", paper="foundation_clip"),
        with_mao("promptsrc", "--pseudo-labeler", "tuned", name="+ MAO, tuned prompts", paper="fine_tuned_prompt"),
    ]


def table_7(args):
    rivals = [plain(name, *args.of_rivals, paper=name) for name in ("cocoop", "proda", "kgcoop", "tcp")]
    return [*rivals, plain("promptsrc", paper="promptsrc"), with_mao("promptsrc", name="MAO-SRC", paper="mao-src")]


def table_8(_):
    return [
        plain("coop", name="(a) CoOp", paper="a_coop"),
        plain("coop", "--epochs", "40", name="(b) CoOp, 2x epochs", paper="b_coop_2x_epochs"),
        with_mao("coop", "--no-new", name="(c) + MAO, base phase alone", paper="c_mao_base_only"),
        with_mao("coop", name="(d) + MAO", paper="d_mao_full"),
    ]


def table_3(args):
    return [
        plain("coop", paper="coop"),
        with_mao("coop", paper="coop+mao"),
        plain("maple", paper="maple"),
        plain("coprompt", *args.of_rivals, paper="coprompt"),
    ]


def figure_3(args):
    """DePT is a rival of its own here, on CoOp: on MaPLe and PromptSRC it is not there."""
    dept = plain("dept", *args.of_rivals, name="CoOp + DePT", paper=None)
    return [row for pair in pairs(args)[1:] for row in ([pair, dept] if pair.name == "CoOp" else [pair])]


def figure_4_left(args):
    counts = QUICK_TOP_K if args.quick else TOP_K
    return [with_mao("coop", "--no-new", *(() if k == 8 else ("--top-k", str(k))), name=str(k)) for k in counts]


def figure_4_right(args):
    counts = QUICK_UNLABELED if args.quick else UNLABELED
    return [with_mao("coop", *(() if s == 16 else ("--unlabeled-shots", str(s))), name=str(s)) for s in counts]


# What one cell tells: {score: number}. Where it tells Base and New, H comes from their averages.


def halves(result, _):
    return {"Base": result["base"], "New": result["new"]}


def transfer(result, _):
    """Table 2: the accuracy on the source and on each target."""
    return {name: value for name, value in result.items() if name == "average" or name in (*LAYOUTS, *DEMOS)}


def cost(result, folder):
    """Table 3: what tuning costs, and the images per second at test of the tuned learner, its text encoded before."""
    seconds = [line["seconds"] for line in read_metrics(folder) if line["phase"] == "base"]
    return {
        "learnable": result["learnable_parameters"],
        "memory, MiB": result["peak_mib"],
        "s per base epoch": statistics.mean(seconds),
        "images/s": inference_rate(folder),
        **halves(result, folder),
    }


def spent(result, folder):
    """Fig. 4: the mean size H of the candidate set in the base phase, the time of all phases, the memory."""
    sizes = [line["candidates"] for line in read_metrics(folder) if line["phase"] == "base"]
    return {
        **halves(result, folder),
        "H-size": statistics.mean(sizes),
        "seconds": result["seconds"],
        "memory, MiB": result["peak_mib"],
    }


@torch.no_grad()
def inference_rate(folder, batch=64, repeats=3):
    """Images per second of a finished row at test: the fastest of some batches of noise, since speed sees no image."""
    config = read_config(folder)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    clip_model, sha256 = load_clip_of(config, device)
    learner = build_learner(config, clip_model, config["classnames"], folder / "config.json")
    fit_state(learner, read_prompts(folder / "base.safetensors", config["backbone"], sha256), folder / "config.json")
    pixels, seconds, classify = clip_model.visual.input_resolution, [], scorer(learner)
    images = torch.randn(batch, 3, pixels, pixels, device=device)
    for _ in range(repeats + 1):  # the first one warms up
        started = time.perf_counter()
        classify(images).sum().item()  # .item() waits for a GPU
        seconds.append(time.perf_counter() - started)
    return batch / min(seconds[1:])


class Made(NamedTuple):
    """A table or figure that is made from cells."""

    title: str
    rows: object  # a function from the command's arguments to a list of `Row`
    tell: object  # what one cell tells, a function above
    paper: str | None = None  # its key in paper.json
    each: bool = False  # a block for each dataset, after the one of the average


MADE = {
    "table1": Made("Table 1: base-to-new", pairs, halves, "table1_base_to_new", True),
    "table2": Made("Table 2: cross-dataset", lambda a: pairs(a, a.of_table_2), transfer, "table2_cross_dataset"),
    "table3": Made("Table 3: what tuning costs", table_3, cost, "table3_cost_flowers102"),
    "table4": Made("Table 4: MAO's parts, PromptSRC", table_4, halves, "table4_ablation_promptsrc"),
    "table5": Made("Table 5: whose pseudo-labels, PromptSRC", table_5, halves, "table5_pseudo_labeler_promptsrc"),
    "table7": Made("Table 7: more baselines", table_7, halves, "table7_more_baselines"),
    "table8": Made("Table 8: MAO's parts, CoOp", table_8, halves, "table8_ablation_coop"),
    "fig3": Made("Fig. 3: plug-and-play methods", figure_3, halves),
    "fig4-left": Made("Fig. 4, left: K of Eq. 4, CoOp + MAO's base phase", figure_4_left, spent),
    "fig4-right": Made("Fig. 4, right: unlabeled images a class, CoOp + MAO", figure_4_right, spent),
    "curves": Made("Training curves, CoOp", lambda _: [plain("coop"), with_mao("coop")], halves),
    "confusion": Made("Confusion, CoOp + MAO", lambda _: [with_mao("coop")], halves),
}
PAPERS_WORDS = {"Base": "base", "New": "new", "H": "h", "learnable": "params", "memory, MiB": "memory_mb",
                "s per base epoch": "seconds_per_epoch", "images/s": "inference_fps"}  # fmt: skip


def cells_of(name, args):
    """{(row's name, dataset): [a cell for each seed]} of a table or figure; a cell is a tuple of run.py's options."""
    datasets, more = args.datasets, []
    if name == "table2":  # tuned on one dataset, scored on the others
        source = "demo-plain" if args.demo else "imagenet"
        datasets, more = [source], ["--protocol", "cross-dataset"]
        targets = [dataset for dataset in args.named if dataset != source]
        if 0 < len(targets) < 10:  # all the others are the default
            more += ["--targets", *targets]
    elif name == "table3":  # of one dataset
        datasets = args.datasets if args.demo else ["oxford_flowers"]
        datasets = datasets[:1]
    elif name in ("curves", "confusion"):
        datasets = args.datasets[:1]
    return {
        (row.name, dataset): [
            ("--dataset", dataset, "--seed", str(seed), *row.options, *more, *args.common) for seed in args.seeds
        ]
        for row in MADE[name].rows(args)
        for dataset in datasets
    }


# From cells to a table ------------------------------------------------------------------------------------------------


def lines_of(name, args, out, failed):
    """(lines, notes): a table's figures, dicts, the average over datasets first; and what is to be said under it."""
    made, notes, lines = MADE[name], [], []
    told, marks = {}, {}  # of (row, dataset): what each seed's cell tells, or None; the numbers of its failures
    for key, cells in cells_of(name, args).items():
        told[key], marks[key] = [], ""
        for cell in cells:
            folder = out / sweep.parsed(cell)[1]
            if cell in failed:
                notes.append(f"[{len(notes) + 1}] {folder.name}: {failed[cell]}")
                marks[key] += f" [{len(notes)}]"
            result = None if cell in failed else sweep.finished(cell, out)
            told[key].append(made.tell(result, folder) if result else None)
    rows, datasets = (list(dict.fromkeys(part)) for part in zip(*told))
    whole = whole_datasets(told, rows, datasets)
    if len(whole) < len(datasets) > 1:
        without = ", ".join(dataset for dataset in datasets if dataset not in whole)
        notes.append(f"the averages are over {len(whole)} of {len(datasets)} datasets, without {without}")
    for dataset in ["average", *datasets] if len(datasets) > 1 else datasets:
        for row in made.rows(args):
            over = whole if dataset == "average" else [dataset]
            by_seed = averaged([told[row.name, one] for one in over])
            line = {"table": name, "dataset": dataset, "row": row.name, "seeds": len(by_seed)}
            line["mark"] = "" if dataset == "average" else marks[row.name, dataset].strip()
            paper = papers(made, row, dataset, whole, args)
            for score, (ours, spread) in (with_h(by_seed) if by_seed else {"": (None, None)}).items():
                theirs, difference = paper.get(score), None
                if ours is not None and isinstance(theirs, float) and not args.demo:
                    difference = ours - theirs
                lines.append({**line, "score": score, "ours": ours, "spread": spread, "paper": theirs,
                              "difference": difference})  # fmt: skip
    return lines, notes


def whole_datasets(told, rows, datasets):
    """The datasets of which all rows have all seeds: over them averages compare rows. A row without any cell is out."""
    some = [row for row in rows if any(any(told[row, dataset]) for dataset in datasets)]
    return [dataset for dataset in datasets if some and all(all(told[row, dataset]) for row in some)]


def averaged(by_dataset):
    """What a row tells for each seed that all datasets have, averaged over them. by_dataset: lists over seeds."""
    found = []
    for of_seed in zip(*by_dataset):
        if all(of_seed):
            found.append({score: mean_or_none([one[score] for one in of_seed]) for score in of_seed[0]})
    return found


def mean_or_none(values):
    return None if None in values else statistics.mean(values)


def with_h(by_seed):
    """{score: (mean, standard deviation or None)} of {score: number} for each seed; H of the averaged Base and New."""
    found = {score: mean_or_none([told[score] for told in by_seed]) for score in by_seed[0]}
    each = {score: [told[score] for told in by_seed] for score in found}
    if found.get("Base") is not None and found.get("New") is not None:
        found["H"] = harmonic_mean(found["Base"], found["New"])
        each["H"] = [harmonic_mean(told["Base"], told["New"]) for told in by_seed]
    spread = {score: statistics.stdev(each[score]) for score, mean in found.items() if mean is not None and by_seed[1:]}
    order = sorted(found, key=lambda score: ("Base", "New", "H").index(score) if score in ("Base", "New", "H") else 3)
    return {score: (found[score], spread.get(score)) for score in order}


def papers(made, row, dataset, whole, args):
    """{score: figure} that the paper has for a row: of a dataset, or its average over the datasets `whole`."""
    if made.paper is None or row.paper is None:
        return {}
    found = PAPER[made.paper]["rows"][row.paper]
    if made.tell is transfer:  # its average is over the targets; over fewer than ten, that of those
        targets = [target for target in args.named if target in found and target != "imagenet"]
        if not args.demo and 0 < len(targets) < 10:
            found = {**found, "average": statistics.mean(found[target] for target in targets)}
        return found
    all_there = args.demo or len(whole) == len(LAYOUTS)
    if made.each and dataset != "average":
        found = found.get(dataset, {})
    elif made.each and all_there:
        found = found["average"]
    elif made.each and whole:
        found = {half: statistics.mean(found[one][half] for one in whole) for half in ("base", "new")}
        found["h"] = harmonic_mean(found["base"], found["new"])
    elif made.each or (made.tell is halves and not all_there):
        found = {}  # the paper's other tables have the average over eleven datasets alone
    return {score: found[word] for score, word in PAPERS_WORDS.items() if word in found}


# From a table to text -------------------------------------------------------------------------------------------------


def written(name, lines, notes, args):
    """A table as Markdown, which reads well in a terminal too."""
    made = MADE[name]
    blocks = {}  # {(dataset, row): {score: line}}
    for line in lines:
        if made.each or line["dataset"] == lines[0]["dataset"]:
            blocks.setdefault((line["dataset"], line["row"]), {})[line["score"]] = line
    scores = list(dict.fromkeys(line["score"] for line in lines if line["score"]))
    kinds = [kind for kind in ("ours", "paper", "difference") if any(line[kind] is not None for line in lines)]
    if len(scores) > 6:  # Table 2: ours, the paper's and the difference stand below each other
        table = [["", *scores]]
        for (_, row), found in blocks.items():
            for kind in kinds or ["ours"]:
                cells = [shown(found, score, kind) for score in scores]
                if kind == "ours" or any(cells):
                    table.append([row if kind == "ours" else f"  {kind}", *cells])
    else:
        there = {(kind, line["score"]) for line in lines for kind in kinds if kind == "ours" or line[kind] is not None}
        columns = [(kind, score) for kind in kinds for score in scores if (kind, score) in there]
        table = [["dataset", "row", *(score if kind == "ours" else f"{kind}: {score}" for kind, score in columns)]]
        for (dataset, row), found in blocks.items():
            table.append([dataset, row, *(shown(found, score, kind) for kind, score in columns)])
    about = [seeds_told(args) if len(args.seeds) == 1 else f"{seeds_told(args)}: mean ± standard deviation"]
    if "paper" in kinds:
        about.append("the paper's figures are of its own datasets" if args.demo else "difference: ours - paper")
    if not made.each and lines[0]["dataset"] == "average":
        about.append("figures.csv has each dataset")
    text = [f"### {made.title}", "", "; ".join(about), "", *aligned(table), "", *(printable(note) for note in notes)]
    return "\n".join(text).rstrip() + "\n"


def seeds_told(args):
    return f"seed {args.seeds[0]}" if len(args.seeds) == 1 else f"seeds {', '.join(map(str, args.seeds))}"


def shown(found, score, kind):
    """A cell of a table, text. found: {score: line} of a row, {"": line} where no cell of it is there."""
    if "" in found or score not in found:
        return (found[""]["mark"] or "-") if kind == "ours" and "" in found else ""
    line, value = found[score], found[score][kind]
    if value is None or isinstance(value, str):  # the paper has "8K"
        return value or ("-" if kind == "ours" else "")
    if kind == "difference":
        return f"{value:+.2f}"
    if isinstance(value, int):  # a number of parameters
        return f"{value:,}"
    text = f"{value:,.0f}" if value >= 1000 else f"{value:.2f}"
    if kind == "ours":
        text += f" ± {line['spread']:.2f}" if line["spread"] is not None else ""
        text += f" {line['mark']}" if line["mark"] else ""
    return text


def aligned(table):
    """The lines of a Markdown table, its columns below each other. table: lists of text, the first is the head."""
    widths = [max(map(len, column)) for column in zip(*table)]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths)) + " |" for line in table]
    return [lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]


# The plan -------------------------------------------------------------------------------------------------------------

CLASSES = {  # of each dataset
    "imagenet": 1000, "caltech101": 100, "oxford_pets": 37, "stanford_cars": 196, "oxford_flowers": 102,
    "food101": 101, "fgvc_aircraft": 100, "sun397": 397, "dtd": 47, "eurosat": 10, "ucf101": 101,
}  # fmt: skip
# Seconds of a step of 32 images and MiB of a cell, where no cell of the kind is done yet, by `kind_of`. ViT-B/16's are
# those of docs/speed.md, on 2 cores: MiB of a step, of CLIP's weights, and 800 for all else.
STEP = {
    ("coop", False): (4.4, 2200), ("maple", False): (9.2, 6000), ("promptsrc", False): (13.0, 6800),
    ("coop", True): (0.03, 1000), ("maple", True): (0.045, 1000), ("promptsrc", True): (0.065, 1000),
}  # fmt: skip


def steps_of(cell):
    """How many steps of an optimizer a cell has, nearly: a dataset of one's own may hold fewer images."""
    args, _ = sweep.parsed(cell)
    classes = CLASSES.get(args.dataset, len(demo.CLASSNAMES))
    base = classes if args.protocol == "cross-dataset" else (classes + 1) // 2
    row = settings.row(args, args.method[0], types.SimpleNamespace(new_names=range(classes - base)))
    anchors = args.anchors or paper_batch(base)[0]
    steps = 0
    if row.base_recipe:
        size = anchors if row.method == "mao" and not row.no_base else row.base_recipe.batch_size
        steps += row.base_recipe.epochs * args.shots * base // size
    if row.new_recipe:
        steps += row.new_recipe.epochs * args.unlabeled_shots * (classes - base) // row.new_recipe.batch_size
    return steps


def kind_of(cell):
    """What makes the time of a step: the backbone, and whether it is the demo's small CLIP."""
    args, _ = sweep.parsed(cell)
    return args.backbone, args.dataset.startswith("demo")


def estimates(results, device):
    """{cell: (seconds, MiB), or None where nothing is known}, from the finished cells of the kind, or from STEP.

    results: {cell: its result, or None}.
    """
    per_step = {}
    for cell, result in results.items():
        if result and steps_of(cell):
            per_step.setdefault(kind_of(cell), []).append((result["seconds"] / steps_of(cell), result["peak_mib"] or 0))
    found = {}
    for cell in results:
        known = per_step.get(kind_of(cell))
        if known:
            seconds, mib = statistics.mean(one for one, _ in known), max(one for _, one in known)
        elif kind_of(cell) in STEP and device == "cpu":
            seconds, mib = STEP[kind_of(cell)]
        else:
            seconds, mib = None, None
        steps = steps_of(cell)
        found[cell] = None if seconds is None and steps else ((seconds or 0) * steps, mib or 0)
    return found


def show_plan(results, args):
    """Prints the cells, their number, what is done, what the rest will take. results: {cell: its result, or None}."""
    cells, known = list(results), estimates(results, args.device)
    left = [cell for cell in cells if not results[cell]]
    for cell in cells:
        state = "done" if results[cell] else "unknown" if known[cell] is None else f"{known[cell][0] / 60:.1f} min"
        print(f"{state:>10}  {sweep.parsed(cell)[1]}")
    told = [known[cell] for cell in left if known[cell] is not None]
    print(f"\n{len(cells)} cells, {len(cells) - len(left)} done, {len(left)} to run")
    if left:
        minutes = sum(seconds for seconds, _ in told) / 60
        span = f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"
        mib = max([mib for _, mib in told], default=0)
        print(f"estimate, of tuning alone: {span} one after another, up to {mib:,.0f} MiB a cell")
        if len(told) < len(left):
            print(f"not in it: {len(left) - len(told)} cells of a kind of which none is done yet")


# The command ----------------------------------------------------------------------------------------------------------

BATCHES = {"fig5": figures.batch_in_plane, "fig6": figures.batch_of_images}  # need no cells
NAMES = ["table1", "table2", "table3", "table4", "table5", "table7", "table8", "fig3", "fig4", "fig5", "fig6",
         "curves", "confusion", "all"]  # fmt: skip


def wanted(args):
    """The tables and figures to make: keys of MADE and BATCHES."""
    names = NAMES[:-1] if "all" in args.what else dict.fromkeys(args.what)
    return [part for name in names for part in (["fig4-left", "fig4-right"] if name == "fig4" else [name])]


def run_cells(todo, own, out, args):
    """Runs cells; returns {cell: why it failed, a sentence}. own: those that have a process of their own."""
    failed, how = {}, (todo, out, args.cpus_per_run, args.device, own)
    if args.serial:
        outcomes = sweep.serial(*how)
    else:
        outcomes = sweep.on_ray(*how, args.gpus_per_run, args.memory_per_run, args.address)
    for cell, error, warnings in tqdm(outcomes, "cells", len(todo)):
        name = sweep.parsed(cell)[1]
        for warning in dict.fromkeys(warnings):
            warn(f"{name}: {warning.split(': warning: ', 1)[1]}")
        if error:
            failed[cell] = error
            warn(f"{name} failed: {error}")
    return failed


def make(names, out, args, failed):
    """Writes and prints the tables, and draws the figures, of finished cells.

    Returns (the files it wrote, how many figures are left out for want of their dataset).
    """
    rows, files, left_out = [], [], 0
    for name in names:
        caption = f"{', '.join(args.datasets)}; {seeds_told(args)}"
        if name in BATCHES:
            for dataset in args.of_batches:
                try:
                    figures.save(BATCHES[name](dataset, args.root), out / f"{name}-{dataset}.png")
                    files.append(f"{name}-{dataset}.png")
                except (ValueError, OSError) as error:  # the dataset is not there: the other figures are drawn
                    warn(f"{name} of {dataset} is left out: {error}")
                    left_out += 1
            continue
        lines, notes = lines_of(name, args, out, failed)
        rows += lines
        text = written(name, lines, notes, args)
        write(out / f"{name}.md", text)
        files.append(f"{name}.md")
        print("\n" + text, end="")
        whole = [line for line in lines if line["ours"] is not None]
        if not whole:
            continue  # all of its cells failed
        if name == "fig3":
            figure = figures.bars(whole, caption)
        elif name in ("fig4-left", "fig4-right"):
            figure = figures.sweep(name, whole, caption)
        elif name in ("curves", "confusion"):
            cells = [c for cells in cells_of(name, args).values() for c in cells[:1] if c not in failed]
            folders = [out / sweep.parsed(cell)[1] for cell in cells]
            figure = getattr(figures, name)(folders) if folders else None
        else:
            continue
        if figure is not None:
            figures.save(figure, out / f"{name}.png")
            files.append(f"{name}.png")
    if rows:
        table = io.StringIO()
        writer = csv.DictWriter(table, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write(out / "figures.csv", table.getvalue())
        files.append("figures.csv")
    return files, left_out


def arguments():
    parser = Parser("experiments.reproduce", __doc__)
    add = parser.add_argument
    add("what", nargs="+", choices=NAMES, metavar="WHAT", help=f"one or more of {', '.join(NAMES)}")
    add("--plan", action="store_true", help="print the cells, what is done, and an estimate; run nothing")
    add("--datasets", nargs="+", metavar="NAME", help="default: the paper's eleven; with --demo, its domains")
    add("--backbones", nargs="+", choices=list(BACKBONES), metavar="NAME",
        help=f"of Tables 1 and 2 and Fig. 3 (default: {' '.join(PAPERS_THREE)}; the rivals too)")  # fmt: skip
    add("--seeds", nargs="+", type=at_least(0, 2**31), metavar="N", help="default: 1 2 3; with --quick 1")
    add("--demo", action="store_true", help="the embedded demo's eleven domains in place of the eleven datasets")
    add("--quick", action="store_true", help="eurosat alone (of the demo: its default domain), one seed, CoOp in "
        "Table 2, fewer points of Fig. 4")  # fmt: skip
    add("--recipe", choices=["own", "paper"], help="of rivals: their authors' (default), or that of the other "
        "backbones (default with --demo)")  # fmt: skip
    add("--root", metavar="DIR", help="of the datasets, as of run.py")
    add("--clip", metavar="NAME|FILE", help="as of run.py")
    add("--out", default="runs/reproduce", metavar="DIR", help="cells, tables and figures (default: runs/reproduce)")
    add("--serial", action="store_true", help="one cell after another, without Ray")
    add("--address", metavar="HOST:PORT", help="of a Ray cluster (default: Ray starts by itself, here)")
    add("--cpus-per-run", type=at_least(1, 1024), default=1, metavar="N", help="threads of a cell (default: 1)")
    add("--gpus-per-run", type=at_least(0.0, 64), metavar="X", help="default: 0.25 where there is a GPU, else 0")
    add("--memory-per-run", type=at_least(1, 10**8), metavar="MIB", help="that Ray keeps for a cell (default: none)")
    args = parser.parse_args()
    if args.serial and args.address is not None:
        parser.error("--serial runs here, --address elsewhere: leave one out")
    known = DEMOS[1:] if args.demo else list(LAYOUTS)
    for option in ("datasets", "backbones", "seeds"):  # each value once
        setattr(args, option, list(dict.fromkeys(getattr(args, option) or [])))
    for dataset in args.datasets:
        if dataset not in known:
            parser.error(f"--datasets {dataset} is not known{' with --demo' if args.demo else ''}: {', '.join(known)}")
    args.named, quick = args.datasets, [f"demo-{demo.DEFAULT}" if args.demo else "eurosat"]
    args.of_batches = args.named or figures.TWO_DATASETS["demo" if args.demo else "paper"]
    args.datasets = args.named or (quick if args.quick else known)
    args.seeds = args.seeds or ([1] if args.quick else [1, 2, 3])
    args.of_table_2 = args.backbones or (["coop"] if args.quick else PAPERS_THREE)
    args.backbones = args.backbones or PAPERS_THREE
    args.of_rivals = ["--recipe", "paper"] if (args.recipe or ("paper" if args.demo else "own")) == "paper" else []
    args.common = [word for option in ("root", "clip") if getattr(args, option) is not None
                   for word in (f"--{option}", getattr(args, option))]  # fmt: skip
    if args.gpus_per_run is None:
        args.gpus_per_run = 0.25 if torch.cuda.is_available() else 0.0
    args.device = "cuda" if args.gpus_per_run else "cpu"
    return args


def main():
    args = arguments()
    out, names = pathlib.Path(args.out), wanted(args)
    tables = [cells_of(name, args) for name in names if name in MADE]
    cells = list(dict.fromkeys(cell for table in tables for row in table.values() for cell in row))  # each once
    if args.plan:
        show_plan({cell: sweep.finished(cell, out) for cell in cells}, args)
        return None
    with alone(out):
        make_folder(out)
        results = {cell: sweep.finished(cell, out) for cell in cells}
        todo = [cell for cell in cells if results[cell] is None]
        if not args.serial:  # the longest first, so that at the end no worker waits long for another
            known = estimates(results, args.device)
            todo.sort(key=lambda cell: known[cell][0] if known[cell] else math.inf, reverse=True)
        print(f"{len(cells)} cells, {len(cells) - len(todo)} done, {len(todo)} to run")
        sweep.clear(out, {sweep.parsed(cell)[1] for cell in todo})
        own = {cell for name in names if name in MADE and MADE[name].tell in (cost, spent)
                 for row in cells_of(name, args).values() for cell in row}  # fmt: skip
        failed = run_cells(todo, own, out, args) if todo else {}
        sweep.clear(out, {sweep.parsed(cell)[1] for cell in failed})
        files, left_out = make(names, out, args, failed)
        print(f"\nIn {out}: {', '.join(files) or 'nothing'}")
    if failed:
        print(f"{len(failed)} cells failed; the same command tries them again")
    return 1 if failed or left_out else None


if __name__ == "__main__":
    end("experiments.reproduce", main)
