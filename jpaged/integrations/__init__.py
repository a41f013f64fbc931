"""Adapters to other projects, each in a module that imports that project. jpaged itself needs none of them."""
