"""The method inside training loops that somebody else runs: fxstn.tune, and what it hears of the loop.

tune is the function, attached the tuner that it returns, adapter what a framework's callback does with it. A tuner hears of
steps (step_hooks, gradients), of passes over the loader (observed) and of their batches (seen_batches, read_ahead). It reads
these (forwards, draws), or a whole training step (called). decay takes over the weight decay of an optimizer, refit and rates
the loop for a refit.
"""

from fxstn.loops.tune import LoopTuner, TuneSettings, tune

__all__ = ["LoopTuner", "TuneSettings", "tune"]
