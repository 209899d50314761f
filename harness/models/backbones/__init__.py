"""timm networks as a stem and a list of stages, and where their pre-trained weights come from."""
