"""Decompositions: modules and functions that traces cannot look into, as operations. A new decomposition goes into one of them.

attention: attention of torch and of torchvision's Swin, transformer layers, and `torchvision.ops.stochastic_depth`.
recognition, layer_drop: dropout in classes of other libraries, and loops that skip layers.
recurrent: LSTM, GRU and RNN.
torchvision: random modules of `torchvision.transforms.v2`, and the module `torchvision.ops.StochasticDepth`.
registry: the table and its decorator.
"""

from fxstn.frontends.decompositions import attention, recurrent
from fxstn.frontends.decompositions.registry import DECOMPOSITIONS, decomposes

__all__ = ["DECOMPOSITIONS", "attention", "decomposes", "recurrent"]
