"""What is put into a GPU's streams: kernels, from Python to a launch."""
