"""Mutates every kind of file that the project reads: each must be read, or refused in one sentence that names the file.

    python -m tests.fuzz --inputs 3000        the suite does some hundred

What counts as a fault: another kind of error than `cli.run_main` tells in a sentence, a sentence that does not name the
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

import safetensors.torch
import torch
from PIL import Image

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import test_layouts
from conftest import draw

import data
import predict
import run
from backbones import CoOp
from baselines.coprompt import sentence_lists
from harness import clips, folders, images, options, runs, scores
from harness.cli import printable, sentence

NASTY = [
    None, True, False, 0, -1, 1, 2, 10**13, -(10**13), 10**400, 0.5, -0.0, 1e308, "", " ", "x", "\x00", "\x1b[2J",
    "../..", "=1+1", "é", "\udcff", "a" * 5000, [], [[]], {}, [None], ["x"], {"x": 1}, {"": None}, [1, 2, 3], "demo",
    "coop", "NaN",
]  # fmt: skip
TOKENS = ["NaN", "Infinity", "1e999", "[" * 100_000, '{"a":' * 100_000, "9" * 5000, '"\\ud800"', "\x00", "﻿", "null"]
WORDS = ["", "0", "-5", "9" * 30, "1.5", "x", "/", "a/b/c", "NaN"]
LINES = ["", "x", "x y z w", "-1", "\x1b[2J", "a\tb", "é" * 300, "../x 1 1"]
NAMES = ("ant", "bee", "cow", "dog")

# Mutations ------------------------------------------------------------------------------------------------------------


def mutate_value(content, rng):
    """A copy of what a JSON file holds, with one of its nodes replaced, taken out, doubled or given a new key."""
    content, places = json.loads(json.dumps(content)), []

    def walk(node):
        for key in list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
            places.append((node, key))
            walk(node[key])

    walk(content)
    if not places or rng.random() < 0.05:
        return rng.choice(NASTY)
    (node, key), kind = rng.choice(places), rng.random()
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
    """Bytes with a few of them changed, taken out, put in or doubled; or cut off."""
    content = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        at, length, kind = rng.randrange(len(content) + 1), rng.choice([1, 1, 2, 8, 64, 1000]), rng.randrange(6)
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
            content[at : at + length] = rng.randbytes(min(length, len(content) - at))
    return bytes(content)


def mutate_json(content, rng):
    """The bytes of a JSON file whose content, or whose text, is mutated."""
    kind, text = rng.random(), json.dumps(json.loads(content))
    if kind < 0.75:
        return json.dumps(mutate_value(json.loads(content), rng)).encode()
    if kind < 0.9:
        at = rng.randrange(len(text))
        return (text[:at] + rng.choice(TOKENS) + text[at + rng.randrange(3) :]).encode("utf-8", "surrogatepass")
    return mutate_bytes(text.encode(), rng)


def mutate_lines(content, rng):
    """The bytes of a text file whose lines or words are mutated."""
    lines = content.decode().splitlines()
    if rng.random() < 0.3:
        return mutate_bytes(content, rng)
    for _ in range(rng.randint(1, 3)):
        at, kind = rng.randrange(len(lines)) if lines else 0, rng.randrange(5)
        if not lines or kind == 0:
            lines.insert(at, rng.choice(LINES))
        elif kind == 1:
            del lines[at]
        elif kind == 2:
            lines.append(lines[at])
        else:
            words = lines[at].split(" ")
            words[rng.randrange(len(words))] = rng.choice(WORDS)
            lines[at] = " ".join(words)
    return "\n".join(lines).encode()


def mutate_weights(content, rng):
    """The bytes of a file of tensors, one of which is mutated."""
    found = safetensors.torch.load(content)
    key = rng.choice(list(found))
    value, kind = found.pop(key), rng.randrange(6)
    names = ["x", "visual.layer1.0.conv1.weight", "transformer.resblocks.x.y", key + "x"]
    if kind < 5:
        found[rng.choice(names) if kind == 3 else key] = {
            0: torch.full_like(value, float("nan")),
            1: value.flatten()[: max(1, value.numel() // 2)],
            2: value.unsqueeze(0),
            3: value,
            4: value.new_zeros((0,) * value.ndim),
        }[kind]
    return safetensors.torch.save(found)


def mutate_header(content, rng):
    """The bytes of a file of prompts whose header is mutated."""
    size = int.from_bytes(content[:8], "little")
    about = json.loads(content[8 : 8 + size])["__metadata__"]["mao"]
    mutated = mutate_json(about, rng).decode("utf-8", "replace")
    return safetensors.torch.save(safetensors.torch.load(content), {"mao": mutated})


# Good files of each kind: (name, file, its mutation, what reads it) ---------------------------------------------------


def of_runs(folder):
    """A run's files, by --eval, --resume and predict.py."""
    photos, out = folder / "photos", folder / "runs"
    for number, name in enumerate(NAMES * 4):
        draw(photos / name / f"{number}.png", number)
    ask = f"--dataset folder --root {photos} --clip demo --shots 1 --epochs 2 --method mao --workers 0 --out {out}"
    quietly(run.main, ask.split())
    (done,) = out.glob("folder*")
    again = functools.partial(run.score_again, done, options.Settings(eval=(str(done),)))
    load = functools.partial(predict.load_learner, done / "new.safetensors", ["ant", "bee"])
    for name, mutation in (("header", mutate_header), ("tensors", mutate_weights), ("bytes", mutate_bytes)):
        yield f"prompts' {name}", done / "new.safetensors", mutation, load
    for name in ("config.json", "result.json", "lists.json"):
        if (done / name).exists():
            yield name, done / name, mutate_json, again
    stopped, config = out / "stopped", runs.read_config(done)
    learner = CoOp(clips.load_clip("demo")[0], ["ant"])
    state = learner, torch.optim.SGD(learner.parameters(), 0.1), torch.amp.GradScaler("cpu", enabled=False)
    first = runs.Record(stopped, config)
    first.epochs_left("base", 2, 1, *state)
    first.end_epoch("base", 1, *state)
    resume = lambda: runs.Record(stopped, config, resume=True).epochs_left("base", 2, 1, *state)  # noqa: E731
    yield "resume.pt", stopped / "resume.pt", mutate_bytes, resume


def of_lists(folder):
    """Split files, the datasets' own lists, and what names one's own classes."""
    for dataset, files in {
        "eurosat": ["split_zhou_EuroSAT.json"],
        "sun397": ["split_zhou_SUN397.json"],
        "fgvc_aircraft": ["variants.txt", "images_variant_train.txt"],
        "imagenet": ["classnames.txt"],
    }.items():
        place, make = test_layouts.TREES[dataset]
        lists = make(folder / place)
        if dataset == "eurosat":
            (folder / place / files[0]).write_text(json.dumps(test_layouts.by_coops_rule(lists)))

        def read(dataset=dataset):
            data.base_to_new_task(folders.open_dataset(dataset, folder), 16, 16, 1)

        for file in files:
            mutation = mutate_json if file.endswith("json") else mutate_lines
            yield f"{dataset}'s {file}", folder / place / file, mutation, read
    names = {name: f"a {name}" for name in NAMES}
    for file, text in (("names.json", json.dumps(names)), ("names.csv", "\n".join(map(",".join, names.items())))):
        (folder / file).write_text(text)
        read = functools.partial(folders.open_dataset, "folder", folder / "photos", names=folder / file)
        yield f"--names {file}", folder / file, mutate_json if "json" in file else mutate_lines, read
    classes, sentences = folder / "names.txt", folder / "sentences.json"
    classes.write_text("\n".join(NAMES))
    yield "class names", classes, mutate_lines, functools.partial(folders.read_names, classes)
    sentences.write_text(json.dumps({name: [f"{name} {number}." for number in range(3)] for name in NAMES}))
    read = functools.partial(sentence_lists, clips.load_clip("demo")[0], list(NAMES), str(sentences))
    yield "sentences", sentences, mutate_json, read


def of_clips(folder):
    """A tiny CLIP's weights, and a config beside another."""
    torch.manual_seed(0)
    weights = clips.clip.model.CLIP(8, 16, 1, 64, 8, 77, 60, 64, 1, 1).state_dict()
    pickled, tensors, config = folder / "clip.pt", folder / "clip.safetensors", folder / "theirs" / "config.json"
    torch.save(weights, pickled)
    config.parent.mkdir()
    for path in (tensors, config.parent / "clip.safetensors"):
        safetensors.torch.save_file({key: value.contiguous() for key, value in weights.items()}, path)
    sides = {"hidden_act": "gelu", "hidden_size": 64, "num_attention_heads": 1}
    config.write_text(json.dumps({"vision_config": sides, "text_config": sides}))
    for path, mutation in ((pickled, mutate_bytes), (tensors, mutate_bytes), (tensors, mutate_weights)):
        read = functools.partial(clips.load_clip, str(path), activation="gelu")
        yield f"{path.name} by {mutation.__name__}", path, mutation, read
    read = functools.partial(clips.load_clip, str(config.parent / "clip.safetensors"))
    yield "CLIP's config", config, mutate_json, read


def of_images(folder):
    """Images of every common kind."""
    exif = Image.Exif()
    exif[274] = 6
    for ending in ("jpg", "png", "webp", "gif", "tiff", "bmp", "ppm"):
        path = folder / f"image.{ending}"
        draw(path, **({"exif": exif} if ending == "jpg" else {}))
        yield f"image .{ending}", path, mutate_bytes, functools.partial(read_image, path)
    palette = folder / "palette.png"
    Image.open(folder / "image.png").quantize(7).save(palette, transparency=bytes([0, 128, 255]))
    yield "image, a palette", palette, mutate_bytes, functools.partial(read_image, palette)


def read_image(path):
    for plain in (False, True):
        images.test_transform(16)(images.FolderReader(path.parent, plain)(path.name))


# The verdict ----------------------------------------------------------------------------------------------------------


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
        if not any(part in text for part in (path.name, path.parent.name, "--learner sentences", "--root")):
            return f"fault: the file is not named: {text[:300]}"
        return "refused" if len(printable(text)) <= 3000 else f"fault: {len(text)} characters"
    except BaseException:
        return f"fault: {traceback.format_exc(limit=-3)}"
    finally:
        signal.alarm(0)


def fuzz(inputs, seed, folder, report=print):
    """Mutates `inputs` files in `folder`. Returns {kind of file: a Counter of "read", "refused" and "fault"}."""
    kinds = [kind for make in (of_runs, of_lists, of_clips, of_images) for kind in make(folder)]
    rng, ends = random.Random(seed), collections.defaultdict(collections.Counter)
    load, score = clips.load_clip, scores.score
    demo = functools.lru_cache(lambda device: load("demo", device))
    try:
        # Scoring and opening the demo's CLIP take seconds and read no file that is mutated here.
        scores.score = lambda *_: dict.fromkeys(["base", "new", "h", "base_by_final_prompt"], 1.0)
        clips.load_clip = lambda name="ViT-B/16", device="cpu", *more, **about: (
            demo(device) if name == "demo" else load(name, device, *more, **about)
        )
        for name, path, _, read in kinds:
            if judge(path, read) != "read":
                raise AssertionError(f"{name}: the good file ends with {judge(path, read)}")
        for number in range(inputs):
            name, path, mutation, read = kinds[number % len(kinds)]
            content = path.read_bytes()
            path.write_bytes(mutation(content, rng))
            end = judge(path, read)
            ends[name][end.split(":")[0]] += 1
            if end.startswith("fault"):
                report(f"{name}, input {number} of seed {seed}: {path.read_bytes()[:200]!r}\n{end}")
            path.write_bytes(content)
            if end == "read" and number % 7 == 0 and judge(path, read) != "read":
                report(f"{name}: the good file is refused after input {number}: something was left behind")
                ends[name]["fault"] += 1
    finally:
        scores.score, clips.load_clip = score, load
    return ends


def main():
    """The command line of tests/fuzz.py. Exit code 1: there were faults."""
    parser = argparse.ArgumentParser("tests.fuzz", description=__doc__)
    parser.add_argument("--inputs", type=int, default=3000, metavar="N", help="default: 3000")
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="of the mutations (default: 1)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        ends = fuzz(args.inputs, args.seed, pathlib.Path(folder))
    for name, counts in ends.items():
        print(f"{name:42s} {counts['read']:5d} read {counts['refused']:5d} refused {counts['fault']:5d} faults")
    total = sum(ends.values(), collections.Counter())
    print(f"{args.inputs} inputs: {total['read']} read, {total['refused']} refused, {total['fault']} faults")
    sys.exit(total["fault"] > 0)


if __name__ == "__main__":
    main()
