"""Training: text to token rows, the objective, the pipelines, and the plain forward pass."""
