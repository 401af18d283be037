"""The record of studies in MLflow."""
