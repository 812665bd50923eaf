"""The experiment: what is refused and how it is said, how overrides are read, and what makes two runs the same."""

import math
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from dcgan import config
from dcgan.config import PRESETS, Protocol, build, keys, override, validate

PRESET_FILES = Path(config.__file__).parent / "presets"
NEEDED = {"folder": ["data.source=/pictures"]}  # what a preset cannot know

# One value beyond each bound and one of each wrong type; a key that is missing here fails `test_every_key_is_listed`.
REFUSED = {
    "data.name": ["imagenet21k"],
    "data.size": ["0", "33", "true"],
    "data.source": ["ftp://host/files"],
    "data.test_fraction": ["0", "1", "-0.1", "a"],
    "data.offline": ["perhaps"],
    "data.category": ["1.5"],
    "data.extra": ["2"],
    "data.unreadable": ["ignore"],
    "data.deduplicate": ["some"],
    "data.remote": ["bucket/prefix", "http://host/bucket", "s3://"],
    "data.cache_gb": ["0", "-1", "true"],
    "data.home": [],  # any path is allowed
    "model.kernel": ["2", "6"],
    "model.width": ["0", "2049", "1.5", "true"],
    "model.z_dim": ["0", "4097"],
    "model.z": ["gauss"],
    "model.conditional": ["2", "maybe"],
    "model.hidden": ["-1", "8193", "true"],
    "model.affine": ["7"],
    "model.spectral_norm": ["3.5"],
    "train.steps": ["0", "1.5", "many", "null", "2015-01-01"],
    "train.batch_size": ["1", "0"],
    "train.learning_rate": ["0", "1.1", "nan", ".inf", "-1e-4"],
    "train.decay": ["-0.1", "1.1", "true"],
    "train.beta1": ["-0.1", "1"],
    "train.weight_decay": ["-1e-9", "1.1", "true"],
    "train.update": ["never"],
    "train.label_smoothing": ["-0.1", "0.5"],
    "train.ema": ["-0.1", "1"],
    "train.precision": ["float16"],
    "train.memory_format": ["first"],
    "train.seed": ["-1", str(2**32), "true"],
    "train.log_every": ["0"],
    "train.sample_every": ["0"],
    "train.checkpoint_every": ["0"],
    "train.keep": ["0"],
    "compute.workers": ["-1"],
    "compute.device": ["tpu"],
    "compute.graph": ["2"],
    "compute.cpus": ["0", "1.5"],
    "compute.max_failures": ["-1"],
    "evaluate.checkpoint": ["newest"],
    "evaluate.images": ["photos"],
    "evaluate.images_source": ["ftp://host/x"],
    "evaluate.protocols": ["svm", "[svn]", "[]", "[svm, svm]"],
    "evaluate.labels": ["-1"],
    "evaluate.labels_per_class": ["0"],
    "evaluate.draws": ["1"],
    "evaluate.c_grid": ["[]", "[0]", "[-1e-3]", "[1e-3, 1e-3]", "[nan]", "0.1"],
    "evaluate.restarts": ["0"],
    "evaluate.neighbours": ["[]", "[0]", "[1, 1]", "[1.5]", "[true]"],
    "evaluate.standardise": ["yes please"],
    "evaluate.inception": [],  # a path: any text is one
    "evaluate.seed": ["-1", str(2**32)],
}


def test_every_key_is_listed_and_explained() -> None:
    assert set(REFUSED) == set(keys())
    assert all(knob.description for knob in keys().values())


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in REFUSED.items() for value in values])
def test_a_value_out_of_bounds_is_refused_in_one_line_that_names_the_key(key: str, value: str) -> None:
    with pytest.raises(ValueError, match=key.replace(".", r"\.")) as refusal:
        build("digits", [f"{key}={value}"])
    assert "\n" not in str(refusal.value)


def test_every_numeric_bound_of_the_model_has_a_refused_value_on_each_side() -> None:
    for key, knob in keys().items():
        bounds = [bound.split() for bound in knob.allowed.split(", ") if bound[:1] in "<>" and bound]
        numbers = [float(value) for value in REFUSED[key] if _is_number(value)]
        for sign, limit in bounds:
            beyond = min(numbers) <= float(limit) if sign[0] == ">" else max(numbers) >= float(limit)
            assert beyond, f"{key}: no refused value beyond {sign} {limit}"


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


@pytest.mark.parametrize(
    ("preset", "word", "reason"),
    [
        ("lsun", "model.conditional=true", "images with labels; those of lsun have none"),
        ("stl10", "model.conditional=true", "images with labels; those of stl10 have none"),
        ("imagenet32", "evaluate.images=mnist", "digits and mnist are grey"),
        ("digits", "evaluate.images=cifar10", "digits and mnist are grey"),
    ],
)
def test_what_images_cannot_give_is_refused_before_they_are_fetched(preset: str, word: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        build(preset, [word])


def test_the_bounds_themselves_are_allowed() -> None:
    edges = ["train.beta1=0", "train.ema=0", "train.learning_rate=1", "model.width=2048", "train.seed=4294967295"]
    experiment = build("digits", [*edges, "train.batch_size=2", "compute.workers=0"])
    assert (experiment.train.beta1, experiment.model.width, experiment.train.batch_size) == (0, 2048, 2)


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["train.batch_size=65", "compute.workers=2"], "train.batch_size=65 is not divisible by compute.workers=2"),
        (["train.batch_size=2", "compute.workers=2"], "leaves each of compute.workers=2 one image"),
        (["data.name=mnist", "data.size=28", "data.test_fraction=0.1", "model.kernel=3"], "not data.size=28"),
        (["data.name=folder"], "data.name=folder needs data.source"),
        (["data.name=mnist"], "data.test_fraction is for digits, lfw, folder, not for mnist"),
        (["data.unreadable=skip"], "data.unreadable is for celeba, lfw"),
    ],
)
def test_combinations_that_cannot_work_are_refused(overrides: list[str], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        build("digits", overrides)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("train.step=1", "unknown key 'train.step', did you mean train.steps"),
        ("trian.steps=1", "unknown key 'trian.steps', did you mean train.steps"),
        ("learning_rate=1", "unknown key 'learning_rate', did you mean train.learning_rate"),
        ("qqq=1", "unknown key 'qqq'; `dcgan run --help` lists the keys"),
        ("train.steps", "override 'train.steps' is not of the form section.key=value"),
        ("train.steps={", "train.steps='{' is not a value that YAML can read"),
        ("train.steps=2015-99-99", "train.steps='2015-99-99' is not a value that YAML can read"),
        ("evaluate.protocols=svm", r"evaluate.protocols='svm': input should be a list, as in \[svm, knn\]"),
    ],
)
def test_what_is_wrong_with_an_override_is_said(word: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build("digits", [word])


def test_a_misspelt_preset_says_which_one_was_meant() -> None:
    with pytest.raises(ValueError, match=r"unknown preset 'cifar', did you mean cifar10\?"):
        build("cifar")
    with pytest.raises(ValueError, match=r"unknown preset 'q'; presets are digits, mnist, cifar10, .*, folder"):
        build("q")


def test_an_unknown_key_in_a_stored_experiment_is_refused() -> None:
    sections = build("digits").model_dump(mode="json")
    sections["train"]["step"] = 1
    with pytest.raises(ValueError, match=r"unknown key 'train.step', did you mean train.steps"):
        validate(sections)


def test_a_missing_key_is_named() -> None:
    with pytest.raises(ValueError, match=r"data.name is required; data.size is required"):
        validate({"data": {}, "model": {}, "train": {"steps": 1}})


@pytest.mark.parametrize(
    ("word", "section", "name", "value"),
    [
        ("train.learning_rate=1e-4", "train", "learning_rate", 1e-4),
        ("train.steps=2e3", "train", "steps", 2000),
        ("compute.graph=false", "compute", "graph", False),
        ("data.source=null", "data", "source", None),
        ("data.source=", "data", "source", None),
        ("data.source=/a #1: b", "data", "source", "/a #1: b"),
        ("data.source=/2015", "data", "source", "/2015"),
        ("data.source=http://127.0.0.1:8000/x", "data", "source", "http://127.0.0.1:8000/x"),
        ("evaluate.protocols=[knn, svm]", "evaluate", "protocols", ("knn", "svm")),
        ("evaluate.c_grid=[1e-4, 2]", "evaluate", "c_grid", (1e-4, 2.0)),
    ],
)
def test_values_mean_what_they_look_like(word: str, section: str, name: str, value: object) -> None:
    read = getattr(getattr(build("digits", [word]), section), name)
    assert (read, type(read)) == (value, type(value))


def test_local_paths_do_not_depend_on_the_directory_or_the_shell(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/someone")
    data = build("folder", ["data.source=pictures", "data.home=~/runs"]).data
    assert (data.source, data.home) == (str(tmp_path / "pictures"), Path("/home/someone/runs"))


def test_the_later_override_wins() -> None:
    assert build("digits", ["train.steps=5", "train.steps=7"]).train.steps == 7


def test_an_experiment_is_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        build("digits").train.steps = 1  # type: ignore[misc]


def test_home_is_the_setting_then_the_environment_then_var(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for value in (None, ""):
        monkeypatch.delenv("DCGAN_HOME", raising=False) if value is None else monkeypatch.setenv("DCGAN_HOME", value)
        assert build("digits").home == tmp_path / "var"
    monkeypatch.setenv("DCGAN_HOME", "/elsewhere")
    assert build("digits").home == Path("/elsewhere")
    assert build("digits", [f"data.home={tmp_path / 'set'}"]).home == tmp_path / "set"


@pytest.mark.parametrize(
    "word", ["compute.workers=2", "evaluate.labels=100", "data.home=/elsewhere", "data.source=/mirror"]
)
def test_where_a_run_is_computed_and_scored_is_not_its_identity(word: str) -> None:
    assert build("digits", [word]).identity() == build("digits").identity()


@pytest.mark.parametrize("word", ["data.size=64", "data.test_fraction=0.3", "model.width=16", "train.seed=1"])
def test_data_model_and_training_are_its_identity(word: str) -> None:
    assert build("digits", [word]).identity() != build("digits").identity()


def test_the_presets_are_the_files_in_presets() -> None:
    assert sorted(PRESETS) == sorted(path.stem for path in PRESET_FILES.glob("*.yaml"))


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_builds(preset: str) -> None:
    assert build(preset, NEEDED.get(preset, [])).data.name == preset


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_header_gives_command_hardware_time_and_expected_figures(preset: str) -> None:
    lines = (PRESET_FILES / f"{preset}.yaml").read_text().splitlines()
    header = "\n".join(lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))])
    assert config.summary(preset) == lines[0][2:]
    assert f"dcgan run {preset}" in header
    says = {"hardware": ("CPU", "GPU"), "time": ("minute", "hour"), "figure": ("accuracy", "NMI")}
    if preset == "folder":
        del says["figure"]  # whose pictures they are is not known
    for what, words in says.items():
        assert any(word in header for word in words), f"{preset}.yaml: the header gives no {what}"


def test_a_dumped_experiment_validates_to_itself() -> None:
    experiment = build("folder", [*NEEDED["folder"], "evaluate.protocols=[svm]", "data.home=/h"])
    assert validate(experiment.model_dump(mode="json")) == experiment


PATHS = st.text(st.characters(exclude_categories=["Cs"]), max_size=20).map(lambda text: "/" + text.replace("\0", ""))
SOURCES = st.none() | PATHS | st.just("https://example.org/files#b")
SETTINGS = st.fixed_dictionaries(
    {
        "data": st.fixed_dictionaries(
            {
                "name": st.just("digits"),
                "size": st.sampled_from([28, 32, 64, 96, 128]),
                "source": SOURCES,
                "home": st.none() | PATHS,
                "test_fraction": st.floats(0, 1, exclude_min=True, exclude_max=True),
            }
        ),
        "model": st.fixed_dictionaries({"width": st.integers(1, 2048), "conditional": st.booleans()}),
        "train": st.fixed_dictionaries(
            {"steps": st.integers(1), "learning_rate": st.floats(0, 1, exclude_min=True), "seed": st.integers(0, 9)}
        ),
        "evaluate": st.fixed_dictionaries(
            {
                "protocols": st.lists(st.sampled_from(config.PROTOCOLS), min_size=1, unique=True),
                "c_grid": st.lists(st.floats(1e-300, 1e300), min_size=1, unique=True),
            }
        ),
    }
)


@given(SETTINGS)
def test_flat_fed_back_as_overrides_gives_the_same_experiment(sections: dict) -> None:
    experiment = validate(sections)
    words = [f"{key}={text}" for key, text in experiment.flat().items()]
    assert override({}, words) == experiment
    assert set(experiment.flat()) == set(keys())


def test_protocols_are_all_run_by_default() -> None:
    assert build("digits").evaluate.protocols == get_args(Protocol)
