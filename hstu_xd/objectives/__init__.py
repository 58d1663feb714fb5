"""What a trainer minimises, and what ranks items for a user."""
