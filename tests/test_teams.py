"""Two people and a shared DVC remote: what one has computed, the other gets and does not compute again."""

import json
from pathlib import Path

import pytest
from whole_project import Project, finished, shared_folder

OUTPUTS = ["data/records/scenes.parquet", "models/finetune/open_clip_model.safetensors", "models/reports/report.html"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("team")


@pytest.fixture(scope="module")
def first(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """Has run the pipeline, and shared what came out."""
    project = finished(shared_folder(tmp_path_factory), folder / "first")
    project.run(f"dvc remote add --default shared {folder / 'remote'}")
    project.run("git add -A")
    project.run("git commit -qm finished")
    project.run("dvc push")
    return project


@pytest.fixture(scope="module")
def second(folder: Path, first: Project) -> Project:
    """Has cloned the code and pulled the rest."""
    first.run(f"git clone -q {first.root} {folder / 'second'}")
    project = Project(folder / "second")
    assert not any((project.root / name).exists() for name in OUTPUTS)
    project.run("dvc pull")
    return project


@pytest.mark.timeout(600)
def test_the_lock_file_is_committed_and_the_results_are_not(first: Project):
    tracked = first.run("git ls-files").stdout.splitlines()
    assert "dvc.lock" in tracked and ".dvc/config" in tracked and ".dvc/plots/recall.json" in tracked
    assert not [name for name in tracked if name.startswith(("data/", "models/", "mlruns/", ".fast_goal/"))]


@pytest.mark.timeout(600)
def test_the_second_clone_has_everything_and_nothing_to_do(first: Project, second: Project):
    for name in OUTPUTS:
        assert (second.root / name).read_bytes() == (first.root / name).read_bytes()
    assert "up to date" in second.run("dvc status").stdout
    assert "Running stage" not in second.run("dvc repro").stdout
    assert second.run("git status --porcelain").stdout == ""


@pytest.mark.timeout(600)
def test_without_the_remote_the_committed_lock_stands_in_nobodys_way(folder: Path, first: Project):
    first.run(f"git clone -q {first.root} {folder / 'alone'}")
    project = Project(folder / "alone")
    project.run("dvc remote remove shared")
    assert project.run("dvc pull", check=False).returncode
    assert "Running stage 'download'" in project.run("dvc repro download").stdout
    records = "data/records/scenes.parquet"
    assert (project.root / records).read_bytes() == (first.root / records).read_bytes()


@pytest.mark.timeout(600)
def test_a_change_is_compared_with_a_short_table_and_with_plots(second: Project):
    reports = second.root / "models/reports"
    headline = json.loads((reports / "headline.json").read_text())
    name = "scenes.long.finetuned.text_to_image.R1"
    (reports / "headline.json").unlink()  # it may be a link to the cache
    (reports / "headline.json").write_text(json.dumps({**headline, name: headline[name] + 1}))
    found = json.loads(second.run("dvc metrics diff --json").stdout)
    assert list(found) == ["models/reports/headline.json"]
    changed = found["models/reports/headline.json"]
    assert len(headline) < 26 and [key for key in changed if changed[key]["diff"]] == [name]
    second.run("dvc plots diff --out plots")
    page = (second.root / "plots/index.html").read_text()
    for title in ("Training loss", "validation split", "Recall at k", "most similar patches"):
        assert title in page
    assert "<DVC_METRIC" not in page
    specifications = [line.split("=", 1)[1].strip().rstrip(";") for line in page.splitlines() if "var spec" in line]
    panels = [json.loads(one) for one in specifications if '"facet"' in one]
    assert len(panels) == 3
    for panel in panels:  # each axis says what it shows, and shows numbers
        axes = panel["spec"]["encoding"]
        assert {axes["x"]["title"], axes["y"]["title"]} <= {"epoch", "k", "R@1, percent", "R@k, percent", "sentences, percent"}
        assert all(isinstance(float(row[axes["y"]["field"]]), float) for row in panel["data"]["values"])
        assert {row["rev"] for row in panel["data"]["values"]} == {"workspace"}, "of equal revisions one is shown"
