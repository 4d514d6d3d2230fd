"""The import layers are a contract: an import that points up makes `make lint` fail."""

import pathlib
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]


def lint_imports(folder: pathlib.Path) -> subprocess.CompletedProcess:
    command = [str(pathlib.Path(sys.executable).parent / "lint-imports"), "--no-cache"]
    paths = f"{folder}:{folder / 'kernels'}"
    return subprocess.run(command, cwd=folder, env={"PYTHONPATH": paths}, capture_output=True, text=True, check=False)


@pytest.fixture
def house(tmp_path):
    if shutil.which("lint-imports", path=str(pathlib.Path(sys.executable).parent)) is None:
        pytest.skip("import-linter is not installed")
    for name in ("diffopt", "kernels"):
        shutil.copytree(ROOT / name, tmp_path / name)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def test_the_layers_hold(house):
    result = lint_imports(house)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(
    ("low", "planted", "broken"),
    [
        ("diffopt/tree/ravel.py", "import diffopt.autodiff", "diffopt.tree is not allowed to import diffopt.autodiff"),
        ("diffopt/linalg/dense.py", "import diffopt.transforms", "diffopt.linalg is not allowed to import"),
        (
            "kernels/diffopt_kernels/philox.py",
            "import diffopt.tree",
            "diffopt_kernels is not allowed to import diffopt",
        ),
    ],
)
def test_a_planted_upward_import_fails(house, low, planted, broken):
    file = house / low
    file.write_text(file.read_text() + f"\n{planted}\n")
    result = lint_imports(house)
    assert result.returncode != 0
    assert broken in result.stdout
