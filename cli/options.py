"""The flags of the training scripts and show_batch.py.  Imports no torch: --help is instant.

The defaults are the recipe of the study (experiment v2).  A preset sets other defaults; flags take precedence.
"""
import argparse

from cli import method_flags, presets
from cli.flag_types import count, device, nonempty, nonnegative, number, png, positive, probability, seed, whole
from losses.methods import METHODS
from rundir.errors import Parser
from rundir.identity import BETWEEN, listed, unlisted

DATASETS = ("cifar100", "cifar10", "imagefolder", "synthetic")
POLICIES = ("none", "autoaugment", "autoaugment-imagenet", "autoaugment-svhn", "randaugment", "trivialaugment")
CROPS = ("pad", "resized")
LARGE = 64  # pixels: larger images of folders are taken for photographs
DEFAULT = "default: %(default)s"


def data_flags(parser) -> None:
    add = parser.add_argument_group("data").add_argument
    add("--dataset", choices=DATASETS, default="cifar100", help=DEFAULT)
    add("--data-dir", type=nonempty, default="datasets", metavar="DIR",
        help="directory of the files, or for the download; a CSV file of path,label[,split]; " + DEFAULT)
    add("--val-size", type=whole, metavar="N", help="training images held out for validation, stratified; default: 5000 for "
        "CIFAR, 10%% otherwise; 0 validates on the test set, as in the literature")
    add("--image-size", type=number(int, at_least=8), metavar="PIXELS", help="resize images on the device; default: native size")
    add("--unreadable", choices=("stop", "skip"), default="stop", help="on files that cannot be read; " + DEFAULT)
    add("--allow-empty-classes", action="store_true", help="leave out class folders without training images")


def augmentation_flags(parser) -> None:
    add = parser.add_argument_group("augmentation").add_argument
    add("--crop", choices=CROPS, help="random crops of the image padded by 4 pixels, or of windows that are resized to "
        f"--image-size; default: resized for --dataset imagefolder above {LARGE} pixels, else pad")
    add("--crop-scale", type=positive, nargs=2, default=[0.08, 1.0], metavar=("MIN", "MAX"),
        help="share of the area in a resized window; default: 0.08 1.0")
    add("--crop-ratio", type=positive, nargs=2, default=[0.75, 1.3333], metavar=("MIN", "MAX"),
        help="width of a resized window over its height; default: 0.75 1.3333")
    add("--flip", action=argparse.BooleanOptionalAction, default=True,
        help="mirror half of the images; --no-flip for letters, digits, arrows; " + DEFAULT)
    add("--policy", choices=POLICIES, help=f"default: autoaugment-imagenet for --dataset imagefolder above {LARGE} pixels, else "
        "autoaugment (CIFAR-10 policy)")
    add("--random-erasing", type=probability, default=0.25, metavar="P", help="probability of Random Erasing; " + DEFAULT)
    add("--mixup", type=nonnegative, default=0.8, metavar="ALPHA", help="Mixup, by Beta(ALPHA, ALPHA), 0 is off; " + DEFAULT)
    add("--cutmix", type=nonnegative, default=1.0, metavar="ALPHA", help="CutMix, by Beta(ALPHA, ALPHA), 0 is off; " + DEFAULT)
    add("--mix-prob", type=probability, default=1.0, metavar="P", help="probability of mixing; " + DEFAULT)
    add("--mix-mode", choices=("batch", "elem"), default="batch", help="one draw per batch or per image; " + DEFAULT)


def batch_size_flag(add, default: int) -> None:
    add("-b", "--batch-size", type=number(int, at_least=2), default=default, metavar="N",
        help="images per step and process; " + DEFAULT)


def optimisation_flags(parser) -> None:
    add = parser.add_argument_group("optimisation").add_argument
    add("--epochs", type=count, default=200, metavar="N", help=DEFAULT)
    batch_size_flag(add, default=128)
    add("--grad-accum", type=count, metavar="N", help="accumulate gradients over N micro-batches of a batch, to save memory; "
        "BatchNorm, DIST, MLKD and SKD see micro-batches; default: 1")
    add("--grad-checkpoint", action="store_true", help="recompute activations in the backward pass: much less memory, more time, "
        "the same results")
    add("--opt", choices=("adamw", "sgd"), default="adamw", help=DEFAULT)
    add("--lr", type=positive, default=1e-3, metavar="RATE", help="peak learning rate; " + DEFAULT)
    add("--momentum", type=number(float, at_least=0, below=1), default=0.9, metavar="M", help="momentum of SGD; " + DEFAULT)
    add("--weight-decay", type=nonnegative, default=0.05, metavar="W", help="on all parameters; " + DEFAULT)
    add("--sched", choices=("cosine", "multistep"), default="cosine", help="cosine to 0, or x0.1 at --milestones; " + DEFAULT)
    add("--milestones", type=count, nargs="+", default=[150, 180, 210], metavar="EPOCH",
        help="epochs at which --sched multistep lowers the rate; default: 150 180 210")
    add("--warmup-epochs", type=whole, metavar="N",
        help="linear warm-up of the learning rate from 0; default: 5, or all epochs but one of a shorter run")
    add("--label-smoothing", type=number(float, at_least=0, below=1), default=0.1, metavar="EPS", help=DEFAULT)
    add("--class-weights", choices=("none", "balanced"), default="none", help="weights of the classes in the cross-entropy; "
        "balanced: inverse to their numbers of training images, 1 on average; " + DEFAULT)
    add("--clip-grad", type=nonnegative, default=1.0, metavar="NORM", help="maximum gradient norm, 0 is off; " + DEFAULT)
    add("--model-ema", type=number(float, at_least=0, below=1), default=0.0, metavar="DECAY",
        help="evaluate and save an exponential moving average of the weights, 0 is off; in step t the decay is at most "
        "t / (9 + t), so that a short run does not end with its first weights; " + DEFAULT)
    add("--patience", type=whole, default=30, metavar="EPOCHS",
        help="early stopping after so many epochs without improvement, 0 is off; " + DEFAULT)
    add("--monitor", choices=("val_loss", "val_acc1"), default="val_loss", help="for best.pt and early stopping; " + DEFAULT)


def device_flags(add) -> None:
    add("--config", metavar="FILE", help="config.json of a run: its flags are the defaults, and flags take precedence")
    add("--device", type=device, default="auto", help="auto, cpu, cuda or cuda:N; " + DEFAULT)
    add("--kernels", choices=("auto", "triton", "reference"), default="auto",
        help="fused Triton kernels or plain PyTorch for augmentation and loss; auto is Triton on CUDA; " + DEFAULT)


def debug_flag(add) -> None:
    add("--debug", action="store_true", help="also show the traceback of expected errors")


def run_flags(parser, output) -> None:
    add = parser.add_argument_group("device and output").add_argument
    device_flags(add)
    add("--amp", choices=("fp16", "bf16", "off"), help="off: fp32, without TF32; default: fp16 on CUDA, off on a CPU")
    add("--compile", action="store_true", help="compile the networks with torch.compile, which takes a minute or more")
    add("--cuda-graph", action=argparse.BooleanOptionalAction, help="capture each step in a CUDA graph and replay it; "
        "default: on CUDA, where possible")
    add("--seed", type=seed, default=42, metavar="N", help="seed of weights, split, shuffling and augmentation; " + DEFAULT)
    add("--deterministic", action="store_true", help="bitwise reproducible on one GPU model with one set of versions; slower")
    add("--output", type=nonempty, metavar="DIR", help=f"run directory; default: {output}")
    add("--resume", nargs="?", const="auto", type=nonempty, metavar="auto|PATH",
        help="continue the run in --output, or start it if there is none; PATH: a run directory or its last.pt")
    add("--overwrite", action="store_true", help="replace the run in --output")
    add("--dry-run", action="store_true", help="print the configuration, and what can be said before training, then stop")
    debug_flag(add)


def new_parser(description=None, usage_lines=None, prog=None) -> Parser:
    return Parser(prog=prog, description=description, epilog=usage_lines, allow_abbrev=False,
                  formatter_class=argparse.RawDescriptionHelpFormatter)


def parse_teacher(description=None, usage_lines=None, argv=None, prog=None):
    """The flags of train_teacher.py; exits with 2 and one line on an error."""
    parser = new_parser(description, usage_lines, prog)
    add = parser.add_argument_group("network").add_argument
    add("--model", type=nonempty, default="efficientnet_v2_l", metavar="NAME",
        help="a torchvision classifier, a CIFAR network, v2_* or timm/NAME; " + DEFAULT)
    add("--pretrained", action=argparse.BooleanOptionalAction,
        help="start from torchvision's or timm's weights; default: if available")
    add("--init", type=nonempty, metavar="PATH", help="start from a local file of weights, without a head of other classes")
    data_flags(parser)
    augmentation_flags(parser)
    optimisation_flags(parser)
    run_flags(parser, output="runs/teacher")
    parser.set_defaults(**presets.defaults(parser, argv, "train_teacher"))
    args = parser.parse_args(argv)
    if args.init and args.pretrained:
        parser.error("--init and --pretrained exclude each other")
    fill_in_augmentation(parser, args)
    check_schedule(parser, args)
    args.output = args.output or "runs/teacher"
    return args


def parse_distill(description=None, usage_lines=None, argv=None, prog=None):
    """The flags of distill.py, with defaults of the chosen method; exits with 2 and one line on an error."""
    parser = new_parser(description, usage_lines, prog)
    add = parser.add_argument_group("distillation").add_argument
    add("--experiment", choices=presets.EXPERIMENTS, help="a preset of the study; flags take precedence")
    add("--method", choices=METHODS, default="kd", help=DEFAULT)
    add("--teacher-checkpoint", type=nonempty, nargs="+", default=presets.STUDY_TEACHERS[0], metavar="PATH",
        help="a best.pt, or weights of another project; the mean of several; " + DEFAULT)
    add("--teacher", type=nonempty, nargs="+", metavar="NAME",
        help="network of each file of another project; default: the CIFAR network that its tensors fit")
    add("--teacher-image-size", type=count, metavar="N", help="pixels for which weights of another project were trained; "
        "default: as published for timm/NAME, else those of the run")
    for name, kind in (("mean", probability), ("std", number(float, above=0, at_most=1))):
        add(f"--teacher-{name}", type=kind, nargs=3, metavar=("R", "G", "B"), help="of their images in [0, 1]; default: likewise")
    add("--allow-weak-teacher", action="store_true", help="accept a teacher near chance")
    add("--teacher-logits", nargs="?", const="runs/teacher-logits", type=nonempty, metavar="DIR",
        help="store the teacher's logits, and read those that a run with this teacher, seed, data and augmentation has stored; "
        "DIR: %(const)s by default")
    add("--teacher-logits-limit", type=positive, default=20.0, metavar="GB", help="largest size of that directory; " + DEFAULT)
    add("--student", type=nonempty, default="efficientnet_v2_s", metavar="NAME", help="network; " + DEFAULT)
    add("--student-init", type=nonempty, default="none", metavar="{none,imagenet,PATH}", help="weights; " + DEFAULT)
    method_flags.add_flags(parser)
    data_flags(parser)
    augmentation_flags(parser)
    optimisation_flags(parser)
    run_flags(parser, output="runs/<experiment, or method and hyperparameters>-s<seed>")
    preset = presets.defaults(parser, argv, "distill")
    parser.set_defaults(**preset)  # --help shows them
    args = parser.parse_args(argv)
    files = listed(args.teacher_checkpoint)
    names = args.teacher or []
    if names and len(names) != len(files):
        parser.error(f"--teacher must name one network for each --teacher-checkpoint ({len(names)} for {len(files)})")
    args.teacher_checkpoint, args.teacher = unlisted(files), BETWEEN.join(names) or None
    method_flags.fill_in(parser, args, of_preset=set(preset) if args.method != preset.get("method") else set())
    fill_in_augmentation(parser, args)
    check_schedule(parser, args)
    args.output = args.output or f"runs/{args.experiment or method_flags.chosen(args).run_name}-s{args.seed}"
    return args


def parse_show(description, usage_lines, argv=None):
    """The flags of show_batch.py; exits with 2 and one line on an error."""
    parser = new_parser(description, usage_lines)
    data_flags(parser)
    augmentation_flags(parser)
    add = parser.add_argument_group("batch and output").add_argument
    batch_size_flag(add, default=128)
    add("--images", type=count, default=32, metavar="N", help="number of images to draw; " + DEFAULT)
    add("--epoch", type=count, default=1, metavar="N", help=DEFAULT)
    add("--step", type=whole, default=0, metavar="N", help="step of the epoch, from 0; " + DEFAULT)
    add("--seed", type=seed, default=42, metavar="N", help=DEFAULT)
    device_flags(add)
    add("--output", type=png, default="batch.png", metavar="FILE", help=DEFAULT)
    debug_flag(add)
    parser.set_defaults(**presets.defaults(parser, argv, "distill", "train_teacher"))
    args = parser.parse_args(argv)
    fill_in_augmentation(parser, args)
    return args


def image_defaults(args) -> tuple[dict, str]:
    """The defaults that depend on the images, and why; without --image-size a folder is asked for the size of an image."""
    large, reason = False, args.dataset
    if args.dataset == "imagefolder":
        from data.layout import native_side
        large = (args.image_size or native_side(args.data_dir)) > LARGE
        reason += f" {'above' if large else 'up to'} {LARGE} pixels"
    return {"crop": "resized", "policy": "autoaugment-imagenet"} if large else {"crop": "pad", "policy": "autoaugment"}, reason


def fill_in_augmentation(parser, args) -> None:
    """Set the defaults of --crop and --policy, and check the ranges of the crop."""
    for name, value in image_defaults(args)[0].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    for name in ("crop_scale", "crop_ratio"):
        smallest, largest = given = getattr(args, name)
        if smallest > largest or name == "crop_scale" and largest > 1:
            limit = ", to 1 at most" * (name == "crop_scale")
            parser.error(f"{method_flags.flag(name)} must rise{limit} ({smallest:g} {largest:g})")
        if args.crop == "pad" and given != parser.get_default(name):
            parser.error(f"{method_flags.flag(name)} does not belong to --crop pad ({smallest:g} {largest:g})")


def chosen_defaults(args) -> list[str]:
    """A line that says which defaults the images of a folder led to, if any."""
    defaults, reason = image_defaults(args)
    chosen = ", ".join(f"{name}={value}" for name, value in defaults.items() if getattr(args, name) == value)
    return [f"{chosen}: {reason}"] if chosen and args.dataset == "imagefolder" else []


def check_schedule(parser, args) -> None:
    if args.compile and args.grad_checkpoint:
        parser.error("--compile and --grad-checkpoint exclude each other")
    if args.warmup_epochs is None:
        args.warmup_epochs = min(5, args.epochs - 1)
    if args.warmup_epochs >= args.epochs:
        parser.error(f"--warmup-epochs must be less than --epochs ({args.warmup_epochs} of {args.epochs})")
    if args.milestones != sorted(set(args.milestones)):
        parser.error(f"--milestones must increase ({' '.join(map(str, args.milestones))})")


def data(args) -> dict:
    """Keyword arguments of data.datasets.load; runs of earlier versions lack some of the flags."""
    names = ("data_dir", "val_size", "seed", "image_size", "crop", "unreadable", "allow_empty_classes")
    return {"name": args.dataset, **{name: getattr(args, name) for name in names if name in vars(args)}}


def teacher_inputs(args) -> dict:
    return {name: getattr(args, f"teacher_{name}") for name in ("image_size", "mean", "std")}


def augmentation(args) -> dict:
    names = ("seed", "crop", "flip", "policy", "random_erasing", "mixup", "cutmix", "mix_prob", "mix_mode")
    image_size = args.image_size if args.crop == "resized" else None
    of_crop = {"image_size": image_size, "scale": args.crop_scale, "ratio": args.crop_ratio}
    return {name: getattr(args, name) for name in names} | of_crop
