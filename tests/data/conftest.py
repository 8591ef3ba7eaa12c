import pytest

from fedsim.data.digits import build_digits


@pytest.fixture(scope="session")
def digits():
    """A small suite, all domains, in one process."""
    return build_digits(0, train=12, test=15, workers=1)
