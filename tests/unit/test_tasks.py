"""What the flows' tasks decide: which failures are tried again, and for how long they may run."""

import pytest
from prefect.states import Failed

from dcgan.data.sources.attempts import DownloadError
from dcgan.remote import RemoteError
from flows import tasks


@pytest.mark.parametrize(
    ("error", "again"),
    [
        (RemoteError("no answer"), True),
        (DownloadError("f could not be downloaded: HTTP 503", transient=True), True),
        (DownloadError("f could not be downloaded: HTTP 404"), False),
        (ValueError("train.steps=0"), False),
    ],
)
def test_what_the_network_did_is_tried_again(error: Exception, again: bool) -> None:
    assert tasks._is_transient(None, None, Failed(data=error)) is again  # type: ignore[arg-type]


def test_only_what_uses_the_network_asks_why_it_failed() -> None:
    assert tasks.ingest.retry_condition_fn is tasks._is_transient
    assert (tasks.ingest.retries, tasks.ingest.retry_delay_seconds) == (3, [10, 60, 120])
    for task in (tasks.train, tasks.extract, tasks.evaluate, tasks.report, tasks.measure_row):
        assert task.retry_condition_fn is None


def test_what_may_take_days_has_no_limit() -> None:
    for task in (tasks.ingest, tasks.train, tasks.extract, tasks.evaluate, tasks.measure_row):
        assert task.timeout_seconds is None
