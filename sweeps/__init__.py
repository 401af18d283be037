"""Studies of editing positions: plan, run on Ray Tune, track in MLflow, choose."""
