"""A Kubernetes node's network in one Python process."""

__version__ = "0.1.0"
