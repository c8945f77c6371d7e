"""nbbn against the frameworks that models are trained in, live."""
