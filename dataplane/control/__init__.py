"""What the node should be, where that is written, and how it is asked."""
