"""Names what is on images of your own by tuned prompts, and writes it as CSV: path, class, confidence.

    python predict.py photo.jpg --prompt runs/demo-coop-mao-seed1/new.safetensors --classes names.txt
    python predict.py photos --prompt runs/demo-coop-mao-seed1/new.safetensors --classes names.txt --out photos.csv
"""

import csv
import io
import os
import pathlib

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

import demo
from backbones import BACKBONES, load_clip
from command import Parser, at_least, end
from loaders import FolderReader, Images, model_input, test_transform
from record import read_header, read_prompts, write
from tasks import find_pictures, read_names


def load_learner(prompt, classnames, clip=None, device="cpu"):
    """The prompt learner of a file that run.py wrote, before these class names: (learner, its CLIP).

    clip: where that CLIP is now, if not where it was. ValueError, FileNotFoundError: not such a file, or another CLIP.
    """
    header = read_header(prompt)
    if header["backbone"] not in BACKBONES:
        raise ValueError(f"{prompt} is of a backbone '{header['backbone']}', and here are {', '.join(BACKBONES)} alone")
    clip = clip or header["clip"]
    clip_model, sha256 = load_clip(demo.WEIGHTS if clip == "demo" else clip, device)
    state = read_prompts(prompt, header["backbone"], sha256)
    learner = BACKBONES[header["backbone"]](clip_model, classnames, **header["settings"])
    try:
        learner.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"the prompts in {prompt} do not fit the settings in its header: run the row again") from error
    return learner, clip_model


@torch.no_grad()
def predict(learner, batches, device="cpu"):
    """Probabilities [N, C] of the learner's classes for the images of a loader, uint8 [B, 3, h, w] each (Eq. 3)."""
    text_features = learner.text_features()  # [C, d]
    found = []
    for images, _ in tqdm(batches, unit="batch"):
        logits = learner.logit_scale * learner.image_features(model_input(images.to(device))) @ text_features.T
        found.append(logits.float().softmax(dim=-1).cpu())  # [B, C]
    return torch.cat(found)


def main():
    parser = Parser("predict.py", __doc__)
    parser.add_argument("images", metavar="IMAGE_OR_DIR", help="an image, or a folder, its subfolders included")
    parser.add_argument("--prompt", required=True, metavar="FILE", help="prompts that run.py left: "
                        "new.safetensors for the new classes, base.safetensors for the base classes")
    parser.add_argument("--classes", required=True, metavar="FILE", help="the candidates' names, a line each")
    parser.add_argument("--out", default="predictions.csv", metavar="FILE", help="default: predictions.csv")
    parser.add_argument("--clip", metavar="NAME|FILE", help="the frozen CLIP, if it is not where the run had it")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu",
                        help="default: cuda where there is one")
    parser.add_argument("--workers", type=at_least(0), metavar="N", help="load images (default: a core each, at most 8; "
                        "none for one image)")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: PyTorch sees no GPU here; use --device cpu")
    path, out = pathlib.Path(args.images), pathlib.Path(args.out)
    if out.is_dir() or not out.parent.is_dir():
        raise ValueError(f"--out {out} must be a file in a folder that is there: give another")
    if not path.exists():
        raise FileNotFoundError(f"there is no image or folder {path}: give one")
    folder, names = (path.parent, [path.name]) if path.is_file() else (path, find_pictures(path))
    classes = read_names(args.classes)
    learner, clip_model = load_learner(args.prompt, classes, args.clip, args.device)

    workers = args.workers
    if workers is None:
        workers = 0 if path.is_file() else min(8, os.cpu_count() or 1)
    images = Images(names, FolderReader(folder), test_transform(clip_model.visual.input_resolution))
    probabilities = predict(learner, DataLoader(images, 64, num_workers=workers), args.device)
    confidences, best = probabilities.max(dim=-1)
    table = io.StringIO()
    rows = csv.writer(table)
    rows.writerow(["path", "class", "confidence"])
    for name, label, confidence in zip(names, best.tolist(), confidences.tolist()):
        rows.writerow([folder / name, classes[label], f"{confidence:.4f}"])
    write(out, table.getvalue())
    if path.is_file():
        for confidence, label in zip(*(values.tolist() for values in probabilities[0].topk(min(5, len(classes))))):
            print(f"{100 * confidence:6.2f}%  {classes[label]}")
    print(f"{len(names)} image{'s' * (len(names) > 1)} in {out}")


if __name__ == "__main__":
    end("predict.py", main)
