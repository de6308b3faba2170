"""`pytest --library PATH` tests another build of libsparsek_ops.so than build/release's."""

import pathlib

import pytest
import torch
from program import TEXT


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--library", help="path of the libsparsek_ops.so to test")


def pytest_configure(config: pytest.Config) -> None:
    library = config.getoption("--library")
    if library:
        torch.ops.load_library(library)


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(2406)


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("texts") / "text.txt"
    path.write_text(TEXT * 40)
    return path
