"""The trainable modules of the methods, one file for each method of the same name; `bottleneck` serves several."""
