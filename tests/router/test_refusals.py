import logging

import pytest

from router.refusals import PER_SECOND, RefusalLog


def test_a_flood_of_refusals_is_logged_by_its_number(caplog: pytest.LogCaptureFixture):
    now = [0.0]
    log = RefusalLog(logging.getLogger("test"), lambda: now[0])
    with caplog.at_level(logging.INFO):
        for number in range(100):
            log.note("resource_exhausted", f"r{number}", "too many")
        log.note("invalid_argument", "other", "wrong")
        assert len(caplog.records) == PER_SECOND + 1
        now[0] = 1.5
        log.note("invalid_argument", "next", "wrong")
    told = [(record.message, getattr(record, "num_requests", None)) for record in caplog.records[-2:]]
    assert told == [("more requests were refused", 100 - PER_SECOND), ("request refused", None)]
