"""Tests: each file checks the laws of one room or of one feature; `cases.py` has a line for each tangent rule."""
