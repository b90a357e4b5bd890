"""One training step runs through few files of the project."""
import sys
from pathlib import Path

from helpers import make_images

import distill
import train_teacher
from cli import options
from training import optimization

ROOT = Path(__file__).parent.parent
FLAGS = ("--dataset imagefolder --data-dir {place}/images --epochs 1 --warmup-epochs 0 --batch-size 16 --val-size 12 "
         "--device cpu --output {place}/")


def test_a_step_on_a_cpu_runs_through_nine_files(tmp_path, monkeypatch):
    """The third step, from its learning rate to that of the fourth."""
    make_images(tmp_path / "images", ["a", "b", "c"], 40, seed=0, size=32)
    flags = FLAGS.format(place=tmp_path)
    train_teacher.main(options.parse_teacher(argv=f"{flags}teacher --model v2_pico".split()))
    steps, files, learning_rate = [], set(), optimization.learning_rate

    def called(frame, event, argument):
        path = Path(frame.f_code.co_filename)
        if event == "call" and ROOT in path.parents and ".venv" not in path.parts and "tests" not in path.parts:
            files.add(str(path.relative_to(ROOT)))

    def begin(*arguments):
        steps.append(arguments)
        sys.setprofile(called if len(steps) == 3 else None)
        return learning_rate(*arguments)

    monkeypatch.setattr(optimization, "learning_rate", begin)
    try:
        distill.main(options.parse_distill(argv=f"{flags}student --student v2_pico --method dkd --teacher-checkpoint "
                                                f"{tmp_path}/teacher/best.pt".split()))
    finally:
        sys.setprofile(None)
    assert len(steps) > 3 and "distill.py" in files and len(files) <= 9, sorted(files)
