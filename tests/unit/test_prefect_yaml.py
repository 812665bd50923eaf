"""prefect.yaml against the flow that it deploys; Prefect itself drops a misspelt key without a word."""

import importlib
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from prefect import Flow
from prefect.cli.deploy._models import DeploymentConfig, PrefectYamlModel, RawScheduleConfig, WorkPoolConfig
from prefect.client.schemas.actions import ArtifactCreate
from prefect.exceptions import ParameterTypeError
from pydantic import BaseModel

from dcgan import config, reproduce
from flows import tasks

ROOT = Path(__file__).parents[2]
DEFINED = yaml.safe_load((ROOT / "prefect.yaml").read_text())
TABLES = {d["name"]: d for d in DEFINED["deployments"] if "reproduce" in d["entrypoint"]}
DEPLOYMENTS = {d["name"]: d for d in DEFINED["deployments"] if "train_eval" in d["entrypoint"]}
ALL = [*DEPLOYMENTS.values(), *TABLES.values()]
OURS = {"definitions"}  # YAML anchors; Prefect ignores the key


def flow_of(deployment: dict[str, Any]) -> Flow[..., Any]:
    file, _, name = deployment["entrypoint"].partition(":")
    assert (ROOT / file).is_file()
    return getattr(importlib.import_module(file.removesuffix(".py").replace("/", ".")), name)


def unknown(given: dict[str, Any], model: type[BaseModel]) -> set[str]:
    return set(given) - {field.alias or name for name, field in model.model_fields.items()}


@pytest.mark.parametrize("name", [*config.PRESETS, *reproduce.TABLES])
def test_what_a_flow_shows_has_a_key_that_prefect_takes(name: str) -> None:
    assert ArtifactCreate(key=tasks.artifact_key("train-eval", name)).key.startswith("train-eval-")


def test_every_key_is_one_that_prefect_reads() -> None:
    assert unknown(DEFINED, PrefectYamlModel) == OURS
    assert len(ALL) == len(DEFINED["deployments"])
    for deployment in ALL:
        assert unknown(deployment, DeploymentConfig) == set()
        assert unknown(deployment["work_pool"], WorkPoolConfig) == set()
    PrefectYamlModel.model_validate(DEFINED)


def test_misspelt_key_would_be_found() -> None:
    assert unknown({"paramters": {}, "name": "digits"}, DeploymentConfig) == {"paramters"}


def test_the_schedule_and_the_cluster_of_the_readme_have_their_place() -> None:
    readme = (ROOT / "README.md").read_text()
    [line] = re.findall(r"^    (schedules: .+)$", readme, re.MULTILINE)
    [schedule] = DeploymentConfig.model_validate({"name": "any", **yaml.safe_load(line)}).schedules or []
    assert isinstance(schedule, RawScheduleConfig)
    assert schedule.parameters is not None
    assert config.build("folder", schedule.parameters["overrides"]).data.source
    [line] = re.findall(r"^    (RAY_ADDRESS: .+)$", readme, re.MULTILINE)
    text = (ROOT / "prefect.yaml").read_text().replace("        env:\n", f"        env:\n          {line}\n")
    moved = [deployment["work_pool"]["job_variables"]["env"] for deployment in yaml.safe_load(text)["deployments"]]
    assert all("RAY_ADDRESS" in env and "PREFECT_LOGGING_EXTRA_LOGGERS" in env for env in moved)


def test_a_deployment_a_preset_each_named_after_it() -> None:
    assert list(DEPLOYMENTS) == list(config.PRESETS)
    assert {name: deployment["parameters"]["preset"] for name, deployment in DEPLOYMENTS.items()} == {
        name: name for name in config.PRESETS
    }


@pytest.mark.parametrize("name", DEPLOYMENTS)
def test_flow_accepts_the_parameters_and_the_experiment_is_valid(name: str) -> None:
    deployment = DEPLOYMENTS[name]
    flow = flow_of(deployment)
    assert flow.name == "train-eval"

    given = flow.validate_parameters(deployment["parameters"])

    assert set(deployment["parameters"]) == set(flow.parameters.properties)
    needed = ["data.source=pictures"] if name == "folder" else []
    assert config.build(given["preset"], [*given["overrides"], *needed]).data.name == name


def test_folder_says_what_it_needs() -> None:
    parameters = DEPLOYMENTS["folder"]["parameters"]
    with pytest.raises(ValueError, match=r"data\.source=DIRECTORY"):
        config.build(parameters["preset"], parameters["overrides"])
    assert "data.source=DIRECTORY" in DEPLOYMENTS["folder"]["description"]


def test_form_offers_the_presets_as_a_choice_and_explains_both_parameters() -> None:
    fields = flow_of(DEPLOYMENTS["digits"]).parameters.properties
    assert fields["preset"]["enum"] == list(config.PRESETS)
    assert fields["overrides"] | {"type": "array", "items": {"type": "string"}, "default": []} == fields["overrides"]
    assert all(field["description"] for field in fields.values())


@pytest.mark.parametrize(
    "wrong", [{"preset": "imagenet21k"}, {"preset": "digits", "overrides": "train.steps=1"}, {"steps": 1}]
)
def test_flow_refuses_wrong_parameters(wrong: dict[str, Any]) -> None:
    flow = flow_of(DEPLOYMENTS["digits"])
    with pytest.raises((ParameterTypeError, TypeError)):
        flow.validate_parameters(wrong)


@pytest.mark.parametrize("name", reproduce.TABLES)
def test_a_deployment_a_table_whose_flow_accepts_its_parameters(name: str) -> None:
    assert list(TABLES) == list(reproduce.TABLES)
    flow = flow_of(TABLES[name])
    assert flow.name == "reproduce"
    assert set(TABLES[name]["parameters"]) == set(flow.parameters.properties)
    assert flow.validate_parameters(TABLES[name]["parameters"])["table"] == name
    assert flow.parameters.properties["table"]["enum"] == list(reproduce.TABLES)
    assert all(field["description"] for field in flow.parameters.properties.values())


def test_a_server_that_restarts_ends_no_flow_run() -> None:
    """The lease of a concurrency limit is lost with the server, and the flow run with the lease."""
    assert not any("concurrency_limit" in deployment for deployment in ALL)


def test_heartbeat_is_frequent_enough_for_the_automation() -> None:
    """Of every flow run that its server sees: also those of `make run`, which shares the server's database."""
    automation = yaml.safe_load((ROOT / "infra" / "zombies.json").read_text())
    makefile, services = (ROOT / "Makefile").read_text(), (ROOT / "infra" / "services.py").read_text()
    found = [
        re.search(r"^export PREFECT_FLOWS_HEARTBEAT_FREQUENCY = (\d+)$", makefile, re.MULTILINE),
        re.search(r'^ +"PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "(\d+)"', services, re.MULTILINE),
    ]
    for each in found:
        assert each
        assert automation["trigger"]["within"] >= 3 * int(each[1])
