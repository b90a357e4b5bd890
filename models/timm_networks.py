"""timm's networks, as `timm/NAME` or `timm/NAME.TAG`: construction, published inputs, weights.  timm is an optional package.

timm is imported for such a name only.
"""
import difflib
import importlib.util
import logging

import torch

from rundir.errors import DATA, USAGE, Failure, first_line, optional

PREFIX = "timm/"


def is_timm(name: str) -> bool:
    return name.startswith(PREFIX)


def package(name: str):
    """The package timm.  Failure USAGE: it is not installed.  name: the network for which it is needed."""
    return optional("timm", f"builds this network ({name})")


def names() -> list[str]:
    """All names without a tag, with prefix; none where timm is not installed."""
    return [PREFIX + name for name in package(PREFIX).list_models()] if importlib.util.find_spec("timm") else []


def config(name: str):
    """timm's PretrainedCfg: input_size (C, H, W), mean, std, where its weights are.  Failure USAGE: no timm, or unknown name."""
    timm, short = package(name), name.removeprefix(PREFIX)
    known = {*timm.list_models(), *timm.list_pretrained()}
    if short not in known:
        close = [PREFIX + each for each in difflib.get_close_matches(short, sorted(known))]
        raise unknown(name, close, "import timm; print(*timm.list_models())")
    return timm.get_pretrained_cfg(short)


def unknown(name: str, close: list[str], command: str) -> Failure:
    """The error for a network that does not exist.  close: similar names.  command: Python that prints all."""
    question = f"did you mean {' or '.join(close)}? " if close else ""
    return Failure(USAGE, f"unknown model ({name})", f'{question}all names: python -c "{command}"')


def inputs(name: str) -> dict:
    """Image size, mean and standard deviation for which timm's weights of the network were published."""
    published = config(name)
    return {"image_size": published.input_size[-1], "mean": list(published.mean), "std": list(published.std)}


def create(name: str, num_classes: int, image_size: int, pretrained: bool = False):
    """The network for images of this size, to which timm also fits its weights; its head is random unless it fits them."""
    return package(name).create_model(name.removeprefix(PREFIX), pretrained=pretrained, num_classes=num_classes,
                                      pretrained_cfg_overlay={"input_size": (3, image_size, image_size)})


def weights(net, name: str):
    """The state_dict of a network like `net`, from `create`, with timm's weights, downloaded if they are not in the cache.

    Failure DATA: neither in the cache nor downloadable.
    """
    source = config(name)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # a retried download is no error
    try:
        with torch.random.fork_rng(devices=()):  # of the head
            return create(name, net.num_classes, net.pretrained_cfg["input_size"][-1], pretrained=True).state_dict()
    except Exception as failure:  # huggingface_hub and its clients raise many types
        from huggingface_hub.constants import HF_HUB_CACHE
        copy = (f"folder models--{source.hf_hub_id.replace('/', '--')} of another machine's cache to {HF_HUB_CACHE}"
                if source.hf_hub_id else f"file to {torch.hub.get_dir()}/checkpoints")
        raise Failure(DATA, f"cannot load timm's weights of {name} ({source.hf_hub_id or source.url}: {first_line(failure)})",
                      f"copy the {copy}, or start from --init PATH, or --no-pretrained") from failure
