from importlib import import_module


def get_model(model_name):
    folder = "HLLM" if model_name == "HLLM" else "IDNet"
    return getattr(import_module(f"REC.model.{folder}.{model_name.lower()}"), model_name)
