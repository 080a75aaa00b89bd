"""The flows with a real DVC and a real Prefect server, in a repository of trivial steps."""

import importlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from fast_goal.stages import STEPS

FLOWS = Path(__file__).parents[2] / "flows"
PROGRAM = r"""#!/bin/sh
# what `fast-goal gate` and `fast-goal drift` write; `verdict` and `drifted` say what they find
echo "$1 $FAST_GOAL_PIPELINE_ID" >> log
if [ -e "hang_$1" ]; then echo $$ > started.part; mv started.part started; exec sleep 600; fi
if [ -e "status_$1" ]; then echo "$1: something happened"; exit "$(cat "status_$1")"; fi
"$PYTHON" write.py "$@"
"""
WRITE = r"""
import datetime, json, pathlib, sys

now = datetime.datetime.now(datetime.UTC)
stamp = f"{now:%Y%m%dT%H%M%S.%fZ}"
if sys.argv[1] == "drift":
    drifted = pathlib.Path("drifted").exists()
    tests = [{"what": "words per caption", "statistic": 0.4, "p": 0.001, "p_adjusted": 0.002, "drifted": drifted,
              "text": "12 words instead of 82"}]
    folder, content = pathlib.Path("models/drift") / stamp, {"tests": tests, "drifted": drifted}
    files = [folder / "drift.json"]
else:
    version = json.loads(pathlib.Path("models/register/registration.json").read_text())["version"]
    verdict = pathlib.Path("verdict").read_text().strip()
    content = {"decision": verdict, "model": "m", "candidate": {"version": version, "digest": "a"},
               "champion": {"version": 100, "digest": "b"}, "checks": [{"name": "long", "passed": verdict == "promoted",
               "measured": 2.0, "bound": 1.0, "text": "R@1 +2.0"}], "reasons": ["R@1 +2.0 points"], "time": stamp,
               "dry_run": False}
    folder = pathlib.Path("models/decisions")
    files = [folder / f"{stamp}-v{version}" / "decision.json", folder / "latest.json"]
for file in files:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))
"""


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    """A git and DVC repository: each step appends to a log which pipeline it belongs to, and copies its predecessor's file.

    A file `hang_<step>` lets the step hang, `status_<step>` lets it fail with that exit status. `register` counts versions.
    """
    folder = tmp_path_factory.mktemp("repository")
    shutil.copytree(FLOWS, folder / "flows", ignore=shutil.ignore_patterns("__pycache__"))
    pipeline, before = {}, "start.txt"
    (folder / before).write_text("start")
    for step in STEPS:
        outputs = [f"{step}.txt"]
        command = f"echo {step} says hello && echo {step} $FAST_GOAL_PIPELINE_ID >> log"
        command += f" && (test ! -e hang_{step} || (echo $$ > started.part && mv started.part started && exec sleep 600))"
        command += f" && (test ! -e status_{step} || (echo the disk is on fire && exit $(cat status_{step})))"
        command += f" && echo {step} >> done && cat {before} > {step}.txt"
        if step == "register":
            outputs.append("models/register/registration.json")
            registration = '{"version": %d, "model": "m", "alias": "a", "uri": "models:/m@a"}'
            command += f" && echo >> versions && mkdir -p models/register && printf '{registration}' $(wc -l < versions)"
            command += f" > {outputs[1]}"
        pipeline[step] = {"cmd": command, "deps": [before], "outs": outputs}
        before = f"{step}.txt"
    (folder / "dvc.yaml").write_text(yaml.safe_dump({"stages": pipeline}, sort_keys=False))
    (folder / "params.yaml").write_text("download:\n  watch: start.txt\n")
    (folder / "bin").mkdir()
    (folder / "bin/fast-goal").write_text(PROGRAM)
    (folder / "bin/fast-goal").chmod(0o755)
    (folder / "write.py").write_text(WRITE)
    (folder / "verdict").write_text("promoted")
    env = {**os.environ, "DVC_NO_ANALYTICS": "1"}
    for command in (["git", "init", "-q"], [sys.executable, "-m", "dvc", "init", "-q"]):
        subprocess.run(command, cwd=folder, env=env, check=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}")
        patch.setenv("PYTHON", sys.executable)
        for name in ("FAST_GOAL_WEBHOOK_URL", "FAST_GOAL_NOTIFICATION_BLOCK", "PREFECT_API_URL"):
            patch.delenv(name, raising=False)
        yield folder


@pytest.fixture(scope="session")
def flows(root, tmp_path_factory):
    """Gives the flows' modules by name, as they stand in that repository, beside a Prefect server of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFECT_HOME", str(tmp_path_factory.mktemp("prefect")))
        patch.syspath_prepend(root / "flows")
        for path in FLOWS.glob("*.py"):
            patch.delitem(sys.modules, path.stem, raising=False)
        running = importlib.import_module("running")
        assert root == running.ROOT
        from prefect.testing.utilities import prefect_test_harness

        with prefect_test_harness(server_startup_timeout=120):
            yield importlib.import_module


@pytest.fixture
def api(flows):
    """The address of the server."""
    import prefect.settings

    return prefect.settings.PREFECT_API_URL.value()


@pytest.fixture
def decisions(root):
    """The lines of the decision log that were added since the test began."""
    path = root / "models/decisions/log.jsonl"

    def lines():
        return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []

    before = len(lines())
    return lambda: lines()[before:]


@pytest.fixture
def ran(root):
    """The steps that were begun since the test began, and, with `done=True`, those that ended."""

    def lines(done=False):
        path = root / ("done" if done else "log")
        return [line.split()[0] for line in path.read_text().splitlines()] if path.is_file() else []

    before = {done: len(lines(done)) for done in (False, True)}
    return lambda done=False: lines(done)[before[done] :]


@pytest.fixture
def change(root):
    """Puts files with their texts into the repository, and takes them away in the end."""
    made = []

    def put(**texts):
        for name, text in texts.items():
            (root / name).write_text(text)
            made.append(root / name)

    yield put
    for path in made:
        path.unlink(missing_ok=True)


@pytest.fixture
def new_data(root):
    """Changes the data that are watched."""
    return lambda: (root / "start.txt").write_text(f"changed at {time.monotonic_ns()}")


@pytest.fixture
def started(root):
    """Waits until a hanging step of the process has begun; its process id."""
    path = root / "started"
    path.unlink(missing_ok=True)

    def wait(process, seconds=100):
        end = time.monotonic() + seconds
        while not path.exists():
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.05)
        number = int(path.read_text())
        path.unlink()
        return number

    return wait
