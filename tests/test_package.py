"""The package: what its metadata say, and that a wheel carries recipes and cards and works by itself."""

import ast
import re
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from cli_kit import environment

import kdcli

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
RECIPES = sorted(path.relative_to(ROOT / "recipes").as_posix() for path in (ROOT / "recipes").rglob("*.toml"))
CARDS = sorted(path.relative_to(ROOT / "zoo").as_posix() for path in (ROOT / "zoo").rglob("*.toml"))


def test_version_and_entry_point():
    assert re.fullmatch(r"\d+\.\d+\.\d+", kdcli.__version__)
    assert f"## {kdcli.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert PROJECT["scripts"] == {"kdcli": "kdcli.cli:main"}
    (entry,) = [one for one in entry_points(group="console_scripts") if one.name == "kdcli"]
    from kdcli.cli import main

    assert entry.load() is main


def test_the_licence_is_apache_2_whole():
    assert PROJECT["license"] == "Apache-2.0"
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in text
    assert "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text


def test_what_is_needed_is_declared():
    """Every package that kdcli imports is a dependency, and nothing else is one."""
    names = {re.split(r"[^A-Za-z0-9-]", one)[0].lower() for one in PROJECT["dependencies"]}
    module = {"scikit-learn": "sklearn", "pillow": "PIL"}
    imported: set[str] = set()
    for path in (ROOT / "kdcli").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {one.name.partition(".")[0] for one in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(str(node.module).partition(".")[0])
    known = {module.get(name, name) for name in names}
    others = {"kdcli", "huggingface_hub"}  # timm's own way to its weights
    assert imported - known - set(sys.stdlib_module_names) <= others
    unused = known - imported
    reasons = {
        "onnxscript": "torch's exporter needs it",
        "matplotlib": "reports will draw with it",
    }
    assert unused <= set(reasons)


def test_no_file_names_a_folder_of_some_machine():
    tracked = [p for d in ("kdcli", "recipes", "zoo", "tests", ".ci") for p in (ROOT / d).rglob("*") if p.is_file()]
    tracked += [ROOT / name for name in ("pyproject.toml", "CHANGELOG.md", "README.md")]
    place = re.compile(r"(?<![\w.<{}])/(work|home|Users|root|mnt|tmp)/\w")
    found = [
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for path in tracked
        if path.suffix in (".py", ".toml", ".md", "")
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines()
        if place.search(line)
    ]
    assert found == []


def test_the_top_level_holds_only_what_the_design_names():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    top = {line.split("/")[0] for line in tracked.stdout.splitlines()}
    allowed = {"kdcli", "recipes", "zoo", "tests", "README.md", "LICENSE", "CHANGELOG.md", "pyproject.toml"}
    assert {name for name in top if not name.startswith(".")} <= allowed


@pytest.mark.slow
def test_a_wheel_carries_all_it_needs_and_works_where_no_checkout_is(tmp_path):
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", tmp_path, ROOT], check=True, timeout=300)
    (wheel,) = tmp_path.glob("kdcli-*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    assert {f"kdcli/_shipped/recipes/{name}" for name in RECIPES} <= held
    assert {f"kdcli/_shipped/zoo/{name}" for name in CARDS} <= held
    assert not [name for name in held if name.startswith(("tests", "recipes", "zoo")) or "__pycache__" in name]
    assert any(name.endswith("licenses/LICENSE") for name in held)
    target = tmp_path / "site"
    subprocess.run([*pip, "install", "--no-deps", "--target", target, wheel], check=True, timeout=300)
    code = "import kdcli, sys; from kdcli.cli import main; print(kdcli.__file__, file=sys.stderr); main(sys.argv[1:])"

    def installed(*args: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", code, *args], capture_output=True, text=True, check=True, cwd=tmp_path,
            env=environment(PYTHONPATH=str(target)),
        )  # fmt: skip

    listed = installed("recipes", "ls")
    assert str(target) in listed.stderr
    assert all(name.removesuffix(".toml") in listed.stdout for name in RECIPES)
    assert "card only" in installed("zoo", "ls").stdout
    assert 'name = "digits"' in installed("recipes", "cat", "quickstart", "--whole").stdout
