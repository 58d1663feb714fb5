"""Rank the candidates of requests: settings, histories, the model, its training and evaluation."""
