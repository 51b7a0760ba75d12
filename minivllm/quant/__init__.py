"""How a linear layer's weights are stored and applied; one file a method."""
