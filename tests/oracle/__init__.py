"""What decides whether a result of nbbn is right. The tests and the benchmarks share it.

* reference: batch normalization in float64, written from the formulas. Nothing in it comes from nbbn.
* agreement: how far a result may be from the reference.
* strategies: random layers and inputs, for Hypothesis.
* conversions: what reading and writing a 16-bit float must give, for every value.
* contract: small problems, and the checks that the kernels of every machine must pass.
* face, targets, targets_cuda: the machines that run the kernels, as contract sees them.
"""
