"""Hyperparameters: specs to ask for them, and the space that holds them.

>>> from fxstn import hp
>>> hparams = [hp.Dropout("input", "layer*"), hp.WeightDecay("*", shared=True)]
"""

from fxstn.hp.bijection import Bijection, Quantity
from fxstn.hp.space import HyperparameterSpace
from fxstn.hp.specs import Dropout, Scalar, Spec, WeightDecay, start_inside

__all__ = ["Bijection", "Dropout", "HyperparameterSpace", "Quantity", "Scalar", "Spec", "WeightDecay", "start_inside"]
