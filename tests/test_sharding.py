"""Bases whose parameters are sharded over processes. The checks themselves are in the programs."""

import importlib.util
import json
from pathlib import Path

import pytest
from launching import launch


def failures(program, folder, checks, **options):
    """The checks of a program that failed, on each of its two processes."""
    launch(Path(__file__).with_name(program), folder, **options)
    reports = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]
    assert [len(report) for report in reports] == [checks, checks]
    return [{check: how for check, how in report.items() if how} for report in reports]


@pytest.mark.processes
def test_fsdp(tmp_path):
    assert failures("sharded_by_fsdp.py", tmp_path, checks=29) == [{}, {}]


@pytest.mark.processes
@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs DeepSpeed")
def test_zero_3(tmp_path):
    # DeepSpeed compiles something when it first runs on a machine.
    options = {"env": {"DS_ACCELERATOR": "cpu"}, "timeout": 240}
    assert failures("sharded_by_zero.py", tmp_path, checks=8, **options) == [{}, {}]
