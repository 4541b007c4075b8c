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
from unittest import mock

import safetensors.torch
import torch
from PIL import Image

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import test_layouts
from conftest import draw

import predict
import run
from baselines.coprompt import sentence_lists
from harness import clips, folders, image_files, images, options, runs, scores
from harness.cli import printable, sentence

NASTY = [
    None, True, False, 0, -1, 1, 2, 10**13, -(10**13), 10**400, 0.5, -0.0, 1e308, "", " ", "x", "\x00", "\x1b[2J",
    "../..", "=1+1", "é", "\udcff", "a" * 5000, [], [[]], {}, [None], ["x"], {"x": 1}, {"": None}, [1, 2, 3], "demo",
    "coop", "NaN",
]  # fmt: skip
TOKENS = ["NaN", "Infinity", "1e999", "[" * 100_000, '{"a":' * 100_000, "9" * 5000, '"\\ud800"', "\x00", "﻿", "null"]
WORDS = ["", "0", "-5", "9" * 30, "1.5", "x", "/", "a/b/c", "NaN", "x y z w", "\x1b[2J", "a\tb", "é" * 300, "../x 1 1"]
NAMES = ("ant", "bee", "cow", "dog")

# Mutations: of a file's bytes, with a random.Random -------------------------------------------------------------------


def places(node):
    """(node, key) of everything inside what a JSON file holds."""
    for key in list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
        yield node, key
        yield from places(node[key])


def mutate_value(content, rng):
    """What a JSON file holds, with one of its nodes replaced, taken out, doubled or given a new key."""
    if not list(places(content)) or rng.random() < 0.05:
        return rng.choice(NASTY)
    (node, key), kind = rng.choice(list(places(content))), rng.random()
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
    """Some bytes are changed, taken out, put in or doubled; or all that follow are cut off."""
    for _ in range(rng.randint(1, 4)):
        at, length = rng.randrange(len(content) + 1), rng.choice([1, 1, 2, 8, 64, 1000])
        before, part, after = content[:at], content[at : at + length], content[at + length :]
        flipped = bytes(byte ^ 1 << rng.randrange(8) for byte in part[:1]) + part[1:]
        changed = [flipped, b"", bytes(length) + part, part + part, rng.randbytes(len(part))]
        content = before + rng.choice(changed) + (after if rng.random() < 0.95 else b"")
    return content


def mutate_json(content, rng):
    """The content of a JSON file is mutated, or its text."""
    kind, text = rng.random(), json.dumps(json.loads(content))
    if kind < 0.75:
        return json.dumps(mutate_value(json.loads(content), rng)).encode()
    if kind < 0.9:
        at = rng.randrange(len(text))
        return (text[:at] + rng.choice(TOKENS) + text[at + rng.randrange(3) :]).encode("utf-8", "surrogatepass")
    return mutate_bytes(text.encode(), rng)


def mutate_lines(content, rng):
    """Lines of a text file, or words in them, are mutated."""
    if rng.random() < 0.3:
        return mutate_bytes(content, rng)
    lines = content.decode().splitlines()
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(lines))
        words = lines[at].split(" ")
        words[rng.randrange(len(words))] = rng.choice(WORDS)
        changed = [[rng.choice(WORDS), lines[at]], [], [lines[at]] * 2, [" ".join(words)], [" ".join(words)]]
        lines[at : at + 1] = rng.choice(changed)
        lines = lines or [""]
    return "\n".join(lines).encode()


def mutate_tensors(content, rng):
    """One tensor of a safetensors file is mutated, or goes; what the header says is lost."""
    found = safetensors.torch.load(content)
    key = rng.choice(list(found))
    value = found.pop(key)
    flat = value.flatten()
    kinds = [torch.full_like(value, float("nan")), flat[: len(flat) // 2], flat[:0], value[None], value]
    names = [key] * 4 + ["x", "visual.layer1.0.conv1.weight", "transformer.resblocks.x.y", key + "x"]
    if rng.random() < 0.9:
        found[rng.choice(names)] = rng.choice(kinds)
    return safetensors.torch.save(found)


def mutate_header(content, rng):
    """The header of a file of prompts is mutated."""
    about = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]["mao"]
    mutated = mutate_json(about, rng).decode("utf-8", "replace")
    return safetensors.torch.save(safetensors.torch.load(content), {"mao": mutated})


# Good files of each kind: (file, its mutation, what reads it) ---------------------------------------------------------


def of_runs(folder):
    """A run's files, by --eval, --resume and predict.py."""
    for number, name in enumerate(NAMES * 4):
        draw(folder / "photos" / name / f"{number}.png", number)
    ask = f"--dataset folder --root {folder / 'photos'} --clip demo --shots 1 --epochs 2 --method mao --workers 0"
    ask = ["--cache", "none", *ask.split()]
    quietly(run.main, [*ask, "--out", str(folder)])
    with mock.patch.object(scores, "score", side_effect=OSError("stopped")), contextlib.suppress(OSError):
        quietly(run.main, [*ask, "--seed", "2", "--out", str(folder)])
    (done,), (stopped,) = folder.glob("folder*seed1*"), folder.glob("folder*seed2*")
    again = functools.partial(run.score_again, done, options.Settings(eval=(str(done),)))
    load = functools.partial(predict.load_learners, [(done / "new.safetensors", ["ant", "bee"])])
    for mutation in (mutate_header, mutate_tensors, mutate_bytes):
        yield done / "new.safetensors", mutation, load
    for path in sorted(done.glob("*.json")):
        yield path, mutate_json, again
    yield stopped / "resume.pt", mutate_bytes, functools.partial(runs.read_state, stopped)


def of_lists(folder):
    """Split files, the datasets' own lists, and what names one's own classes."""
    for dataset, file in (
        ("sun397", "split_zhou_SUN397.json"),
        ("fgvc_aircraft", "variants.txt"),
        ("fgvc_aircraft", "images_variant_train.txt"),
        ("imagenet", "classnames.txt"),
    ):
        place, make, _ = test_layouts.TREES[dataset]
        make(folder / place)
        read = functools.partial(folders.open_dataset, dataset, folder)
        yield folder / place / file, mutate_json if file.endswith("json") else mutate_lines, read
    by_json, by_csv, classes, sentences = (folder / f"names{ending}" for ending in (".json", ".csv", ".txt", "2.json"))
    by_json.write_text(json.dumps({name: f"a {name}" for name in NAMES}))
    by_csv.write_text("\n".join(f"{name},a {name}" for name in NAMES))
    for path, mutation in ((by_json, mutate_json), (by_csv, mutate_lines)):
        yield path, mutation, functools.partial(folders.open_dataset, "folder", folder / "photos", names=path)
    classes.write_text("\n".join(NAMES))
    yield classes, mutate_lines, functools.partial(folders.read_names, classes)
    sentences.write_text(json.dumps({name: [f"{name} {number}." for number in range(3)] for name in NAMES}))
    yield sentences, mutate_json, functools.partial(sentence_lists, clips.load_clip("demo")[0], NAMES, str(sentences))


def of_clips(folder):
    """A tiny CLIP's weights, and a config beside another."""
    weights = clips.clip.model.CLIP(8, 16, 1, 64, 8, 77, 60, 64, 1, 1).state_dict()
    pickled, tensors, config = folder / "clip.pt", folder / "clip.safetensors", folder / "theirs" / "config.json"
    torch.save(weights, pickled)
    config.parent.mkdir()
    for path in (tensors, config.parent / "clip.safetensors"):
        safetensors.torch.save_file({key: value.contiguous() for key, value in weights.items()}, path)
    sides = {"hidden_act": "gelu", "hidden_size": 64, "num_attention_heads": 1}
    config.write_text(json.dumps({"vision_config": sides, "text_config": sides}))
    for file, mutation in ((pickled, mutate_bytes), (tensors, mutate_bytes), (tensors, mutate_tensors)):
        yield file, mutation, functools.partial(clips.load_clip, str(file), activation="gelu")
    yield config, mutate_json, functools.partial(clips.load_clip, str(path))


def of_images(folder):
    """Images of every common kind."""
    exif = Image.Exif()
    exif[274] = 6
    names = [f"image.{ending}" for ending in ("jpg", "png", "webp", "gif", "tiff", "bmp", "ppm")] + ["palette.png"]
    for path in [folder / name for name in names]:
        draw(path, exif=exif)
        if path.stem == "palette":
            Image.open(path).quantize(7).save(path, transparency=bytes([0, 128, 255]))
        yield path, mutate_bytes, functools.partial(read_image, path)


def read_image(path):
    for plain in (False, True):
        images.test_transform(16)(image_files.FolderReader(path.parent, plain)(path.name))


# The verdict ----------------------------------------------------------------------------------------------------------


def quietly(function, *arguments):
    """Calls a function; what it prints is thrown away."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return function(*arguments)


def judge(path, read):
    """How reading ended: "read", "refused", or "fault: ..."."""
    signal.signal(signal.SIGALRM, mock.Mock(side_effect=TimeoutError))  # an OSError, told apart below
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
        if not any(part in text for part in (path.name, path.parent.name, "--learner sentences", "there is no CLIP")):
            return f"fault: the file is not named: {text[:300]}"
        return "refused" if len(printable(text)) <= 3000 else f"fault: {len(text)} characters"
    except BaseException:
        return f"fault: {traceback.format_exc(limit=-3)}"
    finally:
        signal.alarm(0)


def fuzz(inputs, seed, folder, report=print):
    """Mutates `inputs` files in `folder`. Returns {kind of file: a Counter of "read", "refused" and "fault"}."""
    kinds = [kind for make in (of_runs, of_lists, of_clips, of_images) for kind in make(folder)]
    rng, ends, load = random.Random(seed), collections.defaultdict(collections.Counter), clips.load_clip
    # Scoring and opening the demo's CLIP take seconds and read no file that is mutated here.
    scored = mock.patch.object(scores, "score", return_value=dict.fromkeys(["base", "new", "h"], 1.0))
    opened = mock.patch.object(clips, "load_clip", lambda name, *more, **about: known(str(name), *more, **about))
    known = lambda name, *more, **about: demo if name == "demo" else load(name, *more, **about)  # noqa: E731
    demo = load("demo")
    with scored, opened:
        for number in range(-len(kinds), inputs):  # those before 0 are read as they are
            path, mutation, read = kinds[number % len(kinds)]
            name, content = f"{path.name} by {mutation.__name__}", path.read_bytes()
            path.write_bytes(mutation(content, rng) if number >= 0 else content)
            end, mutated = judge(path, read), path.read_bytes()
            path.write_bytes(content)
            if (number < 0 and end != "read") or (number % 7 == 0 and end == "read" and judge(path, read) != "read"):
                end = f"fault: the good file is refused before or after this input, which is {end}"
            if end.startswith("fault"):
                report(f"{name}, input {number} of seed {seed}: {mutated[:200]!r}\n{end}")
            ends[name][end.split(":")[0]] += number >= 0 or end != "read"
    return ends


def main():
    """The command line of tests/fuzz.py. Exit code 1: there were faults."""
    parser = argparse.ArgumentParser("tests.fuzz", description=__doc__)
    parser.add_argument("--inputs", type=int, default=3000, help="default: 3000")
    parser.add_argument("--seed", type=int, default=1, help="of the mutations (default: 1)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        ends = fuzz(args.inputs, args.seed, pathlib.Path(folder))
    for name, counts in ends.items():
        print(f"{name:55s} {counts['read']:5d} read {counts['refused']:5d} refused {counts['fault']:5d} faults")
    total = sum(ends.values(), collections.Counter())
    print(f"{args.inputs} inputs: {total['read']} read, {total['refused']} refused, {total['fault']} faults")
    sys.exit(total["fault"] > 0)


if __name__ == "__main__":
    main()
