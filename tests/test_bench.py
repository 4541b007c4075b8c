"""The benchmark runs, its fast paths are exact, and its ratios have their names."""

import json
import runpy
import sys
import time

import pytest

from experiments import bench

NAMES = [
    "text_all_classes",
    "text_candidates",
    "coop_step",
    "cached_views_phase",
    "maple_step",
    "promptsrc_step",
    "coop_step_bf16",
    "promptsrc_step_cached_bf16",
    "cached_views_phase_bf16",
    "mao_step_to_coop_step",
    "coop_step_to_image_side",
    "maple_step_to_image_side",
    "promptsrc_step_to_image_side",
]


@pytest.mark.parametrize("quick", [True, False])
def test_the_bench_at_tiny_sizes(quick, tmp_path, monkeypatch, capsys):
    how = ["--turns", "2", *(["--quick"] if quick else [])]
    monkeypatch.setattr(sys, "argv", ["bench", *how, "--sizes", "tiny", "--json", str(tmp_path / "bench.json")])
    runpy.run_module("experiments.bench", run_name="__main__")
    found = json.loads((tmp_path / "bench.json").read_text())
    assert set(NAMES) <= set(found["ratios"]) and all(one["value"] > 0 for one in found["ratios"].values())
    assert found["memory_1000_classes"] > 1
    assert len(found["differences"]) == 6 and max(found["differences"].values()) < 1e-4
    text = {(line["backbone"], line["classes"]): line["mao"][1] for line in found["sweep"]}
    assert text["coop", 1000] < 2 * text["coop", 50] + 2  # MiB: flat in the number of classes
    out = capsys.readouterr().out
    assert all(name in out for name in NAMES) and ("PromptSRC + MAO, new phase" in out) == (not quick)


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


def test_the_loader(capsys):
    costs = bench.bench_loader(bench.Meter("cpu", 2), count=4)  # which compares the bits
    bench.show_loader(costs, count=4)
    assert costs["kept"].least < costs["anew"].least and "a second decoded anew" in capsys.readouterr().out


def test_a_step_of_the_demo_takes_as_long_as_its_parts(capsys):
    costs = bench.bench_demo_step(bench.Meter("cpu", 2), steps=4)
    assert costs["whole"].least > costs["image encoder"].least + costs["text side forward"].least > 0
    bench.show_demo_step(costs, steps=4)
    assert "a step of MAO's base phase on the demo" in capsys.readouterr().out


def test_table_3_has_all_nine(tmp_path, monkeypatch, capsys):
    file = tmp_path / "table3.json"
    how = ["--table3", "--turns", "2", "--sizes", "tiny", "--json", str(file)]
    monkeypatch.setattr(sys, "argv", ["bench", *how])
    runpy.run_module("experiments.bench", run_name="__main__")
    rows = {row["row"]: row for row in json.loads(file.read_text())["rows"]}
    assert len(rows) == 3 * 9 - 1 and "CoPrompt + MAO, new phase" not in rows  # which the paper leaves out
    assert all(row["step"] > 0 and row["images_per_second"] > 0 for row in rows.values())
    assert rows["KgCoOp"]["learnable"] == rows["KgCoOp + MAO, base phase"]["learnable"] == 4 * 64
    assert "| CoCoOp + MAO, new phase |" in capsys.readouterr().out
