"""Hyperparameters: the specs that ask for them, and the space that holds λ. A new spec is a class in one of these files.

>>> from fxstn import hp
>>> hparams = [hp.Dropout("input", "layer*"), hp.WeightDecay("*", shared=True), hp.ColorJitter(init={"hue": 0.1})]
"""

from fxstn.hp.augment import (
    ColorJitter,
    Cutout,
    Erasing,
    GaussianBlur,
    GaussianNoise,
    Grayscale,
)
from fxstn.hp.bijection import Bijection
from fxstn.hp.geometry import Affine, Flip, Rotation, VerticalFlip
from fxstn.hp.hyperparameter import Hyperparameter
from fxstn.hp.mix import CutMix, Mixing, MixUp
from fxstn.hp.moving import Moving
from fxstn.hp.operation import OPERATIONS, Operation
from fxstn.hp.regularize import (
    ActivationDecay,
    Activity,
    DropBlock,
    DropConnect,
    EmbeddingDropout,
    JacobianNorm,
    LayerDrop,
    LockedDropout,
    StochasticDepth,
    TemporalDecay,
)
from fxstn.hp.space import HyperparameterSpace
from fxstn.hp.specs import Dropout, LabelSmoothing, Scalar, Spec, WeightDecay
from fxstn.hp.terms import Auxiliary, LossTerms

__all__ = [
    "OPERATIONS",
    "ActivationDecay",
    "Activity",
    "Affine",
    "Auxiliary",
    "Bijection",
    "ColorJitter",
    "CutMix",
    "Cutout",
    "DropBlock",
    "DropConnect",
    "Dropout",
    "EmbeddingDropout",
    "Erasing",
    "Flip",
    "GaussianBlur",
    "GaussianNoise",
    "Grayscale",
    "Hyperparameter",
    "HyperparameterSpace",
    "JacobianNorm",
    "LabelSmoothing",
    "LayerDrop",
    "LockedDropout",
    "LossTerms",
    "MixUp",
    "Mixing",
    "Moving",
    "Operation",
    "Rotation",
    "Scalar",
    "Spec",
    "StochasticDepth",
    "TemporalDecay",
    "VerticalFlip",
    "WeightDecay",
]
__dir__ = __all__.copy  # what completion lists
