"""How good are samples: what they are compared with, and by which metric."""
