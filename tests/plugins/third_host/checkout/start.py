"""Its entry."""
