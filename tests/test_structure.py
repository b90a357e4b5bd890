"""Who may import whom; how long a script may be; what needs no torch."""
import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted(path.stem for path in ROOT.glob("*.py"))
# Folder: which of the others it may import.  Each names only folders above it, so no import points upward.
ALLOWED = {
    "kernels": set(),
    "losses": {"kernels"},
    "augment": {"kernels"},
    "rundir": {"losses"},
    "data": {"rundir"},
    "models": {"rundir"},
    "cli": {"data", "losses", "rundir"},
    "diagnostics": {"losses"},
    "plots": {"diagnostics", "losses", "rundir"},
    "training": {"augment", "cli", "data", "diagnostics", "kernels", "losses", "models", "plots", "rundir"},
    "deploy": {"cli", "data", "models", "rundir", "training"},
    "benchmarks": {"augment", "cli", "data", "deploy", "diagnostics", "kernels", "losses", "models", "rundir", "training"},
}


def our_imports(path: Path) -> set:
    """The folders and scripts of ours that a file imports, wherever the import stands."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
    return {name.split(".")[0] for name in names} & {*ALLOWED, *SCRIPTS}


def modules():
    for folder in ALLOWED:
        yield from sorted((ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("path", [pytest.param(path, id=str(path.relative_to(ROOT))) for path in modules()])
def test_imports_point_downward(path):
    folder = path.relative_to(ROOT).parts[0]
    assert our_imports(path) <= ALLOWED[folder] | {folder}
    assert len(path.read_text().splitlines()) <= 300 or folder in ("kernels", "plots"), "a file can be read in one sitting"


def test_the_table_has_every_folder_and_no_upward_arrow():
    order = list(ALLOWED)
    assert {path.parent.name for path in ROOT.glob("[!.]*/*.py")} - {"results", "tests"} == {*order}
    assert all(order.index(other) < order.index(folder) for folder, others in ALLOWED.items() for other in others)


def test_no_folder_holds_more_than_a_fifth_of_the_source():
    lines = {folder: sum(len(path.read_text().splitlines()) for path in (ROOT / folder).rglob("*.py")) for folder in ALLOWED}
    assert max(lines.values()) <= sum(lines.values()) / 5, lines


def test_every_folder_of_code_is_a_package():
    """An installed package called kernels or augment would otherwise shadow ours."""
    assert all((ROOT / folder / "__init__.py").exists() == (folder != "plots") for folder in ALLOWED)


def test_scripts_are_short_and_answer_help_without_torch_which_plots_do_not_need():
    for script in SCRIPTS:
        text = (ROOT / f"{script}.py").read_text()
        assert len(text.splitlines()) < 90 and f"python {script}.py" in ast.get_docstring(ast.parse(text)), script
    program = f"""import contextlib, runpy, sys
sys.modules["torch"], sys.argv = None, ["script.py", "--help"]
import {", ".join(f"plots.{path.stem}" for path in (ROOT / "plots").glob("*.py"))}
for script in {SCRIPTS}:
    with contextlib.suppress(SystemExit):
        runpy.run_path(f"{{script}}.py", run_name="__main__")"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count("usage: ") == len(SCRIPTS), done.stderr
