"""The README's picture of the demo's world: what pretraining saw, and the eleven few-shot domains beside it.

    python -m experiments.demo_picture --out assets/demo.png
"""

import argparse

import matplotlib.pyplot as plt
import numpy as np

import demo


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="assets/demo.png", help="PNG file (default: assets/demo.png)")
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    figure = plt.figure(figsize=(15, 7), dpi=80)
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1.3))

    left.suptitle("pretraining: pictures and their captions")
    left.subplots_adjust(0.02, 0.02, 0.98, 0.88, 0.1, 0.5)
    for axis in left.subplots(5, 4).flat:
        name, light = rng.choice(demo.CLASSNAMES), rng.choice(demo.SEEN)
        axis.imshow(demo.draw(name, light, rng))
        axis.set_title(demo.caption(name, light, rng).replace(" of ", "\nof "), fontsize=8)
        axis.axis("off")

    right.suptitle("the eleven few-shot domains (the last five lights were never seen in pretraining)")
    right.subplots_adjust(0.14, 0.02, 0.99, 0.93, 0, 0.08)
    names = demo.CLASSNAMES[3::8]
    for row, domain in zip(right.subplots(len(demo.LIGHTS), 1), demo.LIGHTS):
        pictures = [np.asarray(demo.read(f"{domain}/test/{name}/00")) for name in names]
        row.imshow(np.concatenate(pictures, 1))
        row.set_ylabel(domain + (" = demo" if domain == demo.DEFAULT else ""), rotation=0, ha="right", va="center")
        row.set_xticks([]), row.set_yticks([])
    figure.savefig(args.out)


if __name__ == "__main__":
    main()
