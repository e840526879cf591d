"""Memory, time and collectives of a training on devices that are not here."""
