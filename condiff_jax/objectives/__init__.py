"""What can be trained, and what a configuration of it must satisfy."""
