"""The rules of the code base that a reviewer would have to remember: who imports what, and what nobody does."""

import ast
import importlib
import os
import re
import subprocess
import sys
from collections.abc import Callable, Container, Iterator
from fnmatch import fnmatch
from functools import cache
from graphlib import TopologicalSorter
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from itertools import product
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement

from dcgan.data.store import Store

ROOT = Path(__file__).parents[2]
FILES = sorted([*ROOT.glob("dcgan/**/*.py"), *ROOT.glob("flows/**/*.py")])
OPERATION = sorted(ROOT.glob("infra/**/*.py"))  # what starts servers
LONGEST = 250  # lines; what can be read in one sitting

# Who may import a library, by the beginning of the file's path. A library that is not listed is free to all.
IMPORTERS = {
    "prefect": ("flows/",),
    "ray": ("dcgan/cluster",),
    "mlflow": ("dcgan/tracking",),
    "torchvision": (),  # the tests' reference; torch-fidelity brings it along
    "PIL": ("dcgan/data/decode.py", "dcgan/data/shards.py", "dcgan/tracking", "dcgan/report"),
    "lmdb": ("dcgan/data/sources/",),
    "s3fs": ("dcgan/remote.py",),
    "sklearn": ("dcgan/evaluate/", "dcgan/data/sources/digits.py"),
    "scipy": ("dcgan/evaluate/", "dcgan/data/sources/"),
    "matplotlib": ("dcgan/report",),
    "jinja2": ("dcgan/report",),
    "torch_fidelity": ("dcgan/evaluate/",),
}

# From the bottom up; a module imports from its own layer and from those below. A package stands for all in it, a star
# for any end of a name.
LAYERS: list[set[str]] = [
    {
        "dcgan",
        "dcgan.storage",
        "dcgan.settings",
        "dcgan.experiment",
        "dcgan.config",
        "dcgan.environment",
        "dcgan.convolution",
        "dcgan.memory",
        "dcgan.models",
        "dcgan.numerics",
        "dcgan.pictures",
        "dcgan.charts",
        "dcgan.remote",
    },
    {
        "dcgan.run",
        "dcgan.data",
        "dcgan.distributed",
        "dcgan.preemption",
        "dcgan.wasserstein",
        "dcgan.step",
        "dcgan.player",
        "dcgan.sampling",
        "dcgan.checkpoint",
        "dcgan.export",
        "dcgan.mirror*",
    },
    {
        "dcgan.summary",
        "dcgan.tables",
        "dcgan.cluster*",
        "dcgan.keeper",
        "dcgan.train",
        "dcgan.features",
        "dcgan.feature_banks",
    }
    | {"dcgan.evaluate"},
    {"dcgan.tracking*", "dcgan.report", "dcgan.scoring"},
    {"dcgan.stages"},
    {"dcgan.reproduce"},
    {"dcgan.commands", "dcgan.cli", "flows"},
]
# Modules that know only these of ours: a launcher of any function, and functions of arrays.
KNOW_ONLY = {
    "dcgan.cluster*": {"dcgan.config", "dcgan.settings", "dcgan.storage", "dcgan.environment", "dcgan.cluster*"},
    "dcgan.evaluate": {"dcgan.config", "dcgan.settings", "dcgan.numerics", "dcgan.evaluate"},
}


def module_name(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(file) for file in FILES}


@cache
def tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"), str(file))


def imports(file: Path, apart: Container[int] = ()) -> set[str]:
    """Every module that a file imports anywhere in it, ours by full name: `from dcgan import run` is `dcgan.run`.

    apart: ids of nodes that do not count.
    """
    found: set[str] = set()
    for node in ast.walk(tree(file)):
        if id(node) in apart:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file.name}:{node.lineno}: relative import"
            assert node.module is not None
            submodules = {f"{node.module}.{alias.name}" for alias in node.names} & MODULES
            found |= submodules or {node.module}
    return found


def ours(file: Path) -> set[str]:
    return imports(file) & MODULES - {module_name(file)}


def matching(module: str, names: set[str]) -> set[str]:
    return {name for name in names if fnmatch(module, name) or (name != "dcgan" and module.startswith(f"{name}."))}


def layer(module: str) -> int:
    found = [number for number, names in enumerate(LAYERS) if matching(module, names)]
    assert len(found) == 1, f"give {module} a place in LAYERS"
    return found[0]


@pytest.mark.parametrize("library", IMPORTERS)
def test_a_library_is_imported_only_where_it_belongs(library: str) -> None:
    allowed = IMPORTERS[library]
    importers = {
        file.relative_to(ROOT).as_posix()
        for file in FILES
        if any(name == library or name.startswith(f"{library}.") for name in imports(file))
    }
    assert not {file for file in importers if not file.startswith(allowed)}


@pytest.mark.parametrize("file", FILES, ids=module_name)
def test_imports_point_down(file: Path) -> None:
    above = {name for name in ours(file) if layer(name) > layer(module_name(file))}
    assert not above, f"{module_name(file)} imports from above"


def test_no_module_imports_itself_through_others() -> None:
    graph = {module_name(file): at_import(file) & MODULES - {module_name(file)} for file in FILES}
    assert len(list(TopologicalSorter(graph).static_order())) == len(MODULES)  # raises CycleError


def at_import(file: Path) -> set[str]:
    """What a file imports when it is imported itself: not in functions, not for the type checker alone."""
    later = [n for n in ast.walk(tree(file)) if isinstance(n, ast.FunctionDef) or _for_types(n)]
    apart = {id(inner) for node in later for inner in ast.walk(node)}
    return imports(file, apart)


def _for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


@pytest.mark.parametrize("package", KNOW_ONLY)
def test_a_launcher_and_an_evaluator_know_none_of_our_models(package: str) -> None:
    files = [file for file in FILES if matching(module_name(file), {package})]
    assert files
    known = {name for file in files for name in ours(file)}
    if package == "dcgan.evaluate":  # one trains classifiers of the discriminator's architecture
        known -= ours(ROOT / "dcgan" / "evaluate" / "supervised.py") & {"dcgan.models"}
        assert not {file.stem for file in files if "dcgan.models" in ours(file)} - {"supervised"}
    assert not {name for name in known if not matching(name, KNOW_ONLY[package])}


@pytest.mark.parametrize("file", FILES, ids=module_name)
def test_a_module_can_be_read_in_one_sitting(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    assert text.count("\n") <= LONGEST
    assert not text.strip() or ast.get_docstring(tree(file)), "says in a docstring what it is for"


def calls(file: Path) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


@pytest.mark.parametrize("file", FILES, ids=module_name)
def test_nothing_that_is_read_can_run_code(file: Path) -> None:
    for name, call in calls(file):
        where = f"{module_name(file)}:{call.lineno}: {name}"
        assert name not in ("pickle.load", "pickle.loads", "eval", "exec", "yaml.load", "os.system"), where
        options = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        if name == "torch.load":
            assert options.get("weights_only") == "True", where
        assert options.get("allow_pickle", "False") == "False", where
        assert options.get("shell", "False") == "False", where


@pytest.mark.parametrize("file", FILES, ids=module_name)
def test_no_exception_is_caught_by_chance(file: Path) -> None:
    handlers = [node for node in ast.walk(tree(file)) if isinstance(node, ast.ExceptHandler)]
    for handler in handlers:
        caught = ast.unparse(handler.type) if handler.type else "everything"
        broad = caught in ("everything", "Exception", "BaseException")
        passed_on = any(isinstance(node, ast.Raise) and node.exc is None for node in ast.walk(handler))
        assert not broad or passed_on, f"{module_name(file)}:{handler.lineno} catches {caught}"


def test_nothing_names_this_machine_or_listens_to_others() -> None:
    names = ("Makefile", "prefect.yaml", "pyproject.toml", "README.md", ".ci/run")
    others = [*ROOT.glob("dcgan/presets/*"), *ROOT.glob("docs/*.md"), *(ROOT / n for n in names if (ROOT / n).exists())]
    forbidden = re.compile(r"(?<![\w.~])/(work|farm|root|tmp|home/\w+)\b|\b0\.0\.0\.0\b|index-url")
    for file in [*FILES, *OPERATION, *others]:
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            assert not forbidden.search(line), f"{file.relative_to(ROOT)}:{number}: {line.strip()}"


# What an import brings and does is seen in a fresh interpreter.


def python(code: str, *arguments: str, cwd: Path) -> str:
    command = [sys.executable, "-B", "-c", code, *arguments]
    ours = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=cwd, env=ours, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


LIGHT = """
import sys
from dcgan.cli import main
try:
    main(sys.argv[1:])
except SystemExit as exit:
    assert exit.code in (0, 2), exit.code
print(*sorted({name.partition(".")[0] for name in sys.modules}))
"""


@pytest.mark.parametrize("words", ["--help", "train --help", "train digit", "train digits train.stepss=1"])
def test_help_and_refusals_wait_for_no_heavy_library(words: str, tmp_path: Path) -> None:
    loaded = set(python(LIGHT, *words.split(), cwd=tmp_path).splitlines()[-1].split())
    assert not loaded & {"torch", *IMPORTERS}


QUIET = """
import sys
import numpy, pydantic, torch  # free to all; what they do at import is theirs
torch.distributed, torch.nn.functional
changes = ("os.mkdir", "os.rename", "os.remove", "shutil.rmtree", "socket.connect", "socket.bind", "subprocess.Popen")
done = []
def watch(event, details):
    if event == "open":
        path, mode, flags = details
        code = str(path).endswith((".py", ".pyc", ".so")) or isinstance(path, int)
        code = code or "site-packages" in str(path) or ".egg-info" in str(path)  # what the interpreter itself looks up
        if (mode and set(mode) & set("wax+")) or (str(path).startswith(sys.argv[1]) and not code):
            done.append(f"{event} {details}")
    elif event in changes:
        done.append(f"{event} {details}")
import importlib
sys.addaudithook(watch)
for name in sys.argv[2:]:
    importlib.import_module(name)
    assert not done, f"importing {name}: {done}"
print(*sorted({name.partition(".")[0] for name in sys.modules}))
"""


def test_importing_our_modules_reads_and_writes_nothing_and_brings_no_heavy_library(tmp_path: Path) -> None:
    light = sorted(MODULES - heavy_modules())
    assert {"dcgan.stages", "dcgan.cli", "dcgan.train", "dcgan.features", "dcgan.tracking"} <= set(light)
    loaded = set(python(QUIET, str(ROOT), *light, cwd=tmp_path).split())
    assert not loaded & set(IMPORTERS) - _brought_by("torch", "numpy", "pydantic")


DEPLOYED = """
import sys
sys.path.insert(0, sys.argv[1])
import flows.reproduce, flows.train_eval
assert not {"torch", "sklearn", "mlflow", "ray"} & set(sys.modules)
import dcgan.reproduce
assert "torch_fidelity" not in sys.modules
"""


def test_deploying_the_flows_imports_no_evaluator_and_other_tables_no_torch_fidelity(tmp_path: Path) -> None:
    """Seconds of `make up`, and of each row."""
    python(DEPLOYED, str(ROOT), cwd=tmp_path)


SCRIPTS = """
import importlib, sys
found = [sys.argv[1], *sys.path]
for name in sys.argv[2:]:
    sys.path[:] = found  # without what the one before has added
    importlib.import_module(name)
"""


def test_every_benchmark_finds_what_it_imports(tmp_path: Path) -> None:
    scripts = sorted(file.stem for file in ROOT.glob("tests/benchmarks/*.py"))
    assert "bench_step" in scripts
    python(SCRIPTS, str(ROOT / "tests" / "benchmarks"), *scripts, cwd=tmp_path)


@pytest.mark.parametrize("file", sorted(ROOT.glob("tests/**/*.py")), ids=lambda file: file.stem)
def test_what_the_tests_use_of_ours_exists(file: Path) -> None:
    """Nothing else checks the names in a benchmark, which is run by hand."""
    modules = {}
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "dcgan":
            for alias in node.names:
                if f"{node.module}.{alias.name}" in MODULES:
                    modules[alias.asname or alias.name] = importlib.import_module(f"{node.module}.{alias.name}")
                else:
                    found = getattr(importlib.import_module(node.module), alias.name)
                    assert not isinstance(found, ModuleType), f"{node.module} only imports {alias.name} itself"
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
            assert hasattr(modules[node.value.id], node.attr), f"line {node.lineno}: {ast.unparse(node)}"


def heavy_modules() -> set[str]:
    """Those that bring a library of IMPORTERS when imported: by themselves, by their package or by what they import."""
    brought = {module_name(file): at_import(file) | {module_name(file).rpartition(".")[0]} for file in FILES}
    found = {name for name, names in brought.items() if {n.partition(".")[0] for n in names} & set(IMPORTERS)}
    while more := {name for name, names in brought.items() if names & found} - found:
        found |= more
    return found


def _brought_by(*packages: str) -> set[str]:
    """The importable names of distributions and of all that they require."""
    pending, found = list(packages), set()
    while pending:
        package = pending.pop().lower().replace("_", "-")
        if package in found:
            continue
        found.add(package)
        try:
            needed = [Requirement(text) for text in requires(package) or []]
        except PackageNotFoundError:
            continue  # required on another platform
        pending += [r.name for r in needed if r.marker is None or r.marker.evaluate({"extra": ""})]
    names = packages_distributions().items()
    return {name for name, owners in names if {o.lower().replace("_", "-") for o in owners} & found}


ALONE = """
import json, sys, sysconfig
from pathlib import Path

sysconfig_data = [sysconfig._get_sysconfigdata_name()]  # generated when Python was built, so on no list

class Only:
    # Finds what its finder finds if it is allowed; the rest looks as if it were not installed.
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        return self.finder.find_spec(name, path, target) if name.partition(".")[0] in allowed else None

allowed = {*sys.stdlib_module_names, *sysconfig_data, *sys.argv[2].split(","), "dcgan"}
sys.meta_path[:] = map(Only, sys.meta_path)

from dcgan import config, train
from dcgan.data import store
from dcgan.run import Run

home, fingerprint = Path(sys.argv[1]), sys.argv[3]
experiment = config.validate({
    "data": {"name": "digits", "size": 28, "home": str(home)},
    "model": {"width": 2, "z_dim": 2},
    "train": {"steps": 2, "batch_size": 4, "log_every": 1},
    "compute": {"workers": 0, "device": "cpu"},
})
run = Run.create(experiment, store.Store.open(home, fingerprint))
train.train(Run.open(run.path))
print(json.dumps([line["step"] for line in run.metrics()]))
"""


def test_training_a_stored_data_set_needs_torch_numpy_and_pydantic_alone(
    tmp_path: Path, make_store: Callable[..., Store]
) -> None:
    stored = make_store(tmp_path, size=28, channels=1, train=8, test=8)
    allowed = _brought_by("torch", "numpy", "pydantic")
    assert not allowed & {"yaml", "sklearn", "PIL", "ray", "prefect", "mlflow"}
    assert (
        python(ALONE, str(tmp_path), ",".join(sorted(allowed)), stored.fingerprint, cwd=tmp_path).split("\n")[-2]
        == "[1, 2]"
    )


def test_the_rules_see_what_they_should() -> None:
    """The helpers are code too: a module of each kind is where they say, and edges are found."""
    assert "dcgan.data.store" in ours(ROOT / "dcgan" / "run.py")
    assert "dcgan.tracking" in ours(ROOT / "dcgan" / "stages.py") - at_import(ROOT / "dcgan" / "stages.py")
    assert layer("dcgan.data.sources.digits") == layer("dcgan.data") > layer("dcgan.config")
    for above, below in product(LAYERS, LAYERS):
        assert above is below or not above & below
