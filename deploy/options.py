"""The flags of export.py and predict.py.  Imports no torch."""
from cli.flag_types import count, matching, nonempty, nonnegative, png
from cli.options import DEFAULT, debug_flag, new_parser

CHECKS = ("openvino", "opencv", "web")
FORMATS, PRECISIONS = ("onnx", "pt2", "executorch"), ("fp32", "fp16", "int8")


def parse_export(description, usage_lines, argv=None):
    """The checked flags of export.py; exits with 2 and one line otherwise."""
    parser = new_parser(description, usage_lines)
    add = parser.add_argument
    add("checkpoint", type=nonempty, metavar="CHECKPOINT", help="a run's best.pt")
    add("--format", choices=FORMATS, default="onnx", help="pt2 is torch.export's; " + DEFAULT)
    add("--precision", choices=PRECISIONS, default="fp32", help="int8 is calibrated on validation images; " + DEFAULT)
    add("--input", choices=("uint8", "float"), default="uint8",
        help="input type: uint8 images (N, H, W, 3), or float32 (N, 3, H, W) between 0 and 1; " + DEFAULT)
    add("--max-drop", type=nonnegative, default=1.0, metavar="POINTS",
        help="largest accepted loss of test accuracy, in percentage points; " + DEFAULT)
    runtime = matching("|".join(CHECKS), f"must be one of {', '.join(CHECKS)}, after the checkpoint")
    add("--check", nargs="+", type=runtime, default=[], metavar="RUNTIME",
        help=f"also run the .onnx file there, and refuse it if predictions differ: {', '.join(CHECKS)}")
    add("--data-dir", type=nonempty, metavar="DIR", help="folder of the run's data set; default: as in its config.json")
    add("--output", type=nonempty, metavar="DIR", help="default: the folder export beside the checkpoint")
    debug_flag(add)
    args = parser.parse_args(argv)
    if args.format == "executorch" and args.precision == "fp16":
        parser.error("--format executorch has no fp16: its CPU backend would keep the weights in fp32 (--precision fp16)")
    if args.check and args.format != "onnx":
        parser.error(f"--check is for --format onnx (--format {args.format})")
    return args


def parse_predict(description, usage_lines, argv=None):
    """The checked flags of predict.py; exits with 2 and one line otherwise."""
    parser = new_parser(description, usage_lines)
    add = parser.add_argument
    add("model", type=nonempty, metavar="MODEL", help="a run's best.pt, or a file exported by export.py")
    add("images", type=nonempty, nargs="+", metavar="IMAGE|DIR|-",
        help="images, folders of images, or - for paths on stdin, one a line")
    add("--top", type=count, default=5, metavar="K", help="classes per image; " + DEFAULT)
    add("--csv", action="store_true", help="print a table with the columns path, rank, class, probability")
    add("--output", type=png, metavar="FILE.png", help="also draw a contact sheet")
    debug_flag(add)
    return parser.parse_args(argv)
