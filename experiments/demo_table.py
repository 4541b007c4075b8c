"""The README's tables of the demo: backbones with and without MAO, over domains and seeds.

    python -m experiments.demo_table                                        CoOp on the default domain, seeds 1-3
    python -m experiments.demo_table --domains all                          CoOp on all eleven
    python -m experiments.demo_table --backbones coop maple promptsrc       these on the default domain
    python -m experiments.demo_table --backbones kgcoop tcp --recipe paper  rivals, tuned as long as the others

With --reuse finished rows in --out are taken as they are. As in the paper's tables, Base and New are averaged first,
over seeds and domains, and H is the harmonic mean of the averages. Behind a mean stands the standard deviation over
seeds.
"""

import argparse
import json
import multiprocessing
import pathlib
import statistics

import demo
from evaluate import harmonic_mean
from record import folder_name
from rivals import BACKBONES

ROWS = ("zeroshot", "backbone", "mao")


def folder(out, domain, backbone, method, seed, recipe):
    changed = {} if recipe == "own" else {"recipe": recipe}
    return pathlib.Path(out) / folder_name(f"demo-{domain}", backbone, method, seed, changed)


def tune(job):
    """One run of run.py in a process of its own, on one thread: two of them fill two cores better than one."""
    out, domain, backbone, seed, recipe, reuse = job
    import torch

    import run

    torch.set_num_threads(1)
    options = ["--dataset", f"demo-{domain}", "--backbone", backbone, "--seed", str(seed), "--recipe", recipe]
    run.main([*options, "--out", out, "--workers", "0", "--resume" if reuse else "--force"])


def scores(out, domain, backbone, method, seeds, recipe):
    """{"base", "new", "h", "labels"}: a list over the seeds, percent."""
    found = {"base": [], "new": [], "h": [], "labels": []}
    for seed in seeds:
        place = folder(out, domain, backbone, method, seed, recipe)
        result = json.loads((place / "result.json").read_text())
        for key in ("base", "new", "h"):
            found[key].append(result[key])
        if method == "mao":
            lines = map(json.loads, (place / "metrics.jsonl").read_text().splitlines())
            right = [line["pseudo_label_accuracy"] for line in lines if line["phase"] == "new"]
            if right:  # CoPrompt has no new phase
                found["labels"].append(statistics.mean(right))
    return found


def cells(found):
    """The cells of a row of `scores`: the average and, from two seeds on, the sample standard deviation."""
    averages = {key: statistics.mean(values) for key, values in found.items() if values}
    averages["h"] = harmonic_mean(averages["base"], averages["new"])
    spreads = {key: f" ± {statistics.stdev(values):.2f}" for key, values in found.items() if len(values) > 1}
    return [f"{averages[key]:.2f}{spreads.get(key, '')}" if key in averages else "" for key in found]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--domains", nargs="+", default=[demo.DEFAULT], help="names, or all (default: the demo's)")
    parser.add_argument("--backbones", nargs="+", default=["coop"], choices=list(BACKBONES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--recipe", choices=["own", "paper"], default="own", help="as of run.py (default: own)")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time (default: 2)")
    parser.add_argument("--out", default="runs/table", help="where the rows go (default: runs/table)")
    parser.add_argument("--reuse", action="store_true", help="take finished rows in --out as they are")
    args = parser.parse_args()
    domains = list(demo.LIGHTS) if args.domains == ["all"] else args.domains

    jobs = []
    for seed in args.seeds:
        for domain in domains:
            for backbone in args.backbones:
                done = (folder(args.out, domain, backbone, "mao", seed, args.recipe) / "result.json").is_file()
                if not (args.reuse and done):
                    jobs.append((args.out, domain, backbone, seed, args.recipe, args.reuse))
    with multiprocessing.get_context("spawn").Pool(args.jobs, maxtasksperchild=1) as pool:
        for done, _ in enumerate(pool.imap_unordered(tune, jobs), 1):
            print(f"run {done} of {len(jobs)} done", flush=True)

    rows = [("zero-shot CLIP", args.backbones[0], "zeroshot")]
    for backbone in args.backbones:
        name = BACKBONES[backbone].__name__
        rows += [(name, backbone, "backbone"), (f"{name} + MAO", backbone, "mao")]
    print("\n| domain | row | Base | New | H | pseudo-labels right |\n|---|---|---|---|---|---|")
    for domain in domains:
        for label, backbone, method in rows:
            found = scores(args.out, domain, backbone, method, args.seeds, args.recipe)
            print(f"| {domain} | {label} | " + " | ".join(cells(found)) + " |")
    if len(domains) > 1:
        for label, backbone, method in rows:
            every = [scores(args.out, domain, backbone, method, args.seeds, args.recipe) for domain in domains]
            base, new = (statistics.mean(statistics.mean(found[key]) for found in every) for key in ("base", "new"))
            print(f"| **average** | {label} | {base:.2f} | {new:.2f} | {harmonic_mean(base, new):.2f} | |")


if __name__ == "__main__":
    main()
