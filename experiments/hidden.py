"""What MAO's scores hide, and when its new phase helps: docs/results.md's tables and figure, over the demo's domains.

    python -m experiments.hidden                       all eleven domains, seeds 1 to 3 (2 cores: about an hour)
    python -m experiments.hidden --clip clip1.pt       zero-shot CLIP, CoOp and CoOp + MAO on another CLIP

A cell is a domain and a seed. It has run.py's three rows, and from the prompts that MAO's phase 1 left there, its phase
2 in each of the ways below. A cell that is there already is not computed again.
"""

if __name__ == "__main__":
    from cli import catch_early_interrupt

    catch_early_interrupt()  # the imports below take seconds

import json
import multiprocessing
import pathlib
import statistics

import torch

import data
import demo
import evaluate
import run
import settings
from checkpoints import load_clip_of
from cli import Parser, at_least, end
from encoders import ZeroShot
from experiments.reproduce import with_h
from images import Images, augmentation_seed, model_input
from pseudolabel import PseudoLabeler
from record import Record, folder_name, read_metrics, read_prompts, read_result, write
from rivals import BACKBONES

PHASE_2 = {  # how phase 2 is run, by the options of run.py
    "top1": [],
    "random draw": ["--unlabeled-draw", "random"],
    "center": ["--pseudo-label-view", "center"],
    "confident": ["--pseudo-labels", "confident"],
    "balanced": ["--pseudo-labels", "balanced"],
    "soft": ["--pseudo-labels", "soft"],
    "tuned": ["--pseudo-labeler", "tuned"],
}
VIEWS = 4  # of each unlabeled image, for the rule
SPLITS = {  # the six domains on which a rule's threshold is chosen; the other five test it
    "the lights of pretraining": list(demo.SEEN),
    "every other domain": list(demo.LIGHTS)[::2],
}


def options_of(domain, seed, clip, out):
    """run.py's options of a cell. clip: a checkpoint of experiments/pretrain.py, or None for the demo's."""
    options = ["--dataset", f"demo-{domain}", "--seed", str(seed), "--out", str(out), "--workers", "0"]
    return options if clip is None else [*options, "--clip", clip, "--clip-activation", "quickgelu"]


def compute(job):
    """One cell in a process of its own, on one thread; returns its file. job: (domain, seed, clip, out)."""
    domain, seed, clip, out = job
    path = pathlib.Path(out) / f"cell-{domain}-seed{seed}.json"
    if path.is_file():
        return path
    torch.set_num_threads(1)
    options = options_of(domain, seed, clip, out)
    run.main([*options, "--resume"])
    args = settings.parse(options)
    rows = {}
    for method in settings.METHODS:
        folder = pathlib.Path(out) / folder_name(args.dataset, args.backbone, method, seed, args.changed)
        rows[method] = read_result(folder)
    cell = {"rows": rows}
    if clip is None:
        base = read_prompts(folder / "base.safetensors", "coop", load_clip_of(vars(args), "cpu")[1])
        _, task, clip_model, *_ = open_run(options)
        tests = evaluate.Tests(task, ZeroShot(clip_model, task.base_names), "cpu")
        for name, more in PHASE_2.items():
            cell[name] = phase_2(name, [*options, *more], base, tests, pathlib.Path(out) / "phase2")
        cell["never"], cell["signs"] = before_phase_2(options, base, tests)
    write(path, json.dumps(cell, indent=1) + "\n")
    return path


def open_run(options):
    """(args, task, clip_model, SHA-256, row, learner) of run.py's options; the learner is a new one."""
    args = settings.parse(options)
    task = data.task_of(vars(args))
    clip_model, sha256 = load_clip_of(vars(args), "cpu")
    settings.fit(args, task, clip_model)
    torch.manual_seed(args.seed)
    learner = BACKBONES[args.backbone](clip_model, task.base_names, **args.settings)
    return args, task, clip_model, sha256, settings.row(args, "mao", task), learner


def phase_2(name, options, base, tests, out):
    """{"new", "one_list", "labels"} after phase 2 by run.py's options, from the prompts `base` of phase 1."""
    args, task, clip_model, sha256, row, learner = open_run(options)
    learner.load_state_dict(base)
    folder = out / folder_name(args.dataset, name.replace(" ", "-"), "mao", args.seed, {})
    record = Record(folder, settings.in_force(row, task, sha256), force=True)
    run.new_phase(learner, clip_model, task, row, record)
    last = {key: value.clone() for key, value in learner.state_dict().items()}
    scores = evaluate.score(learner, {"base": base, "new": last}, task, tests)
    record.result(scores, learner)
    return {"new": scores["new"], "one_list": scores["one_list"], "labels": label_accuracy(read_metrics(folder))}


def label_accuracy(metrics):
    """The share of right pseudo-labels over a new phase, in percent; None where no image was taken."""
    right = [line["pseudo_label_accuracy"] for line in metrics if "pseudo_label_accuracy" in line]
    return statistics.mean(right) if right else None


@torch.no_grad()
def before_phase_2(options, base, tests):
    """(New of the prompts of phase 1, the signs that are known before phase 2): no label of a new image is read.

    The signs are of the foundation CLIP and of the base-tuned prompts, over four views of the unlabeled images.
    """
    args, task, clip_model, _, row, learner = open_run(options)
    learner.load_state_dict(base)
    foundation = ZeroShot(clip_model, task.new_names, task.label_template)
    learner.set_classes(task.new_names)
    transform = run.augmentation(learner, clip_model, task, row)
    images, views = Images(task.new_train, task.new_read, transform), {"foundation": [], "tuned": []}
    labelers = {"foundation": PseudoLabeler(foundation), "tuned": PseudoLabeler(learner)}
    for view in range(VIEWS):
        keys = [(i, augmentation_seed(args.seed, 3, view, i)) for i in range(len(images))]
        pixels = torch.stack([images[key][0] for key in keys])
        f = foundation.image_features(model_input(pixels))
        for name, labeler in labelers.items():
            views[name].append(labeler.probabilities(f))  # [N, C_n]
    signs = {}
    for name, p in views.items():
        signs.update({f"{sign} of {name}": value for sign, value in signs_of(torch.stack(p)).items()})
    same = torch.stack(views["foundation"]).argmax(-1) == torch.stack(views["tuned"]).argmax(-1)
    signs["agreement of both"] = same.float().mean().item()
    new = evaluate.accuracy(*evaluate.top1(learner, tests.batches("new", learner), "cpu"))
    return new, signs


def signs_of(p):
    """What p [V, N, C_n] tells without labels: {sign: value}; entropies in nats."""
    labels = p.argmax(dim=-1)  # [V, N]
    pairs = [labels[i] == labels[j] for i in range(len(p)) for j in range(i)]
    predicted = torch.bincount(labels.flatten(), minlength=p.shape[-1]).float()
    mean, each = p.flatten(0, 1).mean(dim=0), entropy(p).mean()
    return {
        "confidence": p.max(dim=-1).values.mean().item(),
        "agreement over views": torch.stack(pairs).float().mean().item(),
        "entropy of classes": entropy(predicted / predicted.sum()).item(),
        "mutual information": (entropy(mean) - each).item(),
    }


def entropy(p):
    """-sum of p log p over the last dimension, in nats."""
    return -(p * p.clamp_min(1e-12).log()).sum(dim=-1)


# Tables ---------------------------------------------------------------------------------------------------------------


def mean(values):
    return statistics.mean(values)


def with_spread(by_seed):
    """ "mean ± standard deviation" of an average over domains, one per seed."""
    return shown(mean(by_seed), statistics.stdev(by_seed) if len(by_seed) > 1 else None)


def shown(value, spread):
    return f"{value:.2f}" if spread is None else f"{value:.2f} ± {spread:.2f}"


def h_of(base, new):
    """(H as the paper's tables have it, of the averages over seeds; its spread). base, new: one per seed."""
    return with_h([{"Base": b, "New": n} for b, n in zip(base, new)])["H"]


def over_domains(cells, value):
    """The average over domains of value(cell), one per seed. cells: {(domain, seed): cell}."""
    seeds = sorted({seed for _, seed in cells})
    return [mean([value(cell) for (_, seed), cell in cells.items() if seed == wanted]) for wanted in seeds]


def table_of_lists(cells):
    """Base, New and H apart and over one list of classes, of run.py's rows: Markdown."""
    print("\n| row | Base | New | H | one list: Base | New | H | all |\n|---|---|---|---|---|---|---|---|")
    names = {"zeroshot": "zero-shot CLIP", "backbone": "CoOp", "mao": "CoOp + MAO"}
    rows = [(names[method], method, "one_list") for method in settings.METHODS]
    for name, method, scores in [*rows, ("CoOp + MAO, final prompt alone", "mao", "one_list_final")]:
        of = [
            {"base": r["base"], "new": r["new"], "one": r[scores]} for r in (c["rows"][method] for c in cells.values())
        ]
        keyed = dict(zip(cells, of))
        base = over_domains(keyed, lambda found: found["base"])
        if scores == "one_list_final":
            base = over_domains(
                {key: cell["rows"]["mao"] for key, cell in cells.items()}, lambda r: r["base_by_final_prompt"]
            )
        new = over_domains(keyed, lambda found: found["new"])
        one = {key: over_domains(keyed, lambda found, key=key: found["one"][key]) for key in ("base", "new", "all")}
        columns = [with_spread(base), with_spread(new), shown(*h_of(base, new))]
        columns += [with_spread(one["base"]), with_spread(one["new"]), shown(*h_of(one["base"], one["new"]))]
        print(f"| {name} | {' | '.join(columns)} | {with_spread(one['all'])} |")


def table_of_phase_2(cells):
    """New after phase 2 in each of its ways, per domain, and how many pseudo-labels were right: Markdown."""
    print("\n| domain | before phase 2 | " + " | ".join(PHASE_2) + " |")
    print("|---|---|" + "---|" * len(PHASE_2))
    for domain in dict.fromkeys(domain for domain, _ in cells):
        own = {key: cell for key, cell in cells.items() if key[0] == domain}
        row = [[cell["never"] for cell in own.values()]]
        row += [[cell[name]["new"] for cell in own.values()] for name in PHASE_2]
        print(f"| {domain} | " + " | ".join(map(with_spread, row)) + " |")
    row = [over_domains(cells, lambda cell: cell["never"])]
    row += [over_domains(cells, lambda cell, name=name: cell[name]["new"]) for name in PHASE_2]
    print("| **average** | " + " | ".join(map(with_spread, row)) + " |")
    against = ["", ""]
    for name in list(PHASE_2)[1:]:
        wins = [cell[name]["new"] - cell["top1"]["new"] for cell in cells.values()]
        against.append(f"{mean(wins):+.2f}, above in {sum(win > 0 for win in wins)} of {len(wins)}")
    print("| against top1 | " + " | ".join(against) + " |")
    labels = [""]
    for name in PHASE_2:
        right = [cell[name]["labels"] for cell in cells.values() if cell[name]["labels"] is not None]
        labels.append(f"{mean(right):.1f}% right")
    print("| pseudo-labels | " + " | ".join(labels) + " |")


def choices(cells, second):
    """[(signs, New of phase 2 by the foundation's labels, New of the other choice)] of cells. second: its key."""
    other = {"never": lambda cell: cell["never"], "tuned": lambda cell: cell["tuned"]["new"]}[second]
    return [(cell["signs"], cell["top1"]["new"], other(cell)) for cell in cells]


def right_choices(found, sign, threshold):
    """How often a rule is right: it takes the second choice where sign(signs) exceeds the threshold. A tie is right."""
    right = 0
    for signs, first, second in found:
        right += (second >= first) if sign(signs) > threshold else (first >= second)
    return right


def best_threshold(found, sign):
    """The threshold, among those halfway between the values that occur and beyond them, that is right most often."""
    values = sorted({sign(signs) for signs, _, _ in found}) or [0]
    between = [(a + b) / 2 for a, b in zip(values, values[1:])]
    return max([values[0] - 1, *between, values[-1] + 1], key=lambda t: right_choices(found, sign, t))


RULES = {  # what speaks for the second choice, the more the more: "theirs" is of the base-tuned prompts
    "mutual information, theirs over the foundation's": lambda s: difference(s, "mutual information"),
    "confidence, theirs over the foundation's": lambda s: difference(s, "confidence"),
    "agreement over views, theirs over the foundation's": lambda s: difference(s, "agreement over views"),
    "entropy of the predicted classes, theirs over the foundation's": lambda s: difference(s, "entropy of classes"),
    "agreement of both": lambda s: s["agreement of both"],
    "confidence of the foundation, low": lambda s: -s["confidence of foundation"],
    "agreement of the foundation over views, low": lambda s: -s["agreement over views of foundation"],
}


def difference(signs, name):
    return signs[f"{name} of tuned"] - signs[f"{name} of foundation"]


def table_of_rules(cells):
    """How often a rule chooses the better of two, its threshold fixed on six domains and tested on five: Markdown.

    The last rules have no threshold to fix: one that was written down before (0.02), and none at all.
    """
    for second, name in (("tuned", "labels of the base-tuned prompts"), ("never", "no phase 2")):
        parts, fixed_on = [], []
        for domains in SPLITS.values():
            fixed = choices([cell for (domain, _), cell in cells.items() if domain in domains], second)
            tested = choices([cell for (domain, _), cell in cells.items() if domain not in domains], second)
            parts += [fixed, tested]
            fixed_on += [fixed, fixed]
        titles = " | ".join(f"fixed on {split} | tested on the others" for split in SPLITS)
        print(f"\n| phase 2 with the foundation's labels, or {name} | {titles} |")
        print("|---|" + "---|" * len(parts))
        for rule, sign in RULES.items():
            counts = []
            for part, fixed in zip(parts, fixed_on):
                counts.append(f"{right_choices(part, sign, best_threshold(fixed, sign))} of {len(part)}")
            print(f"| {rule} | " + " | ".join(counts) + " |")
        rules = {
            "mutual information, theirs over the foundation's by 0.02": (RULES[next(iter(RULES))], 0.02),
            "always the foundation's labels": (lambda _: -1, 0),
            f"always {name}": (lambda _: 1, 0),
        }
        for rule, (sign, threshold) in rules.items():
            counts = [f"{right_choices(part, sign, threshold)} of {len(part)}" for part in parts]
            print(f"| {rule} | " + " | ".join(counts) + " |")


def figure(cells, path):
    """H apart and over one list of classes, each row a pair of bars: a picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = {"zeroshot": "zero-shot CLIP", "backbone": "CoOp", "mao": "CoOp + MAO"}
    _, axes = pyplot.subplots(1, 2, figsize=(9, 3.2), constrained_layout=True)
    for shift, label, h in (
        (-0.2, "told which half", lambda r: (r["base"], r["new"])),
        (0.2, "one list of classes", lambda r: (r["one_list"]["base"], r["one_list"]["new"])),
    ):
        heights, spreads = [], []
        for method in names:
            pairs = [over_domains(cells, lambda cell, i=i: h(cell["rows"][method])[i]) for i in (0, 1)]  # noqa: B023
            height, spread = h_of(*pairs)
            heights.append(height)
            spreads.append(spread or 0)
        bars = axes[0].bar([i + shift for i in range(3)], heights, 0.38, yerr=spreads, capsize=3, label=label,
                           color="0.35" if shift < 0 else "0.75", edgecolor="black")  # fmt: skip
        axes[0].bar_label(bars, fmt="%.1f", padding=3)
    axes[0].set_xticks(range(3), names.values())
    axes[0].set_ylim(0, 100)
    axes[0].set_ylabel("H, %")
    axes[0].legend(loc="lower right")
    zero_shot = [cell["rows"]["zeroshot"]["new"] for cell in cells.values()]
    for key, marker, label in (("never", "x", "after phase 1"), ("top1", "o", "after phase 2")):
        new = [cell[key] if key == "never" else cell[key]["new"] for cell in cells.values()]
        axes[1].plot(zero_shot, new, marker, color="black", fillstyle="none", label=label)
    axes[1].axline((0, 0), slope=1, color="0.6", linewidth=1)
    axes[1].set_xlim(0, 100)
    axes[1].set_ylim(0, 100)
    axes[1].set_xlabel("New of zero-shot CLIP, %")
    axes[1].set_ylabel("New of CoOp + MAO, %")
    axes[1].legend(loc="upper left")
    pyplot.savefig(path, dpi=130)


def main():
    """The command line of experiments/hidden.py."""
    parser = Parser("experiments.hidden", __doc__)
    add = parser.add_argument
    add("--domains", nargs="+", choices=list(demo.LIGHTS), default=list(demo.LIGHTS), metavar="NAME")
    add("--seeds", nargs="+", type=int, default=[1, 2, 3], metavar="N", help="default: 1 2 3")
    add("--clip", metavar="FILE", help="of experiments.pretrain --seed (default: the demo's; then also phase 2's ways)")
    add("--jobs", type=at_least(1, 100), default=2, metavar="N", help="cells at a time, a thread each (default: 2)")
    add("--out", default="runs/hidden", metavar="DIR", help="for the cells (default: runs/hidden)")
    add("--figure", metavar="FILE", help="draw the figure of docs/results.md, a PNG")
    args = parser.parse_args()
    jobs = [(domain, seed, args.clip, args.out) for seed in args.seeds for domain in args.domains]
    with multiprocessing.get_context("spawn").Pool(args.jobs, maxtasksperchild=1) as pool:
        paths = list(pool.imap(compute, jobs))
    cells = {job[:2]: json.loads(path.read_text()) for job, path in zip(jobs, paths)}
    table_of_lists(cells)
    if args.clip is None:
        table_of_phase_2(cells)
        table_of_rules(cells)
        if args.figure:
            figure(cells, args.figure)


if __name__ == "__main__":
    end("experiments.hidden", main)
