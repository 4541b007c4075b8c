"""Classifies your images with tuned prompts, and writes the result as CSV: path, class, confidence.

    python predict.py photo.jpg --prompt runs/demo-coop-mao-seed1/new.safetensors --classes names.txt
    python predict.py photos --prompt runs/demo-coop-mao-seed1/new.safetensors --classes names.txt --out photos.csv
    python predict.py --prompt runs/demo-coop-mao-seed1/new.safetensors --classes names.txt --export model.onnx

The confidence is the probability of that class among the candidates (Eq. 3). An image that cannot be read has a row
without a class; the command then ends with exit code 1.
"""

import csv
import io
import os
import pathlib
import sys

import torch
from msgspec.structs import asdict
from tqdm import tqdm

from backbones import BACKBONES
from baselines import BASELINES
from harness import images, runs
from harness.cli import printable, run_main
from harness.clips import load_clip_of
from harness.export import export
from harness.files import open_atomic, wrap_os_errors
from harness.folders import read_names
from harness.options import Parser, Workers, checked
from harness.scores import check_finite, scorer
from harness.tuning import choose_device


def load_learner(prompt, classnames, clip=None, device="cpu"):
    """The prompt learner of a file that run.py wrote, with these class names: (learner, the file's header, a dict).

    clip: where its CLIP is now, if not where it was. ValueError, FileNotFoundError: not such a file, or another CLIP.
    """
    header = runs.read_header(prompt)
    clip_model, sha256 = load_clip_of(asdict(header), device, clip)
    state, where = runs.read_prompts(prompt, header.backbone, sha256), f"the header of {prompt}"
    tuned_on = header.classnames or classnames  # an older file does not name them
    about = header.backbone, header.settings, clip_model, tuned_on, [state], where
    learner = runs.build_learner(BACKBONES | BASELINES, *about)
    with torch.no_grad():
        learner.set_classes(classnames)
    return learner, asdict(header)


class ImagesOrErrors(images.Images):
    """An `images.Images` that returns an error instead of raising it: (uint8 [3, pixels, pixels], error or "")."""

    def __init__(self, paths, read, pixels):
        super().__init__(paths, read, images.test_transform(pixels))
        self.pixels = pixels

    def __getitem__(self, index):
        try:
            return super().__getitem__(index)[0], ""
        except images.UnreadableImage as error:
            return torch.zeros(3, self.pixels, self.pixels, dtype=torch.uint8), str(error)


@torch.no_grad()
def predict(learner, batches, device="cpu"):
    """Yields, batch by batch, the probabilities [B, C] of the classes (Eq. 3), and each image's error or "".

    batches: a loader of an `ImagesOrErrors`.
    """
    logits = scorer(learner)
    for pixels, errors in tqdm(batches, unit="batch"):
        yield check_finite(logits(images.model_input(pixels.to(device)))).float().softmax(dim=-1).cpu(), errors


def write_table(out, paths, classes, batches):
    """The CSV file `out`: for each path, the most likely class and its probability; nothing for an unreadable image.

    Rows are written as the batches come, into a file beside `out` that takes its place at the end. batches: of
    `predict`. Yields each batch again when it is written. OSError: it cannot be written.
    """
    paths = iter(paths)
    with open_atomic(out) as file:
        table = io.TextIOWrapper(file, "utf-8", "surrogateescape", newline="", write_through=True)
        rows = csv.writer(table)
        rows.writerow(["path", "class", "confidence"])
        for probabilities, errors in batches:
            confidences, best = probabilities.max(dim=-1)
            with wrap_os_errors(out):
                for label, confidence, error in zip(best.tolist(), confidences.tolist(), errors):
                    cells = ["", ""] if error else [no_formula(classes[label]), f"{confidence:.4f}"]
                    rows.writerow([no_formula(str(next(paths))), *cells])
            yield probabilities, errors
        with wrap_os_errors(out):
            table.detach()


def no_formula(text):
    """Prefixes an apostrophe to a cell that a spreadsheet would take for a formula."""
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text


def parse(arguments=None):
    """The command line of predict.py. ValueError, FileNotFoundError: what it names cannot be used."""
    parser = Parser("predict.py", __doc__)
    add = parser.add_argument
    # fmt: off
    add("images", type=pathlib.Path, metavar="IMAGE_OR_DIR", nargs="?", help="an image, or a folder with subfolders")
    add("--prompt", required=True, metavar="FILE", help="prompts that run.py left: new.safetensors for the new "
        "classes, base.safetensors for the base classes")
    add("--classes", required=True, metavar="FILE", help="the candidates' names, one per line")
    add("--out", type=pathlib.Path, default="predictions.csv", metavar="FILE", help="default: predictions.csv")
    add("--export", type=pathlib.Path, metavar="FILE", help="write the tuned classifier for other programs: "
        ".safetensors, a head for any CLIP user, or .onnx, image encoder and head (harness/export.py)")
    add("--clip", metavar="CLIP", help="the frozen CLIP, if it is not where the run had it")
    add("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    add("--workers", type=checked(Workers), metavar="N", help="load images (default: one per core, at most 8)")
    # fmt: on
    args = parser.parse_args(arguments)
    if args.images is None and args.export is None:
        raise ValueError("nothing to do: give an image or a folder, or --export FILE")
    if args.images is not None and not args.images.exists():
        raise FileNotFoundError(f"there is no image or folder {args.images}: give one")
    written = {"--out": args.out, "--export": args.export}
    named = {"--prompt": args.prompt, "--classes": args.classes, "the image": args.images, **written}
    for option, path in written.items():
        if path is not None and (path.is_dir() or not path.parent.is_dir()):
            raise ValueError(f"{option} {path} must be a file in a folder that exists: give another")
        for other, there in named.items():
            if path and there and other != option and os.path.realpath(path) == os.path.realpath(there):
                raise ValueError(f"{option} {path} is {other} too, which it would replace: give another file")
    return args


def main(arguments=None):
    """Exports the classifier, predicts, or both. Returns what `classify` does."""
    args = parse(arguments)
    onnx = args.export is not None and args.export.suffix == ".onnx"  # an ONNX file is for any device
    device = choose_device("cpu" if onnx else args.device)
    classes = read_names(args.classes)
    learner, header = load_learner(args.prompt, classes, args.clip, device)
    if args.export is not None:
        export(args.export, learner, header, classes)
        print(printable(f"{len(classes)} classes in {args.export}"))
    if args.images is not None:
        return classify(args, learner, classes, device)


def classify(args, learner, classes, device):
    """Predicts, writes the table, and prints the top 5 of a single image. Returns 1 where an image could not be read.

    UnreadableImage: the single image cannot be read.
    """
    single, folder = args.images.is_file(), args.images
    names, folder = ([folder.name], folder.parent) if single else (images.find_images(folder), folder)
    dataset = ImagesOrErrors(names, images.FolderReader(folder), learner.clip_model.visual.input_resolution)
    workers = args.workers if args.workers is not None else 0 if single else images.default_workers()
    batches, wrong = images.loader(dataset, workers, prefetch_factor=1, batch_size=64), []
    found = predict(learner, batches, device)
    for probabilities, errors in write_table(args.out, (folder / name for name in names), classes, found):
        wrong += [error for error in errors if error]
        if single and wrong:
            raise images.UnreadableImage(wrong[0])
        top = probabilities[0].topk(min(5, len(classes)))
    if single:
        for probability, label in zip(top.values.tolist(), top.indices.tolist()):
            print(f"{100 * probability:6.2f}%  {printable(classes[label])}")
    print(printable(f"1 image in {args.out}" if len(names) == 1 else f"{len(names)} images in {args.out}"))
    if wrong:
        headline = f"predict.py: {len(wrong)} of {len(names)} images have no class there:"
        print(headline, *map(printable, wrong), sep="\n", file=sys.stderr)
        return 1


if __name__ == "__main__":
    run_main("predict.py", main)
