import os
import subprocess
import sys

import psutil
import pytest

from fast_goal.tracking import identity


@pytest.fixture(autouse=True)
def _no_pipeline(monkeypatch):
    monkeypatch.delenv(identity.PIPELINE_VARIABLE, raising=False)


def test_pipeline_of_the_variable(monkeypatch):
    monkeypatch.setenv(identity.PIPELINE_VARIABLE, "prefect-1' or '1'='1")
    assert identity.pipeline_id() == "prefect-1__or__1___1"


def test_steps_run_by_hand_are_pipelines_of_their_own():
    assert identity.pipeline_id() != identity.pipeline_id()


def test_steps_below_one_dvc_process_share_a_pipeline(tmp_path):
    dvc = tmp_path / "dvc"  # stands for the command: runs its step twice, each in a shell, as dvc does
    dvc.write_text(
        f"#!{sys.executable}\nimport subprocess, sys\n"
        'for _ in range(2): subprocess.run(["/bin/sh", "-c", sys.executable + \' -c \''
        " + '\"from fast_goal.tracking.identity import pipeline_id; print(pipeline_id())\"; true'])\n"
    )
    dvc.chmod(0o755)
    first, second = subprocess.run([dvc], capture_output=True, text=True, check=True).stdout.split()
    other, _ = subprocess.run([dvc], capture_output=True, text=True, check=True).stdout.split()
    assert first == second and first.startswith("dvc-")
    assert other != first


@pytest.mark.parametrize(
    ("name", "command", "expected"),
    [
        ("dvc", ["/venv/bin/python", "/venv/bin/dvc", "repro"], True),
        ("python", ["/venv/bin/python", "/venv/bin/dvc", "repro"], True),
        ("python3.11", ["/venv/bin/python", "-m", "dvc", "repro"], True),
        ("python", ["python", "-X", "dev", "-m", "dvc", "repro"], True),
        ("bash", ["bash", "-c", "dvc repro"], False),
        ("vim", ["vim", "notes/dvc-lock.txt"], False),
        ("python", ["python", "-m", "pytest"], False),
        ("kernel", [], False),
    ],
)
def test_is_dvc(name, command, expected):
    assert identity.is_dvc(name, command) is expected


def test_alive_and_dead_processes():
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        mark = identity.process_mark(psutil.Process(child.pid))
        assert identity.is_alive(mark)
        assert not identity.is_alive(f"{child.pid}@1.00"), "a reused process id"
    finally:
        child.kill()
        child.wait()
    assert not identity.is_alive(mark)
    assert not identity.is_alive("")
    assert identity.is_alive(identity.process_mark(psutil.Process(os.getpid())))


def test_git_and_dvc_facts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert (identity.git_commit(), identity.git_dirty(), identity.dvc_lock()) == ("none", False, "none")
    author = ["-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", "init", "-q"], check=True)
    (tmp_path / "a").write_text("1")
    subprocess.run(["git", "add", "a"], check=True)
    subprocess.run(["git", *author, "commit", "-qm", "a"], check=True)
    assert len(identity.git_commit()) == 40
    (tmp_path / "unknown").write_text("")
    assert not identity.git_dirty()
    (tmp_path / "a").write_text("2")
    assert identity.git_dirty()
    (tmp_path / "dvc.lock").write_text("x")
    first = identity.dvc_lock()
    (tmp_path / "dvc.lock").write_text("y")
    assert first != identity.dvc_lock() != "none"


@pytest.mark.parametrize("folder", [".", "project"])
def test_the_lock_that_the_pipeline_rewrites_is_no_change(tmp_path, monkeypatch, folder):
    (tmp_path / folder).mkdir(exist_ok=True)
    monkeypatch.chdir(tmp_path / folder)
    files = [tmp_path / folder / "dvc.lock", tmp_path / folder / "params.yaml", tmp_path / "above"]
    for file in files:
        file.write_text("1")
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    subprocess.run(["git", "add", *files], check=True)
    subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "a"], check=True)
    files[0].write_text("2")
    assert not identity.git_dirty()
    for file in files[1:]:
        file.write_text("2")
        assert identity.git_dirty()
        file.write_text("1")
    files[0].unlink()
    assert not identity.git_dirty()
