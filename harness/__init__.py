"""Adapt one frozen, pre-trained backbone to one segmentation dataset with one method under one fixed budget."""

__version__ = "0.1.0"
