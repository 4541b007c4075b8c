"""Mutates every kind of file that the project reads: each must be read, or refused in one sentence that names the file.

    python -m tests.fuzz --inputs 3000        the suite does some hundred

What counts as a fault: another kind of error than `cli.end` tells in a sentence, a sentence that does not name the
file, one that would be several lines, and an input that takes longer than 30 seconds.
"""

import argparse
import collections
import contextlib
import functools
import io
import json
import pathlib
import random
import signal
import sys
import tempfile
import traceback
import warnings

import checkpoints
import evaluate
import images
import layouts
import numpy as np
import record
import safetensors.torch
import settings
import torch
from cli import printable, sentence
from PIL import Image
from rivals.coprompt import sentence_lists

import data
import predict
import run

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import test_layouts

NASTY = [
    None, True, False, 0, -1, 1, 2, 10**13, -(10**13), 10**400, 0.5, -0.0, 1e308, "", " ", "x", "\x00", "\x1b[2J",
    "../..", "=1+1", "é", "\udcff", "a" * 5000, [], [[]], {}, [None], ["x"], {"x": 1}, {"": None}, [1, 2, 3], "demo",
    "coop", "NaN",
]  # fmt: skip
TOKENS = ["NaN", "Infinity", "1e999", "[" * 100_000, '{"a":' * 100_000, "9" * 5000, '"\\ud800"', "\x00", "﻿", "null"]

# Mutations ------------------------------------------------------------------------------------------------------------


def mutate_value(content, rng):
    """A copy of what a JSON file holds, with one of its nodes replaced, taken out, doubled or given a new key."""
    content = json.loads(json.dumps(content))
    places = []

    def walk(node):
        for key in list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
            places.append((node, key))
            walk(node[key])

    walk(content)
    if not places or rng.random() < 0.05:
        return rng.choice(NASTY)
    node, key = rng.choice(places)
    kind = rng.random()
    if kind < 0.6:
        node[key] = rng.choice(NASTY)
    elif kind < 0.8:
        del node[key]
    elif isinstance(node, dict):
        node[rng.choice(["x", "", "settings", "eval", "\x1b", "method "])] = rng.choice(NASTY)
    else:
        node.append(rng.choice([*NASTY, node[key]]))
    return content


def mutate_bytes(content, rng):
    """Bytes with a few of them changed, taken out, put in or doubled; or cut off; or emptied."""
    content = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        at, length = rng.randrange(len(content) + 1), rng.choice([1, 1, 2, 8, 64, 1000])
        kind = rng.randrange(6)
        if kind == 0 and at < len(content):
            content[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del content[at : at + length]
        elif kind == 2:
            content[at:at] = bytes(rng.choice([0, 255, rng.randrange(256)]) for _ in range(length))
        elif kind == 3:
            content[at:at] = content[at : at + length]
        elif kind == 4 and rng.random() < 0.3:
            del content[at:]
        else:
            content[at : at + length] = bytes(rng.randrange(256) for _ in range(min(length, len(content) - at)))
    return bytes(content)


def mutate_json(content, rng):
    """The bytes of a JSON file whose content, or whose text, is mutated."""
    kind = rng.random()
    if kind < 0.75:
        return json.dumps(mutate_value(content, rng)).encode()
    text = json.dumps(content)
    at = rng.randrange(len(text))
    if kind < 0.9:
        return (text[:at] + rng.choice(TOKENS) + text[at + rng.randrange(3) :]).encode("utf-8", "surrogatepass")
    return mutate_bytes(text.encode(), rng)


def mutate_lines(content, rng):
    """The bytes of a text file whose lines or words are mutated."""
    lines = content.decode().splitlines()
    if rng.random() < 0.3:
        return mutate_bytes(content, rng)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(lines)) if lines else 0
        kind = rng.randrange(5)
        if not lines or kind == 0:
            lines.insert(at, rng.choice(["", "x", "x y z w", "-1", "\x1b[2J", "a\tb", "é" * 300, "../x 1 1"]))
        elif kind == 1:
            del lines[at]
        elif kind == 2:
            lines.append(lines[at])
        else:
            words = lines[at].split(" ")
            words[rng.randrange(len(words))] = rng.choice(["", "0", "-5", "9" * 30, "1.5", "x", "/", "a/b/c", "NaN"])
            lines[at] = " ".join(words)
    return "\n".join(lines).encode()


# Readers --------------------------------------------------------------------------------------------------------------


class Readers:
    """Good files of each kind in a folder; `kinds` has (name, file, its mutation, what reads it)."""

    def __init__(self, folder):
        self.folder, self.kinds = folder, []
        self.make_runs()
        self.make_lists()
        self.make_checkpoints()
        self.make_images()

    def add(self, name, path, mutation, read):
        """mutation: of the file's bytes, or of its JSON content, as the function wants it."""
        content = path.read_bytes()
        good = json.loads(content) if mutation is mutate_json else content
        self.kinds.append((name, path, content, functools.partial(mutation, good), read))

    def make_runs(self):
        """A run's files, by --eval, --resume and predict.py."""
        out = self.folder / "runs"
        photos = self.folder / "photos"
        for name in ("ant", "bee", "cow", "dog"):
            (photos / name).mkdir(parents=True)
            for number in range(4):
                Image.new("RGB", (8, 8), (50 * number, 9 * len(name), 7)).save(photos / name / f"{number}.png")
        ask = [
            "--dataset",
            "folder",
            "--root",
            photos,
            "--clip",
            "demo",
            "--shots",
            1,
            "--epochs",
            2,
            "--method",
            "mao",
        ]
        quietly(run.main, [*map(str, ask), "--workers", "0", "--out", str(out)])
        (self.run,) = out.glob("folder*")
        state, classes = safetensors.torch.load_file(self.run / "new.safetensors"), self.folder / "names.txt"
        header, prompts = record.read_header(self.run / "new.safetensors"), self.folder / "prompts.safetensors"
        classes.write_text("ant\nbee\nblue cow\n")
        safetensors.torch.save_file(state, prompts, {"mao": json.dumps(header)})

        def mutate_header(content, rng):
            return safetensors.torch.save(state, {"mao": mutate_json(header, rng).decode("utf-8", "replace")})

        def load_prompts():
            predict.load_learner(prompts, ["ant", "bee"])

        def score_again():
            evaluate.score_again(self.run, "cpu")

        self.add("prompts' header", prompts, mutate_header, load_prompts)
        self.add("prompts", prompts, mutate_bytes, load_prompts)
        for name in ("config.json", "result.json", "lists.json"):
            self.add(name, self.run / name, mutate_json, score_again)
        self.add("metrics.jsonl", self.run / "metrics.jsonl", mutate_lines, score_again)
        self.add("class names", classes, mutate_lines, lambda: data.read_names(classes))

        stopped = out / "stopped"
        stopped.mkdir()
        config = json.loads((self.run / "config.json").read_text())
        config.pop("versions")
        first = record.Record(stopped, config)
        learner = torch.nn.Linear(2, 2)
        optimizer = torch.optim.SGD(learner.parameters(), 0.1)
        first.keep("base", 1, learner, optimizer, torch.amp.GradScaler("cpu", enabled=False))

        def resume():
            again = record.Record(stopped, config, resume=True)
            again.restore(learner, optimizer, torch.amp.GradScaler("cpu", enabled=False))

        self.add("resume.pt", stopped / "resume.pt", mutate_bytes, resume)

    def make_lists(self):
        """Split files, the datasets' own lists, and what names one's own classes."""
        for dataset, files in (
            ("eurosat", []), ("oxford_pets", ["annotations/trainval.txt", "annotations/test.txt"]),
            ("stanford_cars", ["devkit/cars_meta.mat", "devkit/cars_train_annos.mat"]),
            ("oxford_flowers", ["imagelabels.mat", "cat_to_name.json"]),
            ("sun397", ["ClassName.txt", "Training_01.txt"]),
            ("ucf101", ["ucfTrainTestlist/classInd.txt", "ucfTrainTestlist/trainlist01.txt"]),
            ("fgvc_aircraft", ["variants.txt", "images_variant_train.txt"]), ("imagenet", ["classnames.txt"]),
        ):  # fmt: skip
            root = self.folder / dataset
            folder, make = test_layouts.TREES[dataset]
            make(root / folder)

            def open_task(dataset=dataset, root=root, folder=folder):
                made = layouts.LAYOUTS[dataset].split
                if made is not None and dataset != "eurosat":
                    layouts.made_split(dataset, root / folder).unlink(missing_ok=True)
                source = data.open_dataset(dataset, root)
                data.open_task(source)

            for file in files:
                mutation = {".mat": mutate_bytes, ".json": mutate_json}.get(pathlib.Path(file).suffix, mutate_lines)
                self.add(f"{dataset}'s {file}", root / folder / file, mutation, open_task)
            if dataset == "eurosat":
                quietly(open_task)
                self.add("split file", layouts.made_split(dataset, root / folder), mutate_json, open_task)
        photos, names = self.folder / "photos", {name: f"a {name}" for name in ("ant", "bee", "cow", "dog")}
        by_json, by_csv = self.folder / "folders.json", self.folder / "folders.csv"
        by_json.write_text(json.dumps(names))
        by_csv.write_text("".join(f"{folder},{name}\n" for folder, name in names.items()))
        for path, mutation in ((by_json, mutate_json), (by_csv, mutate_lines)):
            read = functools.partial(data.open_dataset, "folder", photos, names=path)
            self.add(f"--names {path.suffix}", path, mutation, read)
        sentences = self.folder / "sentences.json"
        sentences.write_text(json.dumps({name: [f"{name} {i}." for i in range(3)] for name in names}))
        args = argparse.Namespace(sentences=sentences, dataset="folder")
        demo_clip = checkpoints.load_clip("demo")[0]
        read = lambda: sentence_lists(demo_clip, list(names), settings.read_sentences(args))  # noqa: E731
        self.add("--sentences", sentences, mutate_json, read)

    def make_checkpoints(self):
        """A tiny CLIP's weights, and a config beside another."""
        torch.manual_seed(0)
        weights = checkpoints.clip.model.CLIP(8, 16, 1, 64, 8, 77, 60, 64, 1, 1).state_dict()
        weights = {key: value.contiguous() for key, value in weights.items()}
        pickled, tensors = self.folder / "clip.pt", self.folder / "clip.safetensors"
        torch.save(weights, pickled)
        safetensors.torch.save_file(weights, tensors)
        for path in (pickled, tensors):
            read = functools.partial(checkpoints.load_clip, str(path), activation="gelu")
            self.add(f"checkpoint {path.suffix}", path, mutate_bytes, read)

        def mutate_weights(content, rng):
            changed, key = dict(weights), rng.choice(list(weights))
            value = changed.pop(key)
            kind = rng.randrange(6)
            if kind == 0:
                changed[key] = torch.full_like(value, float("nan"))
            elif kind == 1:
                changed[key] = value.flatten()[: max(1, value.numel() // 2)]
            elif kind == 2:
                changed[key] = value.unsqueeze(0)
            elif kind == 3:
                changed[rng.choice(["x", "visual.layer1.0.conv1.weight", "transformer.resblocks.x.y", key + "x"])] = (
                    value
                )
            elif kind == 4:
                changed[key] = value.new_zeros((0,) * value.ndim)
            return safetensors.torch.save(changed)

        read = functools.partial(checkpoints.load_clip, str(tensors), activation="gelu")
        self.add("checkpoint's tensors", tensors, mutate_weights, read)
        beside = self.folder / "theirs" / "config.json"
        beside.parent.mkdir()
        (beside.parent / "clip.safetensors").write_bytes(tensors.read_bytes())
        vision = {"hidden_act": "gelu", "hidden_size": 64, "num_attention_heads": 1}
        text = {"hidden_act": "gelu", "num_attention_heads": 1}
        beside.write_text(json.dumps({"vision_config": vision, "text_config": text}))
        self.add(
            "CLIP's config", beside, mutate_json, lambda: checkpoints.load_clip(str(beside.parent / "clip.safetensors"))
        )

    def make_images(self):
        """Images of every common kind."""
        rng = np.random.default_rng(0)
        pixels = Image.fromarray(rng.integers(0, 256, (24, 20, 3), dtype=np.uint8))
        exif = Image.Exif()
        exif[274] = 6
        for ending, options in (
            ("jpg", {"exif": exif}), ("png", {}), ("webp", {"lossless": True}), ("gif", {}), ("tiff", {}), ("bmp", {}),
            ("ppm", {}),
        ):  # fmt: skip
            path = self.folder / f"image.{ending}"
            pixels.save(path, **options)
            self.add(f"image .{ending}", path, mutate_bytes, functools.partial(self.read_image, path))
        palette = self.folder / "palette.png"
        pixels.quantize(7).save(palette, transparency=bytes([0, 128, 255]))
        self.add("image, a palette", palette, mutate_bytes, functools.partial(self.read_image, palette))

    def read_image(self, path):
        for plain in (False, True):
            image = images.FolderReader(path.parent, plain)(path.name)
            images.test_transform(16)(image)


def quietly(function, *arguments):
    """Calls a function; what it prints is thrown away."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return function(*arguments)


def judge(path, read):
    """How reading ended: "read", "refused", or "fault: ..."."""

    def too_long(*_):
        raise TimeoutError("30 seconds")  # an OSError, told apart below

    signal.signal(signal.SIGALRM, too_long)
    signal.alarm(30)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            quietly(read)
        return "read"
    except TimeoutError:
        return "fault: it takes longer than 30 seconds"
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        text = sentence(error)
        if text is None:
            return f"fault: {traceback.format_exc(limit=-3)}"
        if not any(
            part in text for part in (path.name, path.parent.name, str(path.parent.parent), "--sentences", "--root")
        ):
            return f"fault: the file is not named: {text[:300]}"
        if len(printable(text)) > 3000:
            return f"fault: {len(text)} characters"
        return "refused"
    except BaseException:
        return f"fault: {traceback.format_exc(limit=-3)}"
    finally:
        signal.alarm(0)


def fuzz(inputs, seed, folder, report=print):
    """{kind: Counter of how its inputs ended}; faults are reported with what made them."""
    readers, rng = Readers(folder), random.Random(seed)
    score, load = evaluate.score, checkpoints.load_clip
    demo = functools.lru_cache(lambda device: load("demo", device))
    ends = collections.defaultdict(collections.Counter)
    try:
        # Scoring and opening the demo's CLIP take seconds and read no file that is mutated here.
        one_list = {"base": 1.0, "new": 2.0, "h": 1.5, "all": 1.5}
        scores = {"base": 1.0, "new": 2.0, "h": 1.5, "base_by_final_prompt": 1.0}
        scores |= {"one_list": one_list, "one_list_final": one_list}
        evaluate.score = lambda *_: scores
        checkpoints.load_clip = lambda name="ViT-B/16", device="cpu", *more, **options: (
            demo(device) if name == "demo" else load(name, device, *more, **options)
        )
        for number in range(inputs):
            name, path, content, mutation, read = readers.kinds[number % len(readers.kinds)]
            path.write_bytes(mutation(rng))
            end = judge(path, read)
            ends[name][end.split(":")[0]] += 1
            if end.startswith("fault"):
                report(f"{name}, input {number} of seed {seed}: {path.read_bytes()[:200]!r}\n{end}")
            path.write_bytes(content)
            if end == "read" and number % 7 == 0 and judge(path, read) != "read":
                report(f"{name}: the good file is refused after input {number}: something was left behind")
                ends[name]["fault"] += 1
    finally:
        evaluate.score, checkpoints.load_clip = score, load
    return ends


def main():
    """The command line of tests/fuzz.py. Exit code 1: there were faults."""
    parser = argparse.ArgumentParser("tests.fuzz", description=__doc__)
    parser.add_argument("--inputs", type=int, default=3000, metavar="N", help="default: 3000")
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="of the mutations (default: 1)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        ends = fuzz(args.inputs, args.seed, pathlib.Path(folder))
    total = collections.Counter()
    for name, counts in ends.items():
        print(f"{name:42s} {counts['read']:5d} read {counts['refused']:5d} refused {counts['fault']:5d} faults")
        total += counts
    print(f"{sum(total.values())} inputs: {total['read']} read, {total['refused']} refused, {total['fault']} faults")
    sys.exit(total["fault"] > 0)


if __name__ == "__main__":
    main()
