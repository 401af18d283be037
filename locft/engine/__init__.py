"""The tail engine: the fast forward pass from the trained layer upwards."""
