"""The line of a training step and the table of scores, as a person reads them."""

import json
from pathlib import Path
from typing import Any

import pytest

from dcgan import summary, tables
from dcgan.config import build
from dcgan.run import Run

SCORES = {
    "knn": {"discriminator": {"knn/accuracy": 0.9, "knn/neighbours": 5.0}},
    "svm_few_labels": {
        "discriminator": {"svm_few_labels/accuracy": 0.63849, "svm_few_labels/accuracy_std": 0.004},
        "random_init": {"svm_few_labels/accuracy": 0.56, "svm_few_labels/accuracy_std": 0.01},
        "raw_pixels": {"svm_few_labels/accuracy": 0.25, "svm_few_labels/accuracy_std": 0.02},
    },
}


@pytest.fixture
def run(tmp_path: Path) -> Run:
    run = Run(tmp_path / "runs" / "digits-0", build("digits"), "0" * 16, "0" * 16)
    (run.path / "scores").mkdir(parents=True)
    return run


def write_scores(run: Run, **steps: int) -> None:
    for protocol, scores in SCORES.items():
        content = {"checkpoint": steps.get(protocol, 1200), "chosen": "best", "scores": scores}
        (run.path / "scores" / f"{protocol}.json").write_text(json.dumps(content))


def test_each_score_stands_beside_its_controls_and_its_deviation(run: Run) -> None:
    write_scores(run)
    assert summary.score_rows(run) == [
        ("knn/accuracy", "0.9000", "-", "-"),
        ("svm_few_labels/accuracy", "0.6385 ± 0.0040", "0.5600 ± 0.0100", "0.2500 ± 0.0200"),
    ]


def test_the_text_table_is_aligned_and_says_what_was_scored(run: Run) -> None:
    write_scores(run)
    caption, blank, header, knn, few = tables.text_table(run).splitlines()
    assert (caption, blank) == ("digits-0: the best checkpoint, step 1,200", "")
    for column, control, mean in (("discriminator", "0.9000", "0.6385"), ("random init", "-  ", "0.5600")):
        assert header.index(column) == knn.index(control) == few.index(mean)


def test_scores_of_two_checkpoints_are_told_apart(run: Run) -> None:
    write_scores(run, knn=600)
    expected = "knn: the best checkpoint, step 600; svm_few_labels: the best checkpoint, step 1,200"
    assert tables.text_table(run).startswith(f"digits-0: {expected}\n")


def test_scores_with_another_setting_than_the_runs_say_so(run: Run) -> None:
    write_scores(run)
    file = run.path / "scores" / "knn.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "settings": {"labels": 100, "seed": 0}}))
    assert "knn: the best checkpoint, step 1,200, evaluate.labels=100; svm_few_labels: the" in tables.text_table(run)


def test_scores_of_other_images_are_in_no_table(run: Run) -> None:
    write_scores(run)
    file = run.path / "scores" / "knn.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "images": "1" * 16}))
    assert [row[0] for row in summary.score_rows(run)] == ["svm_few_labels/accuracy"]


def test_a_run_without_scores_says_so(run: Run) -> None:
    assert tables.text_table(run).startswith("digits-0: not scored yet")


def line(step: int, **more: float) -> dict[str, Any]:
    losses = {"d_loss": 0.5, "g_loss": 1.25, "d_real": 0.75, "d_fake": 0.25}
    return {"step": step, "images": step * 64, "images_per_second": 640.0, "seconds": 1.0, **losses, **more}


def test_a_line_of_progress_gives_the_time_left() -> None:
    """At 640 images/s a step of 64 takes 0.1 s: 1,100 steps are 110 s."""
    assert tables.progress_line(line(100, swd=0.125), 1200) == (
        "step 100/1,200  loss D 0.500  loss G 1.250  D(real) 0.75  D(fake) 0.25  swd 0.1250  640 images/s  "
        "1 min 50 s left"
    )
    assert tables.progress_line(line(100), 110).endswith("1 s left")
    assert tables.progress_line(line(100), 36_100).endswith("1 h 0 min left")
    assert tables.progress_line(line(1200), 1200).endswith("640 images/s")


def test_a_line_of_alternating_updates_says_what_was_played() -> None:
    one_net = {"step": 1, "images": 64, "images_per_second": 640.0, "seconds": 0.1, "g_loss": 1.25, "g_grad_norm": 2.0}
    assert tables.progress_line(one_net, 1) == "step 1/1  loss G 1.250  640 images/s"


def test_progress_is_said_at_intervals_at_checkpoints_and_at_the_end() -> None:
    now, said = [0.0], []
    progress = tables.Progress(100, said.append, lambda: now[0])
    for time, words in ((0.0, line(1)), (0.5, line(2)), (1.0, line(3, swd=0.1)), (2.5, line(4)), (3.1, line(5))):
        now[0] = time
        progress(words)
    progress(line(100))
    assert [text.split("/")[0] for text in said] == ["step 1", "step 3", "step 5", "step 100"]
