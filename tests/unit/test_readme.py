"""README.md against the repository: its tree is the tracked files, and its commands can be typed."""

import ast
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from dcgan import cli, commands, config
from dcgan.reproduce import measure, overrides

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
WHOLE = (
    ".ci/",
    "docs/",
    "tests/unit/",
    "tests/integration/",
    "tests/faults/",
    "tests/gpu/",
    "tests/benchmarks/",
)  # one line each


SHELL = ("make", ".venv/bin/dcgan", "prefect", ".venv/bin/torchrun")  # what a line of a shell block begins with


def section(title: str) -> str:
    return README.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def blocks() -> list[str]:
    """The lines of shell blocks: indented by four, the comment cut off."""
    lines = [line[4:] for line in README.splitlines() if re.match(r"    \S", line)]
    return [line.partition("  #")[0].strip() for line in lines if line.split()[0] in SHELL]


def listed() -> dict[str, str]:
    """Path to description in the README's tree; a directory ends with a slash."""
    found: dict[str, str] = {}
    parents: list[str] = []
    for line in section("The tree").splitlines():
        if match := re.fullmatch(r"    ( *)(\S+)(?: +(.*))?", line):
            indent, name, description = match.groups()
            parents = parents[: len(indent) // 2]
            found["".join(parents) + name] = description or ""
            if name.endswith("/"):
                parents.append(name)
    return found


def tracked() -> set[str]:
    """What git has, or would have with `git add .`, and every directory; a directory in WHOLE stands for all in it.

    The line of a package stands for its __init__.py, that of tests/ for the files beside the suites.
    """
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: nothing says which files belong to it")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    files = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    found: set[str] = set()
    for name in filter(None, files):
        whole = next((directory for directory in WHOLE if name.startswith(directory)), "")
        found |= {f"{parent}/" for parent in Path(whole or name).parents} - {"./"}
        if whole:
            found.add(whole)
        elif (ROOT / name).exists() and Path(name).name != "__init__.py" and Path(name).parent != Path("tests"):
            found.add(name)
    return found


def test_the_tree_is_the_repository() -> None:
    missing, gone = tracked() - set(listed()), set(listed()) - tracked()
    assert (missing, gone) == (set(), set()), f"README's tree lacks {sorted(missing)} and has {sorted(gone)} too many"


def test_every_file_of_the_tree_is_explained() -> None:
    assert [path for path, description in listed().items() if not description] == []


def test_every_make_target_exists() -> None:
    rules = re.findall(r"^([\w ]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    targets = {name for rule in rules for name in rule.split()}
    typed = {line.split()[1] for line in blocks() if line.startswith("make ")}
    named = typed | set(re.findall(r"`make (\w+)`", README)) | set(listed()["Makefile"].split(", "))
    assert {"run", "test"} <= named <= targets


def test_every_dcgan_command_is_accepted() -> None:
    lines = [line for line in blocks() if "dcgan" in line.split()[0]]
    assert len(lines) >= 3
    for line in lines:
        _, *words = shlex.split(line)
        chosen = cli._parser().parse_args(words)
        if "overrides" in chosen:
            config.build(chosen.target, chosen.overrides)
        if "words" in chosen:
            measure.choose(chosen.table, [word for word in chosen.words if "=" not in word])
            overrides.check([word for word in chosen.words if "=" in word])
    for name in re.findall(r"`dcgan (\w+)", README):
        assert name in (*commands.STAGES, "sample", "sync", "data", "reproduce"), name


def test_every_deployment_and_module_exists() -> None:
    deployments = set()
    for d in yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]:
        deployments.add(f"{Path(d['entrypoint'].partition(':')[0]).stem.replace('_', '-')}/{d['name']}")
    named = set(re.findall(r"deployment run ([\w-]+/\w+)", README))
    assert {name.partition("/")[0] for name in named} == {"train-eval", "reproduce"}
    assert named <= deployments
    for module in re.findall(r"-m ([\w.]+)", README):
        assert (ROOT / module.replace(".", "/")).with_suffix(".py").exists()


def test_what_it_links_to_and_names_is_there() -> None:
    for target in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (ROOT / target).exists(), target
    for path in re.findall(r"`((?:dcgan|tests|docs|flows)/[\w/.]+)`", README):
        assert (ROOT / path).exists(), path


def test_its_python_calls_what_there_is() -> None:
    [code] = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    for call in (node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)):
        name = ast.unparse(call.func)
        module, _, function = name.partition(".")
        if function:
            assert hasattr(__import__(f"dcgan.{module}", fromlist=[function]), function), name
    [words] = re.findall(r'config\.build\("digits", (\[.*?\])', code)
    config.build("digits", ast.literal_eval(words))


def test_the_shell_blocks_are_seen() -> None:
    assert {line.split()[0] for line in blocks()} == set(SHELL)


def test_a_home_with_a_space_in_its_name_is_one_directory() -> None:
    done = subprocess.run(
        ["make", "-n", "run", "DCGAN_HOME=/a b"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("mkdir"))
    assert shlex.split(line) == ["mkdir", "-p", "/a b/prefect"]
