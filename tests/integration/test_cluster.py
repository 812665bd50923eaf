"""Real Ray Train workers: they find one another, are restarted when killed, and say why they failed."""

import asyncio
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import fabricated
import pytest
import ray_nodes

from dcgan import cluster, cluster_session, cluster_train, environment, feature_banks
from dcgan.config import Compute
from dcgan.run import Run
from dcgan.storage import CorruptError

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ray_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One local Ray for the tests of this module, in a directory too long for a Unix socket below it."""
    home = tmp_path_factory.mktemp("a-home-with-a-name-of-more-bytes-than-the-107-of-a-unix-socket-have-room-for")
    with cluster_session.session(home, workers=2):
        yield home


def compute(**settings: int) -> Compute:
    return Compute(workers=2, device="cpu", **settings)


def test_workers_form_a_process_group_share_the_cores_and_stay_in_the_directory(ray_home: Path) -> None:
    def report(directory: str) -> None:
        import torch
        import torch.distributed as dist

        total = torch.tensor([float(dist.get_rank() + 1)])
        dist.all_reduce(total)
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
        seen = {
            "total": total.item(),
            "threads": torch.get_num_threads(),
            "directory": os.getcwd(),
            "missing": [name for name in names if name not in os.environ],
            "rank": [dist.get_rank(), int(os.environ["RANK"])],
        }
        Path(directory, f"{dist.get_rank()}.json").write_text(json.dumps(seen))

    cluster_train.launch(report, (str(ray_home),), compute(), ray_home, "group")

    share = max(environment.cpus(), 2) // 2
    for rank in (0, 1):
        assert json.loads((ray_home / f"{rank}.json").read_text()) == {
            "total": 3.0,
            "threads": share,
            "directory": os.getcwd(),
            "missing": [],
            "rank": [rank, rank],
        }
    assert (ray_home / "ray" / "train").is_dir()


def test_a_local_ray_starts_nothing_that_training_does_not_need(tmp_path: Path) -> None:
    program = f"""
        import json
        import os
        import time
        from pathlib import Path

        from dcgan import cluster_session, cluster_train
        from dcgan.config import Compute

        def others():
            # The actors of Ray beside this one: what the raylet has started.
            children = Path(f"/proc/{{os.getppid()}}/task/{{os.getppid()}}/children").read_text().split()
            titles = [Path(f"/proc/{{child}}/cmdline").read_text() for child in children]
            return [title for title in titles if "Controller" in title or "Actor" in title]

        def report(file):
            import torch
            from ray.util import list_named_actors
            found = [] if not torch.distributed.is_initialized() else ["a process group"]
            found += [] if os.environ["WORLD_SIZE"] == "1" else ["others that are waited for"]
            until = time.monotonic() + 30
            while (actors := others()) and time.monotonic() < until:  # a process takes its time to die
                time.sleep(0.1)
            Path(file).write_text(json.dumps(list_named_actors(all_namespaces=True) + actors + found))

        home = Path({str(tmp_path)!r})
        with cluster_session.session(home, workers=1):
            cluster_train.launch(report, (str(home / "actors"),), Compute(device="cpu"), home, "lean")
            import ray
            print(sorted(ray._private.worker._global_node.all_processes))
    """
    found = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env={**os.environ, "WORLD_SIZE": "2", "RANK": "1"},  # as in a pod of a job with two of them
    )
    assert found.stdout.splitlines()[-1] == "['gcs_server', 'raylet']"
    assert json.loads((tmp_path / "actors").read_text()) == []


def test_a_worker_that_computes_is_hardly_ever_woken_up(ray_home: Path) -> None:
    def count(file: str) -> None:
        def wakings() -> int:
            status = Path(f"/proc/self/task/{os.getpid()}/status").read_text()  # of the main thread; this is another
            return int(status.partition("\nvoluntary_ctxt_switches:")[2].split()[0])

        time.sleep(3)  # so that the first poll, of PATIENCE = 4 seconds, ends while it counts
        before = wakings()
        time.sleep(3)
        Path(file).write_text(str(wakings() - before))

    cluster_train.launch(count, (str(ray_home / "wakings"),), Compute(device="cpu"), ray_home, "quiet")
    assert int((ray_home / "wakings").read_text()) < 30  # Ray alone: 300


def test_a_notebook_whose_thread_runs_an_event_loop_can_train(ray_home: Path) -> None:
    async def cell() -> None:
        cluster_train.launch(touch, (str(ray_home / "cell"),), Compute(device="cpu"), ray_home, "notebook")

    def touch(file: str) -> None:
        Path(file).touch()

    asyncio.run(cell())

    assert (ray_home / "cell").exists()


def test_worker_killed_at_once_is_restarted_with_the_others(tmp_path: Path) -> None:
    def die_once(directory: str) -> None:
        import torch.distributed as dist

        attempts = Path(directory, f"attempts-{dist.get_rank()}")
        attempts.write_text(attempts.read_text() + "x" if attempts.exists() else "x")
        if dist.get_rank() == 1 and attempts.read_text() == "x":
            os.kill(os.getpid(), signal.SIGKILL)
        dist.barrier()  # rank 0 waits here for a peer that is dead

    cluster_train.launch(die_once, (str(tmp_path),), compute(max_failures=1), tmp_path, "killed")

    assert [(tmp_path / f"attempts-{rank}").read_text() for rank in (0, 1)] == ["xx", "xx"]


def test_workers_that_always_die_are_given_up(tmp_path: Path) -> None:
    def die(directory: str) -> None:
        with Path(directory, "attempts").open("a") as file:
            file.write("x")
        time.sleep(3)  # so that the group has started: a death before that is another case
        os._exit(1)

    with pytest.raises(cluster_session.WorkerError):
        cluster_train.launch(die, (str(tmp_path),), Compute(device="cpu", max_failures=1), tmp_path, "dying")
    assert (tmp_path / "attempts").read_text() == "xx"


def test_exception_of_a_worker_is_one_line_and_one_that_would_repeat_is_not_retried(ray_home: Path) -> None:
    assert issubclass(CorruptError, cluster.REPEATS), "whose files are compared for minutes before it is raised"

    def fail(directory: str) -> None:
        import torch.distributed as dist

        attempts = Path(directory, f"failures-{dist.get_rank()}")
        attempts.write_text(attempts.read_text() + "x" if attempts.exists() else "x")
        if dist.get_rank() == 1:
            raise ValueError("train.batch_size=7 is\nwrong")
        dist.barrier()

    with pytest.raises(cluster_session.WorkerError, match=r"^worker 1: ValueError: train.batch_size=7 is wrong$"):
        cluster_train.launch(fail, (str(ray_home),), compute(max_failures=3), ray_home, "failing")

    assert (ray_home / "failures-1").read_text() == "x"


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (Compute(workers=99, device="cpu"), "compute.workers=99 needs as many CPUs, and Ray has"),
        (Compute(workers=1, device="cuda"), "compute.workers=1 on compute.device=cuda needs a GPU each, and Ray has 0"),
    ],
)
def test_what_ray_lacks_is_refused_before_anything_waits_for_it(ray_home: Path, asked: Compute, message: str) -> None:
    import ray

    if asked.device == "cuda" and ray.cluster_resources().get("GPU"):
        pytest.skip("this machine has a GPU")
    with pytest.raises(ValueError, match=message):
        cluster_train.launch(print, (), asked, ray_home, "refused")


@pytest.mark.parametrize(
    ("nodes", "workers", "cpus"),
    [([8], 1, 8), ([8], 3, 2), ([2, 2], 1, 2), ([4, 4, 1], 2, 4), ([3, 3], 3, 1), ([1, 1], 2, 1)],
)
def test_share_is_the_most_that_fits_within_nodes(nodes: list[int], workers: int, cpus: int) -> None:
    assert cluster_train._share([(node, 0) for node in nodes], Compute(workers=workers), on_gpus=False) == cpus


@pytest.mark.parametrize(
    ("nodes", "workers", "cpus"),
    [([(64, 0), (8, 1)], 1, 8), ([(32, 1), (8, 2)], 2, 8), ([(32, 1), (8, 2)], 3, 4), ([(8, 4)], 2, 4)],
)
def test_a_worker_on_a_gpu_has_the_cpus_of_its_node(nodes: list[tuple[int, int]], workers: int, cpus: int) -> None:
    assert cluster_train._share(nodes, Compute(workers=workers), on_gpus=True) == cpus
    with pytest.raises(ValueError, match="needs as many CPUs, each on a node with a GPU for it, and Ray has 64"):
        cluster_train._share([(64, 0), (0, 1)], Compute(workers=1), on_gpus=True)


@pytest.mark.parametrize(
    ("device", "workers", "gpus", "expected"),
    [
        ("cpu", 1, 8, False),
        ("auto", 4, 0, False),
        ("auto", 1, 1, True),
        ("auto", 4, 4, True),
        ("cuda", 2, 4, True),
        ("auto", 4, 3, None),
        ("cuda", 1, 0, None),
    ],
)
def test_workers_have_a_gpu_each_or_none(device: str, workers: int, gpus: int, expected: bool | None) -> None:
    wanted = Compute.model_validate({"device": device, "workers": workers})
    if expected is None:
        with pytest.raises(ValueError, match=f"needs a GPU each, and Ray has {gpus}"):
            cluster.use_gpu(wanted, gpus)
    else:
        assert cluster.use_gpu(wanted, gpus) is expected


def test_the_cpus_of_a_worker_can_be_given() -> None:
    nodes = [(8, 0), (3, 0)]
    assert cluster_train._share(nodes, Compute(workers=3, cpus=3), on_gpus=False) == 3
    with pytest.raises(ValueError, match=r"workers=4 needs compute.cpus=3 CPUs of one node each, and Ray has 11"):
        cluster_train._share(nodes, Compute(workers=4, cpus=3), on_gpus=False)
    assert cluster_train._share([(8, 1), (8, 1)], Compute(workers=2, cpus=4), on_gpus=True) == 4
    with pytest.raises(ValueError, match="4 CPUs of one node each, each on a node with a GPU"):
        cluster_train._share([(8, 1), (8, 0)], Compute(workers=2, cpus=4), on_gpus=True)


def test_nodes_that_may_have_a_worker_are_asked_whether_they_can() -> None:
    nodes = [
        {"NodeID": name, "Alive": name != "dead", "Resources": resources}
        for name, resources in (
            ("head", {}),
            ("dead", {"CPU": 8.0, "GPU": 1.0}),
            ("small", {"CPU": 2.0, "GPU": 1.0}),
            ("large", {"CPU": 8.0}),
            ("whole", {"CPU": 8.0, "GPU": 2.0}),
        )
    ]
    for cpus, on_gpu, names in ((1, False, "small large whole"), (4, False, "large whole"), (1, True, "small whole")):
        assert [node["NodeID"] for node in cluster.able(nodes, cpus, on_gpu)] == names.split()


def test_workers_that_hang_are_not_waited_for_after_a_second_sigterm(tmp_path: Path) -> None:
    """Nor does what SIGTERM did before, as Prefect's handler, get lost in Ray."""
    program = f"""
        import os, signal, threading, time
        from pathlib import Path
        from types import SimpleNamespace
        from dcgan import cluster_train, preemption
        from dcgan.config import Compute

        class Cancelled(BaseException): ...
        def cancel(*_):
            raise Cancelled
        def hang(file):
            Path(file).touch()
            time.sleep(600)
        def terminate():
            while not file.exists():
                time.sleep(0.1)
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(3)
            print("still waiting", flush=True)
            os._exit(1)

        home = Path({str(tmp_path)!r})
        file = home / "began"
        signal.signal(signal.SIGTERM, cancel)
        threading.Thread(target=terminate, daemon=True).start()
        try:
            with preemption.awaited(SimpleNamespace(path=home)):
                cluster_train.launch(hang, (str(file),), Compute(device="cpu"), home, "hanging")
        except Cancelled:
            print("cancelled", flush=True)
            os._exit(0)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], stdout=subprocess.PIPE, text=True)
    assert (done.returncode, done.stdout) == (0, "cancelled\n")


def test_a_local_ray_keeps_others_out_whatever_was_set_for_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "")
    cluster_session.prepare()
    assert os.environ["RAY_AUTH_MODE"] == "token"
    own = os.environ["RAY_AUTH_TOKEN"]
    assert len(own) == 64
    cluster_session.prepare()
    assert os.environ["RAY_AUTH_TOKEN"] == own


def test_two_workers_on_two_nodes_train_what_they_train_on_one(home: Path, tmp_path: Path) -> None:
    short = ["train.steps=4", "train.log_every=1", "train.checkpoint_every=4", "model.width=4", "compute.workers=2"]
    script = f"""
        import os, sys
        from pathlib import Path
        from dcgan import cluster_train, config, stages

        def work(run):
            import ray
            Path(run, "node-" + os.environ["RANK"]).write_text(ray.get_runtime_context().get_node_id())
            stages.train_here(run)

        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])  # a processor each, as the nodes have
        experiment = config.build("digits", {short!r} + ["data.home=" + sys.argv[1]])
        run = stages.ingest(experiment)
        cluster_train.launch(work, (str(run.path),), experiment.compute, run.home, run.name)
    """

    def trained(home: Path) -> tuple[set[str], Run]:
        subprocess.run([sys.executable, "-c", textwrap.dedent(script), str(home)], check=True)
        (path,) = (home / "runs").iterdir()
        return {file.read_text() for file in path.glob("node-*")}, Run.open(path)

    shutil.copytree(home, tmp_path / "one")
    one, expected = trained(tmp_path / "one")
    with ray_nodes.cluster(tmp_path) as nodes:
        nodes.add()
        two, run = trained(home)
    assert (len(one), len(two)) == (1, 2)
    timed = {"seconds", "images_per_second"}
    ours, theirs = (
        [{name: value for name, value in line.items() if name not in timed} for line in each.metrics()]
        for each in (run, expected)
    )
    assert ours == theirs
    assert [line["step"] for line in ours] == [1, 2, 3, 4]


def test_a_node_that_lacks_our_modules_is_named_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "class Without:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] == 'dcgan':\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}')\n"
        "sys.meta_path.insert(0, Without())\n"
    )
    program = f"""
        from pathlib import Path
        from dcgan import cluster, cluster_session, cluster_train
        from dcgan.config import Compute
        from dcgan.feature_banks import extract as work_of
        for work in (
            lambda: cluster_train.launch(work_of, (), Compute(device="cpu"), Path({str(tmp_path)!r}), "lost"),
            lambda: list(cluster.scatter(work_of, ["job"], Path({str(tmp_path)!r}))),
        ):
            try:
                work()
            except cluster_session.WorkerError as error:
                print(error)
    """
    with ray_nodes.cluster(tmp_path) as nodes:
        nodes.add(path=str(tmp_path))
        told = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(program)], stdout=subprocess.PIPE, text=True, check=True
        ).stdout.splitlines()
    assert len(told) == 2
    for line in told:
        assert line.startswith("the Ray node at 127.0.0.3 can't run this: "), line
        assert line.endswith("No module named 'dcgan'"), line


def test_workers_wait_for_room_on_a_cluster_and_say_so(tmp_path: Path) -> None:
    program = f"""
        import logging, time
        from pathlib import Path
        from dcgan import cluster_session, cluster_train
        from dcgan.config import Compute
        home = Path({str(tmp_path)!r})
        said, working = str(home / "said"), str(home / "working")
        class Handler(logging.StreamHandler):
            def emit(self, record):
                super().emit(record)
                if "trying again" in record.getMessage():
                    Path(said).touch()
        logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[Handler()])
        def work(file):
            Path(file).touch()
        def busy():
            Path(working).touch()
            while not Path(said).exists():
                time.sleep(0.1)
        with cluster_session.session(home, 1):
            import ray
            other = ray.remote(num_cpus=1)(busy).remote()
            while not Path(working).exists():
                time.sleep(0.1)
            cluster_train.launch(work, (str(home / "done"),), Compute(device="cpu"), home, "waiting")
    """
    with ray_nodes.cluster(tmp_path):
        around = {**os.environ, "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "3"}
        command = [sys.executable, "-c", textwrap.dedent(program)]
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True, env=around, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "done").exists()
    assert "Ray has 0 CPUs free of the 1 wanted, and is waited for" in done.stderr
    assert "the cluster has no room for compute.workers=1; trying again" in done.stderr


def test_a_job_whose_process_always_dies_is_given_up(ray_home: Path) -> None:
    with pytest.raises(cluster_session.WorkerError, match="processes died again and again"):
        list(cluster.scatter(lambda _: os._exit(1), ["job"], ray_home))


def test_sigterm_while_ray_starts_is_as_at_any_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def connect(*_: object) -> None:
        raise SystemExit(signal.SIGTERM)  # Ray's own handler

    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.shutdown", lambda: None)
    monkeypatch.setattr(cluster_session, "_connect", connect)
    before = signal.signal(signal.SIGTERM, lambda *_: seen.append("called"))
    try:
        with pytest.raises(KeyboardInterrupt), cluster_session.session(tmp_path, 1):
            raise AssertionError("not reached")
    finally:
        signal.signal(signal.SIGTERM, before)
    assert seen == ["called"]


def test_a_cluster_that_cannot_be_joined_is_said_in_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def init(address: str, **_: object) -> None:
        raise RuntimeError("Version mismatch: The cluster was started with Python 3.12")

    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.init", init)
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    with (
        pytest.raises(cluster_session.WorkerError, match=r"RAY_ADDRESS=head:6379 can't be joined .*Version mismatch"),
        cluster_session.session(tmp_path, 1),
    ):
        raise AssertionError("not reached")


def test_a_cluster_without_a_cpu_is_said_before_anything_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.nodes", lambda: [{"NodeID": "head", "Alive": True, "Resources": {}}])
    with pytest.raises(ValueError, match="no Ray node has 2 CPUs and a GPU"):
        cluster.check_nodes(print, 1, 2, True)


def test_no_job_starts_nothing(tmp_path: Path) -> None:
    assert list(cluster.scatter(str, [], tmp_path / "none")) == []
    assert not (tmp_path / "none").exists()


def test_features_of_several_processes_are_those_of_one(ray_home: Path, home: Path) -> None:
    run = fabricated.new_run(home, ["model.width=2"])
    fabricated.save(run, 600)
    found = []
    for maker in (map, functools.partial(cluster.scatter, home=ray_home, concurrency=2)):
        feature_banks.extract(run, maker)
        found.append({file.relative_to(run.features): file.read_bytes() for file in run.features.glob("*/*.npy")})
        shutil.rmtree(run.features)
    assert found[0] == found[1]
    assert len(found[0]) == 12, "three layers of two splits in two banks"
