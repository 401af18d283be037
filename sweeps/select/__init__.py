"""Selecting a position without sweeping the model."""
