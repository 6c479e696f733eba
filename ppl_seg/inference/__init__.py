"""Inference: objectives, expectation maximisation, the trainer, checkpoints and the model directory."""
