"""Published weights: where they are, what their tensors are called, how they are read."""
