"""Networks by name: construction, weights, inference.

    import models
    net = models.load("runs/teacher/best.pt")       # eval mode, frozen; net.info: classes, image size, mean, std, ...
    probabilities = models.predict(net, images)     # uint8 (N, H, W, 3) -> float32 (N, C)

networks.py builds networks, weights.py loads and saves weights, cifar_networks.py defines the networks missing in torchvision,
timm_networks.py takes those of timm, ensemble.py joins several teachers.
"""
from models.ensemble import Ensemble, infer, load_teachers, read_teachers
from models.foreign import complete
from models.networks import build, centre_crop, check_name, describe, flops, has_weights, input_sizes, names, parameters
from models.weights import fold, initialise, load, normalise, predict, read, read_teacher, save

__all__ = ["Ensemble", "build", "centre_crop", "check_name", "complete", "describe", "flops", "fold", "has_weights", "infer",
           "initialise", "input_sizes", "load", "load_teachers", "names", "normalise", "parameters", "predict", "read",
           "read_teacher", "read_teachers", "save"]
