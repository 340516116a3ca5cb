# Copyright 2026 The MaPO reference implementation authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""benchmarks/personalization.py: one small run, and the table of the committed runs."""

import shutil
import sys
from pathlib import Path

import pytest


BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import personalization  # noqa: E402
from demo import report  # noqa: E402


COMMITTED = BENCHMARKS / "results" / "personalization.jsonl"


def test_the_committed_table_is_that_of_the_committed_rows(tmp_path, monkeypatch):
    def train(setting: dict, work_dir: Path) -> None:
        pytest.fail(f"{setting} isn't in {COMMITTED}")

    monkeypatch.setattr(personalization, "train", train)
    shutil.copy(COMMITTED, tmp_path)
    runs = personalization.Runs(tmp_path / COMMITTED.name, tmp_path)
    personalization.write_report(runs, list(personalization.LOSSES))
    assert (tmp_path / "personalization.md").read_text() == COMMITTED.with_suffix(".md").read_text()
    assert len(runs.log.rows) == len(report.read_json_lines(COMMITTED))


def test_a_run_has_the_figures_of_the_committed_ones(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "NUM_INFERENCE_STEPS", 2)
    runs = personalization.Runs(tmp_path / "rows.jsonl", tmp_path)
    quick = ["--max_train_steps=1", "--num_inference_steps=2", "--num_rejected_per_image=1"]
    row = runs.get("DCO", quick)
    committed = report.read_json_lines(COMMITTED)[0]
    assert row.keys() == committed.keys()
    assert row["base"] == committed["base"]
    assert row["photos_palette"] != row["photos_palette_before"]
    assert runs.get("DCO", quick) == row
    picture = personalization.make_picture({"DCO": personalization.output_dir(tmp_path, row)})
    assert picture.size == (1120, 136)
