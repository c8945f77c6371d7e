"""nbbn.compat.v1 against TensorFlow 1's layers in a graph, live."""
