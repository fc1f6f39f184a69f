"""The example's functions are tested as users test theirs: without a job."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "example_dags"


def test_functions_run_in_a_unit_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_file_location("train_function", EXAMPLES / "train_function.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.chdir(tmp_path)
    model = module.train.function(EXAMPLES / "train" / "data.csv", rows=24)
    assert set(model) == {"slope", "intercept"}
    assert (tmp_path / "model.json").exists()
    assert module.forecast.function({"slope": 1.0, "intercept": 2.0}, hour=3) == 5.0
    assert module.forecast.function({"slope": 1.0, "intercept": 2.0}, hour=-1) == 1.0
