"""Trainable modules of the methods that are more than wiring."""
