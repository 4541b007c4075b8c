"""The benchmark runs, its fast paths are exact, and its ratios have their names."""

import json
import sys
import time

import pytest

from experiments import bench
from tests.conftest import encode_once

NAMES = """text_all_classes text_candidates text_32_candidates coop_step maple_step promptsrc_step coop_step_bf16
coop_bf16_to_fp32 promptsrc_step_cached_bf16 promptsrc_step_to_cached_step cached_views_coop cached_views_phase
cached_views_phase_bf16 cached_views_new_phase mao_step_to_coop_step mao_new_step_to_coop_step
mao_new_step_cached_to_coop_step coop_step_to_image_side maple_step_to_image_side promptsrc_step_to_image_side"""

JOBS = [("CoOp", [40, 40, 20]), ("MaPLe", [40, 40, 40]), ("PromptSRC", [80, 80, 40])]  # the images of three phases


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """run("--quick") runs the bench at tiny sizes: (what --json has, stdout)."""

    def command(*words):
        file = tmp_path / "bench.json"
        monkeypatch.setattr(sys, "argv", ["bench", "--turns", "2", "--sizes", "tiny", "--json", str(file), *words])
        assert not bench.main()
        return json.loads(file.read_text()), capsys.readouterr().out

    return command


@pytest.mark.parametrize("name, tuning", JOBS)
def test_a_job_counts_what_it_encodes(name, tuning, monkeypatch):
    monkeypatch.setattr("sampler.minilm", lambda names: encode_once(tuple(names)))
    options = ["--shots", "2", "--epochs", "4", "--workers", "0"]
    for (_, rows), frozen in zip(bench.bench_job(name.lower(), "tiny", "cpu", 10, options=options), (1, 0)):
        images = {row["part"]: (row["images encoded"], row["needed"]) for row in rows}
        phases = [images[f"{name}{phase}"] for phase in (": base phase", " + MAO: base phase", " + MAO: new phase")]
        assert phases == list(zip(tuning, tuning))
        passes = [frozen, 0, 0] if name == "CoOp" else [frozen, 1, 2]  # the first of the two jobs fills the cache
        tests = [images[f"{row}: test images"] for row in ("zero-shot CLIP", name, f"{name} + MAO")]
        assert tests == [(30 * count, 30 * count) for count in passes]
        assert rows[-1]["images encoded"] == sum(tuning) + 30 * sum(passes)  # and none in another part
        assert {row["part"]: row["texts encoded"] for row in rows}[f"{name}: base phase"] == 20 + 300 * (name[0] == "P")


@pytest.mark.parametrize("how", [["--quick"], []])
def test_the_bench_at_tiny_sizes(how, run):
    found, out = run(*how)
    assert set(NAMES.split()) <= set(found["ratios"]) and all(one["value"] > 0 for one in found["ratios"].values())
    assert found["memory_1000_classes"] > 1 and len(found["differences"]) == 3
    assert max(found["differences"].values()) < 1e-4
    text = {line["classes"]: line["candidates"] for line in found["MiB of the text side"]}
    assert text[1000] < 2 * text[50] + 2  # flat in the number of classes
    assert all(name in out for name in NAMES.split()) and ("PromptSRC + MAO, new phase" in out) == (not how)


def test_turns_and_what_is_said_of_them():
    costs = bench.Meter("cpu", 3)({"a": lambda: sum(range(2_000_000)), "b": lambda: sum(range(1_000_000))})
    found = bench.ratio(costs["a"], costs["b"])
    assert found.value == pytest.approx(2, rel=0.2) and len(costs["a"].seconds) == 3
    asleep = bench.Meter("cpu", 2)({"a": lambda: time.sleep(0.05)})["a"]  # as while other work has the processor
    assert asleep.least < 0.02 and min(asleep.clock) >= 0.05
    steady, unsteady = (bench.ratio(bench.Cost([2.0, 2 + d, 9.0]), bench.Cost([1.0, 1.0, 1.0])) for d in (0.2, 0.4))
    assert str(steady) == "2.00 (10%)" and str(unsteady).startswith("unsteady: the fastest two turns are 20% apart")
    shorter = bench.Ratio(0.5, 0.01)  # a step that takes half of what its image side takes
    assert bench.impossible({"coop_step_to_image_side": shorter, "coop_step": shorter}) == ["coop_step_to_image_side"]


def test_the_loader(monkeypatch, run):
    costs = bench.bench_loader(bench.Meter("cpu", 2), count=4)
    assert costs["kept"].least < costs["anew"].least
    monkeypatch.setattr(bench, "bench_loader", lambda _: costs)
    assert "kept_images" in run("--loader")[0]["ratios"]


def test_table_3_has_all_nine(run):
    rows = {row["row"]: row for row in run("--table3")[0]["rows"]}
    assert len(rows) == 3 * 9 - 1 and "CoPrompt + MAO, new phase" not in rows  # which the paper leaves out
    assert all(row["s per step"] > 0 and row["images/s at test"] > 0 for row in rows.values())
    assert rows["KgCoOp"]["learnable"] == rows["KgCoOp + MAO, base phase"]["learnable"] == 4 * 64
