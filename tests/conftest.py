"""One thread per test process: same bits on every machine, and quicker than two on small tensors."""
import os
from importlib.metadata import version
from types import SimpleNamespace

import pytest
import torch
from packaging.version import Version

torch.set_num_threads(1)
# Files of tests that take long, and begin first, so that no process waits for the other one at the end.
LONG = ("reliability", "gpu_day", "scripts", "capture", "augment_kernel", "cuda_path", "ptx", "softmax_kl", "teacher_logits",
        "benchmarks")


def patch_once():
    """Replace the functions of triton.language once, and not in every call of a device function, which takes half of the time."""
    import triton.language as tl
    from triton.runtime import interpreter
    interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    interpreter._patch_lang = lambda function: interpreter._LangPatchScope()


if not torch.cuda.is_available():  # then Triton's kernels run in its interpreter; it reads this when it is first imported
    os.environ["TRITON_INTERPRET"] = "1"
    patch_once()


@pytest.fixture(autouse=True)
def same_random_numbers():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def quick_runs(request, monkeypatch):
    """Runs draw their confusion matrix, which takes a fifth of a short run, in the tests of the scripts alone."""
    if request.path.stem != "test_scripts":
        monkeypatch.setattr("plots.confusion.picture", lambda *matrix: b"")


@pytest.fixture
def trained(tmp_path_factory, capsys):
    """The directory of a small run, beside the folder of its images; made once by each test process."""
    from exporting import trained_run
    return trained_run(tmp_path_factory.getbasetemp() / "trained", capsys)


@pytest.fixture
def program(trained, capsys):
    """best-fp32.pt2 of that run; made once, as an export takes seconds."""
    from command import succeeds
    path = trained.parent / "program" / "best-fp32.pt2"
    if not path.exists():
        succeeds(capsys, "export.py", f"{trained}/best.pt --format pt2 --output {path.parent}")
    return path


def pytest_collection_modifyitems(items):
    ranks = {f"test_{name}": rank for rank, name in enumerate(LONG)}
    items.sort(key=lambda item: ranks.get(item.path.stem, len(LONG)))


def pytest_configure():
    triton, numpy = version("triton"), version("numpy")
    if "TRITON_INTERPRET" in os.environ and Version(triton) < Version("3.7") and Version(numpy) >= Version("2.5"):
        raise pytest.UsageError(f"the interpreter of Triton {triton} does not run with numpy {numpy}. install 'numpy<2.5'")
