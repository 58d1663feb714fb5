import json
from pathlib import Path

from REC.utils import get_model


class Config:
    def __init__(self, config_file_list=None):
        self.final_config_dict = {}
        for name in config_file_list or []:
            for line in Path(name).read_text(encoding="utf-8").splitlines():
                key, colon, value = line.split("#")[0].partition(":")
                if colon:
                    self.final_config_dict[key.strip()] = _parsed(value.strip())
        self.model_class = get_model(self["model"])

    def __getitem__(self, key):
        return self.final_config_dict.get(key)

    def __setitem__(self, key, value):
        self.final_config_dict[key] = value


def _parsed(text):
    try:
        return json.loads(text.lower() if text in ("True", "False") else text)
    except ValueError:
        return text
