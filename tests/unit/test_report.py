"""The page: complete by itself, whatever the run has, and its charts and tables say what the files say."""

import itertools
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import fabricated
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dcgan import charts, config, report, storage
from dcgan.run import Run


class Elements(HTMLParser):
    """Every tag of a page with its attributes, and its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def written(run: Run) -> Elements:
    return Elements(report.write(run).read_text())


@pytest.fixture
def run(home: Path) -> Run:
    return fabricated.new_run(home)


def test_a_finished_run_is_one_file_without_scripts_or_addresses(run: Run) -> None:
    fabricated.finished(run)
    page = written(run)
    assert not page.of("script")
    assert [link["href"] for link in page.of("link")] == ["data:,"]
    assert all(image["src"].startswith("data:image/png;base64,") for image in page.of("img"))
    assert len(page.of("img")) == 1 + 7
    assert len(page.of("svg")) == len(report.CHARTS)
    assert not re.search(r"url\(|@import", (run.path / "report.html").read_text())
    assert "have 93.0% in svm/accuracy, and 88.0% without training" in page.text
    assert "dcgan run digits train.steps=600" in page.text
    assert run.fingerprint in page.text


def test_a_run_that_has_just_begun_has_a_page(run: Run) -> None:
    page = written(run)
    assert "have not been scored" in page.text
    assert "No samples have been drawn" in page.text
    assert "No step has been recorded" in page.text


def test_one_line_of_metrics_is_drawn(run: Run) -> None:
    fabricated.play(run, 0, run.experiment.train.log_every)
    page = written(run)
    assert len(page.of("svg")) == len(report.CHARTS) - 1  # no distance yet
    assert "nan" not in (run.path / "report.html").read_text().lower().split("</style>")[1]


def test_a_run_without_its_image_store_has_a_page(run: Run) -> None:
    fabricated.score(run)
    (run.home / "stores" / run.fingerprint / storage.MANIFEST).unlink()
    assert "image store has been removed" in written(run).text


def test_values_that_are_not_finite_are_left_out_of_the_charts(run: Run) -> None:
    fabricated.play(run, 0, 20)
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({**fabricated.line(run, 30), "d_loss": float("nan"), "g_loss": None}) + "\n")
    report.write(run)
    loss = charts.chart("Loss", {"d": report._points(run.metrics(), "d_loss")}, (0, 2000))
    assert loss.count("<circle") == 2


def test_events_stand_before_everything_else_and_are_escaped(run: Run) -> None:
    fabricated.finished(run)
    event = {"step": 310, "event": "collapse", "message": "<script>alert(1)</script>"}
    (run.path / "events.jsonl").write_text(json.dumps(event) + "\n")
    page = written(run)
    assert not page.of("script")
    assert page.text.index("Beware") < page.text.index("Scores")
    assert "collapse at step 310: <script>alert(1)</script>" in page.text
    assert sum(path.get("class") == "mark" for path in page.of("path")) == len(report.CHARTS)


def test_gain_has_the_sign_of_trained_less_random_init(run: Run) -> None:
    fabricated.score(run, better=-0.2)
    scores = {score.metric: score for score in report._scores(run)}
    assert scores["svm/accuracy"].values == ["0.7300", "0.8800", "0.9100", "-0.1500"]
    assert scores["svm/accuracy"].better is False
    assert scores["svm/c"].values == ["0.001", "0.01", "0.01", ""]
    fabricated.score(run, better=-0.05)  # as good as random init
    (equal,) = (score for score in report._scores(run) if score.metric == "svm/accuracy")
    assert (equal.values[-1], equal.better) == ("+0.0000", None), "neither good nor bad"
    assert [score.minor for score in report._scores(run)] == [False, False, False, True]


def test_a_mean_over_draws_stands_with_its_deviation(run: Run) -> None:
    values = {"svm_few_labels/accuracy": 0.5, "svm_few_labels/accuracy_std": 0.01}
    content = {"checkpoint": 1, "chosen": "best", "scores": {"discriminator": values}}
    storage.write_json(run.path / "scores" / "svm_few_labels.json", content)
    (score,) = report._scores(run)
    assert score.values == ["0.5000 ±\N{NO-BREAK SPACE}0.0100", "-", "-", ""]


def test_published_figures_stand_beside_their_metric_with_their_source(home: Path) -> None:
    digits = fabricated.new_run(home)
    run = Run(digits.path.with_name("cifar10-00000000"), digits.experiment, digits.fingerprint, digits.scored)
    fabricated.score(run)
    page = written(run)
    assert "0.8280" in page.text
    assert "Radford et al., ICLR 2016, table 1; trained on ImageNet-1k" in page.text
    assert "Exemplar CNN" in page.text
    assert "knn/accuracy" not in page.text  # not measured here


def test_published_figures_are_those_of_the_images_that_are_scored(run: Run) -> None:
    experiment = run.experiment.model_copy(update={"evaluate": config.Evaluate(images="svhn")})  # grey nets for colour
    other = replace(run, experiment=experiment, scored="1" * 16)
    fabricated.score(other)
    page = written(other)
    assert "On svhn, of the best checkpoint" in page.text
    assert "digits images, after seeing" in page.text
    assert "in svm/accuracy on svhn" in page.text
    content = {"checkpoint": 1, "chosen": "best", "scores": {"discriminator": {"svm_few_labels/accuracy": 0.5}}}
    storage.write_json(run.path / "scores" / "svm_few_labels.json", content)
    (score,) = (score for score in report._scores(other) if score.metric == "svm_few_labels/accuracy")
    assert score.published == "0.7752"
    assert "Radford et al., ICLR 2016, table 2" in written(other).text


def test_a_mark_beyond_the_last_line_is_in_the_chart(run: Run) -> None:
    """A step that diverges has no line of metrics."""
    fabricated.play(run, 0, 50)
    (run.path / "events.jsonl").write_text(json.dumps({"step": 100, "event": "non_finite", "message": "d_loss"}) + "\n")
    marks = [path["d"] for path in written(run).of("path") if path.get("class") == "mark"]
    assert marks
    assert all(float(re.findall(r"[\d.]+", str(mark))[0]) <= charts.WIDTH - charts.RIGHT for mark in marks)


@given(st.integers(1, 200), st.integers(2, 12))
def test_the_strip_has_the_first_and_the_last_and_even_distances(count: int, most: int) -> None:
    chosen = [int(path.name) for path in report._evenly([Path(str(n)) for n in range(count)], most)]
    assert len(chosen) == len(set(chosen)) == min(count, most)
    assert (chosen[0], chosen[-1]) == (0, count - 1)
    gaps = {after - before for before, after in itertools.pairwise(chosen)}
    assert not gaps or max(gaps) - min(gaps) <= 1


def test_small_grids_show_the_upper_left_images_unscaled(run: Run) -> None:
    fabricated.draw(run, [0])
    assert report._grid(run, run.samples / "00000000.png", report.CROP).width == 4 * 34 + 2


finite = st.floats(-1e6, 1e6, allow_nan=False)


@given(st.lists(st.tuples(finite, finite), min_size=1, max_size=700))
def test_thinning_keeps_the_extremes_and_the_number_down(points: list[tuple[float, float]]) -> None:
    buckets = charts.thin(points)
    assert len(buckets) <= charts.MOST
    assert min(b.low for b in buckets) == min(y for _, y in points)
    assert max(b.high for b in buckets) == max(y for _, y in points)


@given(finite, st.floats(1e-3, 1e6))
def test_ticks_are_few_even_and_inside(low: float, span: float) -> None:
    found = charts.ticks(low, low + span)
    assert 2 <= len(found) <= 6
    assert low - span * 1e-6 <= found[0] <= found[-1] <= low + span * (1 + 1e-6)


def test_a_line_runs_from_corner_to_corner() -> None:
    svg = charts.chart("t", {"a": [(0, 0.0), (10, 1.0)]}, (0, 10), ys=(0.0, 1.0))
    left, right = charts.LEFT, charts.WIDTH - charts.RIGHT
    bottom, top = charts.HEIGHT - charts.BOTTOM, charts.TOP
    assert f'<path class="line" d="M{left:.1f} {bottom:.1f}L{right:.1f} {top:.1f}"/>' in svg


def test_a_chart_without_points_is_refused() -> None:
    with pytest.raises(ValueError, match="chart 'Loss' has no points"):
        charts.chart("Loss", {"d": []}, (0, 1))
