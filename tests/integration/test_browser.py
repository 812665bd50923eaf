"""What a person sees: the report and MLflow's own pages, in a real browser."""

import base64
import io
import json
from collections.abc import Callable
from pathlib import Path

import fabricated
import pytest
from browser import browse
from mlflow_server import Server
from PIL import Image

from dcgan import report, tracking
from dcgan.run import Run

pytestmark = pytest.mark.slow

LOADED = (
    "document.readyState === 'complete' && document.images.length > 0"
    " && [...document.images].every(i => i.complete && i.naturalWidth > 0)"
)
SCROLL = (
    "[...document.querySelectorAll('*')].filter(e => e.scrollHeight > e.clientHeight).forEach(e => e.scrollTo(0, %s))"
)


@pytest.fixture
def run(tmp_path: Path, make_store: Callable[..., object]) -> Run:
    make_store(tmp_path / "home")
    run = fabricated.new_run(tmp_path / "home")
    fabricated.finished(run)
    return run


@pytest.mark.parametrize("width", [1200, 400])
def test_the_report_shows_scores_pictures_and_charts_and_asks_for_nothing(run: Run, tmp_path: Path, width: int) -> None:
    address = report.write(run).as_uri()
    with browse(tmp_path / "browser") as page:
        page.open(address, width)
        page.wait(LOADED)
        text = page.text()
        asked = [request for request in page.requests if not request.startswith(("data:", address))]
        assert not asked
        assert not page.errors
        assert "svm/accuracy\t0.9300\t0.8800\t0.9100\t+0.0500" in text
        assert "25,600 images" in text
        assert page.evaluate("document.images.length") == 1 + 7
        assert page.evaluate("document.querySelectorAll('svg .line').length") == 8
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        page.picture(tmp_path / "report.png", whole=True)
    assert len(set(Image.open(tmp_path / "report.png").getdata())) > 100


def test_the_report_is_dark_where_the_reader_prefers_it_and_light_on_paper(run: Run, tmp_path: Path) -> None:
    address = report.write(run).as_uri()
    background = "getComputedStyle(document.body).backgroundColor"
    with browse(tmp_path / "browser") as page:
        page.open(address)
        page.wait(LOADED)
        seen = {}
        for scheme, media in (("light", "screen"), ("dark", "screen"), ("dark", "print")):
            features = [{"name": "prefers-color-scheme", "value": scheme}]
            page.call("Emulation.setEmulatedMedia", media=media, features=features)
            seen[scheme, media] = page.evaluate(background)
        paper = page.call("Page.printToPDF")["data"]
    assert seen["light", "screen"] == seen["dark", "print"] == "rgb(255, 255, 255)"
    assert sum(map(int, seen["dark", "screen"][4:-1].split(", "))) < 120
    assert io.BytesIO(base64.b64decode(paper)).read(4) == b"%PDF"


def test_text_from_outside_is_shown_and_never_run(run: Run, tmp_path: Path) -> None:
    event = {"step": 10, "event": "collapse", "message": "<img src=x onerror=\"document.title='run'\">"}
    (run.path / "events.jsonl").write_text(json.dumps(event) + "\n")
    with browse(tmp_path / "browser") as page:
        page.open(report.write(run).as_uri())
        page.wait(LOADED)
        assert event["message"] in page.text()
        assert page.evaluate("document.title") == run.name


def test_mlflow_shows_the_run_its_time_lapse_and_two_runs_side_by_side(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = Server(tmp_path / "server")
    try:
        server.start()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server.address)
        other = fabricated.new_run(run.home, ["train.seed=1"])
        fabricated.finished(other, better=0.02)
        for one in (run, other):
            tracking.start(one)
            tracking.sync(one)
            tracking.finish(one, "FINISHED")
        address = tracking.url(run)
        assert address is not None
        with browse(tmp_path / "browser") as page:
            # The run's page: what was run, on what, and what came out.
            page.open(address, 1500, 3000)
            page.wait_for(
                "train.batch_size", "Finished", f"random ({run.fingerprint})", "93.0% in svm/accuracy", "train/d_loss"
            )

            # Its charts, with the sample grids by images seen.
            page.open(address.replace("?", "/model-metrics?"), 1500, 1000)
            page.wait_for("svm")
            page.wait(
                SCROLL % "1e6" + ", [...document.images].some(i => i.src.includes('get-artifact') && i.naturalWidth)"
            )

            # Both runs of the data set in the same charts.
            runs = address.split("/runs/")[0] + "/runs?workflowType=machine_learning&compareRunsMode=CHART"
            page.open(runs, 1500, 3000)
            page.wait_for(f"{run.name} (svm", f"{other.name} (svm")
    finally:
        server.stop()
