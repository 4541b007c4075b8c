"""The figures of README.md and docs/.

    python -m experiments.figures batch     assets/batch.png: one batch of hard negatives beside a random one
    python -m experiments.figures demo      assets/demo.png: what the demo's CLIP was pretrained on, and the domains

Every draw has a fixed seed: the same command makes the same figure.
"""

import argparse

import matplotlib.pyplot as plt
import numpy as np
import torch

import demo
import settings
from data import task_of
from experiments.pretrain import caption
from images import ShuffledBatches
from sampler import HardNegativeSampler, minilm, paper_batch

DOMAIN = "plain"  # of the batch: under plain light a reader sees the colors that the names say


def batch_figure():
    """The first batch of MAO's base phase, b rows of K images, the anchor first; and the first one without MAO."""
    task = task_of(vars(settings.parse(["--dataset", f"demo-{DOMAIN}"])))
    labels = np.array([label for _, label, _ in task.base_train])
    b, k = paper_batch(len(task.base_names))
    hard = next(iter(HardNegativeSampler(labels, task.base_names, b, k)))
    random = next(iter(ShuffledBatches(len(labels), b * k, seed=1)))

    figure = plt.figure(figsize=(18, 8.4), dpi=100)
    sides = figure.subfigures(1, 2, wspace=0.03)
    for side, title, batch in zip(sides, ("hard negatives, one row per anchor", "a random batch"), (hard, random)):
        names = [task.base_names[label] for label in labels[batch]]
        rows = [mean_similarity(names[start : start + k]) for start in range(0, b * k, k)]
        side.suptitle(
            f"{title}\nmean cosine similarity of the names\n"
            f"in a row {np.mean(rows):.2f}, in the batch {mean_similarity(names):.2f}",
            fontsize=20,
        )
        side.subplots_adjust(0.01, 0.01, 0.99, 0.79, 0.08, 0.5)
        for position, axis in enumerate(side.subplots(b, k).flat):
            axis.imshow(task.read(task.base_train[batch[position]][0]))
            axis.set_title(names[position].replace(" ", "\n"), fontsize=16, pad=4)
            axis.set_xticks([])
            axis.set_yticks([])
            framed = batch is hard and position % k == 0  # an anchor
            for spine in axis.spines.values():
                spine.set_visible(framed)
                spine.set_color("crimson")
                spine.set_linewidth(5)
    return figure


def mean_similarity(names):
    """The mean cosine similarity of two different names in a list, by MiniLM."""
    names = sorted(set(names))
    e = torch.nn.functional.normalize(minilm(names), dim=-1)  # [names, 384]
    cosine = e @ e.T
    return cosine[~torch.eye(len(names), dtype=torch.bool)].mean().item()


def demo_figure():
    """Images of pretraining with their captions, and the eleven domains with the same classes in each."""
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


FIGURES = {"batch": batch_figure, "demo": demo_figure}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figure", choices=list(FIGURES))
    parser.add_argument("--out", metavar="FILE", help="PNG file (default: assets/<figure>.png)")
    args = parser.parse_args()
    FIGURES[args.figure]().savefig(args.out or f"assets/{args.figure}.png")


if __name__ == "__main__":
    main()
