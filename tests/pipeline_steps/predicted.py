"""The next-frame objective with a stand-in for the autoencoder. Its tests use the fixture `pooled`."""

import torch
from torch.nn import functional as F

from tests.model.tiny import as_batch, make_batch, make_model
from tests.objectives import step, training_model

CHANNELS, SIDE = 4, 7  # of the stand-in's latents of frames of 56 px


class Pooled:
    """Stands in for the autoencoder: the mean colours of 8 x 8 px and their brightness."""

    channels = CHANNELS

    def __init__(self, folder, key):
        self.folder = folder

    def __call__(self, pixel_values):
        colours = F.avg_pool2d(pixel_values, 8)
        return torch.cat([colours, colours.mean(1, keepdim=True)], dim=1)


def options(**changes):
    return {"next_frame": {"weight": 1.0} | changes}


def made_with(model=None, **changes):
    torch.manual_seed(5)
    return training_model(model or make_model(), **options(**changes))


def objective(training):
    return next(own for own in training.objectives if own.name == "next_frame")


def losses(training, batch=None, **arguments):
    return step(training, batch or as_batch(make_batch()), **arguments)[0]


def modes(**weights):
    return {"modes": {"joint": 0.0, "video_only": 0.0, "text_conditioned": 0.0, "captions": 0.0} | weights}
