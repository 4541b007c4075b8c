"""README.md and docs/ hold true: their links, the lines of code they point to, their code and every command they show.

A link to a line of code names what is defined there: [`candidates`](../mao.py#L48). When code moves,

    python tests/test_docs.py

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

PROJECT = pathlib.Path(__file__).resolve().parent.parent
DOCUMENTS = [PROJECT / "README.md", *sorted((PROJECT / "docs").glob("*.md"))]
NAMES = [str(document.relative_to(PROJECT)) for document in DOCUMENTS]
LINE_LINK = re.compile(r"\[`([^`\]]+)`\]\(([^)#\s]+\.py)#L(\d+)\)")  # name, path, line
LINK = re.compile(r"\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)  # language, content

every_document = pytest.mark.parametrize("document", DOCUMENTS, ids=NAMES)


def prose(document):
    """A document's text without its code blocks."""
    return FENCE.sub("", document.read_text())


def blocks(document, language):
    """The contents of a document's code blocks in a language ("": none is given)."""
    return [content for found, content in FENCE.findall(document.read_text()) if found == language]


# Links ----------------------------------------------------------------------------------------------------------------


def definitions(path):
    """Where a Python file defines its names: {"name" or "Class.name" or "--option": line}."""
    tree, lines = ast.parse(path.read_text()), {}

    def add(statements, prefix):
        for node in statements:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                lines.setdefault(prefix + node.name, node.lineno)
            if isinstance(node, ast.ClassDef):
                add(node.body, f"{prefix}{node.name}.")
            targets = getattr(node, "targets", [getattr(node, "target", None)])
            for target in targets:
                for name in ast.walk(target) if target is not None else ():
                    if isinstance(name, ast.Name):
                        lines.setdefault(prefix + name.id, node.lineno)

    add(tree.body, "")
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            for argument in node.args:
                if isinstance(argument, ast.Constant) and str(argument.value).startswith("--"):
                    lines[argument.value] = min(argument.lineno, lines.get(argument.value, argument.lineno))
    return lines


def right_line(document, name, path):
    """The line that a link [`name`](path#L...) of a document should have; None: nothing of that name is there."""
    file = document.parent / path
    return definitions(file).get(name) if file.is_file() else None


def headings(document):
    """The anchors of a Markdown file's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", prose(document), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@every_document
def test_links_work(document):
    for link in LINK.findall(prose(document)):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = document.parent / path if path else document
        assert target.exists(), f"{document.name} links to {link}, but there is no {path}"
        if anchor and target.suffix == ".md":
            assert anchor in headings(target), f"{document.name} links to {link}, but no heading has that anchor"


@every_document
def test_links_to_code_name_the_line_of_their_definition(document):
    text = prose(document)
    for name, path, line in LINE_LINK.findall(text):
        right = right_line(document, name, path)
        assert right is not None, f"{document.name}: {path} does not define `{name}`"
        assert int(line) == right, (
            f"{document.name}: `{name}` is in line {right} of {path}, not {line}: run python tests/test_docs.py"
        )
    named = len(LINE_LINK.findall(text))
    assert text.count(".py#L") == named, f"{document.name}: each link to a line must be [`name`](file.py#L1)"


def renew():
    """Writes the right line numbers into all links to code; says which links changed, and which have no target."""
    for document in DOCUMENTS:

        def renewed(link, document=document):
            name, path, line = link.groups()
            right = right_line(document, name, path)
            if right is None:
                print(f"{document.name}: {path} does not define `{name}`")
                return link.group()
            if int(line) != right:
                print(f"{document.name}: `{name}` moved from line {line} to {right} of {path}")
            return f"[`{name}`]({path}#L{right})"

        document.write_text(LINE_LINK.sub(renewed, document.read_text()))


def test_renew_mends_drifted_lines_and_reports_lost_names(tmp_path, monkeypatch, capsys):
    (tmp_path / "code.py").write_text('LIMIT = 1\n\n\nclass Box:\n    def open(self):\n        add("--lid")\n')
    document = tmp_path / "page.md"
    document.write_text("[`LIMIT`](code.py#L9) [`Box.open`](code.py#L9) [`--lid`](code.py#L9) [`gone`](code.py#L9)")
    monkeypatch.setattr(sys.modules[__name__], "DOCUMENTS", [document])
    renew()
    assert [int(line) for _, _, line in LINE_LINK.findall(document.read_text())] == [1, 5, 6, 9]
    assert "code.py does not define `gone`" in capsys.readouterr().out


# Code blocks ----------------------------------------------------------------------------------------------------------


@every_document
def test_python_blocks_compile(document):
    for number, block in enumerate(blocks(document, "python"), 1):
        compile(block, f"{document.name}, Python block {number}", "exec")


def test_the_readmes_method_runs_and_learns(monkeypatch):
    """The README's loop over both phases, as it stands there, with a small learner and random images."""
    import torch
    from torch.utils.data import DataLoader, TensorDataset

    import sampler

    class Learner(torch.nn.Module):
        logit_scale = 10.0

        def __init__(self):
            super().__init__()
            self.words, self.image = torch.nn.Embedding(8, 6), torch.nn.Linear(12, 6)

        def text_features(self, classes=None):
            words = self.words.weight if classes is None else self.words(classes)
            return torch.nn.functional.normalize(words, dim=-1)

        def image_features(self, images):
            return torch.nn.functional.normalize(self.image(images.flatten(1)), dim=-1)

    torch.manual_seed(0)
    monkeypatch.setattr(sampler, "minilm", lambda names: torch.randn(len(names), 5))
    images, labels = torch.randn(24, 3, 2, 2), torch.arange(24) % 8
    learner = Learner()
    before = learner.words.weight.detach().clone()
    scope = {
        "DataLoader": DataLoader,
        "dataset": TensorDataset(images, labels),
        "labels": labels,
        "classnames": [f"class {number}" for number in range(8)],
        "learner": learner,
        "zero_shot": Learner(),
        "optimizer": torch.optim.SGD(learner.parameters(), 0.1),
        "unlabeled_loader": DataLoader(images, 12),
    }
    (block,) = blocks(PROJECT / "README.md", "python")
    exec(block, scope)
    assert scope["images"].shape == (12, 3, 2, 2) and scope["pseudo_labels"].shape == (12,)
    assert torch.isfinite(scope["loss"]) and not torch.equal(learner.words.weight, before)


# Commands -------------------------------------------------------------------------------------------------------------


class Parsed(BaseException):
    """Raised in place of a command's work, as soon as its arguments are parsed. args[0]: they."""


def commands(document):
    """The commands that a document shows, in its code blocks and in its text: lists of words."""
    lines = [line for block in blocks(document, "") for line in block.splitlines()]
    lines += [" ".join(inline.split()) for inline in re.findall(r"`([^`]+)`", prose(document))]
    for line in lines:
        if re.match(r"(python|pip|pytest)( |$)", line):
            words = shlex.split(line, comments=True)
            while "&&" in words:
                yield words[: words.index("&&")]
                words = words[words.index("&&") + 1 :]
            yield words


def start(words):
    """Starts the script of a command: the words behind `python`. Its own parser reads sys.argv."""
    if words[0] == "-m":
        importlib.import_module(words[1]).main()
    elif words[0] == "vpt.py":
        block = next(block for block in blocks(PROJECT / "docs/backbone.md", "python") if block.startswith("# vpt.py"))
        exec(block, {"__name__": "__main__"})
    else:
        importlib.import_module(words[0].removesuffix(".py")).main()


@every_document
def test_commands_are_ones_that_the_scripts_accept(document, monkeypatch, capsys):
    import backbones
    import data

    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(parser, arguments=None, namespace=None):
        raise Parsed(parse(parser, arguments, namespace))

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    for program, *words in commands(document):
        shown = " ".join([program, *words])
        if program == "pytest":
            continue
        if program == "pip":
            assert (PROJECT / words[words.index("-r") + 1]).is_file(), shown
            continue
        name, arguments = (words[1], words[2:]) if words[0] == "-m" else (words[0], words[1:])
        with monkeypatch.context() as patch:
            patch.setitem(backbones.BACKBONES, "vpt", None)  # docs/backbone.md puts its own there; undone afterwards
            if name != "vpt.py":
                patch.delitem(backbones.BACKBONES, "vpt")
            patch.setattr(sys, "argv", [name, *arguments])
            try:
                start(words)
                pytest.fail(f"{document.name}: `{shown}` never parsed its arguments")
            except Parsed as parsed:
                given = vars(parsed.args[0])
            except SystemExit as end:
                assert "--help" in words and not end.code, f"{document.name}: `{shown}`: {capsys.readouterr().err}"
                continue
        datasets = [given["dataset"]] if "dataset" in given else []
        if name == "data.py":
            datasets.append(given["name"])
        for dataset in datasets:
            assert dataset in data.DATASETS, f"{document.name}: `{shown}` names a dataset that is not there"


def test_the_readme_shows_its_two_commands_and_stays_short():
    text = (PROJECT / "README.md").read_text()
    assert "pip install -r requirements.txt && python run.py" in text and "\npytest " in text
    assert len(text.encode()) <= 9500


if __name__ == "__main__":
    renew()
