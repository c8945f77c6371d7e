"""nbbn against TensorFlow, live."""
