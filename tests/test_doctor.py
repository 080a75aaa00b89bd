"""`fast-goal doctor`: every check on a good project, and what each says when something is wrong."""

import importlib.metadata
import os
import socket
import sqlite3
import subprocess
import threading
from contextlib import closing
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import SimpleNamespace

import pytest

from fast_goal import doctor, environment
from fast_goal.configure import configure

REAL_REQUIRES = importlib.metadata.requires


@pytest.fixture
def project(tmp_path, monkeypatch):
    """An empty git and DVC project with valid parameters, and no servers."""
    monkeypatch.chdir(tmp_path)
    for name in ("MLFLOW_TRACKING_URI", "PREFECT_API_URL"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.TELEMETRY_SWITCHES.items():
        monkeypatch.setenv(name, value)
    for arguments in (["init"], ["-c", "user.name=t", "-c", "user.email=t@t", "commit", "--allow-empty", "-m", "first"]):
        subprocess.run(["git", *arguments], check=True, capture_output=True)
    (tmp_path / ".dvc").mkdir()
    (tmp_path / "dvc.yaml").write_text("stages: {}\n")
    configure()
    return tmp_path


@pytest.fixture
def server():
    """A server on this machine that answers every request with 'not found'."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_error(404)

        def log_message(self, *_):
            pass

    http = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{http.server_port}"
    http.shutdown()
    http.server_close()


def one(checks):
    (check,) = checks
    return check


def by_name():
    return {check.name: check for check in doctor.run()}


def closed_port():
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_a_good_project_has_no_failure_and_nothing_is_left_behind(project, capsys):
    before = sorted(path.name for path in project.iterdir())
    checks = doctor.run()
    assert [check for check in checks if check.status == "fail"] == []
    assert sorted(path.name for path in project.iterdir()) == before
    names = {check.name for check in checks}
    assert {"python", "torch", "device", "torchvision operators", "write access data/", "disk", "telemetry", "git"} <= names
    assert {"dvc repository", "params.yaml", "mlflow store", "prefect"} <= names
    assert all(check.found for check in checks)
    assert doctor.report() == 0
    printed = capsys.readouterr().out
    assert "torchvision" in printed
    assert "0 failed" in printed


def test_the_report_prints_found_and_fix_and_returns_1(monkeypatch, capsys):
    bad = doctor.Check("disk", "fail", "none [red]free[/red]", "delete something")
    monkeypatch.setattr(doctor, "run", lambda: [bad])
    assert doctor.report() == 1
    printed = capsys.readouterr().out
    assert "none [red]free[/red]" in printed  # not read as markup
    assert "fix: delete something" in printed


def test_warnings_alone_return_0(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "run", lambda: [doctor.Check("disk", "warn", "little", "delete something")])
    assert doctor.report() == 0
    assert "1 with a warning" in capsys.readouterr().out


def test_a_check_that_breaks_is_a_failed_check(project, monkeypatch):
    def broken():
        raise ZeroDivisionError("half an installation")

    monkeypatch.setattr(doctor, "_device", broken)
    check = by_name()["device"]
    assert check.status == "fail"
    assert "ZeroDivisionError: half an installation" in check.found


def test_packages_missing_out_of_range_and_optional(monkeypatch):
    wanted = ["torch>=2.6", "numpy>=99", "no-such-package>=1", "absent; extra == 'dev'", "rich"]
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: wanted)
    checks = {check.name: check for check in doctor._packages()}
    assert set(checks) == {"torch", "numpy", "no-such-package"}
    assert checks["torch"].status == "ok"
    assert checks["numpy"].status == checks["no-such-package"].status == "fail"
    assert "expected >=99" in checks["numpy"].found
    assert checks["numpy"].fix


def test_every_main_package_is_a_requirement():
    from packaging.requirements import Requirement

    assert set(doctor.MAIN_PACKAGES) <= {Requirement(text).name for text in REAL_REQUIRES("fast-goal")}


def test_an_old_python(monkeypatch):
    monkeypatch.setattr(doctor.platform, "python_version", lambda: "3.9.1")
    check = one(doctor._python())
    assert check.status == "fail"
    assert "3.9.1, expected >=3.11" in check.found


def test_a_device_that_is_not_there(monkeypatch):
    monkeypatch.setenv("FAST_GOAL_DEVICE", "warp")
    check = one(doctor._device())
    assert check.status == "fail"
    assert "warp" in check.found


def test_little_memory(monkeypatch):
    import psutil

    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=8 * doctor.GIB, available=doctor.GIB))
    assert one(doctor._machine()).status == "warn"


def test_torchvision_operators_native_and_wrong(monkeypatch):
    import torch

    environment.prepare()
    import torchvision
    from torchvision import extension

    check = one(doctor._torchvision())
    assert check.status == "ok"
    assert (check.found == "native") == extension._has_ops()
    monkeypatch.setattr(extension, "_has_ops", lambda: True)
    assert one(doctor._torchvision()).found == "native"
    monkeypatch.setattr(torchvision.ops, "nms", lambda boxes, scores, iou: torch.arange(3))
    check = one(doctor._torchvision())
    assert check.status == "fail"
    assert "[0, 1, 2] instead of [0, 2]" in check.found


@pytest.mark.parametrize(("gib", "status"), [(1.9, "fail"), (2.1, "warn"), (9.9, "warn"), (10.1, "ok")])
def test_free_disk(monkeypatch, gib, status):
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: SimpleNamespace(free=int(gib * doctor.GIB)))
    check = one(doctor._disk())
    assert check.status == status
    assert bool(check.fix) == (status != "ok")


def test_a_folder_without_write_access(project, monkeypatch):
    def refuse(dir):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(doctor.tempfile, "TemporaryFile", refuse)
    checks = doctor._write_access()
    assert [check.status for check in checks] == ["fail"] * 3
    assert f"{project}: Permission denied" in checks[0].found


def test_a_file_in_the_place_of_a_folder(project):
    (project / "models").write_text("")
    statuses = {check.name: check.status for check in doctor._write_access()}
    assert statuses == {"write access data/": "ok", "write access models/": "fail", "write access .fast_goal/": "ok"}


def test_telemetry_switched_on_by_the_user(monkeypatch):
    for name, value in environment.TELEMETRY_SWITCHES.items():
        monkeypatch.setenv(name, value)
    assert doctor._switches()[0].status == "ok"
    monkeypatch.setenv("GX_ANALYTICS_ENABLED", "true")
    monkeypatch.setenv("YOLO_OFFLINE", "1")
    telemetry, downloads = doctor._switches()
    assert telemetry.status == "warn"
    assert "GX_ANALYTICS_ENABLED=true" in telemetry.found
    assert "unset GX_ANALYTICS_ENABLED," in telemetry.fix
    assert "YOLO_OFFLINE=1" in downloads.found


def test_git_and_dvc_repositories_missing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert one(doctor._git()).status == one(doctor._dvc()).status == "fail"
    subprocess.run(["git", "init"], check=True, capture_output=True)
    assert one(doctor._git()).status == "warn"  # no commit yet
    (tmp_path / ".dvc").mkdir()
    assert "dvc.yaml" in one(doctor._dvc()).found
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    assert one(doctor._git()).found == "not installed"


def test_params_missing_and_invalid(project):
    text = (project / "params.yaml").read_text()
    for old, new, key in (
        ("epochs: 5", "epochs: 0", "finetune.epochs"),
        ("name: fast_goal", "name: nothing", "nothing"),
        ("source: scenes", "source: dreams", "dreams"),
    ):
        assert old in text
        (project / "params.yaml").write_text(text.replace(old, new))
        check = one(doctor._params())
        assert check.status == "fail"
        assert key in check.found
    (project / "params.yaml").unlink()
    assert "does not exist" in one(doctor._params()).found


def test_mlflow_server_that_answers_and_one_that_does_not(server, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    assert one(doctor._mlflow()).status == "ok"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:secret@127.0.0.1:{closed_port()}")
    check = one(doctor._mlflow())
    assert check.status == "fail"
    assert "secret" not in check.found + check.fix
    assert "***@127.0.0.1" in check.found


def test_mlflow_database_locked_damaged_and_elsewhere(project, monkeypatch):
    monkeypatch.setattr(doctor, "SERVER_TIMEOUT", 0.1)
    assert one(doctor._mlflow()).status == "ok"
    assert not (project / "mlflow.db").exists()
    with closing(sqlite3.connect("mlflow.db", isolation_level=None)) as connection:
        connection.execute("create table t (a)")
        assert one(doctor._mlflow()).status == "ok"
        connection.execute("BEGIN EXCLUSIVE")
        assert "locked" in one(doctor._mlflow()).found
    (project / "mlflow.db").write_bytes(b"no database at all, but long enough to have a header" * 40)
    assert "not a database" in one(doctor._mlflow()).found
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "databricks")
    assert one(doctor._mlflow()).found == "databricks (not tried)"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_mlflow_database_read_only(project):
    sqlite3.connect("mlflow.db").execute("create table t (a)").connection.close()
    (project / "mlflow.db").chmod(0o400)
    assert one(doctor._mlflow()).status == "fail"


def test_prefect_without_a_server_with_one_and_with_a_dead_one(server, monkeypatch):
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    assert one(doctor._prefect()).status == "ok"
    monkeypatch.setenv("PREFECT_API_URL", f"{server}/api")
    assert "answers" in one(doctor._prefect()).found
    monkeypatch.setenv("PREFECT_API_URL", f"http://127.0.0.1:{closed_port()}/api")
    assert one(doctor._prefect()).status == "fail"
    monkeypatch.setenv("PREFECT_API_URL", "nonsense")
    assert one(doctor._prefect()).status == "fail"
