"""The direction of imports, read from the source: a layer uses the layers below it, and some libraries have one user."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "fast_goal"
FILES = sorted(SOURCE.rglob("*.py"))
# From the bottom to the top. Siblings in one row do not import each other, but for what ALLOWED says.
ORDER = [
    {"errors"},
    {"files", "progress", "environment", "cache"},
    {"config"},
    {"data"},
    {"model"},
    {"objectives"},
    {"training", "flism", "evaluation", "negatives"},
    {"monitoring", "promotion"},
    {"tracking"},
    {"stages"},
    {"configure"},
    {"ablations", "operations"},
    {"doctor"},
    {"cli"},
    {"__main__"},
]
RANK = {name: rank for rank, names in enumerate(ORDER) for name in names}
USERS = {  # library -> the only places that may import it
    # captions: the tokenizer; prompts: templates and names of classes; export: its byte pairs
    "open_clip": {"model/clip.py", "data/captions.py", "data/prompts.py", "model/export.py"},
    "ultralytics": {"flism/detectors/ultralytics.py"},
    "transformers": {"flism/detectors/yolos.py", "data/captioning", "data/generation", "model/export.py"},
    "onnx": {"model/export.py"},
    "onnxruntime": {"model/export.py"},
    "ray": {"flism/cluster.py"},
    "webdataset": {"data/publication.py", "data/sources/webdataset.py"},
    "httpx": {"data/origins.py", "data/generation"},
    "fsspec": {"data/origins.py"},
    "huggingface_hub": {"data/hub.py", "flism/detectors/yolos.py"},
    "py3langid": {"data/caption_checks.py"},
    "HanTa": {"data/speech.py"},
    "mlflow": {"tracking"},
    "starlette": {"tracking/serving.py"},
    "uvicorn": {"tracking/serving.py"},
    "great_expectations": {"data/expectations.py"},
    "hydra": {"configure.py"},
    "omegaconf": {"configure.py"},
    "prefect": set(),
    "dvc": set(),
    "typer": {"cli.py"},
}
LIGHT = ["objectives", "evaluation/retrieval.py", "flism/matching.py"]  # torch alone


def imports(path: Path) -> set[str]:
    """Every module that the file imports, also inside functions, as a dotted name."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def layer(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(SOURCE).as_posix())
def test_a_file_imports_only_from_below(path: Path):
    own = layer(path)
    if own == "__init__":
        return
    assert own in RANK, f"{own}: give it a place in ORDER"
    for name in imports(path):
        parts = name.split(".")
        if parts[0] != "fast_goal" or len(parts) < 2 or parts[1] == "__version__":
            continue
        other = parts[1]
        assert other == own or RANK[other] < RANK[own], f"{path.name} imports {name}, which is not below {own}"


@pytest.mark.parametrize("library", USERS)
def test_a_library_is_imported_only_by_its_user(library: str):
    importers = [path for path in FILES if any(name.split(".")[0] == library for name in imports(path))]
    users = {path.relative_to(SOURCE).as_posix() for path in importers}
    strays = {user for user in users if not any(user == place or user.startswith(f"{place}/") for place in USERS[library])}
    assert not strays


@pytest.mark.parametrize("place", LIGHT)
def test_formulas_need_torch_alone(place: str):
    files = [SOURCE / place] if place.endswith(".py") else sorted((SOURCE / place).glob("*.py"))
    for path in files:
        outside = {name.split(".")[0] for name in imports(path)} - set(sys.stdlib_module_names) - {"fast_goal", "torch"}
        assert not outside, f"{path}: {outside}"


def test_training_machine_needs_no_mlops_package():
    """With the MLOps packages blocked, everything that a GPU machine runs can still be imported."""
    modules = [
        ".".join(("fast_goal", *path.relative_to(SOURCE).with_suffix("").parts)).removesuffix(".__init__")
        for path in FILES
        if layer(path) in {"model", "objectives", "training", "flism", "config"}
    ]
    code = (
        "import sys, importlib\n"
        "for name in ['mlflow', 'dvc', 'prefect', 'great_expectations', 'hydra', 'omegaconf', 'typer']:\n"
        "    sys.modules[name] = None\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_help_is_quick_because_nothing_heavy_is_imported():
    code = (
        "import sys\nimport fast_goal.cli\nfrom typer.testing import CliRunner\n"
        "result = CliRunner().invoke(fast_goal.cli.app, ['--help'])\nassert result.exit_code == 0, result.output\n"
        "heavy = {'torch', 'numpy', 'pandas', 'mlflow', 'hydra', 'PIL'} & set(sys.modules)\nassert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
