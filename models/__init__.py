"""Networks by name, their weights, and trained networks in use.

    import models
    net = models.load("runs/teacher/best.pt")       # eval mode, frozen; net.info holds classes, image size, mean, deviation
    probabilities = models.predict(net, images)     # uint8 (N, H, W, 3) -> float32 (N, C)

networks.py builds them, weights.py fills, reads and writes them, cifar_networks.py defines those that torchvision lacks.
"""
from models.networks import build, flops, is_torchvision, names, parameters
from models.weights import fold, initialise, load, normalise, predict, read, save

__all__ = ["build", "flops", "fold", "initialise", "is_torchvision", "load", "names", "normalise", "parameters",
           "predict", "read", "save"]
