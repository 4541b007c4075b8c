"""Properties that hold for every input, mutated files of every kind, and runs that are killed.

More inputs and kills than a suite has time for: `python -m tests.fuzz` and `python -m tests.kills`.
"""

import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import PROJECT
from fuzz import fuzz
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

import data
from mao import alterable_cross_entropy, candidates
from sampler import HardNegativeSampler

QUICK = settings(deadline=None, max_examples=60, derandomize=True)


@QUICK
@given(st.integers(0, 999), st.integers(2, 9), st.integers(0, 20), st.integers(1, 6))
def test_the_sampler(seed, classes, more, b):
    """Any number of images, at least one per class; b may exceed it, and K may be all classes."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation([*range(classes), *rng.integers(classes, size=more)])
    k, e = int(rng.integers(1, classes + 1)), rng.normal(size=(classes, 3))
    e /= np.linalg.norm(e, axis=1, keepdims=True)
    ask = labels, [f"c{i}" for i in range(classes)], b, k, seed, lambda names: e
    groups = np.concatenate([np.reshape(batch, (min(b, len(labels)), k)) for batch in HardNegativeSampler(*ask)])
    for anchor, *others in labels[groups].tolist():
        nearest = sorted(set(range(classes)) - {anchor}, key=lambda other: -e[anchor] @ e[other])  # noqa: B023
        assert others == nearest[: k - 1]  # Eq. 4
    assert len(set(groups[:, 0])) == len(groups) == len(labels) - len(labels) % min(b, len(labels))


@QUICK
@given(st.integers(0, 999), st.integers(2, 8), st.integers(1, 12), st.sampled_from([1e-30, 1e-6, 1.0, 1e6, 1e18]))
def test_the_alterable_cross_entropy(seed, classes, count, scale):
    """Over all classes it is the plain one, with finite gradients; neither the order nor the length of g changes it."""
    rng = torch.Generator().manual_seed(seed)
    f, g = (torch.randn(rows, 5, generator=rng, dtype=torch.float64) for rows in (count, classes))
    labels, order = torch.randint(classes, (count,), generator=rng), torch.randperm(classes, generator=rng)
    plain = F.cross_entropy(30 * F.normalize(f, dim=-1) @ F.normalize(g, dim=-1).T, labels)
    assert torch.allclose(alterable_cross_entropy(f, g[order], order.argsort()[labels], 30), plain, rtol=1e-12)
    f, g = (f / scale).float(), (g * scale).float().requires_grad_()
    loss = alterable_cross_entropy(f, g, labels, 30)
    loss.backward()
    assert loss.isfinite() and g.grad.isfinite().all()
    present, targets = candidates(torch.cat([labels, labels]))
    assert torch.equal(present[targets[:count]], labels) and present.equal(candidates(labels)[0])


@QUICK
@given(st.lists(st.tuples(st.text(max_size=3), st.integers(0, 30), st.just("n")), max_size=40))
def test_the_halves_never_overlap(items):
    base, new = data.halves(items)
    assert not set(base) & set(new) and set(base) | set(new) == {label for _, label, _ in items}
    assert 0 <= len(base) - len(new) <= 1
    assert len(data.select(items, base)) + len(data.select(items, new)) == len(items)


def test_mutated_files_are_read_or_refused(tmp_path):
    faults = []
    ends = fuzz(190, 7, tmp_path, faults.append)
    assert not faults and sum(counts["refused"] for counts in ends.values()) > 60


@pytest.mark.skipif(sys.platform == "win32", reason="Windows does not fork")
def test_killed_runs_end_bit_identical_to_runs_never_stopped():
    ask = [sys.executable, "-m", "tests.kills", "--kills", "3", "--seed", "29"]
    done = subprocess.run(ask, cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 of 3 runs came out as if never stopped; 3 of them had been killed" in done.stdout
