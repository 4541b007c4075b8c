"""README.md and docs/ are right: their links, the lines of code they link to, their code, commands and images.

A link to a line of code names what is defined there: [`candidates`](../mao.py#L48). When code moves,

    python -m tests.test_docs

writes the right line numbers into all of these links. It names those whose target is gone.
"""

import argparse
import ast
import importlib
import pathlib
import re
import shlex
import sys

import pytest
import torch
from torch.utils.data import TensorDataset

import run
from backbones import CoOp
from docs.__main__ import is_empty
from encoders import frozen_image_features, load_clip
from harness import demo, folders, images, options

PROJECT = pathlib.Path(run.__file__).parent
DOCUMENTS = [PROJECT / "README.md", *sorted((PROJECT / "docs").glob("*.md"))]
LINE_LINK = re.compile(r"\[`([^`\]]+)`\]\(([^)#\s]+\.py)#L(\d+)\)")  # name, path, line
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)  # language, content

every_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)


def prose(document):
    """A document's text without its code blocks."""
    return FENCE.sub("", document.read_text())


def blocks(document, language):
    """The contents of a document's code blocks in a language ("": none is given)."""
    return [content for found, content in FENCE.findall(document.read_text()) if found == language]


# Links ----------------------------------------------------------------------------------------------------------------


def line_of(name, path):
    """The line where a Python file defines `name`, `Class.name` or run.py's setting `--name`; None: nowhere."""
    name = f"Settings.{name[2:].replace('-', '_')}" if name.startswith("--") else name
    nodes = ast.parse(path.read_text()).body
    for part in name.split("."):
        for node in nodes:
            targets = [node, *getattr(node, "targets", [getattr(node, "target", None)])]
            if part in (getattr(target, "name", getattr(target, "id", None)) for target in targets):
                line, nodes = node.lineno, getattr(node, "body", [])
                break
        else:
            return None
    return line


def headings(document):
    """The anchors of a Markdown file: of its headings, as GitHub makes them, and those set by hand."""
    titles = re.findall(r"^#+ (.+)$", prose(document), re.M)
    by_hand = re.findall(r'<a id="([\w-]+)">', prose(document))
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles} | set(by_hand)


@every_document
def test_links_work(document):
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(document)):
        path, _, anchor = link.partition("#")
        target = document.parent / path if path else document
        assert link.startswith("https://") or target.exists(), f"{link}: there is no {path}"
        if anchor and target.suffix == ".md":
            assert anchor in headings(target), f"{link}: nothing has that anchor"


@every_document
def test_links_to_code_name_the_line_of_their_definition(document):
    links = LINE_LINK.findall(prose(document))
    for name, path, line in links:
        right = line_of(name, document.parent / path)
        assert int(line) == right, f"`{name}` is in line {right} of {path}: run python -m tests.test_docs"
    assert prose(document).count(".py#L") == len(links), "each link to a line must be [`name`](file.py#L1)"


def renew():
    """Writes the right line numbers into all links to code; says which links have no target."""
    for document in DOCUMENTS:

        def renewed(link, document=document):
            name, path, _ = link.groups()
            right = line_of(name, document.parent / path)
            if right is None:
                print(f"{document.name}: {path} does not define `{name}`")
            return f"[`{name}`]({path}#L{right})" if right else link.group()

        document.write_text(LINE_LINK.sub(renewed, document.read_text()))


@pytest.mark.parametrize("path", sorted((PROJECT / "assets").glob("*.png")), ids=lambda path: path.name)
def test_images_show_something(path):
    assert not is_empty(path.read_bytes())
    assert any(f"assets/{path.name})" in prose(document) for document in DOCUMENTS), "no document shows it"


# Code blocks ----------------------------------------------------------------------------------------------------------


@every_document
def test_python_blocks_compile(document):
    for number, block in enumerate(blocks(document, "python"), 1):
        compile(block, f"{document.name}, Python block {number}", "exec")


def test_the_readmes_method_runs_and_scores(capsys):
    """The README's loop over both phases and its scores, as printed there, with CoOp on 8 + 8 of the demo's classes."""
    clip_model, _ = load_clip("demo")
    base_names, new_names = demo.CLASSNAMES[:8], demo.CLASSNAMES[50:58]

    def images_of(names, part, count):
        drawn = [demo.read(f"sepia/{part}/{name}/{number:02d}") for name in names for number in range(count)]
        pixels = images.model_input(torch.stack([images.test_transform(32)(image) for image in drawn]))
        return frozen_image_features(clip_model, pixels), torch.arange(8).repeat_interleave(count)

    base_train, base_labels = images_of(base_names, "train", 8)
    base_images, new_images = TensorDataset(base_train, base_labels), TensorDataset(*images_of(new_names, "train", 8))
    base_test, new_test = images_of(base_names, "test", 10), images_of(new_names, "test", 10)
    torch.manual_seed(1)
    learner = CoOp(clip_model, base_names)
    scope = globals() | locals()
    (block,) = blocks(PROJECT / "README.md", "python")
    assert len(list(filter(None, block.splitlines()))) <= 30
    exec(block, scope)
    base_score, new_score = map(float, capsys.readouterr().out.split())
    assert 60 < base_score <= 100 and 40 < new_score <= 100
    learner.set_classes(base_names)
    learner.load_state_dict(scope["base"])  # the prompts after phase 1, not the last ones, gave the first score
    right = 100 * (learner(base_test[0]).argmax(dim=1) == base_test[1]).float().mean().item()
    assert right == pytest.approx(base_score) and not torch.equal(scope["base"]["ctx"], scope["new"]["ctx"])


# Commands -------------------------------------------------------------------------------------------------------------


class Parsed(BaseException):
    """Raised instead of a command's work, as soon as its arguments are parsed. args[0]: they."""


def commands(document):
    """The Python commands that a document shows, in its code blocks and in its text: lists of words after `python`."""
    lines = [line for block in blocks(document, "") for line in block.splitlines()]
    lines += [" ".join(inline.split()) for inline in re.findall(r"`([^`]+)`", prose(document))]
    for line in lines:
        words = shlex.split(line, comments=True) if re.match("(python|pip) ", line) else []
        if "python" in words:
            yield words[words.index("python") + 1 :]


@every_document
def test_commands_are_ones_that_the_scripts_accept(document, monkeypatch, capsys):
    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(parser, arguments=None, namespace=None):
        raise Parsed(parse(parser, arguments, namespace))

    choices = {"backbone": [*run.LEARNERS, "vpt"], "sampler": run.SAMPLERS, "labeler": run.LABELERS}
    for words in commands(document):
        name, arguments = (words[1], words[2:]) if words[0] == "-m" else (words[0], words[1:])
        try:
            if name in ("run.py", "examples/vpt.py"):
                given = options.parse(arguments, "", choices)
            else:
                with monkeypatch.context() as patch:
                    patch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
                    patch.setattr(sys, "argv", [name, *arguments])
                    importlib.import_module(name.removesuffix(".py")).main()
                pytest.fail(f"`{' '.join(words)}` never parsed its arguments")
        except Parsed as parsed:
            given = parsed.args[0]
        except SystemExit as end:
            assert not end.code, f"`{' '.join(words)}`: {capsys.readouterr().err}"
            continue
        dataset = given.name if name == "data.py" else getattr(given, "dataset", "demo")
        assert dataset in folders.DATASETS, f"`{' '.join(words)}` names a dataset that is not there"


def test_the_readme_shows_its_two_commands_which_ci_runs_and_stays_short():
    ci, (main_job, tests) = (PROJECT / ".ci/run").read_text(), blocks(PROJECT / "README.md", "")[0].splitlines()
    assert main_job == "pip install -r requirements.txt && python run.py" and main_job in ci
    assert tests == "pip install -r requirements-dev.txt && pytest -n 2 --dist loadfile"
    assert ci.rstrip().endswith(f"({tests})")
    assert (PROJECT / "README.md").stat().st_size <= 8192


if __name__ == "__main__":
    renew()
