"""Memory, time and collectives of training on devices that are not attached."""
