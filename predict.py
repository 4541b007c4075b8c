"""Names what is on images of your own by tuned prompts, and writes it as CSV: path, class, confidence.

    python predict.py photo.jpg --prompt runs/demo-coop-mao-seed1/new.safetensors --classes names.txt
    python predict.py photos --prompt runs/demo-coop-mao-seed1/new.safetensors --classes names.txt --out photos.csv

The confidence is the probability of that class among the candidates (Eq. 3). An image that cannot be read has a row
without a class; the command then ends with exit code 1.
"""

if __name__ == "__main__":
    from cli import catch_early_interrupt

    catch_early_interrupt()  # the imports below take seconds

import csv
import io
import os
import pathlib
import sys

import torch
from tqdm import tqdm

from backbones import PromptLearner
from checkpoints import load_clip_of
from cli import Parser, at_least, end, printable
from data import read_names
from evaluate import build_learner, finite, fit_state, scorer
from export import export
from images import (
    FolderReader,
    Images,
    UnreadableImage,
    default_workers,
    find_images,
    loader,
    model_input,
    test_transform,
)
from record import read_header, read_prompts, telling, whole

MANY = 1000  # class names that are encoded at a time


def load_learner(prompt, classnames, clip=None, device="cpu"):
    """The prompt learner of a file that run.py wrote, before the names that it was tuned on: (learner, its CLIP).

    classnames: those to come, for a file of an older version, which does not name its own. clip: where
    that CLIP is now, if not where it was. ValueError, FileNotFoundError: not such a file, or another CLIP.
    """
    header = read_header(prompt)
    try:
        clip_model, sha256 = load_clip_of(header, device, clip)
    except (ValueError, OSError) as error:
        raise ValueError(f"{prompt} needs its CLIP: {error}") from error
    state = read_prompts(prompt, header["backbone"], sha256)
    learner = build_learner(header, clip_model, header.get("classnames", classnames), f"the header of {prompt}")
    fit_state(learner, state, f"the header of {prompt}")
    return learner, clip_model


@torch.no_grad()
def encode_names(learner, classnames):
    """Puts a learner before class names, and returns their text features g [C, d] where they are many, else None.

    Many names are encoded a thousand at a time, so that memory does not grow with them; the learner then holds the last
    of them alone. A learner with scores of its own, or text that depends on the image, holds them all.
    """
    by_similarity = getattr(type(learner), "logits", PromptLearner.logits) is PromptLearner.logits
    if len(classnames) <= MANY or not by_similarity or getattr(learner, "text_depends_on_image", False):
        learner.set_classes(classnames)
        return None
    parts = []
    for start in tqdm(range(0, len(classnames), MANY), "class names", unit="thousand"):
        learner.set_classes(classnames[start : start + MANY])
        parts.append(learner.text_features())
    return torch.cat(parts)


class ImagesOrTroubles(Images):
    """An `Images` that goes on past what it cannot read: (uint8 [3, pixels, pixels], what is wrong with it or "")."""

    def __init__(self, paths, read, pixels):
        super().__init__(paths, read, test_transform(pixels))
        self.pixels = pixels

    def __getitem__(self, index):
        try:
            return super().__getitem__(index)[0], ""
        except UnreadableImage as error:
            return torch.zeros(3, self.pixels, self.pixels, dtype=torch.uint8), str(error)


@torch.no_grad()
def predict(learner, batches, device="cpu", g=None):
    """Yields, batch by batch, the probabilities [B, C] of the classes (Eq. 3), and what is wrong with each image or "".

    batches: a loader of an `ImagesOrTroubles`. g: of `encode_names`.
    """
    logits = scorer(learner, g)
    for images, wrong in tqdm(batches, unit="batch"):
        yield finite(logits(model_input(images.to(device)))).float().softmax(dim=-1).cpu(), wrong


def write_table(out, paths, classes, batches):
    """The CSV file `out`: of each path the class of highest probability, and that; nothing where there is trouble.

    The rows are written as the batches come, into a file beside `out` that takes its place at the end. batches: of
    `predict`. Yields each batch again when it is written. OSError: it cannot be written.
    """
    paths = iter(paths)
    with whole(out) as file:
        table = io.TextIOWrapper(file, "utf-8", "surrogateescape", newline="", write_through=True)
        rows = csv.writer(table)
        rows.writerow(["path", "class", "confidence"])
        for probabilities, troubles in batches:
            confidences, best = probabilities.max(dim=-1)
            with telling(out):
                for label, confidence, wrong in zip(best.tolist(), confidences.tolist(), troubles):
                    cells = ["", ""] if wrong else [harmless(classes[label]), f"{confidence:.4f}"]
                    rows.writerow([harmless(str(next(paths))), *cells])
            yield probabilities, troubles
        with telling(out):
            table.detach()


def harmless(text):
    """A cell that no spreadsheet takes for a formula: one that begins like it gets an apostrophe before it."""
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text


def arguments():
    """The command line of predict.py. ValueError, FileNotFoundError: what it names cannot be used."""
    parser = Parser("predict.py", __doc__)
    add = parser.add_argument
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # fmt: off
    add("images", type=pathlib.Path, metavar="IMAGE_OR_DIR", nargs="?", help="an image, or a folder, its subfolders "
        "included")
    add("--prompt", required=True, metavar="FILE", help="prompts that run.py left: new.safetensors for the new "
        "classes, base.safetensors for the base classes")
    add("--classes", required=True, metavar="FILE", help="the candidates' names, one per line")
    add("--out", type=pathlib.Path, default="predictions.csv", metavar="FILE", help="default: predictions.csv")
    add("--export", type=pathlib.Path, metavar="FILE", help="write the tuned classifier for other programs: "
        ".safetensors, a head for any CLIP user, or .onnx, image encoder and head (see export.py)")
    add("--clip", metavar="NAME|FILE", help="the frozen CLIP, if it is not where the run had it")
    add("--device", choices=["cpu", "cuda"], default=device, help="default: cuda where there is one")
    add("--workers", type=at_least(0, 1000), metavar="N", help="load images (default: one per core, at most 8; none "
        "for one image)")
    # fmt: on
    args = parser.parse_args()
    if args.images is None and args.export is None:
        raise ValueError("nothing to do: give an image or a folder, or --export FILE")
    written = {"--out": args.out, "--export": args.export}
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: PyTorch sees no GPU here; use --device cpu")
    for option, path in written.items():
        if path is not None and (path.is_dir() or not path.parent.is_dir()):
            raise ValueError(f"{option} {path} must be a file in a folder that is there: give another")
    read = {"--prompt": args.prompt, "--classes": args.classes, "the image": args.images}
    for option, path in written.items():
        for other, there in {**read, **written}.items():
            if other == option or path is None or there is None:
                continue
            if os.path.realpath(path) == os.path.realpath(there):
                raise ValueError(f"{option} {path} is {other} too, which it would replace: give another file")
    if args.export is not None and args.export.suffix == ".onnx":
        args.device = "cpu"  # an ONNX file is for any device
    if args.images is None:
        return args
    if not args.images.exists():
        raise FileNotFoundError(f"there is no image or folder {args.images}: give one")
    if args.workers is None:
        args.workers = 0 if args.images.is_file() else default_workers()
    return args


def main():
    """Exports the classifier, predicts, or both. Returns what `classify` does."""
    args = arguments()
    classes = read_names(args.classes)
    learner, clip_model = load_learner(args.prompt, classes, args.clip, args.device)
    g = encode_names(learner, classes)
    if args.export is not None:
        export(args.export, learner, read_header(args.prompt), classes, clip_model.visual.input_resolution, g)
        print(printable(f"{len(classes)} classes in {args.export}"))
    if args.images is not None:
        return classify(args, learner, g, clip_model, classes)


def classify(args, learner, g, clip_model, classes):
    """Predicts, writes the table, and prints the top 5 of a single image. Returns 1 where an image could not be read.

    UnreadableImage: the single image could not be.
    """
    single = args.images.is_file()
    folder, names = (args.images.parent, [args.images.name]) if single else (args.images, find_images(args.images))
    images = ImagesOrTroubles(names, FolderReader(folder), clip_model.visual.input_resolution)
    batches, wrong = loader(images, args.workers, prefetch_factor=1, batch_size=64), []
    found = predict(learner, batches, args.device, g)
    for probabilities, troubles in write_table(args.out, (folder / name for name in names), classes, found):
        wrong += [trouble for trouble in troubles if trouble]
        if single and wrong:
            raise UnreadableImage(wrong[0])
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
    end("predict.py", main)
