"""The command line, as it is typed: what it prints, what it refuses and how, and what a run may be asked afterwards."""

import contextlib
import io
import json
import re
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from dcgan import cli, commands, config, pictures, stages
from dcgan.run import Run

NO_SERVER = "http://127.0.0.1:9"  # the discard port: refused at once
TINY = [
    "train.steps=4",
    "train.batch_size=16",
    "train.log_every=1",
    "train.sample_every=4",
    "train.checkpoint_every=2",
    "model.width=4",
    "model.z_dim=4",
    "compute.workers=0",
    "evaluate.protocols=[knn]",
    "evaluate.labels=200",
]


def dcgan(*words: str) -> SimpleNamespace:
    """One command in this process: its exit code and what it wrote."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = cli.main(words)
        except SystemExit as end:
            code = end.code
    return SimpleNamespace(code=code, out=out.getvalue(), err=err.getvalue())


def refusal(*words: str) -> str:
    """The one line of a refused command."""
    done = dcgan(*words)
    assert done.code == 2
    [line] = [line for line in done.err.splitlines() if line.startswith("dcgan: error: ")]
    assert done.err.rstrip("\n").endswith(line)
    return line.removeprefix("dcgan: error: ")


@pytest.fixture(autouse=True)
def _outside(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each command is given in a directory of its own, and finds the module's home by the environment."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    directory = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DCGAN_HOME", str(directory))
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        yield directory


@pytest.fixture(scope="module")
def ran(home: Path) -> SimpleNamespace:
    """A whole run, with what it printed. Shared: a test that changes it copies it first."""
    done = dcgan("run", "digits", *TINY)
    assert done.code == 0, done.err
    [done.run] = [Run.open(path) for path in (home / "runs").iterdir() if (path / "report.html").exists()]
    return done


def test_one_command_trains_scores_and_reports(ran: SimpleNamespace) -> None:
    assert [line["step"] for line in ran.run.metrics()] == [1, 2, 3, 4]
    for said in ("step 2/4", "step 4/4", "trained to step 4", "scoring knn", "step 4", str(ran.run.path)):
        assert said in ran.out
    table = [line.split() for line in ran.out.splitlines()]
    header = table.index(["metric", "discriminator", "random", "init", "raw", "pixels"])
    name, *values = table[header + 1]
    assert name == "knn/accuracy"
    assert len(values) == 3
    assert all(0 < float(value) < 1 for value in values)
    assert str(ran.run.path / "report.html") in ran.out.splitlines()[-1]


def test_the_same_command_finds_its_run_and_repeats_nothing(ran: SimpleNamespace, home: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in ran.run.checkpoints.rglob("*")}
    again = dcgan("train", "digits", *TINY)
    assert str(ran.run.path) in again.out
    assert {path: path.stat().st_mtime_ns for path in ran.run.checkpoints.rglob("*")} == before
    assert len(list((home / "stores").glob("*/manifest.json"))) == 1


def test_training_alone_is_shown_as_finished_and_not_again_when_nothing_is_left() -> None:
    words = ("train", "digits", *TINY, "train.seed=7")
    ledger = Path(dcgan(*words).out.split()[1], "mlflow.json")  # training <run>
    first = json.loads(ledger.read_text())
    assert first["status"] == "FINISHED"
    assert dcgan(*words).code == 0
    assert json.loads(ledger.read_text()) == first


def test_training_that_was_killed_before_it_was_ended_is_ended(ran: SimpleNamespace) -> None:
    words = ("train", "digits", *TINY, "train.seed=7")
    ledger = Path(dcgan(*words).out.split()[1], "mlflow.json")
    ledger.write_text(json.dumps({**json.loads(ledger.read_text()), "status": "RUNNING"}))
    assert dcgan(*words).code == 0
    assert json.loads(ledger.read_text())["status"] == "FINISHED"


@pytest.mark.parametrize(("error", "status"), [(OSError("no space"), "FAILED"), (KeyboardInterrupt(), "KILLED")])
def test_a_stage_that_fails_after_training_ends_the_run_in_mlflow(
    ran: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, error: BaseException, status: str
) -> None:
    def failing(*_: object) -> None:
        raise error

    words = ("digits", *TINY, "train.seed=8")
    monkeypatch.setattr(stages, "extract", failing)
    assert dcgan("run", *words).code in (2, 130)
    (run,) = [path for path in ran.run.path.parent.iterdir() if Run.open(path).experiment.train.seed == 8]
    assert json.loads((run / "mlflow.json").read_text())["status"] == status
    shutil.rmtree(run)


def test_a_report_that_is_interrupted_leaves_a_finished_run_finished(
    ran: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = ran.run.path / "mlflow.json"
    assert json.loads(ledger.read_text())["status"] == "FINISHED"

    def interrupted(run: Run) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("dcgan.tracking.sync", interrupted)
    assert dcgan("report", str(ran.run.path)).code == 130
    assert json.loads(ledger.read_text())["status"] == "FINISHED"


def test_ingest_names_the_store_and_the_run(ran: SimpleNamespace) -> None:
    images, run = dcgan("ingest", "digits", *TINY).out.splitlines()
    assert str(ran.run.store().path) in images
    assert f"{ran.run.store().count('train'):,} train" in images
    assert str(ran.run.path) in run


def test_a_run_is_found_by_name_and_by_path(ran: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    assert commands.find(ran.run.name, []) == commands.find(str(ran.run.path), []) == ran.run
    monkeypatch.chdir(ran.run.path.parent)
    monkeypatch.setenv("DCGAN_HOME", "/nowhere")
    assert commands.find(ran.run.name, []) == ran.run


def test_of_a_run_only_compute_and_evaluate_can_be_changed(ran: SimpleNamespace, tmp_path: Path) -> None:
    copy = shutil.copytree(ran.run.path, tmp_path / "runs" / ran.run.name)
    changed = commands.find(str(copy), ["evaluate.labels=100", "compute.max_failures=1"])
    assert (changed.experiment.evaluate.labels, changed.experiment.compute.max_failures) == (100, 1)
    assert Run.open(copy) == changed
    for word in ("evaluate.images=mnist", "evaluate.images_source=/elsewhere"):
        assert refusal("evaluate", str(copy), word).startswith(f"{word} asks for images to be ingested; give ")
    for word in ("train.steps=9", "model.width=8", "data.source=/elsewhere", "data.home=/elsewhere"):
        assert refusal("train", str(copy), word).startswith(f"{word} would make {ran.run.name}")
    assert Run.open(copy) == changed


def test_a_checkpoint_alone_is_enough_to_sample(
    ran: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DCGAN_HOME", "/nowhere")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", NO_SERVER)
    alone = shutil.copytree(ran.run.checkpoints / "4", tmp_path / "checkpoint")
    for seed, name in (("0", "a.png"), ("0", "b.png"), ("1", "c.png")):
        assert dcgan("sample", str(alone), "--count", "9", "--seed", seed, "--out", name).code == 0
    a, b, c = (Path(name).read_bytes() for name in ("a.png", "b.png", "c.png"))
    assert a == b != c
    width, height = struct.unpack(">II", a[16:24])  # PNG's header
    assert 3 * 32 <= width == height <= 3 * 32 + 2 * 4


def test_images_without_labels_are_trained_on_and_reported(tmp_path: Path) -> None:
    for i in range(40):
        (tmp_path / "flat").mkdir(exist_ok=True)
        pictures.write_png(tmp_path / "flat" / f"{i}.png", np.full((32, 32, 3), 5 * i, np.uint8))
    words = [word for word in TINY if not word.startswith(("evaluate", "train.batch"))]
    done = dcgan("run", "folder", "data.source=flat", "data.size=32", "train.batch_size=8", *words)
    assert done.code == 0, done.err
    assert "not scored: scoring needs images of at least two classes" in done.out
    (page,) = (Path(config.default_home()) / "runs").glob("folder-*/report.html")
    assert "have not been scored" in page.read_text()


def test_a_run_can_be_sampled_by_name(ran: SimpleNamespace) -> None:
    assert dcgan("sample", ran.run.name).code == 0
    assert Path("grid.png").read_bytes().startswith(b"\x89PNG")


def test_sync_delivers_once(ran: SimpleNamespace) -> None:
    done = dcgan("sync", ran.run.name)
    assert done.code == 0, done.err
    assert done.out.startswith("delivered 0 metric values, 0 grids, 0 files, 0 models")
    assert f"sqlite:///{ran.run.home}/mlflow.db" in done.out


def test_a_server_that_is_away_is_named_in_one_line(ran: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", NO_SERVER)
    assert NO_SERVER in refusal("sync", ran.run.name)


def test_a_damaged_checkpoint_is_named_in_one_line(ran: SimpleNamespace, tmp_path: Path) -> None:
    damaged = shutil.copytree(ran.run.checkpoints / "4", tmp_path / "4")
    with (damaged / "state.pt").open("r+b") as file:
        file.write(b"X")
    assert (
        refusal("sample", str(damaged)) == f"{damaged / 'state.pt'} is corrupt: its SHA-256 differs from the manifest's"
    )


def test_a_run_in_use_is_named_in_one_line(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", NO_SERVER)
    run = commands.find("digits", [*TINY, "train.seed=1"])
    with run.lock():
        assert refusal("train", str(run.path)).startswith(f"run {run.name} is being written by process ")
        for target in (run.name, "digits"):  # other settings are not recorded under who trains it
            own = [*TINY, "train.seed=1"] if target == "digits" else []
            assert f"{run.name} is being written by" in refusal("evaluate", target, *own, "evaluate.labels=100")
        assert commands.find("digits", [*TINY, "train.seed=1"]) == run
    assert Run.open(run.path) == run


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("train digit", "'digit' is neither a preset nor a run, did you mean digits?"),
        ("train digits train.step=1", "unknown key 'train.step', did you mean train.steps?"),
        ("train digits train.batch_size=65 compute.workers=2", "train.batch_size=65 is not divisible by compute.work"),
        ("train digits model.kernel=3 data.size=28", "model.kernel=3 makes 32, 64, 96 or 128 pixels, not data.size=28"),
        ("train digits evaluate.labels_per_class=200", "evaluate.labels_per_class=200, but class "),
        ("train digits evaluate.labels=3 evaluate.protocols=[knn]", "evaluate.labels=3 leaves none of class "),
        ("train digits data.offline=true data.remote=s3://b/c", "and data.remote needs one: unset one of them"),
        ("train digits train.batch_size=100000", "train.batch_size=100000 exceeds the "),
        ("ingest folder", "data.name=folder needs data.source=DIRECTORY"),
        ("ingest folder data.source=/nowhere/at/all", "/nowhere/at/all"),
        (
            "ingest mnist data.source=https://me:secret@host/mnist",
            "data.source: an address at host with a user, a password",
        ),
        ("ingest mnist data.source=https://host/mnist?sig=secret", "data.source: an address at host with a user, a"),
        ("sample digits", "digits is a preset; this command takes a run; th"),
        ("sync nothing-at-all", "'nothing-at-all' is neither a preset nor a run; presets are digits, mnist"),
        ("sample . --count 0", "argument --count: '0' is not a whole number of at least 1"),
        ("sample . --seed -1", "argument --seed: "),
        ("train", "the following arguments are required: PRESET|RUN"),
        ("train digits --seed 1", "unrecognized arguments: --seed 1"),
        ("reproduce mnist real --seeds 1 train.step=1", "unknown key 'train.step', did you mean train.steps?"),
        ("reproduce mnist --seeds 1 real --sedes 1", "unrecognized arguments: real --sedes 1"),
        ("trian digits", "argument COMMAND: invalid choice: 'trian' (choose from 'run', 'ingest', 'train'"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(words: str, message: str) -> None:
    said = refusal(*words.split())
    assert message in said
    assert "secret" not in said


def test_a_misspelt_run_says_which_one_was_meant(ran: SimpleNamespace) -> None:
    assert refusal("train", ran.run.name[:-1]).endswith(f"did you mean {ran.run.name}?")


@pytest.mark.parametrize("bug", [KeyError("step"), RuntimeError("shape mismatch"), TypeError("no")])
def test_a_bug_keeps_its_traceback(bug: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise bug

    monkeypatch.setattr(stages, "sample", fail)
    with pytest.raises(type(bug)):
        dcgan("sample", ".")


def test_ctrl_c_says_that_the_same_command_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(stages, "sample", interrupt)
    done = dcgan("sample", ".")
    assert (done.code, done.err) == (130, "dcgan: stopped; the same command continues from here\n")


def test_help_lists_the_commands_and_presets() -> None:
    text = dcgan("--help").out
    for word in (*commands.STAGES, "sample", "sync"):
        assert f"\n    {word} " in text
    for preset in config.PRESETS:
        assert re.search(rf"^  {preset}  +{re.escape(config.summary(preset))}$", text, re.MULTILINE)


def test_the_help_of_a_stage_lists_every_key_with_meaning_default_and_bounds() -> None:
    text = dcgan("train", "--help").out
    flat = " ".join(text.split())
    for key, knob in config.keys().items():
        assert f"\n  {key}" in text
        assert " ".join(knob.description.split()) in flat
    assert "train.label_smoothing (>= 0, < 0.5) [0.0]" in text
    assert "model.kernel (3|4|5) [5]" in text
    assert "train.steps (>= 1)\n" in text
    assert 'evaluate.protocols [["svm", "svm_few_labels", "clustering", "knn"]]' in text
    assert max(map(len, text.splitlines())) <= 140


def test_the_run_file_stays_readable_by_others(ran: SimpleNamespace, tmp_path: Path) -> None:
    """Changing `evaluate` rewrites experiment.json; what else it records stays."""
    copy = shutil.copytree(ran.run.path, tmp_path / "runs" / ran.run.name)
    before = json.loads((copy / "experiment.json").read_text())
    commands.find(str(copy), ["evaluate.seed=5"])
    after = json.loads((copy / "experiment.json").read_text())
    assert after["experiment"]["evaluate"].pop("seed") == 5
    assert before["experiment"]["evaluate"].pop("seed") == 0
    assert after == before
