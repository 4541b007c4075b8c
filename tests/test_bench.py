"""The benchmark runs, its fast paths are exact, and its ratios have their names."""

import json
import runpy
import sys

import pytest

NAMES = [
    "text_all_classes",
    "text_candidates",
    "coop_step",
    "cached_views_phase",
    "maple_step",
    "promptsrc_step",
    "memory_1000_classes",
    "mao_step_to_coop_step",
    "coop_step_to_image_side",
    "maple_step_to_image_side",
    "promptsrc_step_to_image_side",
]


@pytest.mark.parametrize("quick", [True, False])
def test_the_bench_at_tiny_sizes(quick, tmp_path, monkeypatch, capsys):
    how = ["--quick"] if quick else ["--repeats", "1"]
    monkeypatch.setattr(sys, "argv", ["bench", *how, "--sizes", "tiny", "--json", str(tmp_path / "bench.json")])
    runpy.run_module("experiments.bench", run_name="__main__")
    found = json.loads((tmp_path / "bench.json").read_text())
    assert set(NAMES) <= set(found["ratios"]) and all(value > 0 for value in found["ratios"].values())
    assert len(found["differences"]) == 6 and max(found["differences"].values()) < 1e-4
    text = {(line["backbone"], line["classes"]): line["mao"][1] for line in found["sweep"]}
    assert text["coop", 1000] < 2 * text["coop", 50] + 2  # MiB: flat in the number of classes
    out = capsys.readouterr().out
    assert all(name in out for name in NAMES) and ("PromptSRC + MAO, new phase" in out) == (not quick)


def test_table_3_has_all_nine(tmp_path, monkeypatch, capsys):
    file = tmp_path / "table3.json"
    how = ["--table3", "--repeats", "1", "--sizes", "tiny", "--json", str(file)]
    monkeypatch.setattr(sys, "argv", ["bench", *how])
    runpy.run_module("experiments.bench", run_name="__main__")
    rows = {row["row"]: row for row in json.loads(file.read_text())["rows"]}
    assert len(rows) == 3 * 9 - 1 and "CoPrompt + MAO, new phase" not in rows  # which the paper leaves out
    assert all(row["step"] > 0 and row["images_per_second"] > 0 for row in rows.values())
    assert rows["KgCoOp"]["learnable"] == rows["KgCoOp + MAO, base phase"]["learnable"] == 4 * 64
    assert "| CoCoOp + MAO, new phase |" in capsys.readouterr().out
