"""Causal attention inside every (user, domain) run; :mod:`.api` is the only public module."""
