"""The tests of nbbn.

This folder is a package so that the tests and the benchmarks import what they share by one absolute name, and so that
an installed package that is called `tests`, too, cannot take its place.
"""
