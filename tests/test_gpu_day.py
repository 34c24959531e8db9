"""tests/gpu_day.py without a GPU: one call brings home every figure that can be had; tests/benchmark.py"""
import benchmark
import gpu_day
import torch
import worlds

import pretrain

PAGE = "# earlybird\n\n<!-- gpu: begin -->\nyesterday's\n<!-- gpu: end -->\n\nThe end.\n"


def test_a_step_that_fails_or_is_late_does_not_stop_the_day(tmp_path, monkeypatch):
    """`waits` has no base model to load, `bench` no time to: each says so, and `about` still runs."""
    monkeypatch.setitem(gpu_day.LIMITS, "bench", .2)
    config = gpu_day.Config(("waits", "bench", "about"), "cpu", str(tmp_path / "runs"), str(tmp_path / "out"))
    worlds.quietly(gpu_day.day, config)
    waits, bench, about = worlds.lines(tmp_path / "out" / "gpu_day.jsonl")
    assert waits["failed"] and "more than" not in waits["failed"]
    assert bench["failed"] == "more than 0.2 s" and bench["s"] < 5
    assert about["torch"] == torch.__version__ and "failed" not in about
    table = (tmp_path / "out" / "README.md").read_text()
    assert "| bench | failed | more than 0.2 s |" in table
    assert f"| about | torch | {torch.__version__} |" in table


def test_the_table_of_readme(tmp_path, monkeypatch):
    """Of a GPU, four figures stand between the marks of README.md, whose other lines stay; one that was not
    found is a question mark. A rehearsal leaves README.md alone."""
    monkeypatch.setattr(gpu_day, "ROOT", tmp_path)
    page = tmp_path / "README.md"
    page.write_text(PAGE)
    out = tmp_path / "out"
    out.mkdir()
    lines = [{"step": "about", "card": "A | B"}, {"step": "study", "s": 190., "failed": "more than 190 s"},
             {"step": "waits", "sampling s": .123456, "update s": .5}]
    gpu_day.publish(gpu_day.Config(device="cpu", out=str(out)), lines)
    assert page.read_text() == PAGE
    for _ in range(2):
        gpu_day.publish(gpu_day.Config(out=str(out)), lines)
    before, table, after = page.read_text().replace("end -->", "begin -->").split("<!-- gpu: begin -->")
    assert before + after == "# earlybird\n\n\n\nThe end.\n"
    assert table.splitlines()[-1] == "| A / B | ? | 0.1235 | 0.5 |"


def test_the_benchmark_pretrains_in_micro_batches_of_the_default_size(monkeypatch):
    """It split batches into parts of --micro-batch sequences, which failed when 0 became the default."""
    small = pretrain.Config(batch=2, context=32)
    monkeypatch.setattr(pretrain, "Config", lambda: small)
    [row] = benchmark.pretraining(benchmark.Config(**benchmark.QUICK), "0.3M")
    assert row.amount == 3 * 2 * 32 and len(row.seconds) == 2
