"""The events that a service has accepted, which states of users are rebuilt from."""
