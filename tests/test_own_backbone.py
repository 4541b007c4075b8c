"""A reader's own backbone: the one in docs/backbone.md, and a plain PyTorch model beside copies of the three files."""

import pathlib
import re
import shutil
import subprocess
import sys

import backbones
import run

PROJECT = pathlib.Path(run.__file__).parent


def test_the_backbone_in_the_docs_runs(eurosat, tmp_path, capsys, monkeypatch):
    (block,) = re.findall(r"```python\n(# vpt\.py.*?)```", (PROJECT / "docs" / "backbone.md").read_text(), re.S)
    monkeypatch.setitem(backbones.BACKBONES, "vpt", None)  # taken out again after the test
    data = f"--dataset eurosat --root {eurosat} --clip demo --backbone vpt"
    size = f"--epochs 4 --shots 4 --workers 0 --out {tmp_path / 'runs'}"
    monkeypatch.setattr(sys, "argv", ["vpt.py", *data.split(), *size.split()])
    exec(block, {"__name__": "__main__"})
    out = capsys.readouterr().out
    assert "VPT + MAO" in out and f"{4 * 128}" in out
    assert len(list((tmp_path / "runs").glob("eurosat-vpt-*"))) == 3


PLAIN = """
import torch
from torch.utils.data import DataLoader, TensorDataset
from mao import base_loss, new_loss
from pseudolabel import PseudoLabeler
from sampler import HardNegativeSampler

class Plain(torch.nn.Module):
    logit_scale = 10.0
    def __init__(self, classes):
        super().__init__()
        self.words, self.image = torch.nn.Embedding(classes, 8), torch.nn.Linear(12, 8)
    def text_features(self, classes=None):
        return torch.nn.functional.normalize(self.words.weight if classes is None else self.words(classes), dim=-1)
    def image_features(self, images):
        return torch.nn.functional.normalize(self.image(images.flatten(1)), dim=-1)

torch.manual_seed(0)
names = [f"class {i}" for i in range(6)]
images, labels = torch.randn(24, 3, 2, 2), torch.arange(24) % 6
batches = HardNegativeSampler(labels, names, batch_size=2, top_k=3, encoder=lambda names: torch.randn(6, 5))
learner = Plain(6)
optimizer = torch.optim.SGD(learner.parameters(), 0.5)
losses = []
for epoch in range(20):
    batches.set_epoch(epoch)
    for x, y in DataLoader(TensorDataset(images, labels), batch_sampler=batches):
        assert len(x) == 6
        loss = base_loss(learner, x, y)
        optimizer.zero_grad(); loss.backward(); optimizer.step()
        losses.append(loss.item())
assert sum(losses[-12:]) < 0.5 * sum(losses[:12])
pseudo_labels, confidences = PseudoLabeler(learner)(images)
assert pseudo_labels.shape == (24,) and (confidences <= 1).all()
new_loss(learner, images, pseudo_labels).backward()
print("all three work alone")
"""


def test_three_files_copied_alone_work_with_a_learner_that_is_not_ours(tmp_path):
    for name in ("mao.py", "sampler.py", "pseudolabel.py"):
        shutil.copy(PROJECT / name, tmp_path)
    (tmp_path / "plain.py").write_text(PLAIN)
    program = "import sys; sys.path.insert(0, '.'); import plain"
    done = subprocess.run([sys.executable, "-I", "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.strip() == "all three work alone", done.stderr
