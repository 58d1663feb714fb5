from importlib import import_module


def get_model(model_name):
    folder = "HLLM" if "HLLM" in model_name else "IDNet"
    module = model_name.removeprefix("Personalized").lower()
    return getattr(import_module(f"REC.model.{folder}.{module}"), model_name)
