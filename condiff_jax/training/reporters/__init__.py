"""What a training reports, by objective."""
