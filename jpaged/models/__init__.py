"""Flax Linen models that train and serve with one module and one parameter tree.

This file imports nothing, so that `jpaged.models.config` can be read without JAX.
"""
