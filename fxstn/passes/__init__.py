"""Passes: functions (GraphModule, Plan) → GraphModule, in the order of `transform.PIPELINES`. A new pass gets a file here.

Passes: canonicalize, condition, hyperize, statistics (two), pushforward (and its variant perturbed), linearized,
    output_types (restore_types), simplify, recompute.
Analyses that passes use: match, places, probe, effects, row_structure, example_axes. in_place is a part of canonicalize.
Building the network: request checks the arguments of `transform`, build makes the network, recipe makes its graphs.
Tests only: invariants, the facts that hold after each pass.
"""
