"""The first and the last layer of a network for another number of channels."""

import math

from torch import Tensor


def adapt_embedding(weight: Tensor, channels: int) -> Tensor:
    """Return a patch embedding (D, C, p, p) for another number of channels.

    The weights of the channels are added for one channel, and otherwise repeated in turn and scaled
    by their number, as in timm. So an image whose channels are equal is embedded as before, unless
    channels are left out or are not repeated equally often.
    """
    before = weight.shape[1]
    if channels == before:
        return weight
    if channels == 1:
        return weight.sum(dim=1, keepdim=True)
    repeats = math.ceil(channels / before)
    return weight.repeat(1, repeats, 1, 1)[:, :channels] * (before / channels)


def adapt_prediction(outputs: Tensor, before: int, channels: int) -> Tensor:
    """Return the weight or bias of a layer that predicts patches for another number of channels.

    The channels' weights are averaged for one channel, and otherwise repeated in turn.

    Args:
        outputs: (p*p*C, ...), in the layout of `util.patches.patchify`.
        before: C.
    """
    if channels == before:
        return outputs
    by_channel = outputs.unflatten(0, (-1, before))  # (p*p, C, ...)
    if channels == 1:
        return by_channel.mean(dim=1)
    sources = [channel % before for channel in range(channels)]
    return by_channel[:, sources].flatten(0, 1)
