"""Who may import whom; how long a script may be; how quickly --help answers."""
import ast
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("augment", "benchmarks", "deploy", "kernels", "losses", "plots", "training")
SCRIPTS = sorted(path.stem for path in ROOT.glob("*.py"))
EVERYTHING = {"augment", "deploy", "kernels", "losses", "training"}
NOTHING = set()
ALLOWED = {  # module or folder: what of ours it may import; from top to bottom, so no arrow points upward
    "training.run": {"training.capture", "training.checkpoint", "training.data", "training.diagnostics",
                     "training.evaluation", "training.machine", "training.means", "training.models",
                     "training.options", "training.progress", "training.recompute", "training.resume", "training.rundir",
                     "training.source", "training.step", "training.terminal", "training.verdict", "augment"},
    "training.advice": {"training.data", "training.diagnostics", "training.distributed", "training.evaluation",
                        "training.machine", "training.method", "training.models", "training.options",
                        "training.step", "augment", "losses.methods"},
    "training.diagnostics": {"training.method", "training.step", "losses"}, "training.verdict": {"losses.methods"},
    "training.capture": {"training.errors", "training.machine", "training.step"},
    "training.errors": {"training.terminal"},
    "training.pictures": {"training.errors"},
    "training.evaluation": {"training.errors", "training.machine", "training.models"},
    "training.step": {"training.errors", "training.machine"}, "training.means": {"training.errors", "training.machine"},
    "training.machine": {"training.distributed", "training.errors", "kernels"},
    "training.models": {"training.checkpoint", "training.errors", "training.files", "training.networks"},
    "training.networks": NOTHING,
    "training.resume": {"training.checkpoint", "training.errors", "training.files", "training.options", "training.rundir"},
    "training.rundir": {"training.errors", "training.files", "losses.methods"},
    "training.checkpoint": {"training.errors", "training.files"},
    "training.files": {"training.errors"}, "training.recompute": {"training.errors"},
    "training.data": {"training.cifar", "training.errors", "training.imagefolder", "training.source", "training.synthetic"},
    "training.cifar": {"training.errors", "training.source"},
    "training.imagefolder": {"training.errors", "training.files", "training.pictures", "training.source", "training.terminal"},
    "training.progress": {"training.means", "training.terminal", "losses.methods"},
    "training.options": {"training.flag_types", "training.method", "losses.methods"},
    "training.method": {"training.flag_types", "losses.methods"},
    "training.job": {"training.data", "training.errors", "training.files", "training.grid", "training.options"},
    "training.grid": {"training.errors", "training.flag_types", "training.method", "training.options", "losses.methods"},
    **dict.fromkeys(("training", "training.comparison", "training.distributed", "training.flag_types",
                     "training.source", "training.synthetic", "training.terminal"), NOTHING),
    "kernels": NOTHING, "losses": {"kernels"}, "augment": {"kernels", "losses.targets"}, "plots": NOTHING,
    "deploy": {"training.data", "training.errors", "training.evaluation", "training.files", "training.flag_types",
               "training.models", "training.options"},
}


def our_imports(path: Path) -> set:
    """The modules of ours that a file names in any import, wherever it stands."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            found |= {f"{base}.{alias.name}" if base in FOLDERS and (ROOT / base / f"{alias.name}.py").exists() else base
                      for alias in node.names}
    return {name for name in found if name.split(".")[0] in (*FOLDERS, *SCRIPTS)}


def modules():
    for folder in FOLDERS:
        yield from sorted((ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("path", [pytest.param(path, id=str(path.relative_to(ROOT))) for path in modules()])
def test_imports_follow_the_design(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    folder, name = parts[0], ".".join(parts).removesuffix(".__init__")
    allowed = EVERYTHING | {"benchmarks"} if folder == "benchmarks" else ALLOWED[name if folder == "training"
                                                                                 else folder] | {folder} - {"training"}
    for imported in our_imports(path):
        assert any(imported == one or imported.startswith(one + ".") for one in allowed), f"{name} imports {imported}"


@pytest.mark.parametrize("path", [pytest.param(path, id=str(path.relative_to(ROOT))) for path in modules()])
def test_a_file_can_be_read_in_one_sitting(path):
    assert len(path.read_text().splitlines()) <= 300 or path.parent.name in ("kernels", "plots")


def test_lines_are_narrow():
    files = [*modules(), *ROOT.glob("*.py"), *(ROOT / "tests").glob("*.py")]
    assert [f"{path.name}:{number}" for path in files for number, line in enumerate(path.read_text().splitlines(), 1)
            if len(line) > 130] == []


def test_every_folder_of_code_is_a_package():
    """An installed package called kernels or augment would otherwise shadow ours."""
    assert all((ROOT / folder / "__init__.py").exists()
               for folder in EVERYTHING) and not (ROOT / "plots" / "__init__.py").exists()


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_are_short_and_show_their_commands(script):
    text = (ROOT / f"{script}.py").read_text()
    assert len(text.splitlines()) < 90
    assert f"python {script}.py" in ast.get_docstring(ast.parse(text))


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_answers_without_torch(script):
    started = time.perf_counter()
    result = subprocess.run([sys.executable, "-X", "importtime", ROOT / f"{script}.py", "--help"], capture_output=True, text=True)
    assert result.returncode == 0 and "usage:" in result.stdout
    assert "torch" not in result.stderr, "torch was imported before the flags were checked"
    assert time.perf_counter() - started < 5  # the absence of torch is the check; this only catches a hang
