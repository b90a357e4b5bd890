"""Synthetic image classification: 100 classes in 20 superclasses, no download, 15,000 images in 1.4 s on one core.

The superclass is the shape of the object: one of four styles (solid, star, ring, beads) with 2 to 6 lobes, and a mean hue.
The class is its texture: one of five corners of a pentagon in the plane of stripe frequency and hue gap between the stripes.
So each class has two near and two far siblings in its superclass, and similar classes outside it: the same style with one
lobe more or less, the same number of lobes in another style. A student learns this similarity of the classes from the
teacher's probabilities: the "dark knowledge" of Hinton et al. 2015 (arXiv:1503.02531). Equally dissimilar classes have none.

Position, size, rotation, aspect, colours, stripes, background, distractors, an occluding bar, light and noise are random,
so simple pixel statistics do not separate the classes (pixel 1-nearest-neighbour: 10 %).
"""
import math

import torch

NO_HOLE, NO_CUT = -1.0, 9.0
STYLES = {  # amplitude of the lobes, radius of the hole, cut between the beads, scale factor
    "solid": (0.16, NO_HOLE, NO_CUT, 1.00),
    "star": (0.45, NO_HOLE, NO_CUT, 0.95),
    "ring": (0.16, 0.52, NO_CUT, 1.10),
    "beads": (0.00, 0.38, 0.0, 1.15),
}
SIZE = 32  # pixels
LOBES = range(2, 7)
SIBLINGS = 5

CLASSES = [f"{style}{lobes}_{letter}" for style in STYLES for lobes in LOBES for letter in "abcde"]

GOLDEN_RATIO = 0.61803  # its multiples, modulo 1, spread the superclass hues evenly
CHUNK = 250  # images per batch, which fits the CPU cache; another size would change the images


def generate(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images uint8 (count, 32, 32, 3) and balanced class indices int64 (count,).

    The result is bit-identical for any number of threads; on another processor or torch version a few values may differ by one.
    """
    generator = torch.Generator().manual_seed(seed)
    labels = (torch.arange(count) % len(CLASSES))[torch.randperm(count, generator=generator)]
    images = torch.empty(count, SIZE, SIZE, 3, dtype=torch.uint8)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # on a busy machine two threads took 25 times as long, waiting for each other
    try:
        for chunk, chunk_labels in zip(images.split(CHUNK), labels.split(CHUNK)):
            chunk.copy_(render(chunk_labels, generator))
    finally:
        torch.set_num_threads(threads)
    return images, labels


class Draws:
    """Independent random numbers per image, (count, 1, 1) unless a shape per image is given."""

    def __init__(self, count: int, generator: torch.Generator):
        self.count, self.generator = count, generator

    def uniform(self, low, high) -> torch.Tensor:
        return low + (high - low) * torch.rand(self.count, 1, 1, generator=self.generator)

    def normal(self, deviation: float, *shape: int) -> torch.Tensor:
        return deviation * torch.randn(self.count, *(shape or (1, 1)), generator=self.generator)

    def chance(self, probability: float) -> torch.Tensor:
        return self.uniform(0, 1) < probability

    def colour(self, saturation, value) -> torch.Tensor:
        """RGB (count, 3, 1, 1) with a random hue; saturation and value are drawn from the given ranges."""
        return hsv_to_rgb(self.uniform(0, 1), self.uniform(*saturation), self.uniform(*value))


def render(labels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Images uint8 (N, 32, 32, 3) of the classes `labels` (N,), composed from back to front, then lit."""
    draws = Draws(len(labels), generator)
    labels = labels.view(-1, 1, 1)
    superclass, sibling = labels // SIBLINGS, labels % SIBLINGS
    style, lobes = superclass // len(LOBES), superclass % len(LOBES) + LOBES.start
    amplitude, hole, cut, size_factor = torch.tensor(list(STYLES.values()))[style].unbind(-1)
    pixels = torch.linspace(-1, 1, SIZE)
    across, down = pixels.view(1, 1, SIZE), pixels.view(1, SIZE, 1)

    x, y = object_frame(draws, across, down, size_factor)
    amplitude = amplitude + draws.normal(0.01)
    inside = lobed_shape(x, y, lobes, amplitude, hole, cut, softness=0.06)
    stripes = stripe_texture(draws, x, y, superclass, sibling)

    images = background(draws, across, down)
    for _ in range(2):
        images = blend(images, *distractor(draws, across, down))
    images = blend(images, inside * draws.uniform(0.75, 1.0), stripes)
    images = blend(images, *occluding_bar(draws, across, down))
    images = light_and_noise(draws, images, across)
    return (images.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1)


def object_frame(draws, across, down, size_factor):
    """Pixel coordinates x and y, each (N, 32, 32), in the frame of the object, whose contour is near radius 1."""
    scale = size_factor * torch.exp(draws.uniform(math.log(0.65), math.log(0.85)))
    room = (0.95 - scale).clamp(min=0.05)
    centre_x, centre_y = draws.uniform(-1, 1) * room / 2, draws.uniform(-1, 1) * room / 2
    angle = draws.normal(0.3) + math.pi * draws.uniform(0, 1).round()
    aspect = torch.exp(draws.normal(0.05))
    cosine, sine = torch.cos(angle), torch.sin(angle)
    x = (cosine * (across - centre_x) + sine * (down - centre_y)) / (scale * aspect)
    y = (cosine * (down - centre_y) - sine * (across - centre_x)) / (scale / aspect)
    return x, y


def lobed_shape(x, y, lobes, amplitude, hole, cut, softness):
    """Soft mask (N, 32, 32) in [0, 1] from one implicit function for all four styles.

    The contour is at radius 1 + amplitude * cos(lobes * angle).  hole: radius of the cut-out disc.  cut: a small value keeps
    only the sectors around the lobes, the beads.
    """
    radius, lobe = torch.hypot(x, y), torch.cos(lobes * torch.atan2(y, x))
    depth = torch.minimum(torch.minimum(1 + amplitude * lobe - radius, radius - hole), cut + 0.45 * lobe)
    return torch.sigmoid(depth / softness)


def stripe_texture(draws, x, y, superclass, sibling):
    """RGB stripes (N, 3, 32, 32): frequency and hue gap depend on the class, the mean hue on the superclass."""
    corner = 2 * math.pi * (sibling + 0.37 * superclass) / SIBLINGS  # each superclass has a rotated pentagon
    frequency = 1.9 * torch.exp(0.36 * torch.cos(corner) + draws.normal(0.06))  # cycles across the object
    hue_gap = 0.27 + 0.16 * torch.sin(corner) + draws.normal(0.025)
    phase, direction = draws.uniform(0, 2 * math.pi), draws.normal(0.25)
    along = torch.cos(direction) * x + torch.sin(direction) * y
    share = torch.sigmoid(4 * torch.sin(math.pi * frequency * along + phase))[:, None]
    hue = superclass * GOLDEN_RATIO + draws.normal(0.04)
    hue = hue + draws.uniform(0, 1) * draws.chance(0.1)  # random for a tenth of the objects: no sure sign of the superclass
    hues = ((hue + side * hue_gap / 2) % 1 for side in (-1, 1))
    first, second = (hsv_to_rgb(hue, draws.uniform(0.45, 1.0), draws.uniform(0.5, 1.0)) for hue in hues)
    return share * first + (1 - share) * second


def background(draws, across, down):
    """RGB (N, 3, 32, 32): three random waves between two random colours."""
    waves = sum(torch.sin(draws.uniform(-6, 6) * across + draws.uniform(-6, 6) * down + draws.uniform(0, 6.3)) for _ in range(3))
    share = (waves / 3 + 0.5)[:, None]
    first, second = (draws.colour(saturation=(0, 0.7), value=(0.1, 1.0)) for _ in range(2))
    return share * first + (1 - share) * second


def distractor(draws, across, down):
    """Mask (N, 32, 32) and colour (N, 3, 1, 1) of a small lobed blob, in some of the images."""
    scale = draws.uniform(0.10, 0.28)
    x, y = (across - draws.uniform(-1, 1)) / scale, (down - draws.uniform(-1, 1)) / scale
    lobes, amplitude = draws.uniform(2, 7).floor(), draws.uniform(0, 0.4)
    blob = lobed_shape(x, y, lobes, amplitude, torch.tensor(NO_HOLE), torch.tensor(NO_CUT), softness=0.15)
    return blob * draws.chance(0.35), draws.colour(saturation=(0.2, 1), value=(0.2, 1))


def occluding_bar(draws, across, down):
    """Mask (N, 32, 32) and colour (N, 3, 1, 1) of a straight bar, in some of the images."""
    angle, offset = draws.uniform(0, 6.3), draws.uniform(0.15, 0.9)
    distance = (torch.cos(angle) * across + torch.sin(angle) * down - offset).abs()
    bar = distance < draws.uniform(0.05, 0.16)
    return bar * draws.chance(0.25), draws.colour(saturation=(0, 1), value=(0, 1))


def light_and_noise(draws, images, across):
    """`images` with random brightness, contrast, exposure, a lateral light gradient and sensor noise."""
    gradient = draws.uniform(0.75, 1.2) * (1 + draws.normal(0.075) * across)
    contrast, exposure = draws.uniform(0.6, 1.1), draws.normal(0.03)
    images = (images - 0.5) * contrast[:, None] + 0.5 + exposure[:, None]
    noise = draws.normal(1.0, *images.shape[1:]) * draws.uniform(0.01, 0.04)[:, None]
    return images * gradient[:, None] + noise


def blend(images, mask, colour):
    """`images` (N, 3, 32, 32) where `mask` (N, 32, 32) is 0, `colour` where it is 1."""
    return images + mask[:, None] * (colour - images)


def hsv_to_rgb(hue, saturation, value):
    """RGB (N, 3, 1, 1) of three tensors (N, 1, 1) in [0, 1]."""
    sector = (torch.tensor([5.0, 3.0, 1.0]).view(3, 1, 1) + 6 * hue[:, None]) % 6
    return value[:, None] - (value * saturation)[:, None] * torch.minimum(sector, 4 - sector).clamp(0, 1)
