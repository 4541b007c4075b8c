"""Classifies your images with tuned prompts, and writes the result as CSV: path, class, confidence.

    python predict.py photo.jpg --run runs/demo-coop-mao-seed1
    python predict.py photos more/photo.jpg --run runs/demo-coop-mao-seed1 --candidates new --out photos.csv
    python predict.py photos --prompt runs/demo-coop-mao-seed1/new.safetensors --classes names.txt
    python predict.py --run runs/demo-coop-mao-seed1 --export model.onnx

With --run, the candidates are all classes of the run, base and new, each with its own phase's prompts, as one deploys
them; --candidates takes one half. The confidence is the probability of that class among the candidates (Eq. 3). An
image that cannot be read has a row without a class; the command then ends with exit code 1. From Python:

    import predict
    from PIL import Image
    classify = predict.load_classifier("runs/demo-coop-mao-seed1")
    print(classify([Image.open("photo.jpg")]))  # [(class, confidence)]
"""

import pathlib

from harness.cli import printable, run_main
from harness.files import is_own, open_atomic, wrap_os_errors
from harness.options import Device, Parser, Workers, checked


def parse(arguments=None):
    """The command line of predict.py. Ends with exit code 2 and one sentence where what it names cannot be used."""
    parser = Parser("predict.py", __doc__)
    add, tuned = parser.add_argument, parser.add_mutually_exclusive_group(required=True).add_argument
    # fmt: off
    add("images", type=pathlib.Path, metavar="IMAGE_OR_DIR", nargs="*", help="images, and folders with subfolders")
    tuned("--run", metavar="DIR", help="the folder of a finished run: its prompts and its class names")
    add("--candidates", choices=["all", "base", "new"], help="the classes of --run (default: all that it has)")
    tuned("--prompt", metavar="FILE", help="prompts instead: .safetensors of a run, or the authors' model.pth.tar-N")
    add("--classes", metavar="FILE", help="the candidates of --prompt, one per line (default: those that it names)")
    add("--out", type=pathlib.Path, default="predictions.csv", metavar="FILE", help="default: predictions.csv")
    add("--export", type=pathlib.Path, metavar="FILE", help="for other programs: .safetensors (a head), .onnx (all)")
    add("--clip", metavar="CLIP", help="the frozen CLIP, if it is not where the run had it")
    add("--device", type=checked(Device), metavar="DEVICE", help="as of run.py (default: cuda where there is one)")
    add("--workers", type=checked(Workers), metavar="N", help="load images (default: one per core, at most 8)")
    # fmt: on
    args = parser.parse_args(arguments and [str(word) for word in arguments])
    if not args.images and args.export is None or not args.run and not args.prompt:
        parser.error("nothing to do: give an image, a folder or --export FILE, and --run DIR or --prompt FILE")
    if (args.run and args.classes) or (args.prompt and args.candidates):
        parser.error("--candidates belongs to --run, and --classes to --prompt: leave one out")
    for place in (*args.images, *([pathlib.Path(args.run)] if args.run else [])):
        if not place.exists():
            parser.error(f"there is no image or folder {place}: give one")
    for option, path in (("--out", args.images and args.out), ("--export", args.export)):
        if path and (path.is_dir() or not path.parent.is_dir()):
            parser.error(f"{option} {path} must be a file in a folder that exists: give another")
        if path and not is_own(path, ".csv" if option == "--out" else path.suffix):
            parser.error(f"{option} {path} is there, and predict.py did not write it: give another file")
    return args


if __name__ == "__main__":
    run_main("predict.py", lambda: parse() and None)  # wrong options are handled here: the imports below take seconds

import csv
import io
import sys

import torch
from msgspec.structs import asdict
from PIL import Image
from tqdm import tqdm

from backbones import BACKBONES
from baselines import BASELINES
from harness import image_files, images, runs
from harness.clips import load_clip_of
from harness.export import export
from harness.folders import read_names
from harness.released import read_released
from harness.scores import check_finite, scorer
from harness.tuning import choose_device


def load_learners(prompts, clip=None, device="cpu"):
    """The prompt learners of files, on one CLIP: ([learner, ...], the last file's header, a dict, all class names).

    prompts: pairs of a file, by run.py or by the authors' trainers, and its candidates' names; None: those that the
    file has. clip: where the CLIP is now, if not where it was. ValueError, FileNotFoundError: not such a file, no
    names, or another CLIP.
    """
    learners, classes, opened = [], [], None
    for file, names in prompts:
        header, state = read_released(file) or (runs.read_header(file), None)
        names = names or header.candidates
        if not names:
            raise ValueError(f"{file} does not name the classes that it is for: give them with --classes")
        clip_model, sha256 = opened = opened or load_clip_of(asdict(header), device, clip)
        state = state or runs.read_prompts(file, header.backbone, sha256)
        where, tuned_on = f"the header of {file}", header.classnames or names  # an older file does not name them
        about = header.backbone, header.settings, clip_model, tuned_on, [state], where
        learners.append(runs.build_learner(BACKBONES | BASELINES, *about))
        with torch.no_grad():
            learners[-1].set_classes(names)
        classes += names
    return learners, {**asdict(header), "clip_sha256": sha256}, classes


def prompts_of(run, candidates=None):
    """What `load_learners` takes, of the folder of a finished run: each class has its own phase's prompts.

    candidates: "base", "new" or "all"; None: all that the run has. ValueError, FileNotFoundError: not such a folder, or
    no such classes.
    """
    config, wanted = runs.read_config(run), [candidates] if candidates in ("base", "new") else ["base", "new"]
    names = {"base": config.classnames, "new": config.new_classnames}
    if config.method == "zeroshot" or runs.read_result(run) is None or not any(names[half] for half in wanted):
        raise ValueError(
            f"{run} is zero-shot or not finished, or has no {wanted[-1]} classes: give a tuned run's folder"
        )
    files = runs.prompt_files(pathlib.Path(run), config)
    return [(files[half], names[half]) for half in wanted if names[half]]


@torch.no_grad()
def load_classifier(run, candidates=None, clip=None, device="cpu"):
    """A function from a list of PIL images to a list of (class name, confidence). It turns images by EXIF, in place.

    run, candidates: as of `prompts_of`. clip: as of `load_learners`. ValueError, FileNotFoundError: as these.
    """
    learners, _, classes = load_learners(prompts_of(run, candidates), clip, device)
    transform, logits = images.test_transform(learners[0].clip_model.visual.input_resolution), scorer(*learners)

    @torch.no_grad()
    def classify(photos):
        pixels = torch.stack([transform(image_files.as_shown(photo)) for photo in photos])
        found = check_finite(logits(images.model_input(pixels.to(device)))).float().softmax(dim=-1).max(dim=-1)
        return [(classes[label], share) for share, label in zip(found.values.tolist(), found.indices.tolist())]

    return classify


class ImagesOrErrors(images.Images):
    """An `images.Images` that returns an error instead of raising it: (uint8 [3, pixels, pixels], error or "")."""

    def __getitem__(self, index):
        try:
            return super().__getitem__(index)[0], ""
        except image_files.UnreadableImage as error:
            return self.transform(Image.new("RGB", (1, 1))), str(error)


@torch.no_grad()
def predict(learners, batches, device="cpu"):
    """Yields, batch by batch, the probabilities [B, C] of the classes (Eq. 3), and each image's error or "".

    learners: on one CLIP; C counts the classes of all. batches: a loader of an `ImagesOrErrors`.
    """
    logits = scorer(*learners)
    for pixels, errors in tqdm(batches, unit="batch", disable=None):
        yield check_finite(logits(images.model_input(pixels.to(device)))).float().softmax(dim=-1).cpu(), errors


def write_table(out, paths, classes, batches):
    """The CSV file `out`: for each path, the most likely class and its probability; nothing for an unreadable image.

    It begins with a byte order mark, which tells Excel that it is UTF-8. Rows are written as the batches come, into a
    file beside `out` that takes its place at the end. batches: of `predict`. Yields each batch again when it is
    written. OSError: it cannot be written.
    """
    paths = iter(paths)
    with open_atomic(out) as file:
        table = io.TextIOWrapper(file, "utf-8-sig", "backslashreplace", newline="", write_through=True)
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


def main(arguments=None):
    """Exports the classifier, predicts, or both. Returns what `classify` does."""
    args = parse(arguments)
    device = choose_device("cpu" if str(args.export).endswith(".onnx") else args.device)  # ONNX is for any device
    named = [(args.prompt, args.classes and read_names(args.classes))]
    prompts = prompts_of(args.run, args.candidates) if args.run else named
    learners, header, classes = load_learners(prompts, args.clip, device)
    if args.export is not None:
        export(args.export, learners, header, classes)
        print(printable(f"{len(classes)} classes in {args.export}"))
    if args.images:
        return classify(args, learners, classes, device)


def classify(args, learners, classes, device):
    """Predicts, writes the table, and prints the top 5 of a single image. Returns 1 where an image could not be read.

    UnreadableImage: the single image cannot be read.
    """
    paths, wrong = [], []
    for place in args.images:
        paths += [place / name for name in image_files.find_images(place)] if place.is_dir() else [place]
    single, transform = args.images == paths[:1], images.test_transform(learners[0].clip_model.visual.input_resolution)
    dataset = ImagesOrErrors(paths, image_files.FolderReader(pathlib.Path()), transform)
    workers = args.workers if args.workers is not None else 0 if single else images.default_workers()
    found = predict(learners, images.loader(dataset, workers, prefetch_factor=1, batch_size=64), device)
    for probabilities, errors in write_table(args.out, paths, classes, found):
        wrong += [error for error in errors if error]
        if single and wrong:
            raise image_files.UnreadableImage(wrong[0])
        top = probabilities[0].topk(min(5, len(classes)))
    if single:
        for probability, label in zip(top.values.tolist(), top.indices.tolist()):
            print(f"{100 * probability:6.2f}%  {printable(classes[label])}")
    print(printable(f"1 image in {args.out}" if len(paths) == 1 else f"{len(paths)} images in {args.out}"))
    if wrong:
        headline = f"predict.py: {len(wrong)} of {len(paths)} images have no class there:"
        print(headline, *map(printable, wrong), sep="\n", file=sys.stderr)
        return 1


if __name__ == "__main__":
    run_main("predict.py", main)
