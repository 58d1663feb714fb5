"""The parts of the model, each a module with its own switch."""
