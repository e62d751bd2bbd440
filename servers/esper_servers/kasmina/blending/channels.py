"""Which dimension of a feature map holds its channels."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

_FIRST = (_ConvNd, _NormBase, nn.GroupNorm)
_LAST = (nn.Linear, nn.LayerNorm, nn.RMSNorm, nn.Embedding, nn.MultiheadAttention, nn.RNNBase)
_IMAGE_DIMS = 4


def channel_dim(host: nn.Module, dims: int) -> int:
    """Return 1 for what a convolution gives, -1 for features at the end; `dims` counts the batch.

    A block around a convolution may compute on permuted features inside, so what gives an image is taken to have its
    channels first. Of sequences the last layer decides: an embedding of patches convolves, and then puts them in a row.
    """
    layers = [module for module in host.modules() if isinstance(module, (*_FIRST, *_LAST))]
    if not layers:
        return 1 if dims >= _IMAGE_DIMS else -1
    deciding = layers if dims >= _IMAGE_DIMS else layers[-1:]
    return 1 if any(isinstance(module, _FIRST) for module in deciding) else -1


def channel_count(feature_shape: tuple[int, ...], dim: int) -> int:
    """Return how many channels a map without its batch has, 0 when it is not known."""
    return (feature_shape[0] if dim == 1 else feature_shape[-1]) if feature_shape else 0
