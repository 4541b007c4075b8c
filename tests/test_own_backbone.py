"""A reader's own prompt learner: examples/vpt.py, and a plain one beside copies of the three files."""

import shutil
import subprocess
import sys

from conftest import PROJECT


def python(folder, *words):
    return subprocess.run([sys.executable, *map(str, words)], cwd=folder, capture_output=True, text=True)


def test_the_example_runs_as_a_file_from_anywhere(eurosat, tmp_path):
    """Outside the project's folder, on a small EuroSAT; and its scores again from what it left."""
    command = [PROJECT / "examples" / "vpt.py", "--root", eurosat, "--workers", 0]
    options = f"--dataset eurosat --clip demo --backbone vpt --shots 2 --epochs 4 --out {tmp_path / 'runs'}"
    done = python(tmp_path, *command, *options.split())
    assert done.returncode == 0 and done.stdout.count(f"  {4 * 128}  ") == 2, done.stderr  # learnable parameters
    (row,) = [line.split() for line in done.stdout.splitlines() if line.startswith("VPT + MAO")]
    assert len(list((tmp_path / "runs").glob("eurosat-vpt-*"))) == 3
    again = python(tmp_path, *command, "--eval", *(tmp_path / "runs").glob("*-mao-*"))
    assert row in map(str.split, again.stdout.splitlines()), again.stderr


ALONE = """
import types
import torch
from torch.utils.data import DataLoader, TensorDataset
from mao import base_loss, new_loss
from pseudolabel import PseudoLabeler
from sampler import HardNegativeSampler

torch.manual_seed(0)
data = TensorDataset(torch.eye(6).repeat(4, 1), torch.arange(24) % 6)  # images that are features, and labels
words = torch.randn(6, 6, requires_grad=True)
learner = types.SimpleNamespace(logit_scale=10.0, image_features=lambda images: images)
learner.text_features = lambda classes=None: words if classes is None else words[classes]
names = [f"class {i}" for i in range(6)]
batches = HardNegativeSampler(data.tensors[1], names, batch_size=2, top_k=3, encoder=lambda names: torch.randn(6, 5))
optimizer, losses = torch.optim.SGD([words], 0.5), []
for epoch in range(5):
    for images, labels in DataLoader(data, batch_sampler=batches):
        loss = base_loss(learner, images, labels)
        optimizer.zero_grad(); loss.backward(); optimizer.step()
        losses.append(loss.item())
assert len(images) == 6 and sum(losses[-12:]) < 0.5 * sum(losses[:12])
new_loss(learner, data.tensors[0], PseudoLabeler(learner)(data.tensors[0])[0]).backward()
print("all three work alone")
"""


def test_three_files_copied_alone_tune_a_learner_of_another_project(tmp_path):
    for name in ("mao.py", "sampler.py", "pseudolabel.py"):
        shutil.copy(PROJECT / name, tmp_path)
    (tmp_path / "alone.py").write_text(ALONE)
    done = python(tmp_path, "-I", "-c", "import sys; sys.path.insert(0, '.'); import alone")
    assert done.stdout.strip() == "all three work alone", done.stderr
