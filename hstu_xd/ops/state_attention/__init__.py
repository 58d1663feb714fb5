"""DDSR as an operator: attention over the latest states of every domain."""
