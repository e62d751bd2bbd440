"""Names that mean the same in every installation. Append only: the weights of a policy depend on the places."""

from __future__ import annotations

from esper_rpc.blending import BLENDING_METHODS
from esper_rpc.proto.leyline.v1 import HazardBand

SCHEDULES = BLENDING_METHODS
OPTIMIZER_FAMILIES: tuple[str, ...] = ("sgd", "adam", "adamw", "rmsprop", "adagrad")
HAZARD_CLASSES: tuple[str, ...] = tuple(
    name.removeprefix("HAZARD_BAND_") for name, number in sorted(HazardBand.items(), key=lambda item: item[1]) if number
)
"""By number of the HazardBand: what a band has there it has here, and 0 is unknown in both."""

LAYER_TYPES: tuple[str, ...] = (
    "Linear", "Bilinear", "NonDynamicallyQuantizableLinear", "Embedding", "EmbeddingBag",
    "Conv1d", "Conv2d", "Conv3d", "ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d",
    "BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "SyncBatchNorm", "LayerNorm", "RMSNorm", "GroupNorm",
    "InstanceNorm1d", "InstanceNorm2d", "InstanceNorm3d", "LocalResponseNorm",
    "RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell",
    "MultiheadAttention", "TransformerEncoderLayer", "TransformerDecoderLayer", "TransformerEncoder",
    "TransformerDecoder", "Transformer",
    "MaxPool1d", "MaxPool2d", "MaxPool3d", "AvgPool1d", "AvgPool2d", "AvgPool3d",
    "AdaptiveAvgPool1d", "AdaptiveAvgPool2d", "AdaptiveAvgPool3d",
    "AdaptiveMaxPool1d", "AdaptiveMaxPool2d", "AdaptiveMaxPool3d",
    "Dropout", "Dropout1d", "Dropout2d", "Dropout3d", "AlphaDropout", "FeatureAlphaDropout",
    "Flatten", "Unflatten", "Fold", "Unfold", "Identity", "Upsample", "PixelShuffle", "PixelUnshuffle",
    "ChannelShuffle", "PReLU", "Sequential", "ModuleList", "ModuleDict", "ParameterList",
)  # fmt: skip
"""Classes of torch.nn."""

ACTIVATION_TYPES: tuple[str, ...] = (
    "ReLU", "GELU", "SiLU", "Tanh", "Sigmoid", "LeakyReLU", "ELU", "Softmax", "ReLU6", "SELU", "CELU", "GLU", "Mish",
    "PReLU", "RReLU", "Hardtanh", "Hardswish", "Hardsigmoid", "Softplus", "Softsign", "Softmin", "Softmax2d",
    "LogSoftmax", "LogSigmoid", "Tanhshrink", "Softshrink", "Hardshrink", "Threshold", "MultiheadAttention",
)  # fmt: skip
"""Classes of torch.nn."""
