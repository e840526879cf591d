"""No class at all: what a model reaches unconditionally, our control of the benchmark."""
