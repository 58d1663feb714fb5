from importlib import import_module


def get_model(model_name):
    return getattr(import_module(f"REC.model.IDNet.{model_name.lower()}"), model_name)
