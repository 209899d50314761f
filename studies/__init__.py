"""Studies: many cells run under one budget, as a grid to compare or as a search to choose hyperparameters."""
