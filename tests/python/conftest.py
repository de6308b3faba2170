"""`pytest --library PATH` tests another build of libsparsek_ops.so than build/release's."""

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--library", help="path of the libsparsek_ops.so to test")


def pytest_configure(config: pytest.Config) -> None:
    library = config.getoption("--library")
    if library:
        torch.ops.load_library(library)


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(2406)
