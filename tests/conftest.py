"""What all tests share: the options of the command line and a fixed random state."""

import os

import pytest
import torch

# No test waits for this machine to be measured, or depends on it.
os.environ["FLASHINF_COSTS"] = "builtin"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-golden", action="store_true", help="write the golden texts anew instead of comparing"
    )


@pytest.fixture
def update_golden(request: pytest.FixtureRequest) -> bool:
    """Whether golden texts are written anew."""
    return bool(request.config.getoption("--update-golden"))


@pytest.fixture
def without_gradients():
    """No autograd, and a random state that no other test sees."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.fixture
def fresh_dynamo():
    """Nothing compiled before, and a fixed random state."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()
