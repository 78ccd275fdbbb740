"Fixtures: where real data lies, and the switch for slow tests."
import os
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)
HERE = Path(__file__).resolve().parent


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run tests that take minutes")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--slow"): return
    for item in items:
        if "slow" in item.keywords: item.add_marker(pytest.mark.skip(reason="slow: run with --slow"))


@pytest.fixture(scope="session")
def shared() -> Path:
    "The folder with real frames and papers' tables, named by CMKD_SHARED or lying beside the clone."
    folder = Path(os.environ.get("CMKD_SHARED", HERE.parent.parent/"shared"))
    if not (folder/"data").is_dir():
        pytest.skip("no real data: set CMKD_SHARED to the folder that holds data/kitti")
    return folder


@pytest.fixture(scope="session")
def golden() -> Path:
    "Reference numbers that are committed with the tests."
    return HERE/"golden"
