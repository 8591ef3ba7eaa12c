"""A client applies only the evaluation modes that the run's configuration lists, and only to its test split."""

import pytest

from fedsim.config import to_toml
from fedsim.deployment.jobs import Job, end_of
from fedsim.deployment.server import deployed
from fedsim.deployment.site import Refused, Site
from fedsim.types import Order
from tests.conftest import DOMAINS
from tests.deployment.conftest import settings


@pytest.mark.parametrize(("mode", "split"), [("adabn", "test"), ("own", "validation")])
def test_a_mode_that_was_not_agreed_is_refused(dataset, mode, split):
    config = deployed(settings(algorithm={"strategy": "fedbn"}, evaluation={"modes": "own,reestimated"}))
    site = Site(DOMAINS[0], str(dataset.folder), None)
    agreed = Job(to_toml(config), "0" * 16, client=0, sequence=end_of(1), mode="own")
    site.place(agreed)
    order = Order(1, site.initial, task="evaluate")
    assert site.evaluate(agreed, order).examples == 20
    with pytest.raises(Refused, match=f"no mode '{mode}' for '{split}'"):
        site.evaluate(Job(to_toml(config), "0" * 16, client=0, sequence=end_of(1), mode=mode, split=split), order)
    site.close()
