"""Write a trained network as one file for ONNX Runtime, torch.export or ExecuTorch, checked in that runtime on the test set.

    python export.py runs/v2-s42/best.pt                                  -> runs/v2-s42/export/best-fp32.onnx
    python export.py runs/v2-s42/best.pt --precision int8                 a quarter of the weights; refused above --max-drop
    python export.py runs/v2-s42/best.pt --format executorch --precision int8 --output phone

The file takes images and gives probabilities and logits.  Beside it lie its description, FILE.json, and its line of export.csv,
which compares it with the checkpoint.  An export that fails or is refused leaves nothing.
"""
from deploy.options import parse_export
from rundir import errors


def main(args):
    from pathlib import Path

    import models
    from deploy import check, runtime, writers
    from rundir.files import digest

    runtime.require(*writers.needs(args.format, args.precision))
    checkpoint = Path(args.checkpoint)
    trained = models.read(checkpoint)
    original, module = runtime.of_checkpoint(trained), writers.deployed(trained, args.input, args.precision)
    with check.workplace(args.output or checkpoint.parent / "export") as place:
        data = check.data_of_run(checkpoint, module.info["classes"], args.data_dir)
        print(data)
        takes_float = "-float" if args.input == "float" else ""
        path = place / f"{checkpoint.stem}-{args.precision}{takes_float}{writers.SUFFIXES[args.format]}"
        writers.export(module, args.format, args.precision, check.calibration(data), path)

        card = writers.card(module, args.format, args.precision, trained["sha256"])
        images, labels = (part.numpy() for part in data.test)
        found, expected = (model(images)[1] for model in (runtime.start(path, card), original))
        row = check.compare(path, checkpoint, card, found, expected, labels)
        print(row)
        check.judge(row, args.max_drop, module.info["test_acc1"], module.info["amp"])
        card |= {"test_acc1": row.accuracy, "checkpoint_test_acc1": row.checkpoint_accuracy, "sha256": digest(path)}
        print(f"{check.publish(path, card, row, place.parent)}: {card['images']} -> {' and '.join(card['outputs'])}")


if __name__ == "__main__":
    errors.run(main, parse_export(*__doc__.split("\n\n", 1)))
