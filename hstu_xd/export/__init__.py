"""A trained encoder for places without this package: one folder that torch alone can read."""
